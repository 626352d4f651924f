"""Folders of image files, pairs of files by their names, and DIV2K's own folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import frame, which, write_frames
from pictures import (
    smooth,
    write,
)
from PIL import Image
from streams import stream_of, views_at

from byol_jax.app.data import build_data
from byol_jax.errors import UserError
from byol_jax.sources.folder import Div2k, FilePairs, Folder
from configs import default

# Folders.


def test_folder_with_classes(tmp_path):
    """The folders directly below the root are the classes, sorted, however deep files lie."""
    for name in ('dog/2.png', 'cat/1.png', 'cat/young/3.png', 'ant/0.png'):
        write(tmp_path / name)
    source = Folder(tmp_path)
    assert [source.name(i) for i in range(4)] == [
        'ant/0.png',
        'cat/1.png',
        'cat/young/3.png',
        'dog/2.png',
    ]
    assert tuple(source.label_names) == ('ant', 'cat', 'dog')
    assert source.labels.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    'names',
    [
        pytest.param(('b.png', 'a.png'), id='flat'),
        pytest.param(('all/b.png', 'all/a.png'), id='one folder'),
        pytest.param(('cat/a.png', 'dog/b.png', 'stray.png'), id='a stray file'),
    ],
)
def test_folder_without_classes(tmp_path, names):
    """With fewer than two class folders, or files beside them, there are no labels."""
    for name in names:
        write(tmp_path / name)
    source = Folder(tmp_path)
    assert source.labels is None
    assert [source.name(i) for i in range(len(source))] == sorted(names)


@pytest.mark.parametrize(
    ('names', 'says'),
    [
        (('b.png', 'a.png'), 'no image lies in a class folder'),
        (('all/b.png', 'all/a.png'), 'all images lie in the one folder all (2)'),
        (
            ('cat/a.png', 'dog/b.png', 'dog/c.png', 'stray.png'),
            '1 of 4 images lie beside the class folders cat (1), dog (2): stray.png. Move them '
            'into one of these, or leave them out with data.exclude',
        ),
        (
            ('a.b/1.png', 'a/1.png', 'a.png'),
            '1 of 3 images lie beside the class folders a (1), ',
        ),
        (('cat/a.png', 'dog/b.png'), ''),
    ],
)
def test_why_there_are_no_labels(tmp_path, names, says):
    """A stray picture beside class folders takes all labels away, and the folder says so."""
    for name in names:
        write(tmp_path / name)
    source = Folder(tmp_path)
    assert source.unlabelled.startswith(says)
    assert bool(source.unlabelled) == (source.labels is None)
    if 'stray.png' in names:
        assert Folder(tmp_path, exclude=('stray.png',)).label_names == ('cat', 'dog')


def test_what_is_not_used_is_said(tmp_path):
    """TIFFs, a GIF and a text beside pictures; a hidden picture; a folder of thumbnails."""
    for name in ('1.png', '2.png', '@eaDir/1.png', 'x_mask.png', '.3.png'):
        write(tmp_path / name)
    for name in ('a.tif', 'b.tif', 'c.gif', 'd.jfif', 'e.avif', 'notes.txt', 'noext'):
        (tmp_path / name).touch()
    others, *left_out = Folder(tmp_path, exclude=('*_mask.png',)).unused
    assert others.startswith(
        'not used, 2 .tif, 1 without an extension, 1 .avif, 1 .gif, 1 .jfif, 1 .txt: '
    )
    assert others.endswith(
        ' (image files end in .jpg, .jpeg, .png, .webp, .bmp; convert .avif, .gif, .jfif, .tif '
        'to PNG or JPEG to use them)'
    )
    assert sorted(left_out) == [
        "left out, data.exclude='*_mask.png': x_mask.png",
        'left out, folders of the system: @eaDir',
        'left out, hidden files: .3.png',
    ]
    with pytest.raises(UserError, match=r'holds no image: not used, 2 \.tif'):
        Folder(tmp_path, exclude=('*.png',))


def test_a_folder_of_pictures_alone_has_nothing_to_say(tmp_path):
    write(tmp_path / '1.png')
    (tmp_path / '.DS_Store').touch()
    assert Folder(tmp_path).unused == []


def test_folder_loads_what_it_lists(tmp_path):
    """Index, name, picture and size match."""
    shapes = {'b.png': (3, 4), 'c/d.png': (5, 6), 'ä ö.png': (7, 8)}
    for name, shape in shapes.items():
        write(tmp_path / name, smooth(*shape))
    source = Folder(str(tmp_path))
    for i in range(3):
        shape = shapes[source.name(i)]
        np.testing.assert_array_equal(source.load(i, 'image'), smooth(*shape))
        assert source.size(i, 'image') == shape


def test_folder_knows_extensions_in_any_case(tmp_path):
    """JPEG, PNG, WebP and BMP are listed in upper and lower case; other files are not."""
    names = ['a.JPG', 'b.jpeg', 'c.Png', 'd.webp', 'e.BMP', 'f.jpg']
    for name in [*names, 'g.txt', 'h.jpg.bak', 'png', '.hidden.png', '._a.JPG', 'Thumbs.db']:
        write(tmp_path / name)
    source = Folder(tmp_path)
    assert [source.name(i) for i in range(len(source))] == names


def test_hidden_folders_are_not_searched(tmp_path):
    """Pictures in hidden folders (.ipynb_checkpoints, .Trash) are neither data nor classes."""
    for name in ('cat/1.png', 'dog/1.png', '.ipynb_checkpoints/1.png', 'cat/.thumbnails/1.png'):
        write(tmp_path / name)
    source = Folder(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ['cat/1.png', 'dog/1.png']
    assert tuple(source.label_names) == ('cat', 'dog')


def test_linked_folders_are_searched_once(tmp_path):
    """A linked folder is followed, and a link back to the root lists no picture twice."""
    write(tmp_path / 'elsewhere/1.png')
    write(tmp_path / 'root/2.png')
    (tmp_path / 'root/linked').symlink_to(tmp_path / 'elsewhere')
    source = Folder(tmp_path / 'root')
    assert [source.name(i) for i in range(len(source))] == ['2.png', 'linked/1.png']
    (tmp_path / 'root/loop').symlink_to(tmp_path / 'root')
    assert len(Folder(tmp_path / 'root')) == 2


def test_missing_folder_suggests_its_neighbour(tmp_path):
    """For a missing folder, the nearest folder beside it is suggested."""
    (tmp_path / 'photographs').mkdir()
    with pytest.raises(UserError, match=r"photograhps does not exist\..*'photographs'"):
        Folder(tmp_path / 'photograhps')
    with pytest.raises(UserError, match='does not exist'):
        Folder(tmp_path / 'no' / 'such' / 'place')


def test_file_given_as_folder(tmp_path):
    """A file in place of a folder is named as a file."""
    with pytest.raises(UserError, match=r'a\.png is a file'):
        Folder(write(tmp_path / 'a.png'))


def test_folder_without_pictures(tmp_path):
    """The message has the number of files and the extensions that count."""
    (tmp_path / 'a.tiff').write_bytes(b'')
    (tmp_path / 'b.txt').write_bytes(b'')
    with pytest.raises(UserError, match=r'no image: not used, 1 \.tiff, 1 \.txt: a.* in \.jpg'):
        Folder(tmp_path)


def test_home_is_expanded(tmp_path, monkeypatch):
    """A leading ~ is the home folder."""
    monkeypatch.setenv('HOME', str(tmp_path))
    write(tmp_path / 'photos/1.png')
    assert len(Folder('~/photos')) == 1


@pytest.mark.parametrize('place', ['', 'DIV2K_train_HR', 'DIV2K_train_HR/'])
def test_div2k_folders(div2k_folder, place):
    """The root and the HR folder both give all pictures with their X2 partners."""
    source = Div2k(f'{div2k_folder}/{place}', 'train', ('lr', 'hr'))
    assert [source.name(i) for i in range(len(source))] == ['0001.png', '0002.png', '0010.png']
    for i in range(3):
        high, low = source.load(i, 'hr'), source.load(i, 'lr')
        np.testing.assert_array_equal(low, high[::2, ::2])
        assert high[0, 0, 2] == int(source.name(i)[:4])
        assert source.size(i, 'hr') == (64, 80)
        assert source.size(i, 'lr') == (32, 40)


def test_div2k_validation(div2k_folder):
    """The validation split is in the `valid` folders."""
    source = Div2k(div2k_folder, 'validation', ('hr', 'hr'))
    assert [source.name(i) for i in range(len(source))] == ['0801.png']
    with pytest.raises(UserError, match=r"'test'.*'train' and 'validation'"):
        Div2k(div2k_folder, 'test', ('hr', 'hr'))


def test_div2k_missing_partner(div2k_folder):
    """A picture without its low-resolution partner is named before training."""
    (div2k_folder / 'DIV2K_train_LR_bicubic/X2/0002x2.png').unlink()
    with pytest.raises(UserError, match=r'lacks 1 of 3 pictures, 0002x2\.png'):
        Div2k(div2k_folder, 'train', ('lr', 'hr'))
    assert len(Div2k(div2k_folder, 'train', ('hr', 'hr'))) == 3


def test_div2k_missing_folders(tmp_path):
    """Missing official folders are named, with what the folder holds instead."""
    write(tmp_path / 'DIV2K_train_HR/0001.png')
    assert len(Div2k(tmp_path, 'train', ('hr', 'hr'))) == 1
    with pytest.raises(UserError, match='DIV2K_train_LR_bicubic'):
        Div2k(tmp_path, 'train', ('lr', 'hr'))
    with pytest.raises(UserError, match=r'no folder DIV2K_valid_HR.*DIV2K_train_HR'):
        Div2k(tmp_path, 'validation', ('hr', 'hr'))
    (tmp_path / 'DIV2K_train_HR/0001.png').unlink()
    with pytest.raises(UserError, match=r'DIV2K_train_HR holds no picture'):
        Div2k(tmp_path, 'train', ('hr', 'hr'))
    with pytest.raises(UserError, match='does not exist'):
        Div2k(tmp_path / 'nowhere', 'train', ('hr', 'hr'))


SIDES = ('*_left', '*_right')


def make_config(path: Path, **data):
    config = default.get_config()
    config.views.image_size = 16
    config.data.update({'source': 'folder', 'path': str(path), 'pair_keys': SIDES} | data)
    return config.lock()


@pytest.fixture
def stereo(tmp_path) -> Path:
    """Five pairs in two class folders: left frames are from clip 1, right ones from clip 2."""
    scenes = ['street/7', 'street/8', 'street/9', 'garden/7', 'garden/b_left_c']
    write_frames(tmp_path, [f'{scene}_left.png' for scene in scenes], 1)
    write_frames(tmp_path, [f'{scene}_right.bmp' for scene in scenes], 2)
    return tmp_path


def test_files_pair_by_their_names(stereo):
    """A left file and a right file with the same name are the two pictures of an example."""
    source = FilePairs(stereo, SIDES)
    assert source.keys == SIDES
    assert [source.name(i) for i in range(len(source))] == [
        'garden/7_left.png',
        'garden/b_left_c_left.png',
        'street/7_left.png',
        'street/8_left.png',
        'street/9_left.png',
    ]
    for i in range(5):
        left, right = (which(source.load(i, key)) for key in SIDES)
        assert (left[0], right[0]) == (1, 2)
        assert left[1] == right[1]
        assert source.size(i, '*_right') == (64, 96)
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.label_names == ('garden', 'street')


@pytest.mark.parametrize(
    ('patterns', 'files'),
    [
        (('left/*', 'right/*'), ['left/a/1.png', 'left/2.png', 'right/a/1.png', 'right/2.png']),
        (('*_0', '*_1'), ['a_0.png', 'b_0.png', 'a_1.png', 'b_1.png']),
        (('L*', 'R*'), ['L1.png', 'Lx.png', 'R1.png', 'Rx.png']),
        (('im.(*)', 'im.[*]'), ['im.(1).png', 'im.(2).png', 'im.[1].png', 'im.[2].png']),
    ],
)
def test_patterns(tmp_path, patterns, files):
    """A pattern is a path below the folder, in which everything but its * is literal."""
    write_frames(tmp_path, files)
    source = FilePairs(tmp_path, patterns)
    found = {
        (which(source.load(i, a))[1], which(source.load(i, b))[1])
        for i in range(2)
        for a, b in [patterns]
    }
    assert found == {(0, 2), (1, 3)}


def test_other_files_are_left_out(stereo):
    """Depth maps and other files that match neither pattern are not used."""
    write_frames(stereo, ['street/7_depth.png', 'overview.png'])
    source = FilePairs(stereo, SIDES)
    assert len(source) == 5
    assert source.unused == [
        'not used, 2 images that match neither pattern of data.pair_keys: overview.png, '
        'street/7_depth.png'
    ]
    assert sorted(FilePairs(stereo, SIDES, exclude=('*_depth.png', 'overview*')).unused) == [
        "left out, data.exclude='*_depth.png': street/7_depth.png",
        "left out, data.exclude='overview*': overview.png",
    ]


def test_views_come_from_the_two_files(tmp_path):
    """View 1 is made from the first pattern's file and view 2 from the second's."""
    for name, value in (('a_left', 30), ('a_right', 60)):
        Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(tmp_path / f'{name}.png')
    for pair_keys in (SIDES, SIDES[::-1], (SIDES[0], SIDES[0])):
        config = make_config(tmp_path, pair_keys=pair_keys)
        with config.unlocked():
            for view in (config.views.view1, config.views.view2):
                view.jitter = view.gray = view.blur = view.solarize = 0.0
        stream = stream_of(build_data(config).train, config)
        values = [30 if key == '*_left' else 60 for key in pair_keys]
        assert [int(view.min()) for view in views_at(stream, 0)] == values
        assert [int(view.max()) for view in views_at(stream, 0)] == values


def test_a_pattern_twice_needs_no_partners(tmp_path):
    """With both views from the left files, the right ones may be missing."""
    write_frames(tmp_path, ['a_left.png', 'b_left.png', 'b_right.png'])
    assert len(FilePairs(tmp_path, ('*_left', '*_left'))) == 2


def test_pairs_are_held_out_and_cut_into_tiles(stereo):
    """Pairs go through held_out_fraction and tiles as single pictures do."""
    config = make_config(stereo, tile_size=32)
    train = build_data(config).train
    assert len(train) == 5 * 6
    left, right = (train.load(7, key) for key in SIDES)
    assert left.shape == right.shape == (32, 32, 3)
    whole = frame(1, 1)
    np.testing.assert_array_equal(left, whole[:32, 32:64])
    train, held_out = build_data(make_config(stereo, held_out_fraction=0.5))[:2]
    assert (len(train), len(held_out)) == (3, 2)


@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('sides', [(100, 100), (100, 50), (50, 200), (7, 1), (3, 200)])
def test_tiles_of_pictures_of_other_ratios_show_the_same_part(tmp_path, sides, shift):
    """If the second picture is stretched along one axis, or tiny, a tile still shows the same share
    of each axis, within a pixel, and is never empty.
    """
    left, right = (100, 200), sides
    for name, shape in (('1_left', left), ('1_right', right)):
        # A pixel's row and column as shares of the sides, in units of 1 / 250.
        y, x = np.mgrid[: shape[0], : shape[1]]
        shares = np.stack([250 * y // shape[0], 250 * x // shape[1], 0 * x], axis=-1)
        Image.fromarray(shares.astype(np.uint8)).save(tmp_path / f'{name}.png')
    config = make_config(tmp_path, tile_size=32, tile_stride=15, tile_shift=shift)
    train = build_data(config).train
    for index in range(len(train)):
        one, other = (train.load_in_epoch(1, index, key).astype(int) for key in SIDES)
        assert one.shape == (32, 32, 3)
        for axis in range(2):
            pixel = 250 / min(left[axis], right[axis])
            assert abs(other.shape[axis] / right[axis] - 32 / left[axis]) <= 1 / right[axis]
            assert abs(one[0, 0, axis] - other[0, 0, axis]) <= pixel + 1
    # Views can be made from them too.
    assert views_at(stream_of(train, config), 0)[1].shape == (16, 16, 3)


@pytest.mark.parametrize('missing', ['left', 'right'])
def test_files_without_a_partner_are_named(stereo, missing):
    """Files without a partner are named, for either side."""
    for file in stereo.glob(f'street/*_{missing}.*'):
        file.unlink()
    other = 'right' if missing == 'left' else 'left'
    with pytest.raises(UserError) as caught:
        FilePairs(stereo, SIDES)
    message = str(caught.value)
    assert f"3 of 5 images in {stereo} have no partner '*_{missing}'" in message
    assert f'street/7_{other}' in message


def test_many_files_without_a_partner_are_not_all_named(stereo):
    """With many such files, the first five are named."""
    write_frames(stereo, [f'x{i:02}_right.png' for i in range(40)])
    with pytest.raises(UserError, match=r"40 of 45 .*'\*_left': x00_right.*x04_right\.png, \.\.\."):
        FilePairs(stereo, SIDES)


def test_two_files_for_one_picture_are_named(stereo):
    """If a pattern matches two files with the same name, both are named."""
    write_frames(stereo, ['street/7_left.bmp'])
    with pytest.raises(UserError, match=r'street/7_left\.bmp and street/7_left\.png .*same'):
        FilePairs(stereo, SIDES)


@pytest.mark.parametrize(
    ('patterns', 'message'),
    [
        (('*_links', '*_right'), r"No image .*'\*_links'.* 10 images are garden/7_left\.png"),
        (('*_left.png', '*_right.png'), 'is written without the extension'),
        (('*_left*', '*_right'), r"must hold one \*.*'\*_left\*' holds 2"),
        (('*_left', 'image'), r"'image' holds 0"),
    ],
)
def test_patterns_that_cannot_be_used(stereo, patterns, message):
    """A pattern without files, or without exactly one *, is an error."""
    with pytest.raises(UserError, match=message):
        build_data(make_config(stereo, pair_keys=patterns))


def test_two_patterns_are_needed(stereo):
    """One pattern alone is an error."""
    with pytest.raises(UserError, match='must be 2 values'):
        build_data(make_config(stereo, pair_keys=('*_left',)))
