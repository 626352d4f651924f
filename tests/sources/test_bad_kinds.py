"""Every kind of file: bad ones are named and replaced, odd ones decoded correctly."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from bad_pictures import counted, files
from pictures import encode, png_that_declares, rotated, smooth, write
from PIL import Image
from streams import collect, make_config

from byol_jax.app.data import build_data
from byol_jax.errors import BadPicture, UserError
from byol_jax.input.stream import epoch_order
from byol_jax.sources.bad_files import BadFiles
from byol_jax.sources.base import Cached, Subset
from byol_jax.sources.decode import read_file, read_size
from byol_jax.sources.folder import Div2k, FilePairs, Folder
from byol_jax.sources.tiles import Tiles
from byol_jax.sources.video import Video

NOISE = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)


# What becomes of each kind of file.


def truncated(path: Path) -> None:
    path.write_bytes(encode(NOISE, 'PNG')[:3000])


def cut_jpeg(path: Path) -> None:
    path.write_bytes(encode(NOISE, 'JPEG', quality=95)[:2000])


def empty(path: Path) -> None:
    path.write_bytes(b'')


def text(path: Path) -> None:
    path.write_text('I am no picture.\n')


def tiff(path: Path) -> None:
    path.write_bytes(encode(NOISE, 'TIFF'))


def bomb(path: Path) -> None:
    path.write_bytes(png_that_declares(60_000, 60_000))


def vanished(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def unreadable(path: Path) -> None:
    # Root may read files of any mode, but not through a broken link.
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to('/dev/zero')


def endless(path: Path) -> None:
    # A sparse file of a terabyte.
    os.truncate(path, 10**12)


BAD = {
    pipe: 'is not a file but a pipe',
    device: 'is not a file but a device',
    endless: r'holds 1,000,000,000,000 bytes, more than a picture within .*=200 needs',
    truncated: 'cannot be decoded: .*truncated',
    cut_jpeg: 'cannot be decoded: .*truncated',
    empty: 'is empty',
    text: 'is not an image that can be read',
    tiff: r'is of a kind that is not read here .TIFF.*Convert it',
    bomb: r'declares 60000x60000 pixels \(3600 megapixels\), more than data.max_megapixels=200',
    vanished: 'cannot be read: No such file',
    folder: 'is not a file but a folder',
    unreadable: 'cannot be read: Too many levels of symbolic links',
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize('spoil', BAD, ids=lambda spoil: spoil.__name__)
def test_bad_kinds(tmp_path, spoil):
    """A file of each kind, damaged after listing, is named and replaced; all others stay."""
    for i in range(8):
        write(tmp_path / f'{i}.png', np.roll(NOISE, i))
    source, config = Folder(tmp_path), make_config(4, max_bad_fraction=0.2)
    clean = collect(source, config, 0, 4)
    path = tmp_path / '3.png'
    spoil(path)
    with pytest.raises(BadPicture, match=BAD[spoil]) as caught:
        source.load(3, 'image')
    assert caught.value.file == source.file(3, 'image') == str(path)
    bad_files = counted(source, config)
    made = collect(source, config, 0, 4, bad_files=bad_files)
    assert [tuple(bad) for bad in bad_files.since(0)] == [(str(path), caught.value.reason)]
    order = np.concatenate([epoch_order(0, epoch, 8) for epoch in range(2)]).reshape(4, 4)
    for key in ('view1', 'view2'):
        same = np.all(made[key] == clean[key], axis=(2, 3, 4))
        np.testing.assert_array_equal(same, order != 3)


@pytest.mark.timeout(60)
@pytest.mark.parametrize('spoil', [pipe, device, endless], ids=lambda spoil: spoil.__name__)
def test_sizes_are_not_waited_for(tmp_path, spoil):
    """When sizes are read for tiles, a pipe, a device or an endless file is bad at once."""
    path = write(tmp_path / 'x.png')
    spoil(path)
    with pytest.raises(BadPicture, match=BAD[spoil]):
        read_size(path, 200)


def test_a_file_without_permission_is_bad(tmp_path, monkeypatch):
    """A file without read permission is bad, for the picture and for its size."""
    path = write(tmp_path / 'secret.png')

    def refuse(self, *_):
        raise PermissionError(13, 'Permission denied', str(self))

    if os.getuid():
        path.chmod(0)
    else:
        monkeypatch.setattr(Path, 'read_bytes', refuse)
        monkeypatch.setattr(Path, 'open', refuse)
    for read in (read_file, read_size):
        with pytest.raises(BadPicture, match=r'secret\.png cannot be read: Permission denied'):
            read(path, 1)


@pytest.mark.parametrize('number', [5, 110], ids=['EIO', 'ETIMEDOUT'])
def test_errors_of_the_disk_are_not_tried_again(tmp_path, monkeypatch, number):
    """An error of the disk or the network makes a picture bad at once, for this time."""
    path, calls = write(tmp_path / 'far.png'), []

    def fail(self):
        calls.append(self)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_bytes', fail)
        with pytest.raises(BadPicture, match=f'cannot be read: {os.strerror(number)}'):
            read_file(path, 1)
    assert len(calls) == 1
    assert read_file(path, 1).shape == (4, 5, 3)


def jpeg_of_cmyk() -> bytes:
    ink = np.full((16, 16, 4), (200, 30, 90, 40), np.uint8)
    return encode(Image.fromarray(ink, 'CMYK'), 'JPEG', quality=100)


def palette_with_alpha() -> bytes:
    image = Image.fromarray(np.zeros((4, 4), np.uint8), 'P')
    image.putpalette([200, 100, 50])
    return encode(image, 'PNG', transparency=bytes([128]))


def animation(file_format: str) -> bytes:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (40, 250)]
    return encode(frames[0], file_format, save_all=True, append_images=frames[1:])


def damaged_exif() -> bytes:
    """A JPEG rotated by its EXIF, in which another tag has a type that cannot be written."""
    exif = rotated(6)
    exif[0x0100] = 5
    encoded = bytearray(encode(smooth(), 'JPEG', quality=100, subsampling=0, exif=exif))
    # Tag 0x0100, SHORT, becomes an ASCII text.
    at = encoded.index(b'\x01\x00\x00\x04\x00\x00\x00\x01')
    encoded[at + 3] = 2
    return bytes(encoded)


def jpeg(array: np.ndarray) -> bytes:
    return encode(array, 'JPEG', quality=100, subsampling=0)


# Name, contents, and the right picture, within JPEG's loss.
ODD = {
    'CMYK': ('a.jpg', jpeg_of_cmyk(), np.full((16, 16, 3), (46, 190, 139))),
    '16-bit': (
        'a.png',
        encode(Image.fromarray(np.full((4, 4), 51400, np.uint16)), 'PNG'),
        np.full((4, 4, 3), 200),
    ),
    'grey': ('a.jpg', encode(np.full((9, 9), 93, np.uint8), 'JPEG'), np.full((9, 9, 3), 93)),
    'palette with alpha': ('a.png', palette_with_alpha(), np.full((4, 4, 3), (100, 50, 25))),
    'animated PNG': ('a.png', animation('PNG'), np.full((8, 8, 3), 40)),
    'animated WebP': ('a.webp', animation('WEBP'), np.full((8, 8, 3), 40)),
    'GIF named PNG': ('a.png', animation('GIF'), np.full((8, 8, 3), 40)),
    'PNG named JPEG': ('a.jpg', encode(NOISE, 'PNG'), NOISE),
    'JPEG named PNG': ('a.png', jpeg(smooth()), smooth()),
    'EXIF-rotated': ('a.png', encode(NOISE[:30], 'PNG', exif=rotated(6)), np.rot90(NOISE[:30], -1)),
    'damaged EXIF': ('a.jpg', damaged_exif(), np.rot90(smooth(), -1)),
}


@pytest.mark.parametrize('kind', ODD)
def test_odd_kinds_are_not_bad(tmp_path, kind):
    """A file of each odd kind gives the right picture, with the size from its header."""
    name, contents, expected = ODD[kind]
    (tmp_path / name).write_bytes(contents)
    source, config = Folder(tmp_path), make_config(4, max_bad_fraction=0)
    picture = source.load(0, 'image')
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected).max() <= 4
    assert picture.dtype == np.uint8
    assert source.size(0, 'image') == picture.shape[:2]
    bad_files = counted(source, config)
    collect(source, config, 0, 1, bad_files=bad_files)
    assert len(bad_files) == 0


def test_damaged_exif_is_what_cannot_be_rewritten():
    """Pillow's own rotation fails for the picture with damaged EXIF."""
    from PIL import ImageOps

    with Image.open(io.BytesIO(damaged_exif())) as image, pytest.raises((struct.error, TypeError)):
        ImageOps.exif_transpose(image)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    """A folder without permission is named, and its pictures are not left out silently."""
    write(tmp_path / 'cat' / '1.png')
    write(tmp_path / 'dog' / '1.png')
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('dog'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(UserError, match='dog cannot be listed: Permission denied'):
        Folder(tmp_path)


# Files and tiles.


def test_sources_name_the_files_of_their_errors(tmp_path):
    """`file` gives the name in a `BadPicture`, through every wrapper."""
    for i in (1, 2, 3):
        write(tmp_path / 'DIV2K_train_HR' / f'{i:04}.png', NOISE)
        write(tmp_path / 'DIV2K_train_LR_bicubic' / 'X2' / f'{i:04}x2.png', NOISE[::2, ::2])
    sides = ('DIV2K_train_HR/*', 'DIV2K_train_LR_bicubic/X2/*x2')
    sources = [
        (Folder(tmp_path), 'image'),
        (Div2k(tmp_path, 'train', ('hr', 'lr')), 'hr'),
        (Div2k(tmp_path, 'train', ('hr', 'lr')), 'lr'),
        (FilePairs(tmp_path, sides), sides[0]),
        (FilePairs(tmp_path, sides), sides[1]),
    ]
    sources += [(Cached(source, 10**6), key) for source, key in sources]
    sources += [(Tiles(source, 16), key) for source, key in sources]
    sources.append((Video(tmp_path, 1), 'image'))
    sources += [(Subset(source, np.array([1, 0])), key) for source, key in sources]
    for path in tmp_path.rglob('*.png'):
        path.write_bytes(b'')
    for source, key in sources:
        for index in range(2):
            with pytest.raises(BadPicture) as caught:
                source.load(index, key)
            assert caught.value.file == source.file(index, key)
            assert Path(caught.value.file).exists()


def tile_config(folder: Path, **data):
    config = make_config(4, source='folder', path=str(folder), tile_size=16, **data)
    with config.unlocked():
        config.total_steps, config.total_epochs = 4, None
    return config


def test_a_damaged_picture_is_one_file_of_many_tiles(tmp_path):
    """Bad pictures are counted, not their tiles: a file counts once, whichever tile finds it."""
    for i in range(4):
        write(tmp_path / f'{i}.png', NOISE)
    data = build_data(tile_config(tmp_path))
    (tmp_path / '2.png').write_bytes(encode(NOISE, 'PNG')[:3000])
    bad_files = counted(data.train, tile_config(tmp_path, max_bad_fraction=0.25))
    assert (len(data.train), bad_files.total, bad_files.allowed) == (36, 4, 1)
    collect(data.train, tile_config(tmp_path), 0, 9, bad_files=bad_files)
    assert files(bad_files) == {str(tmp_path / '2.png')}


def test_pictures_left_out_of_tiles(tmp_path):
    """A header that cannot be read counts as bad from the start, a small picture does not; both
    are named and have no tiles.
    """
    for i in range(4):
        write(tmp_path / f'{i}.png', NOISE)
    write(tmp_path / 'small.png', NOISE[:15])
    (tmp_path / '1.png').write_bytes(encode(NOISE, 'PNG')[:20])
    config = tile_config(tmp_path, held_out_fraction=0.2)
    data = build_data(config)
    for part in data[:2]:
        names = [part.name(i).split(' ')[0] for i in range(len(part))]
        assert set(names) == {'0.png', '2.png', '3.png'}
        assert [part.label_names[label] for label in part.labels] == names
    assert [bad.file for bad in data.bad] == [str(tmp_path / '1.png')]
    lines = data.left_out()
    assert len(lines) == 2
    assert '1 picture(s) whose size cannot be read' in lines[0]
    assert str(tmp_path / '1.png') in lines[0]
    assert '1 picture(s) smaller than a tile: small.png (48x15)' in lines[1]
    bad_files = BadFiles(data.train, 'image', 0.0, data.bad)
    assert bad_files.total == 4
    with pytest.raises(UserError, match=r'1 of 4 .*1\.png'):
        bad_files.check()


def test_no_picture_to_cut_tiles_from(tmp_path):
    """If every size is unreadable or too small, the error has the number of each."""
    for i in range(3):
        path = write(tmp_path / f'{i}.png', NOISE[:10])
        if i:
            path.write_bytes(b'')
    with pytest.raises(UserError, match=r'of 3 pictures, 2 have .* 1 are .*_size=16.*1\.png'):
        build_data(tile_config(tmp_path))
