"""From the settings to the training and held-out pictures, and a separate test set."""

from __future__ import annotations

import json

import numpy as np
import pytest
from encoders import evaluation_request, save_random_encoder, write_pictures
from pictures import (
    Coordinates,
    write,
)

from byol_jax.app.data import build_data, settings_of_test_set
from byol_jax.app.modes import MODES
from byol_jax.app.periodic import neighbours_of
from byol_jax.errors import UserError
from byol_jax.evaluation.subject import compared
from byol_jax.evaluation.table import describe
from byol_jax.input.feed import held_array, pictures_in_memory
from byol_jax.settings import Settings
from byol_jax.sources import data as data_module
from byol_jax.sources import tfds
from byol_jax.sources.array import Array
from byol_jax.sources.data import matched
from byol_jax.sources.folder import Folder
from configs import default, div2k

# Config -> data.


def make_config(**data):
    config = default.get_config()
    config.data.update(data)
    return config.lock()


@pytest.fixture
def classes(tmp_path):
    """A folder of three classes with 10, 20 and 30 pictures."""
    for name, count in (('ant', 10), ('cat', 20), ('dog', 30)):
        for i in range(count):
            write(tmp_path / name / f'{i}.png')
    return tmp_path


def test_held_out_pictures_are_stratified(classes):
    """The held-out fraction is taken of every class, and the parts make up the whole."""
    config = make_config(source='folder', path=str(classes), held_out_fraction=0.2)
    train, held_out = build_data(config)[:2]
    assert np.bincount(held_out.labels).tolist() == [2, 4, 6]
    assert np.bincount(train.labels).tolist() == [8, 16, 24]
    names = {part.name(i) for part in (train, held_out) for i in range(len(part))}
    assert len(names) == 60


def test_a_fraction_that_holds_out_nothing_is_said(classes):
    """A fraction is rounded down in each class: where that leaves nothing, a line says so."""
    config = make_config(source='folder', path=str(classes), held_out_fraction=0.03)
    data = build_data(config)
    assert not len(data.held_out)
    assert any('held_out_fraction=0.03 is less than one picture' in s for s in data.left_out())
    config = make_config(source='folder', path=str(classes))
    assert build_data(config).left_out() == []


def lines_of(path, **data):
    return build_data(make_config(source='folder', path=str(path), **data)).lines()


def test_classes_are_counted_as_found(classes):
    """Over both parts, with the number of pictures of each; a few of many classes."""
    expected = ['labels: 3 classes, ant (10), cat (20), dog (30)']
    assert lines_of(classes, held_out_fraction=0.2) == expected
    for number in range(20):
        for copy in range(2):
            write(classes / f'z{number:02}' / f'{copy}.png')
    (line,) = lines_of(classes)
    assert line.startswith('labels: 23 classes, ant (10), cat (20), dog (30), z00 (2), ')
    assert line.endswith('z06 (2), and 13 more')


@pytest.mark.parametrize(
    ('folders', 'hint'),
    [
        ({'train': 8, 'val': 8}, 'the splits of one data set'),
        ({'Training': 3, 'test_set': 3, 'val2017': 3}, 'the splits of one data set'),
        ({'train': 8, 'plane': 8}, ''),
        ({str(i): 1 for i in range(8)}, 'a folder for each picture'),
        ({str(i): 1 + i % 2 for i in range(8)}, 'a folder for each picture'),
        ({str(i): 2 for i in range(8)}, ''),
    ],
    ids=str,
)
def test_what_are_no_classes(tmp_path, folders, hint):
    """Folders of splits, or one a picture, get a hint with the way out, which then is quiet."""
    for name, count in folders.items():
        for i in range(count):
            write(tmp_path / name / f'{i}.png')
    first, *more = lines_of(tmp_path)
    assert first.startswith(f'labels: {len(folders):,} classes, ')
    assert len(more) == bool(hint)
    if hint:
        assert more[0].startswith('hint: ')
        assert hint in more[0]
        assert '--config.data.label_key=' in more[0]
    assert lines_of(tmp_path, label_key='') == ['labels: none (data.label_key is empty)']


@pytest.mark.parametrize('kind', ['folder', 'array', 'tiles'])
def test_labels_can_be_left_out(classes, kind):
    """data.label_key= (nothing): no labels anywhere, and the same pictures are held out."""
    changes = {'source': 'folder', 'path': str(classes), 'held_out_fraction': 0.2}
    if kind == 'tiles':
        changes['tile_size'] = 2
    if kind == 'array':
        file = classes / 'pictures.npz'
        np.savez(file, images=np.zeros((30, 4, 4, 3), np.uint8), labels=np.arange(30) % 3)
        changes |= {'source': 'array', 'path': str(file)}
    labelled, bare = (build_data(make_config(**changes, label_key=key)) for key in ('auto', ''))
    for ours, theirs in ((bare.train, labelled.train), (bare.held_out, labelled.held_out)):
        assert [ours.name(i) for i in range(len(ours))] == [
            theirs.name(i) for i in range(len(theirs))
        ]
        assert ours.labels is None
        assert ours.label_names == ()
        assert theirs.labels is not None
    assert bare.everything.labels is None
    assert (held_array(bare.train) is None) == (kind != 'array')
    if kind == 'array':
        np.testing.assert_array_equal(
            pictures_in_memory(bare.train), pictures_in_memory(labelled.train)
        )


def test_keys_for_other_sources(classes):
    """A feature's name, or patterns of files, for a source that has none: one line."""
    with pytest.raises(UserError, match=r'data\.label_key=label names a feature of a TFDS'):
        lines_of(classes, label_key='label')
    with pytest.raises(UserError, match=r"data\.exclude=.* data\.source='sample' reads none"):
        build_data(make_config(source='sample', exclude=('*.png',)))
    assert lines_of(classes, exclude=('d*',)) == [
        'labels: 2 classes, ant (10), cat (20)',
        "left out, data.exclude='d*': dog",
    ]


def test_held_out_pictures_depend_on_their_own_seed_only(classes):
    """The same pictures are held out whatever the run's seed; held_out_seed changes them."""

    def held_out_names(seed: int, held_out_seed: int) -> list[str]:
        config = default.get_config()
        config.seed = seed
        config.data.update(source='folder', path=str(classes), held_out_fraction=0.2)
        config.data.held_out_seed = held_out_seed
        held_out = build_data(config).held_out
        return [held_out.name(i) for i in range(len(held_out))]

    assert held_out_names(0, 0) == held_out_names(1, 0)
    assert held_out_names(0, 0) != held_out_names(0, 1)


def test_nothing_held_out(classes):
    """A fraction of 0 trains on all pictures and holds out none."""
    train, held_out = build_data(make_config(source='folder', path=str(classes)))[:2]
    assert (len(train), len(held_out)) == (60, 0)


def test_unlabelled_pictures_are_held_out_too(tmp_path):
    """Without labels the fraction is taken of all pictures."""
    for i in range(10):
        write(tmp_path / f'{i}.png')
    config = make_config(source='folder', path=str(tmp_path), held_out_fraction=0.3)
    train, held_out = build_data(config)[:2]
    assert (len(train), len(held_out)) == (7, 3)
    assert held_out.labels is None


def test_unknown_source_suggests_the_nearest():
    """A misspelt data.source is named with the nearest source there is."""
    with pytest.raises(UserError, match=r"data\.source='fodler' .*'folder'"):
        build_data(make_config(source='fodler'))


def test_folder_without_path_says_how_to_give_it():
    """data.source='folder' without a path says which flag is missing."""
    with pytest.raises(UserError, match=r'--config\.data\.path='):
        build_data(make_config(source='folder'))


class Nothing(Coordinates):
    """A source of one's own that finds no pictures and calls its path otherwise."""

    def __init__(self, file='', count=0):
        super().__init__([(4, 4)] * count)


def test_own_source_without_pictures():
    with pytest.raises(UserError, match=r"data\.source='.*:Nothing' \(Nothing\) has no pictures"):
        build_data(make_config(source=f'{__name__}:Nothing'))


def test_own_source_without_an_argument_for_the_path():
    """data.path is the argument `path`, and the message says where that came from."""
    with pytest.raises(UserError, match=r"data\.path as path.*no argument 'path'.*takes: file"):
        build_data(make_config(source=f'{__name__}:Nothing', path='here'))


def test_unknown_pair_key_suggests_the_nearest():
    """A picture that the source does not have is named, with those it has."""
    with pytest.raises(UserError, match=r"no picture 'imgae'\. Did you mean 'image'\?"):
        build_data(make_config(source='sample', pair_keys=('image', 'imgae')))


@pytest.mark.parametrize('pair_keys', [('image',), ('image', 'image', 'image')])
def test_pair_keys_are_two(pair_keys):
    """Other than two pair_keys is an error that says what they are for."""
    with pytest.raises(UserError, match='must be 2 values'):
        build_data(make_config(source='sample', pair_keys=pair_keys))


def test_div2k_from_official_folders(div2k_folder):
    """configs/div2k.py with data.path reads the official folders and not TFDS."""
    config = div2k.get_config('')
    config.data.update(path=str(div2k_folder), tile_size=16, tile_stride=8)
    data = build_data(config)
    assert data.train.load(0, 'hr').shape == (16, 16, 3)
    assert set(data.held_out.labels) == {0, 1, 2}


@pytest.mark.parametrize('arg', ['', 'lr_hr'])
def test_div2k_tiles_are_the_same_from_folders_and_from_tfds(monkeypatch, div2k_folder, arg):
    """Tiles are cut alike from the official folders and from TFDS, for both pairs of keys."""

    class Fake(Coordinates):
        def __init__(self, name, split, data_dir, keys, **_):
            super().__init__([(64, 80)] * 3, keys)

    monkeypatch.setattr(tfds, 'Tfds', Fake)
    shapes = []
    for path in (str(div2k_folder), None):
        config = div2k.get_config(arg)
        config.data.update(path=path, tile_size=16, tile_stride=8)
        train = build_data(config).train
        shapes.append((len(train), train.load(0, config.data.pair_keys[0]).shape))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ('folders', 'by_tfds'),
    [
        (['div2k'], True),
        (['div2k', 'DIV2K_train_HR'], False),
        (['DIV2K_train_HR'], False),
        ([], False),
    ],
)
def test_div2k_that_tfds_prepared_is_given_by_its_folder(monkeypatch, tmp_path, folders, by_tfds):
    """data.path of DIV2K may be a data_dir of TFDS; where the official folders are, those count."""

    class Opened(Exception):
        pass

    def opened(*arguments, **_):
        raise Opened(arguments)

    monkeypatch.setattr(tfds, 'Tfds', opened)
    for name in folders:
        (tmp_path / name).mkdir()
    config = div2k.get_config('')
    config.data.path = str(tmp_path)
    with pytest.raises(Opened if by_tfds else UserError, match=str(tmp_path)):
        build_data(config)


@pytest.mark.parametrize('arg', ['', 'lr_hr'])
def test_div2k_without_network_names_three_ways_out(monkeypatch, arg):
    """Where DIV2K cannot be had, the error names three ways out and no other data is used."""

    def offline(*_, **__):
        raise UserError("TFDS 'div2k/bicubic_x2' could not be downloaded: ConnectionError.")

    def never(*_):
        raise AssertionError('other data was used')

    monkeypatch.setattr(tfds, 'Tfds', offline)
    for other in ('SamplePhotographs', 'Folder', 'Div2k'):
        monkeypatch.setattr(data_module, other, never)
    with pytest.raises(UserError) as caught:
        build_data(div2k.get_config(arg))
    message = str(caught.value)
    assert 'ConnectionError' in message
    assert 'network' in message
    assert '--config.data.path=DIR' in message
    assert 'DIV2K_train_HR' in message
    assert '--config=configs/div2k.py:sample' in message


def test_other_tfds_errors_say_nothing_of_div2k(monkeypatch):
    """The three ways out belong to DIV2K; another data set's error stays as it is."""

    def offline(*_, **__):
        raise UserError("TFDS 'cifar10' could not be downloaded.")

    monkeypatch.setattr(tfds, 'Tfds', offline)
    with pytest.raises(UserError, match=r"^TFDS 'cifar10' could not be downloaded\.$"):
        build_data(make_config(source='tfds', name='cifar10'))


def config_of(train, **changes):
    """A config whose data are the class folders `train`."""
    return evaluation_request(train, train, data__path=str(train), **changes).config


def names(source):
    return [source.name(i) for i in range(len(source))]


@pytest.fixture
def train(tmp_path):
    return write_pictures(tmp_path / 'train', {'bird': 4, 'cat': 6, 'dog': 5}, 0)


def test_all_of_both_sets_is_compared(train, tmp_path):
    """The gallery is all of the data, held-out part included; the queries are all of the test set.

    Labels get the training set's numbers, also where the test set lacks some of its classes.
    """
    test = write_pictures(tmp_path / 'test', {'cat': 2, 'dog': 3}, 1)
    config = config_of(train, evaluate__data_path=str(test), data__held_out_fraction=0.5)
    data = build_data(config)
    assert (len(data.train), len(data.held_out)) == (8, 7)
    gallery, queries = compared(data)
    assert names(gallery) == names(Folder(train))
    assert names(queries) == names(Folder(test))
    assert queries.labels.tolist() == [1, 1, 2, 2, 2]
    assert list(queries.label_names) == ['bird', 'cat', 'dog']
    assert compared(build_data(config_of(train, data__held_out_fraction=0.5)))[0].indices.size == 8


def test_the_table_of_a_run(train, tmp_path):
    """The before/after table is of the test set too, and says so."""
    test = write_pictures(tmp_path / 'test', {'cat': 2, 'dog': 3}, 1)
    config = config_of(train, evaluate__data_path=str(test), views__image_size=8)
    # The mean colour, of which each class has a hue of its own.
    found = neighbours_of(lambda x: x.mean(axis=(1, 2)) - 80, build_data(config), config)
    assert (len(found.gallery), len(found.queries)) == (15, 5)
    assert found.accuracy is not None
    assert 'Each of 5 test pictures' in describe(found, config.evaluate)


def test_labels_of_an_array_by_name(tmp_path):
    """An array's labels are matched by their names, not by their numbers."""
    images = np.zeros((3, 4, 4, 3), np.uint8)
    for name, label_names, labels in (('a', ['x', 'y'], [0, 1, 1]), ('b', ['y', 'x'], [0, 0, 1])):
        np.savez(tmp_path / name, images=images, labels=labels, label_names=label_names)
    train, test = (Array(tmp_path / f'{name}.npz') for name in 'ab')
    assert matched(test, train, tiles=False).labels.tolist() == [1, 1, 0]


def test_a_name_that_no_picture_has_may_be_unknown(tmp_path):
    """Only labels that occur must be known: lists of names may be longer."""
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / 'a', images=images, labels=[0, 1], label_names=['x', 'y'])
    np.savez(tmp_path / 'b', images=images, labels=[1, 1], label_names=['other', 'x'])
    train, test = (Array(tmp_path / f'{name}.npz') for name in 'ab')
    assert matched(test, train, tiles=False).labels.tolist() == [0, 0]


def test_other_labels(train, tmp_path):
    """A label that the training set does not know is an error that names the nearest one."""
    test = write_pictures(tmp_path / 'test', {'cats': 2, 'dog': 3, 'whale': 1}, 1)
    words = (
        r"2 label\(s\) .*'cats' \(2 picture\(s\)\) Did you mean 'cat'\?; 'whale' .*bird, cat, dog"
    )
    with pytest.raises(UserError, match=words):
        build_data(config_of(train, evaluate__data_path=str(test)))


def test_a_test_set_without_labels(train, tmp_path):
    """A test set without labels has no accuracies, and is measured by what needs none."""
    save_random_encoder(tmp_path / 'encoder')
    test = write_pictures(tmp_path / 'test', {'': 7}, 1)
    given = {'data__path': str(train), 'evaluate__data_path': str(test)}
    chosen = ('knn', 'kmeans', 'retrieval')
    MODES['evaluate'](
        evaluation_request(
            tmp_path / 'encoder', tmp_path / 'w', **given, evaluate__protocols=chosen
        )
    )
    found = json.loads((tmp_path / 'w' / 'evaluation.json').read_text())
    assert set(found['metrics']) == {'recall_1', 'recall_5'}
    assert found['not_measured']['knn_5'] == 'the test set has no labels'
    assert found['protocols']['retrieval']['pool'] == 7


def test_tiles_of_a_test_set_have_no_labels(train, tmp_path):
    """A tile is labelled with its picture, which the other set does not hold."""
    test = write_pictures(tmp_path / 'test', {'cat': 2, 'dog': 3}, 1)
    data = build_data(config_of(train, evaluate__data_path=str(test), data__tile_size=10))
    assert data.everything.labels is not None
    assert data.test.train.labels is None
    assert len(data.test.train) == 5 * 6


def test_bad_pictures_of_the_test_set_are_not_the_runs(train, tmp_path):
    """A test picture of unknown size is said to be left out, and does not count in training."""
    test = write_pictures(tmp_path / 'test', {'cat': 2, 'dog': 3}, 1)
    (test / 'cat' / '01.png').write_bytes(b'')
    data = build_data(config_of(train, evaluate__data_path=str(test), data__tile_size=10))
    assert not data.bad
    assert [line.split(':')[0] for line in data.left_out()] == ['test set']


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'evaluate__data_path': 'train'}, 'The test set is the training set, data.path='),
        ({'evaluate__data_path': 'train/cat'}, 'inside the other, so'),
        ({'evaluate__data_path': '.'}, 'inside the other, so'),
        ({'evaluate__data_path': 'tset'}, r"evaluate\.data_path=.*exist\. Did you mean 'test'"),
        ({'evaluate__data_path': 'empty'}, r'evaluate\.data_path=.*empty holds no image'),
        ({'evaluate__data_split': 'test'}, r"source='folder' has none.*evaluate\.data_path=PATH"),
        ({'evaluate__data_path': 'x', 'data__source': 'sample'}, 'has no other'),
    ],
    ids=['same', 'inside', 'around', 'typo', 'empty', 'split', 'sample'],
)
def test_sets_that_cannot_be(train, tmp_path, changes, words):
    """What cannot be a test set is named by the key it was given with, before any training."""
    for name in ('empty', 'test'):
        (tmp_path / name).mkdir()
    if 'evaluate__data_path' in changes:
        changes = {**changes, 'evaluate__data_path': str(tmp_path / changes['evaluate__data_path'])}
    with pytest.raises(UserError, match=words):
        build_data(config_of(train, **changes))


def of_test_set(config):
    checked = Settings.of(config)
    return settings_of_test_set(checked.data, checked.evaluate)


def test_a_split_of_tfds(train):
    """Of a TFDS data set the test set is another split; the same split is refused."""
    tfds = {'data__source': 'tfds', 'data__held_out_fraction': 0.1, 'data__cache': '/decoded'}
    other = of_test_set(config_of(train, **tfds, evaluate__data_split='test'))
    assert (other.source, other.path, other.split) == ('tfds', str(train), 'test')
    assert (other.held_out_fraction, other.cache) == (0, '')
    with pytest.raises(UserError, match=r'is the training set, data\.split=train'):
        of_test_set(config_of(train, **tfds, evaluate__data_split='train'))


def test_an_empty_split(train):
    """A test set of no pictures is an error, not a table of nothing."""
    source = Folder(train)
    source._first = source._first.take([])
    with pytest.raises(UserError, match='holds no picture'):
        matched(source, Folder(train), tiles=False)
