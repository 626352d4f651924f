"""What a run says and writes about its bad files, and how evaluation treats them."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_pictures import Damaged
from colours import Colours, labelled, measured, one_hot_of_label, options_with
from PIL import Image
from streams import make_config, views_of
from whole_runs import release_locks

from byol_jax.app.bad_files import BadFilesLog
from byol_jax.app.build import Run
from byol_jax.app.data import build_data
from byol_jax.app.hosts import check_same_everywhere, gather_texts
from byol_jax.app.modes import MODES, Request
from byol_jax.app.report.pictures import draw_views
from byol_jax.app.workdir import check_workdir, claim_workdir
from byol_jax.errors import BadPicture, UserError
from byol_jax.evaluation.features import encode_source
from byol_jax.evaluation.table import describe
from byol_jax.interop.encoder import make_encoder
from byol_jax.interop.export import save_encoder
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder
from byol_jax.settings import Settings
from byol_jax.sources.bad_files import SHOWN, BadFile
from byol_jax.sources.base import Subset
from byol_jax.sources.data import Data

EMPTY = 'is empty'


class Elsewhere(Damaged):
    """A test set with its own files."""

    def name(self, index):
        return f'test{index}.jpg'


def make_log(workdir: Path, source=None, fraction: float = 1.0, **data) -> BadFilesLog:
    source = Damaged(10, set()) if source is None else source
    config = make_config(max_bad_fraction=fraction)
    return BadFilesLog(Data(source, Subset(source, np.arange(0)), **data), config, workdir)


def lines(workdir: Path) -> list[str]:
    return (workdir / 'bad_files.txt').read_text(errors='surrogateescape').splitlines()


# The log and bad_files.txt.


def test_nothing_bad_leaves_no_file(tmp_path, capsys):
    """A run without bad files writes and says nothing of them."""
    log = make_log(tmp_path)
    log.open()
    log.note()
    log.note_all()
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ''


def test_files_are_appended_as_found_and_sorted_at_the_end(tmp_path):
    """Each file is listed, with its reason, as soon as it is found, and only once."""
    log = make_log(tmp_path)
    log.open()
    log.bad_files.add([BadFile('z.jpg', EMPTY)])
    log.note()
    log.bad_files.add([BadFile('z.jpg', 'is gone'), BadFile('b.jpg', EMPTY)])
    log.note()
    assert lines(tmp_path) == ['z.jpg\tis empty', 'b.jpg\tis empty']
    log.bad_files.add([BadFile('a.jpg', EMPTY)])
    log.close()
    assert lines(tmp_path) == ['a.jpg\tis empty', 'b.jpg\tis empty', 'z.jpg\tis empty']
    log.close()
    assert len(lines(tmp_path)) == 3


def test_the_first_few_are_named_and_the_others_counted(tmp_path, capsys):
    """Of a thousand bad files, a few are named and the rest counted; all are in the file."""
    log = make_log(tmp_path)
    log.open()
    for i in range(1000):
        log.bad_files.add([BadFile(f'{i}.jpg', EMPTY)])
        log.note()
        if i == 499:
            log.note_all()
    log.note_all()
    log.note_all()
    said = capsys.readouterr().out.splitlines()
    assert said[:SHOWN] == [f'bad file: {i}.jpg is empty' for i in range(SHOWN)]
    assert said[SHOWN:] == [
        f'495 more bad file(s), 500 in all: {tmp_path}/bad_files.txt',
        f'500 more bad file(s), 1,000 in all: {tmp_path}/bad_files.txt',
    ]
    assert len(lines(tmp_path)) == 1000


def test_a_later_start_reads_the_listed_files_again(tmp_path, capsys):
    """Mended files leave the list; files that are still bad stay and count; none is there twice."""
    source = Damaged(10, {1, 4, 7})
    log = make_log(tmp_path, source)
    log.open()
    log.bad_files.add(BadFile(source.name(i), 'was broken') for i in (7, 4, 1))
    log.note()  # Killed here: the file is not sorted, and the last line may be cut off.
    with (tmp_path / 'bad_files.txt').open('a') as file:
        file.write('photograph9.jpg\tis em')
    source.bad = {4, 7}
    log = make_log(tmp_path, source)
    log.open()
    assert [line.split('\t')[0] for line in lines(tmp_path)] == [
        'photograph4.jpg',
        'photograph7.jpg',
    ]
    assert '2 of 3 files in' in capsys.readouterr().out.splitlines()[-1]
    log.bad_files.add(BadFile(source.name(i), 'was broken') for i in (4, 2))
    log.note()
    assert len(lines(tmp_path)) == 3
    log.close()
    assert [line.split('\t')[0] for line in lines(tmp_path)] == [
        'photograph2.jpg',
        'photograph4.jpg',
        'photograph7.jpg',
    ]
    source.bad = set()
    make_log(tmp_path, source).open()
    assert not (tmp_path / 'bad_files.txt').exists()


def test_limit_counts_earlier_starts(tmp_path):
    """Files that an earlier start found, and that are still bad, count towards the limit."""
    source = Damaged(10, {1, 4, 7})
    log = make_log(tmp_path, source)
    log.bad_files.add(BadFile(source.name(i), EMPTY) for i in (1, 4, 7))
    log.close()
    log = make_log(tmp_path, source, fraction=0.2)
    log.open()
    assert log.bad_files.too_many()


def test_any_name_is_one_line(tmp_path, capsys):
    """A name with line breaks or that is not UTF-8 takes one line; its bytes are kept."""
    log = make_log(tmp_path)
    log.bad_files.add([BadFile('a\nb\t.jpg', EMPTY), BadFile(os.fsdecode(b'\xe9.jpg'), EMPTY)])
    log.close()
    assert lines(tmp_path)[0] == 'a\\x0ab\\x09.jpg\tis empty'
    assert (tmp_path / 'bad_files.txt').read_bytes().endswith(b'\n\xe9.jpg\tis empty\n')
    assert len(capsys.readouterr().out.splitlines()) == 2
    make_log(tmp_path).open()


def test_what_tiles_leave_out_counts_from_the_start(tmp_path, capsys):
    """Pictures that tiles leave out as bad are listed at once, and may exceed the limit at once."""
    bad = [BadFile(f'{i}.jpg', EMPTY) for i in range(3)]
    log = make_log(tmp_path, bad=bad)
    log.open()
    assert [line.split('\t')[0] for line in lines(tmp_path)] == ['0.jpg', '1.jpg', '2.jpg']
    with pytest.raises(UserError, match='3 of 13 training pictures'):
        make_log(tmp_path, fraction=0.1, bad=bad)


def test_a_later_start_finds_listed_files_wherever_they_are(tmp_path, capsys):
    """Bad files in the held-out part or the test set, and those that tiles leave out, stay listed
    and are said to be still bad; only training pictures count towards the limit.
    """
    whole = Damaged(8, {1, 5})
    train, held_out = Subset(whole, np.arange(4)), Subset(whole, np.arange(4, 8))
    tested = Data(Elsewhere(6, {0}), Subset(whole, np.arange(0)), bad=[BadFile('t.jpg', EMPTY)])
    data = Data(train, held_out, bad=[BadFile('left.jpg', EMPTY)], test=tested)
    bad = ['left.jpg', 'photograph1.jpg', 'photograph5.jpg', 't.jpg', 'test0.jpg']
    mended = ['gone.jpg', 'photograph2.jpg', 'photograph6.jpg', 'test1.jpg']
    listed = ''.join(f'{name}\twas broken\n' for name in bad + mended)
    (tmp_path / 'bad_files.txt').write_text(listed)
    log = BadFilesLog(data, make_config(max_bad_fraction=0.5), tmp_path)
    log.open()
    assert [line.split('\t')[0] for line in lines(tmp_path)] == bad
    assert '5 of 9 files in' in capsys.readouterr().out.splitlines()[-1]
    assert {entry.file for entry in log.bad_files.since(0)} == {'left.jpg', 'photograph1.jpg'}
    # The evaluation at the end finds them again.
    log.bad_files.add([BadFile('photograph5.jpg', EMPTY), BadFile('test3.jpg', EMPTY)])
    log.close()
    assert [line.split('\t')[0] for line in lines(tmp_path)] == [*bad, 'test3.jpg']


def test_the_limit_may_change_when_a_run_goes_on(tmp_path):
    """A run that stopped at the limit continues with a higher one, which changes no weight."""
    claim_workdir(tmp_path / 'w', make_config(max_bad_fraction=0.0), {'examples': 1})
    release_locks()
    check_workdir(tmp_path / 'w', make_config(max_bad_fraction=0.5))
    with pytest.raises(UserError, match=r'data\.max_megapixels'):
        check_workdir(tmp_path / 'w', make_config(max_megapixels=1.0))


def test_one_process_has_its_own_text():
    """A run of one process gathers its own text and agrees with itself."""
    assert gather_texts('abc') == ['abc']
    check_same_everywhere('abc', 'The text')


def test_processes_that_see_other_data_are_told(monkeypatch):
    """A host that leaves out other pictures would train on another stream: this is an error."""
    monkeypatch.setattr('byol_jax.app.hosts.gather_texts', lambda text: ['9', '9', '8'])
    with pytest.raises(UserError, match=r'The data .* 9 for process 0, but 8 for process 2 \(of 3'):
        check_same_everywhere('9', 'The data')


# Pictures for people.


def test_views_are_drawn_around_bad_pictures(tmp_path):
    """views.png shows what training sees: a replacement's original and its views."""
    config = make_config()
    for bad in (set(), {0, 3, 5}):
        source = Damaged(8, bad)
        run = Run(config, Data(source, source), None, None, None, views_of(config))
        (tmp_path / str(len(bad))).mkdir()
        found = draw_views(run, tmp_path / str(len(bad)))
        assert {b.file for b in found} == {source.name(i) for i in bad}
    clean, damaged = (Image.open(tmp_path / name / 'views.png') for name in ('0', '3'))
    assert clean.size == damaged.size
    assert clean.tobytes() != damaged.tobytes()


# Evaluation.


class SomeBad(Colours):
    """Coloured squares of which some cannot be read."""

    def __init__(self, whole: Colours, bad: set[int]):
        super().__init__(whole.colours, whole.labels)
        self.bad = bad

    def load(self, index, key):
        if index in self.bad:
            raise BadPicture(self.name(index), EMPTY)
        return super().load(index, key)


@pytest.mark.parametrize('bad', [{0}, {3, 4, 5, 6, 7, 8}, {12}, set(range(12))])
def test_features_say_whose_they_are(bad):
    """Every row of the features belongs to the example of its index, whichever are missing."""
    colours = np.arange(39).reshape(13, 3)
    source = SomeBad(Colours(colours), bad)
    features, indices, found = encode_source(
        lambda images: images.mean(axis=(1, 2)),
        source,
        'image',
        image_size=8,
        crop_fraction=1.0,
        batch_size=4,
    )
    assert indices.tolist() == [i for i in range(13) if i not in bad]
    np.testing.assert_array_equal(features, colours[indices])
    assert {b.file for b in found} == {source.name(i) for i in bad}


def test_features_of_nothing():
    """If no picture can be read, there are no features but an error that names some files."""
    source = SomeBad(Colours(np.zeros((7, 3))), set(range(7)))
    with pytest.raises(UserError, match=r'None of 7 .*colour 0 is empty; .* and 4 more'):
        encode_source(len, source, 'image', image_size=8, crop_fraction=1.0, batch_size=4)


def test_labels_stay_with_their_pictures():
    """A perfect encoder stays perfect with bad pictures among gallery and queries, named once."""
    gallery, queries = SomeBad(labelled(40, 0), {0, 7, 33}), SomeBad(labelled(13, 1), {2, 3})
    options = options_with(knn_k=(3,))
    found = measured(one_hot_of_label, Data(gallery, queries), options)
    assert found.accuracy == 1.0
    assert (len(found.gallery), len(found.queries)) == (37, 11)
    assert [found.queries.name(i) for i in (1, 2)] == ['colour 1', 'colour 4']
    assert {b.file for b in found.bad} == {f'colour {i}' for i in (0, 7, 33, 2, 3)}
    text = describe(found, options)
    assert 'Each of 11 held-out pictures' in text
    assert '5 file(s) could not be read and are left out.' in text


def test_neighbours_without_bad_pictures():
    """Without held-out pictures, bad pictures are neither queries nor neighbours."""
    data = Data(SomeBad(labelled(30, 0), {0, 1, 2}), labelled(0, 1))
    found = measured(one_hot_of_label, data, options_with(knn_k=(3,)))
    shown = [found.queries.name(i) for i in range(len(found.queries))]
    shown += [found.gallery.name(i) for i in range(len(found.gallery))]
    assert sorted(shown) == sorted(f'colour {i}' for i in range(3, 30))
    assert '3 file(s) could not be read' in describe(found, options_with())


# Whole modes, in this process.


@pytest.fixture
def pictures(tmp_path):
    """Two classes of six plain pictures each, of which cat/2 and dog/0 are damaged."""
    for number in range(12):
        path = tmp_path / 'pictures' / ('cat', 'dog')[number // 6] / f'{number % 6}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 20), (20 * number, 0, 0)).save(path)
    (tmp_path / 'pictures' / 'cat' / '2.png').write_bytes(b'')
    (tmp_path / 'pictures' / 'dog' / '0.png').write_text('no picture')
    return tmp_path / 'pictures'


def request(tmp_path: Path, pictures: Path, **data) -> Request:
    """A request of a mode with a random encoder on the pictures."""
    kwargs = {'stage_sizes': (1,), 'width': 0.125}
    tapped = TappedEncoder(build_encoder('resnet', kwargs), 'avgpool')
    encoder = make_encoder(
        name='resnet',
        kwargs=kwargs,
        hidden_layer='avgpool',
        variables=tapped.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3))),
        image_size=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        step=0,
    )
    save_encoder(encoder, tmp_path / 'encoder')
    config = make_config(source='folder', path=str(pictures), **data)
    with config.unlocked():
        config.evaluate.batch_size = 4
        config.evaluate.knn_k = (1,)
        config.evaluate.protocols = ('knn',)
    return Request(Settings.of(config), tmp_path / 'w', '', encoder=tmp_path / 'encoder')


def test_embed_leaves_bad_pictures_out(tmp_path, pictures, capsys):
    """Rows, names and labels are those of the readable pictures; the others are named."""
    from byol_jax import load_encoder

    asked = request(tmp_path, pictures)
    MODES['embed'](asked)
    said = capsys.readouterr().out
    assert '2 bad file(s), 2 example(s) left out' in said
    assert f'{pictures}/cat/2.png is empty; {pictures}/dog/0.png is not an image' in said
    encoder = load_encoder(tmp_path / 'encoder')
    with np.load(tmp_path / 'w' / 'embeddings.npz') as arrays:
        names = arrays['names'].tolist()
        assert names == [f'cat/{i}.png' for i in (0, 1, 3, 4, 5)] + [
            f'dog/{i}.png' for i in range(1, 6)
        ]
        assert [name.split('/')[0] for name in names] == arrays['label_names'][
            arrays['labels']
        ].tolist()
        for name, features in zip(names, arrays['features'], strict=True):
            red = np.asarray(Image.open(pictures / name))[:16, :16]
            np.testing.assert_allclose(encoder(red[None])[0], features, rtol=1e-5)


def test_embed_of_tiles(tmp_path, pictures, capsys):
    """Pictures whose size cannot be read, or that are smaller than a tile, have no rows."""
    Image.new('RGB', (30, 9)).save(pictures / 'cat' / 'small.png')
    (pictures / 'dog' / '1.png').write_bytes((pictures / 'dog' / '1.png').read_bytes()[:-30])
    MODES['embed'](request(tmp_path, pictures, tile_size=10))
    said = capsys.readouterr().out
    assert 'left out, 2 picture(s) whose size cannot be read' in said
    assert 'left out, 1 picture(s) smaller than a tile: cat/small.png (30x9)' in said
    assert '1 bad file(s), 4 example(s) left out' in said
    with np.load(tmp_path / 'w' / 'embeddings.npz') as arrays:
        assert len(arrays['names']) == 4 * 9
        pictured = [name.split(' ')[0] for name in arrays['names']]
        assert pictured == arrays['label_names'][arrays['labels']].tolist()


def test_evaluate_names_bad_pictures(tmp_path, pictures, capsys):
    """--mode=evaluate measures the readable pictures and says which are not."""
    asked = request(tmp_path, pictures, held_out_fraction=0.5)
    held_out = build_data(asked.config).held_out
    MODES['evaluate'](asked)
    said = capsys.readouterr().out
    bad = sum(held_out.name(i) in ('cat/2.png', 'dog/0.png') for i in range(6))
    assert f', {6 - bad} held-out pictures, 2 labels' in said
    assert '2 bad file(s) left out: ' in said
    assert f'{pictures}/cat/2.png is empty' in said
