"""Plain JPEGs decoded by OpenCV are what Pillow makes of them, and damage is left to Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from byol_jax.errors import BadPicture
from byol_jax.sources.decode import Header, decode, decode_plain, plain_jpeg

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
    """Baseline JPEGs, grey or in colour, are known as plain and get the pixels of Pillow."""
    data = jpeg(picture().convert(mode), **options)
    assert plain_jpeg(data) == Header(67, 41)
    np.testing.assert_array_equal(decode_plain(data), by_pillow(data))
    np.testing.assert_array_equal(decode(data, 'x', 1), by_pillow(data))


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'\xff\xd8\xff\xd9',
        jpeg(progressive=True),
        jpeg(picture().convert('CMYK')),
        jpeg(exif=b'Exif\0\0' + b'II*\0\x08\0\0\0\0\0'),
        jpeg()[:-1],
        jpeg()[:400],
        jpeg() + b'\0',
        jpeg()[:-2] + b'\xff\xd8\xff\xd9',
    ],
    ids=['empty', 'hollow', 'progressive', 'cmyk', 'exif', 'cut', 'header', 'longer', 'two'],
)
def test_other_files_are_left_to_pillow(data):
    """Whatever may need more than plain decoding, or is not whole, is not known as plain."""
    assert plain_jpeg(data) is None


def test_damage_is_refused_as_pillow_refuses_it():
    """Of files damaged at random those that Pillow refuses are bad, and no others; pixels agree."""
    rng = np.random.default_rng(0)
    plain = refused = 0
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
        plain += plain_jpeg(damaged) is not None
        try:
            found = decode(damaged, 'x', 1)
        except BadPicture:
            assert expected is None
            refused += 1
        else:
            np.testing.assert_array_equal(found, expected)
    assert plain > 100
    assert refused > 50


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    """A plain JPEG that declares more than data.max_megapixels is not decoded."""
    monkeypatch.setattr('byol_jax.sources.decode.decode_plain', None)
    with pytest.raises(BadPicture, match='max_megapixels'):
        decode(jpeg(), 'x', 0.001)
