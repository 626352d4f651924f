"""Sources: every readable file becomes the right RGB, every unreadable one a clear error."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import weakref
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from byol_jax.app.data import build_data
from byol_jax.errors import BadPicture, UserError
from byol_jax.sources import data as data_module
from byol_jax.sources import tfds
from byol_jax.sources.base import Cached, Source, Subset
from byol_jax.sources.decode import decode, read_file, read_size
from byol_jax.sources.folder import Div2k, Folder
from byol_jax.sources.sample import SamplePhotographs
from byol_jax.sources.tiles import Tiles
from configs import default, div2k

# EXIF's tag of the orientation.
ORIENTATION = 0x0112


def smooth(height: int = 24, width: int = 32) -> np.ndarray:
    """A gradient with another colour in each corner: uint8 [height, width, 3]."""
    y = np.linspace(0, 255, height)[:, None]
    x = np.linspace(0, 255, width)[None, :]
    return np.stack(np.broadcast_arrays(y, x, (255 - y + x) / 2), axis=-1).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, file_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, file_format, **options)
    return stream.getvalue()


def write(path: Path, image: np.ndarray | None = None) -> Path:
    """Writes a PNG, whatever the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(smooth(4, 5) if image is None else image, 'PNG'))
    return path


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack('>I', zlib.crc32(kind + data))
    return struct.pack('>I', len(data)) + kind + data + checksum


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header declares any size."""
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + png_chunk(b'IHDR', header)
        + png_chunk(b'IDAT', zlib.compress(bytes(100)))
        + png_chunk(b'IEND', b'')
    )


# Decoding.


@pytest.mark.parametrize(
    ('file_format', 'options'), [('PNG', {}), ('BMP', {}), ('WEBP', {'lossless': True})]
)
def test_lossless_formats_give_the_pixels(file_format, options):
    """PNG, BMP and lossless WebP decode to exactly the pixels that were encoded."""
    image = smooth()
    decoded = decode(encode(image, file_format, **options), 'x', 1)
    np.testing.assert_array_equal(decoded, image)
    assert decoded.dtype == np.uint8


def test_jpeg():
    """A JPEG decodes to what was encoded, within its loss, with the channels in RGB order."""
    decoded = decode(encode(smooth(), 'JPEG', quality=100, subsampling=0), 'x', 1)
    assert np.abs(decoded.astype(int) - smooth()).max() <= 4


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'BMP'])
def test_grey(file_format):
    """A grey picture becomes three equal channels."""
    decoded = decode(encode(np.full((6, 7), 93, np.uint8), file_format), 'x', 1)
    np.testing.assert_array_equal(decoded, np.full((6, 7, 3), 93))


def test_bilevel():
    """A picture of one bit a pixel becomes black and white."""
    bits = np.array([[True, False, True]])
    decoded = decode(encode(Image.fromarray(bits), 'PNG'), 'x', 1)
    np.testing.assert_array_equal(decoded[..., 1], [[255, 0, 255]])


def test_cmyk_jpeg():
    """CMYK inks become the light they leave: (255 - ink) (255 - black) / 255."""
    inks = np.array([200, 30, 90, 40])
    image = Image.fromarray(np.full((16, 16, 4), inks, np.uint8), 'CMYK')
    decoded = decode(encode(image, 'JPEG', quality=100), 'x', 1)
    expected = (255 - inks[:3]) * (255 - inks[3]) / 255
    # JPEG's loss on a plain picture, and rounding.
    np.testing.assert_allclose(decoded, np.broadcast_to(expected, decoded.shape), atol=3)


def test_palette():
    """A picture with a palette becomes its palette's colours."""
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    decoded = decode(encode(image, 'PNG'), 'x', 1)
    np.testing.assert_array_equal(decoded, [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]])


def test_palette_with_alpha_is_laid_over_black():
    """A palette entry's alpha darkens its colour."""
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
    image.putpalette([200, 100, 50] * 3)
    decoded = decode(encode(image, 'PNG', transparency=bytes([0, 128, 255])), 'x', 1)
    expected = np.array([0, 128, 255])[None, :, None] / 255 * [200, 100, 50]
    np.testing.assert_allclose(decoded, expected, atol=1)


@pytest.mark.parametrize('file_format', ['PNG', 'WEBP'])
def test_alpha_is_laid_over_black(file_format):
    """RGBA becomes colour x alpha: what is transparent is black, whatever colour it hides."""
    color = smooth(16, 16)
    alpha = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    options = {'lossless': True, 'exact': True} if file_format == 'WEBP' else {}
    decoded = decode(encode(np.dstack([color, alpha]), file_format, **options), 'x', 1)
    np.testing.assert_allclose(decoded, color * (alpha[..., None] / 255), atol=1)


def test_grey_with_alpha_is_laid_over_black():
    """Grey with alpha becomes grey x alpha in three channels."""
    image = np.dstack([np.full((1, 3), 200, np.uint8), np.array([[0, 128, 255]], np.uint8)])
    decoded = decode(encode(Image.fromarray(image, 'LA'), 'PNG'), 'x', 1)
    np.testing.assert_allclose(decoded, [[[0] * 3, [100.4] * 3, [200] * 3]], atol=1)


@pytest.mark.parametrize(
    ('image', 'transparency'),
    [
        pytest.param(np.full((4, 4), 200, np.uint8), 200, id='grey'),
        pytest.param(np.full((4, 4, 3), 200, np.uint8), (200, 200, 200), id='RGB'),
    ],
)
def test_transparent_colour_is_laid_over_black(image, transparency):
    """A PNG's one transparent colour is black too, as any other alpha of 0."""
    decoded = decode(encode(image, 'PNG', transparency=transparency), 'x', 1)
    np.testing.assert_array_equal(decoded, 0)


def test_16_bit_grey_is_scaled():
    """16-bit grey is divided by 257 and rounded, not clipped at 255."""
    wide = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    decoded = decode(encode(Image.fromarray(wide), 'PNG'), 'x', 1)
    expected = np.rint(wide / 257.0)
    np.testing.assert_array_equal(decoded, np.repeat(expected[..., None], 3, axis=-1))


def test_16_bit_colour_is_scaled():
    """16-bit RGB keeps its top 8 bits."""
    wide = (smooth().astype(np.uint16) * 257)[..., ::-1]
    encoded = cv2.imencode('.png', wide)[1].tobytes()
    np.testing.assert_allclose(decode(encoded, 'x', 1), smooth(), atol=1)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize('file_format', ['PNG', 'WEBP'])
@pytest.mark.parametrize('orientation', TURNS)
def test_exif_rotation_is_applied(orientation, file_format):
    """A picture comes out upright, by the definition of each EXIF orientation."""
    options = {'lossless': True} if file_format == 'WEBP' else {}
    encoded = encode(smooth(), file_format, exif=rotated(orientation), **options)
    np.testing.assert_array_equal(decode(encoded, 'x', 1), TURNS[orientation](smooth()))


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'WEBP', 'BMP'])
@pytest.mark.parametrize('orientation', range(11))
def test_read_size_agrees_with_decode(tmp_path, orientation, file_format):
    """read_size gives the height and width of the decoded picture, for any orientation tag."""
    options = {} if file_format == 'BMP' else {'exif': rotated(orientation)}
    path = tmp_path / 'x.bin'
    path.write_bytes(encode(smooth(), file_format, **options))
    assert read_size(path, 1) == read_file(path, 1).shape[:2]


XMP = b'<rdf:Description tiff:Orientation="6"/>'
QUARTER_TURNS = {
    'EXIF': (b'eXIf', rotated(6).tobytes()[6:]),
    'XMP': (b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + XMP),
    'compressed XMP': (b'iTXt', b'XML:com.adobe.xmp\0\1\0\0\0' + zlib.compress(XMP)),
    'text': (
        b'zTXt',
        b'Raw profile type exif\0\0'
        + zlib.compress(b'\nexif\n  26\n' + rotated(6).tobytes().hex().encode()),
    ),
}


@pytest.mark.parametrize('behind', [False, True])
@pytest.mark.parametrize('where', QUARTER_TURNS)
def test_a_png_may_say_behind_its_pixels_how_it_is_turned(tmp_path, where, behind):
    """The chunk with the orientation may stand before the pixels or behind them: the picture comes
    out upright, and its size is that of the upright picture."""
    encoded = encode(smooth(), 'PNG')
    place = encoded.index(b'IEND' if behind else b'IDAT') - 4
    path = tmp_path / 'x.png'
    whole = encoded[:place] + png_chunk(*QUARTER_TURNS[where]) + encoded[place:]
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_file(path, 1), TURNS[6](smooth()))
    assert read_size(path, 1) == (32, 24)
    # A file that is cut off anywhere has the size of its picture, or is bad.
    for length in range(place - 20, len(whole), 5):
        path.write_bytes(whole[:length])
        with contextlib.suppress(BadPicture):
            assert read_size(path, 1) == read_file(path, 1).shape[:2]


def test_the_second_frame_of_a_png_does_not_turn_the_first(tmp_path):
    """Of an animation, what stands behind the second frame's pixels is not the first one's."""
    first, second = (Image.fromarray(smooth()[::step]) for step in (1, -1))
    encoded = encode(first, 'PNG', save_all=True, append_images=[second])
    place = encoded.index(b'IEND') - 4
    path = tmp_path / 'x.png'
    path.write_bytes(encoded[:place] + png_chunk(*QUARTER_TURNS['EXIF']) + encoded[place:])
    assert read_size(path, 1) == read_file(path, 1).shape[:2] == (24, 32)


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'PNG with a date', 'WEBP', 'BMP'])
def test_read_size_needs_the_header_alone(tmp_path, monkeypatch, file_format):
    """read_size decodes no pixel: listing the tiles of 800 large pictures takes a moment.

    Nor does it where text that says nothing of an orientation follows the pixels.
    """
    path = tmp_path / 'x.bin'
    data = encode(smooth(), file_format.split()[0])
    if 'date' in file_format:
        place = data.index(b'IEND') - 4
        date = png_chunk(b'tEXt', b'date:create\0' + b'2026-01-01T00:00:00+00:00')
        data = data[:place] + date + data[place:]
    path.write_bytes(data)

    def load(self):
        raise AssertionError('the picture was decoded')

    with Image.open(path) as image:
        monkeypatch.setattr(type(image), 'load', load)
    assert read_size(path, 1) == (24, 32)


@pytest.mark.parametrize('file_format', ['PNG', 'WEBP'])
def test_first_frame_of_an_animation(file_format):
    """Of an animated file the first frame is taken."""
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (40, 250)]
    options = {'lossless': True} if file_format == 'WEBP' else {}
    encoded = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.n_frames == 2
    np.testing.assert_array_equal(decode(encoded, 'x', 1), 40)


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'WEBP', 'BMP'])
def test_truncated_files_are_named(file_format):
    """A file cut short anywhere is an error with its name, never a half grey picture."""
    encoded = encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), file_format)
    for length in range(1, len(encoded) // 2, 97):
        with pytest.raises(UserError, match=r'holiday/1\.jpg'):
            decode(encoded[:length], 'holiday/1.jpg', 1)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'WEBP', 'BMP'])
def test_damaged_files_decode_or_are_named(tmp_path, file_format):
    """Flipped bytes give a picture or a UserError, no other exception."""
    options = {} if file_format == 'BMP' else {'exif': rotated(6)}
    encoded = encode(smooth(), file_format, **options)
    path = tmp_path / 'x.bin'
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(150):
        damaged = np.frombuffer(encoded, np.uint8).copy()
        places = rng.integers(0, min(len(damaged), 150), 3)
        damaged[places] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        for read in (read_file, read_size):
            try:
                read(path, 1)
            except UserError as error:
                messages.append(str(error))
    assert messages
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize('data', [b'', b'hello, I am no picture\n', bytes(1000)])
def test_files_that_are_no_pictures_are_named(tmp_path, data):
    """An empty file or a text file named .jpg is an error with its path, in both readings."""
    path = tmp_path / 'notes.jpg'
    path.write_bytes(data)
    with pytest.raises(UserError, match=r'notes\.jpg'):
        read_file(path, 1)
    with pytest.raises(UserError, match=r'notes\.jpg'):
        read_size(path, 1)


def test_a_file_that_went_away_is_named(tmp_path):
    """A picture deleted after listing is a UserError with its path."""
    for read in (read_file, read_size):
        with pytest.raises(UserError, match=r'gone\.png'):
            read(tmp_path / 'gone.png', 1)


@pytest.mark.parametrize('side', [11_000, 30_000, 60_000])
def test_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch, side):
    """A small file that declares too many pixels is refused before any decoding."""
    path = tmp_path / 'bomb.png'
    path.write_bytes(png_that_declares(side, side))

    def load(self):
        raise AssertionError('the picture was decoded')

    with monkeypatch.context() as patch:
        patch.setattr('PIL.PngImagePlugin.PngImageFile.load', load)
        for read in (read_file, read_size):
            with pytest.raises(UserError, match=r'bomb\.png .*(declares|too large)'):
                read(path, 100)


def test_largest_picture_is_the_configured_one():
    """A picture of exactly max_megapixels is read; above it the error gives size and limit."""
    encoded = encode(smooth(200, 300), 'PNG')
    assert decode(encoded, 'x', 0.06).shape == (200, 300, 3)
    with pytest.raises(UserError, match=r'300x200 .*max_megapixels=0\.059'):
        decode(encoded, 'x', 0.059)


def test_limit_may_be_above_that_of_pillow(tmp_path):
    """max_megapixels alone decides, also above the 179 megapixels that Pillow opens by itself."""
    path = tmp_path / 'map.bmp'
    header = struct.pack('<2sIIIIiiHHIIiiII', b'BM', 54, 0, 54, 40, 14_000, 14_000, 1, 24, *[0] * 6)
    path.write_bytes(header)
    assert read_size(path, 200) == (14_000, 14_000)
    with pytest.raises(UserError, match=r'map\.bmp declares 14000x14000'):
        read_size(path, 190)


# Folders.


def test_folder_with_classes(tmp_path):
    """Folders right below the root name the classes, in sorted order, however deep files lie."""
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
    """Without at least two class folders, or with files beside them, there are no labels."""
    for name in names:
        write(tmp_path / name)
    source = Folder(tmp_path)
    assert source.labels is None
    assert [source.name(i) for i in range(len(source))] == sorted(names)


def test_folder_loads_what_it_lists(tmp_path):
    """Index, name, picture and size belong together."""
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
    """Pictures in hidden folders (.ipynb_checkpoints, .Trash) are neither data nor a class."""
    for name in ('cat/1.png', 'dog/1.png', '.ipynb_checkpoints/1.png', 'cat/.thumbnails/1.png'):
        write(tmp_path / name)
    source = Folder(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ['cat/1.png', 'dog/1.png']
    assert tuple(source.label_names) == ('cat', 'dog')


def test_linked_folders_are_searched_once(tmp_path):
    """A linked folder is followed, and a link back to the root lists no picture again."""
    write(tmp_path / 'elsewhere/1.png')
    write(tmp_path / 'root/2.png')
    (tmp_path / 'root/linked').symlink_to(tmp_path / 'elsewhere')
    source = Folder(tmp_path / 'root')
    assert [source.name(i) for i in range(len(source))] == ['2.png', 'linked/1.png']
    (tmp_path / 'root/loop').symlink_to(tmp_path / 'root')
    assert len(Folder(tmp_path / 'root')) == 2


def test_missing_folder_suggests_its_neighbour(tmp_path):
    """A folder that does not exist is named, with the nearest folder beside it."""
    (tmp_path / 'photographs').mkdir()
    with pytest.raises(UserError, match=r"photograhps does not exist\..*'photographs'"):
        Folder(tmp_path / 'photograhps')
    with pytest.raises(UserError, match='does not exist'):
        Folder(tmp_path / 'no' / 'such' / 'place')


def test_file_given_as_folder(tmp_path):
    """A file where a folder is expected is named as a file."""
    with pytest.raises(UserError, match=r'a\.png is a file'):
        Folder(write(tmp_path / 'a.png'))


def test_folder_without_pictures(tmp_path):
    """A folder without pictures says how many files it has and which endings count."""
    (tmp_path / 'a.tiff').write_bytes(b'')
    (tmp_path / 'b.txt').write_bytes(b'')
    with pytest.raises(UserError, match=r'no image: of its 2 file.*\.jpg'):
        Folder(tmp_path)


def test_home_is_expanded(tmp_path, monkeypatch):
    """A leading ~ is the home folder."""
    monkeypatch.setenv('HOME', str(tmp_path))
    write(tmp_path / 'photos/1.png')
    assert len(Folder('~/photos')) == 1


# Wrappers and tiles.


class Coordinates(Source):
    """Pixels that know their place: (row, column, picture), in pixels of 'hr'.

    'lr' has half as many pixels a side. Pictures are of shape `shapes[i]`; loads are counted.
    """

    def __init__(self, shapes: list[tuple[int, int]], keys: tuple[str, ...] = ('hr', 'lr')):
        self.shapes = shapes
        self.keys = keys
        self.loads: Counter[tuple[int, str]] = Counter()

    def __len__(self) -> int:
        return len(self.shapes)

    def load(self, index: int, key: str) -> np.ndarray:
        self.loads[index, key] += 1
        y, x = np.mgrid[: self.shapes[index][0], : self.shapes[index][1]]
        picture = np.stack([y, x, np.full_like(y, index)], axis=-1).astype(np.uint8)
        return np.ascontiguousarray(picture[::2, ::2] if key == 'lr' else picture)

    def name(self, index: int) -> str:
        return f'{index:04}.png'


def test_subset():
    """A subset renumbers pictures, names, sizes and labels alike."""
    source = Coordinates([(10, 12), (14, 16), (18, 20)])
    source.labels, source.label_names = np.array([7, 8, 9]), tuple('abcdefghij')
    subset = Subset(source, np.array([2, 0]))
    assert len(subset) == 2
    assert subset.keys == ('hr', 'lr')
    assert subset.labels.tolist() == [9, 7]
    assert subset.label_names == source.label_names
    assert subset.name(0) == '0002.png'
    assert subset.size(0, 'lr') == (9, 10)
    np.testing.assert_array_equal(subset.load(1, 'hr'), source.load(0, 'hr'))
    assert Subset(Coordinates([(4, 4)]), np.array([0])).labels is None


def test_cached_gives_the_same_pictures_and_loads_them_once():
    """Pictures that fit in the cache are loaded once and come out as they are."""
    source = Coordinates([(10, 12), (14, 16)])
    cached = Cached(source, 10**6)
    for _ in range(3):
        for i in range(2):
            for key in source.keys:
                np.testing.assert_array_equal(
                    cached.load(i, key), Coordinates(source.shapes).load(i, key)
                )
    assert source.loads == {(i, key): 1 for i in range(2) for key in source.keys}
    assert (len(cached), cached.name(1), cached.keys) == (2, '0001.png', source.keys)


def test_cached_keeps_the_labels():
    """A cached source has the labels of the source it caches."""
    source = Coordinates([(10, 12), (14, 16)])
    source.labels, source.label_names = np.array([1, 0]), ('ant', 'cat')
    cached = Cached(source, 10**6)
    assert cached.labels is not None
    assert cached.labels.tolist() == [1, 0]
    assert cached.labels_of(np.array([1])).tolist() == [0]
    assert cached.label_names == ('ant', 'cat')


def test_cached_drops_what_was_used_longest_ago():
    """With room for two pictures, a third replaces the one that was not asked for last."""
    source = Coordinates([(10, 10)] * 3)
    cached = Cached(source, 2 * 300)
    for i in (0, 1, 0, 2, 0, 2):
        cached.load(i, 'hr')
    assert source.loads == {(0, 'hr'): 1, (1, 'hr'): 1, (2, 'hr'): 1}
    cached.load(1, 'hr')
    assert source.loads[1, 'hr'] == 2


@pytest.mark.parametrize('max_bytes', [0, 299, 300, 1000])
def test_cached_holds_no_more_than_its_bytes(max_bytes):
    """The pictures kept alive never add up to more than max_bytes, from many threads too."""
    alive = weakref.WeakSet()

    class Picture(np.ndarray):
        __hash__ = object.__hash__

    class Watched(Coordinates):
        def load(self, index, key):
            picture = super().load(index, key).view(Picture)
            alive.add(picture)
            return picture

    cached = Cached(Watched([(10, 10)] * 20), max_bytes)
    expected = [Coordinates([(10, 10)] * 20).load(i, 'hr') for i in range(20)]
    wrong = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 20, 300):
            if not np.array_equal(cached.load(int(i), 'hr'), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong
    kept = sum(picture.nbytes for picture in alive)
    assert kept <= max_bytes
    assert kept == max_bytes // 300 * 300


def test_cached_tiles_decode_each_picture_once():
    """Cutting every tile of a cached example decodes each of its pictures once, not once a tile."""
    source = Coordinates([(64, 64)])
    tiles = Tiles(Cached(source, 10**6), 16)
    source.loads.clear()
    for i in range(len(tiles)):
        tiles.load(i, 'hr')
        tiles.load(i, 'lr')
    assert max(source.loads.values()) == 1


@pytest.mark.parametrize(
    ('shape', 'size', 'stride', 'tops', 'lefts'),
    [
        ((64, 96), 32, 0, [0, 32], [0, 32, 64]),
        ((64, 96), 32, 16, [0, 16, 32], [0, 16, 32, 48, 64]),
        ((70, 33), 32, 32, [0, 32, 38], [0, 1]),
        ((32, 32), 32, 8, [0], [0]),
        ((40, 100), 16, 30, [0, 24], [0, 30, 60, 84]),
    ],
)
def test_tiles_lie_on_a_grid_that_ends_at_the_border(shape, size, stride, tops, lefts):
    """Tiles start every `stride` pixels, and a last one ends at the border if none does."""
    tiles = Tiles(Coordinates([shape]), size, stride)
    corners = []
    for i in range(len(tiles)):
        tile = tiles.load(i, 'hr')
        assert tile.shape == (size, size, 3)
        corners.append(tuple(tile[0, 0, :2]))
        np.testing.assert_array_equal(tile[-1, -1, :2], tile[0, 0, :2] + size - 1)
        assert tiles.name(i) == f'0000.png @{corners[-1][1]},{corners[-1][0]}'
    assert corners == [(top, left) for top in tops for left in lefts]


def test_tiles_are_labelled_with_their_picture():
    """A tile's label is the picture it was cut from, named as the source names it."""
    tiles = Tiles(Coordinates([(32, 64), (32, 32), (64, 32)]), 32)
    assert tiles.labels.tolist() == [0, 0, 1, 2, 2]
    assert list(tiles.label_names) == ['0000.png', '0001.png', '0002.png']
    for i in range(len(tiles)):
        assert np.all(tiles.load(i, 'hr')[..., 2] == tiles.labels[i])


@pytest.mark.parametrize('shape', [(31, 64), (64, 31)])
@pytest.mark.parametrize('fraction', [0.0, 0.1])
def test_a_picture_smaller_than_a_tile_is_left_out(shape, fraction):
    """A picture that no tile fits in gives none and is named; the others' tiles do not change."""
    tiles = Tiles(Coordinates([(200, 64), shape, (64, 200)]), 32)
    whole = Tiles(Coordinates([(200, 64), (64, 64), (64, 200)]), 32)
    assert tiles.small == [('0001.png', *shape)]
    assert tiles.bad == []
    np.testing.assert_array_equal(tiles.boxes, whole.boxes[whole.labels != 1])
    for part, of_whole in zip(tiles.split(fraction, 0), whole.split(fraction, 0), strict=True):
        kept = whole.boxes[of_whole]
        np.testing.assert_array_equal(tiles.boxes[part], kept[kept[:, 0] != 1])


def test_pictures_all_smaller_than_a_tile_are_an_error():
    """Where no picture has a tile, the error names the largest and its size."""
    with pytest.raises(UserError, match=r'All 2 pictures .*tile_size=32.*0001\.png, is 30x40'):
        Tiles(Coordinates([(10, 90), (40, 30)]), 32)


@pytest.mark.parametrize('keys', [('hr', 'lr'), ('lr', 'hr')])
def test_tiles_of_a_pair_show_the_same_part_of_the_scene(keys):
    """A tile's low-resolution and high-resolution pictures begin and end at the same place."""
    source = Coordinates([(64, 96), (48, 40)], keys)
    tiles = Tiles(source, 16, 8)
    for i in range(len(tiles)):
        high, low = tiles.load(i, 'hr'), tiles.load(i, 'lr')
        assert high.shape[0] == 2 * low.shape[0] == (16 if keys[0] == 'hr' else 32)
        np.testing.assert_array_equal(high[::2, ::2], low)


def held_out_pixels(tiles: Tiles, held_out: np.ndarray) -> list[np.ndarray]:
    masks = [np.zeros(shape, bool) for shape in tiles.source.shapes]
    for picture, top, left in tiles.boxes[held_out]:
        masks[picture][top : top + tiles.tile_size, left : left + tiles.tile_size] = True
    return masks


SHAPES = [(200, 250), (96, 130), (64, 240), (240, 64), (97, 97), (150, 151)]


@pytest.mark.parametrize('stride', [0, 31, 16, 8, 13, 40])
@pytest.mark.parametrize('fraction', [0.05, 0.1, 0.2, 0.4])
def test_no_pixel_of_a_held_out_tile_is_trained_on(fraction, stride):
    """Held-out and training tiles share no pixel."""
    tiles = Tiles(Coordinates(SHAPES), 32, stride)
    for seed in range(10):
        train, held_out = tiles.split(fraction, seed)
        masks = held_out_pixels(tiles, held_out)
        for picture, top, left in tiles.boxes[train]:
            assert not masks[picture][top : top + 32, left : left + 32].any()
        assert len(train) > 0


@pytest.mark.parametrize('stride', [0, 31, 16, 8, 13, 40])
@pytest.mark.parametrize('fraction', [0.05, 0.1, 0.2, 0.4])
def test_every_picture_trains_and_is_held_out(fraction, stride):
    """Every picture of two tiles or more a side gives tiles of both kinds, so classes agree."""
    tiles = Tiles(Coordinates(SHAPES), 32, stride)
    for seed in range(10):
        for part in tiles.split(fraction, seed):
            assert set(tiles.labels[part].tolist()) == set(range(len(SHAPES)))


@pytest.mark.parametrize('fraction', [0.1, 0.2, 0.3])
def test_held_out_part_is_about_the_asked_fraction(fraction):
    """Of a picture of many tiles, about the fraction of its area is held out."""
    tiles = Tiles(Coordinates([(250, 250)]), 10, 5)
    _, held_out = tiles.split(fraction, 0)
    share = held_out_pixels(tiles, held_out)[0].mean()
    # Blocks end on the grid of 5 pixels: up to 5 of at least 79 a side are lost.
    assert 0.85 * fraction < share < 1.02 * fraction


def test_split_is_a_function_of_its_seed():
    """The same seed holds out the same tiles, another seed others, in each picture anew."""
    tiles = Tiles(Coordinates([(200, 200)] * 6), 32, 16)
    first, again, other = (tiles.split(0.1, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert set(first[1]) != set(other[1])
    places = {tuple(tiles.boxes[first[1]][tiles.labels[first[1]] == i][0, 1:]) for i in range(6)}
    assert len(places) > 1


def test_split_of_nothing():
    """A fraction of 0 trains on every tile."""
    tiles = Tiles(Coordinates([(64, 64)]), 32, 16)
    train, held_out = tiles.split(0.0, 0)
    assert train.tolist() == list(range(9))
    assert held_out.tolist() == []


@pytest.mark.parametrize('shape', [(32, 32), (50, 50), (40, 63)])
def test_a_picture_too_small_to_be_split_still_trains(shape):
    """A picture of which no two tiles lie apart is trained on whole or an error, never lost."""
    tiles = Tiles(Coordinates([(200, 200), shape]), 32, 16)
    message, trained = '', []
    try:
        trained = tiles.labels[tiles.split(0.1, 0)[0]]
    except UserError as error:
        message = str(error)
    assert 1 in trained or '0001.png' in message


# The sample and DIV2K.


def test_sample_is_ten_photographs():
    """The embedded sample is ten different colour photographs, each its own class."""
    source = SamplePhotographs()
    assert len(source) == 10
    assert source.labels.tolist() == list(range(10))
    assert len({source.name(i) for i in range(10)}) == 10
    for i in range(10):
        picture = source.load(i, 'image')
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert 300 <= min(picture.shape[:2]) <= max(picture.shape[:2]) <= 1411
        assert picture.std(axis=(0, 1)).min() > 5
        assert source.size(i, 'image') == picture.shape[:2]
        assert not np.array_equal(picture[..., 0], picture[..., 2])


def test_sample_without_its_packages_says_what_to_install(monkeypatch):
    """A sample photograph that is not installed is an error that says what to install."""
    monkeypatch.setattr(
        'byol_jax.sources.sample.PHOTOGRAPHS', {'cat': ('skimage.data', 'no_such_cat.png')}
    )
    with pytest.raises(UserError, match=r'no_such_cat.*scikit-image'):
        SamplePhotographs()


@pytest.fixture
def div2k_folder(tmp_path):
    """The official folders with three pictures of 64x80, 'lr' being every second pixel."""
    root = tmp_path / 'DIV2K'
    for subset, numbers in (('train', (1, 2, 10)), ('valid', (801,))):
        for number in numbers:
            picture = Coordinates([(64, 80)] * 900).load(number % 256, 'hr')
            write(root / f'DIV2K_{subset}_HR/{number:04}.png', picture)
            low = root / f'DIV2K_{subset}_LR_bicubic/X2/{number:04}x2.png'
            write(low, picture[::2, ::2])
            write(root / f'DIV2K_{subset}_LR_bicubic/X4/{number:04}x4.png', picture[::4, ::4])
    return root


@pytest.mark.parametrize('place', ['', 'DIV2K_train_HR', 'DIV2K_train_HR/'])
def test_div2k_folders(div2k_folder, place):
    """The root and the HR folder itself both give all pictures with their X2 partners."""
    source = Div2k(f'{div2k_folder}/{place}', 'train', ('lr', 'hr'))
    assert [source.name(i) for i in range(len(source))] == ['0001.png', '0002.png', '0010.png']
    for i in range(3):
        high, low = source.load(i, 'hr'), source.load(i, 'lr')
        np.testing.assert_array_equal(low, high[::2, ::2])
        assert high[0, 0, 2] == int(source.name(i)[:4])
        assert source.size(i, 'hr') == (64, 80)
        assert source.size(i, 'lr') == (32, 40)


def test_div2k_validation(div2k_folder):
    """The validation split is the `valid` folders."""
    source = Div2k(div2k_folder, 'validation', ('hr', 'hr'))
    assert [source.name(i) for i in range(len(source))] == ['0801.png']
    with pytest.raises(UserError, match=r"'test'.*'train' and 'validation'"):
        Div2k(div2k_folder, 'test', ('hr', 'hr'))


def test_div2k_missing_partner(div2k_folder):
    """A picture without its low-resolution partner is named before training starts."""
    (div2k_folder / 'DIV2K_train_LR_bicubic/X2/0002x2.png').unlink()
    with pytest.raises(UserError, match=r'lacks 1 of 3 pictures, 0002x2\.png'):
        Div2k(div2k_folder, 'train', ('lr', 'hr'))
    assert len(Div2k(div2k_folder, 'train', ('hr', 'hr'))) == 3


def test_div2k_missing_folders(tmp_path):
    """Missing official folders are named, with what lies there instead."""
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


def test_tiles_of_the_sample():
    """The sample config cuts tiles of all ten photographs, and none leaks."""
    config = div2k.get_config('sample')
    data = build_data(config)
    for part in data[:2]:
        assert set(part.labels) == set(range(10))
        assert part.load(0, 'image').shape == (64, 64, 3)
    assert not set(data.train.indices) & set(data.held_out.indices)


def test_unknown_source_suggests_the_nearest():
    """A misspelt data.source is named with the nearest source there is."""
    with pytest.raises(UserError, match=r"data\.source='fodler' .*'folder'"):
        build_data(make_config(source='fodler'))


def test_folder_without_path_says_how_to_give_it():
    """data.source='folder' without a path says which flag is missing."""
    with pytest.raises(UserError, match=r'--config\.data\.path='):
        build_data(make_config(source='folder'))


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
