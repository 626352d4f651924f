"""Image files of every kind become upright RGB pictures, or errors that name them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from pictures import encode, png_chunk, png_that_declares, rotated, smooth
from PIL import Image

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.decode import decode, decode_plain, decoding, read_file, read_size
from byol_jax.sources.jpeg import bare_jpeg

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
    """A picture with one bit for each pixel becomes black and white."""
    bits = np.array([[True, False, True]])
    decoded = decode(encode(Image.fromarray(bits), 'PNG'), 'x', 1)
    np.testing.assert_array_equal(decoded[..., 1], [[255, 0, 255]])


def test_cmyk_jpeg():
    """CMYK inks become the light that they leave: (255 - ink) (255 - black) / 255."""
    inks = np.array([200, 30, 90, 40])
    image = Image.fromarray(np.full((16, 16, 4), inks, np.uint8), 'CMYK')
    decoded = decode(encode(image, 'JPEG', quality=100), 'x', 1)
    expected = (255 - inks[:3]) * (255 - inks[3]) / 255
    # JPEG's loss on a plain picture, and rounding.
    np.testing.assert_allclose(decoded, np.broadcast_to(expected, decoded.shape), atol=3)


def test_palette():
    """A palette picture gets its palette's colours."""
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
    """RGBA becomes colour x alpha: transparent pixels are black, whatever colour they hide."""
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
    """A PNG's one transparent colour becomes black, like any alpha of 0."""
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
    """The chunk with the orientation may come before or after the pixels: the picture is upright,
    and its size is that of the upright picture.
    """
    encoded = encode(smooth(), 'PNG')
    place = encoded.index(b'IEND' if behind else b'IDAT') - 4
    path = tmp_path / 'x.png'
    whole = encoded[:place] + png_chunk(*QUARTER_TURNS[where]) + encoded[place:]
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_file(path, 1), TURNS[6](smooth()))
    assert read_size(path, 1) == (32, 24)
    # A file that is cut off anywhere is bad, or has the size of its picture.
    for length in range(place - 20, len(whole), 5):
        path.write_bytes(whole[:length])
        with contextlib.suppress(BadPicture):
            assert read_size(path, 1) == read_file(path, 1).shape[:2]


def test_the_second_frame_of_a_png_does_not_turn_the_first(tmp_path):
    """In an animation, an orientation after the second frame's pixels does not affect the first."""
    first, second = (Image.fromarray(smooth()[::step]) for step in (1, -1))
    encoded = encode(first, 'PNG', save_all=True, append_images=[second])
    place = encoded.index(b'IEND') - 4
    path = tmp_path / 'x.png'
    path.write_bytes(encoded[:place] + png_chunk(*QUARTER_TURNS['EXIF']) + encoded[place:])
    assert read_size(path, 1) == read_file(path, 1).shape[:2] == (24, 32)


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'PNG with a date', 'WEBP', 'BMP'])
def test_read_size_needs_the_header_alone(tmp_path, monkeypatch, file_format):
    """read_size decodes no pixels: the tiles of 800 large pictures are listed at once.

    Text without an orientation after the pixels changes nothing.
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
    """The first frame of an animated file is taken."""
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (40, 250)]
    options = {'lossless': True} if file_format == 'WEBP' else {}
    encoded = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.n_frames == 2
    np.testing.assert_array_equal(decode(encoded, 'x', 1), 40)


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'WEBP', 'BMP'])
def test_truncated_files_are_named(file_format):
    """A file that is cut short anywhere is an error with its name, never a half grey picture."""
    encoded = encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), file_format)
    for length in range(1, len(encoded) // 2, 97):
        with pytest.raises(UserError, match=r'holiday/1\.jpg'):
            decode(encoded[:length], 'holiday/1.jpg', 1)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'WEBP', 'BMP'])
def test_damaged_files_decode_or_are_named(tmp_path, file_format):
    """Flipped bytes give a picture or a UserError, and no other exception."""
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
    """An empty file or a text file named .jpg is an error with its path, for picture and size."""
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
    """Only max_megapixels is a limit, also above the 179 megapixels that Pillow allows."""
    path = tmp_path / 'map.bmp'
    header = struct.pack('<2sIIIIiiHHIIiiII', b'BM', 54, 0, 54, 40, 14_000, 14_000, 1, 24, *[0] * 6)
    path.write_bytes(header)
    assert read_size(path, 200) == (14_000, 14_000)
    with pytest.raises(UserError, match=r'map\.bmp declares 14000x14000'):
        read_size(path, 190)


PLAIN = ({}, {'subsampling': 0}, {'quality': 30, 'optimize': True}, {'restart_marker_blocks': 2})


def picture(height: int = 41, width: int = 67) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([rows * 5, columns * 3, rows + columns], -1) % 256
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, 'JPEG', **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray | None:
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
    except (OSError, SyntaxError, ValueError):
        return None


@pytest.mark.parametrize('options', PLAIN)
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_plain_jpegs_have_pillows_pixels(mode, options):
    """Baseline JPEGs, grey or in colour, are recognised as plain and get Pillow's pixels."""
    data = jpeg(picture().convert(mode), **options)
    found = bare_jpeg(io.BytesIO(data), False)
    assert found.plain == (67, 41)
    np.testing.assert_array_equal(decode_plain(found), by_pillow(data))
    np.testing.assert_array_equal(decode(data, 'x', 1), by_pillow(data))


def test_damage_is_refused_as_pillow_refuses_it():
    """Of files damaged at random those that Pillow refuses are bad, and of the others only those
    whose data ends early, which Pillow fills up; the pixels of the rest agree."""
    rng = np.random.default_rng(0)
    plain = refused = early = 0
    reasons = set()
    for number in range(400):
        data = bytearray(jpeg(**PLAIN[number % len(PLAIN)]))
        place = int(rng.integers(len(data)))
        if number % 3 == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif number % 3 == 1:
            del data[place : place + int(rng.integers(1, 200))]
        else:
            data[place : place + 50] = bytes(50)
        damaged = bytes(data)
        expected = by_pillow(damaged)
        plain += bare_jpeg(io.BytesIO(damaged), False).plain is not None
        try:
            found = decode(damaged, 'x', 1)
        except BadPicture as error:
            refused += expected is None
            if expected is not None:
                reasons.add(re.sub(r'[\d,]+', 'n', error.reason))
                early += 1
        else:
            # Where the last square of 16 pixels lacks a bit, that is made up in another way.
            differing = np.argwhere(np.any(found != expected, axis=-1))
            assert len(differing) <= 16 * 16
            assert not len(differing) or differing.min(axis=0)[0] >= 41 // 16 * 16
    assert plain > 100
    assert refused > 50
    assert 0 < early < 100
    assert reasons == {
        'cannot be decoded: image file is truncated (n bytes not processed)',
        'lacks n of its n restart markers',
    }


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    """A plain JPEG that declares more than data.max_megapixels is not decoded."""
    monkeypatch.setattr('byol_jax.sources.decode.decode_plain', None)
    with pytest.raises(BadPicture, match='max_megapixels'):
        decode(jpeg(), 'x', 0.001)


# Whatever a decoder raises.


class OddError(Exception):
    """A type that nobody has heard of."""


ODD = (OddError('odd'), TypeError('not a str'), KeyError('bbox'), AssertionError(), MemoryError())
ODD += (RecursionError('deep'), zlib.error('Error -3'), struct.error('short'), StopIteration())


@pytest.mark.parametrize('odd', ODD, ids=lambda odd: type(odd).__name__)
@pytest.mark.parametrize('method', ['_open', 'load'])
def test_whatever_a_decoder_raises_is_the_files(tmp_path, monkeypatch, method, odd):
    """An exception of any type, when a file is opened or decoded, makes that file bad."""

    def fail(self):
        raise odd

    path = tmp_path / 'odd.png'
    path.write_bytes(encode(smooth(), 'PNG'))
    monkeypatch.setattr(f'PIL.PngImagePlugin.PngImageFile.{method}', fail)
    for read in (read_file, read_size) if method == '_open' else (read_file,):
        with pytest.raises(BadPicture, match='cannot be') as caught:
            read(path, 1)
        assert caught.value.file == str(path)
        # Pillow has turned some types into others by itself.
        assert type(odd).__name__ in str(caught.value) or str(odd) in str(caught.value)


@pytest.mark.parametrize('stop', [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_error_passes_a_decoder(stop):
    """Ctrl-C in a decoder ends the run and condemns no file."""
    with pytest.raises(stop), decoding('x'):
        raise stop


UNTOUCHED = """
import io
import cv2, numpy as np
from PIL import Image, ImageFile
def settings():
    return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, cv2.getNumThreads()
cv2.setNumThreads(3)
before = settings()
import byol_jax
from byol_jax import evaluation, interop, methods, models, sources, training, views
from byol_jax.sources import Files
from byol_jax.sources.decode import decode
file = io.BytesIO()
Image.new('RGB', (40, 30)).save(file, 'PNG')
open('x.png', 'wb').write(file.getvalue())
batch = next(iter(byol_jax.view_batches(
    Files(['x.png', 'x.png']), views.paper_views(8), batch_size=2, seed=0, stop_step=1)))
assert batch['view1'].shape == (2, 8, 8, 3)
assert settings() == before, (settings(), before)
# Somebody's own limit of pixels stays theirs, and is none of ours.
Image.MAX_IMAGE_PIXELS = 10
decode(file.getvalue(), 'x', 1)
assert Image.MAX_IMAGE_PIXELS == 10
"""


def test_settings_of_the_process_are_left_alone(tmp_path):
    """Neither importing the library nor making views changes what Pillow and OpenCV do for the rest
    of a program."""
    done = subprocess.run(
        [sys.executable, '-c', UNTOUCHED],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
