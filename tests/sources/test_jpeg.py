"""A JPEG is whole or it is bad; what is whole keeps its pixels."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from pictures import encode, rotated, smooth
from PIL import Image

from byol_jax.errors import BadPicture
from byol_jax.sources.decode import decode, read_file, read_size
from byol_jax.sources.jpeg import bare_jpeg

END = b'\xff\xd9'


def picture(height: int = 80, width: int = 112) -> Image.Image:
    """Smooth colours and noise, so that every square takes some bytes."""
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    return Image.fromarray(np.clip(smooth(height, width) + noise, 0, 255).astype(np.uint8))


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert('RGB'))


VARIANTS = {
    'plain': {},
    'full colour': {'subsampling': 0},
    'restarts': {'restart_marker_blocks': 3},
    'fine': {'quality': 98},
    'EXIF': {'exif': rotated(1)},
    'progressive': {'progressive': True},
    'grey': {},
    'CMYK': {},
}


def variant(name: str, image: Image.Image | None = None) -> bytes:
    image = image or picture()
    modes = {'grey': 'L', 'CMYK': 'CMYK'}
    return encode(image.convert(modes.get(name, 'RGB')), 'JPEG', **VARIANTS[name])


@pytest.mark.parametrize('height', [1, 8, 15, 16, 17, 80])
@pytest.mark.parametrize('name', VARIANTS)
def test_whole_files_keep_their_pixels(name, height):
    """Of whatever size and kind, a whole file has the pixels that Pillow finds in it."""
    for width in (1, 9, 33, 112):
        data = variant(name, picture(height, width))
        np.testing.assert_array_equal(decode(data, 'x', 1), by_pillow(data))


@pytest.mark.parametrize('share', [0.3, 0.6, 0.9])
@pytest.mark.parametrize('name', [name for name in VARIANTS if name != 'progressive'])
def test_a_file_that_ends_early_is_bad(name, share):
    """Cut, and closed by an end marker, it looks whole to Pillow, which fills it up with grey."""
    data = variant(name)
    start = data.index(b'\xff\xda')
    short = data[: start + int(share * (len(data) - start))].rstrip(b'\xff') + END
    assert by_pillow(short).shape == (80, 112, 3)
    for ending in (b'', b'trailing bytes', b'\xff\xd8\xff\xe0'):
        with pytest.raises(BadPicture, match=r'x (cannot be decoded.*truncated|lacks \d+ of its)'):
            decode(short + ending, 'x', 1)


def test_a_progressive_file_that_ends_in_its_means_is_bad():
    """A progressive file is a grey picture until the means of its squares are all there."""
    data = variant('progressive')
    scans = [match.start() for match in re.finditer(b'\xff\xda', data)]
    assert len(scans) > 5
    for end in (scans[0] + 100, scans[1]):
        # libjpeg takes either for a whole picture.
        assert by_pillow(data[:end] + END).shape == (80, 112, 3)
        with pytest.raises(BadPicture, match='x ends before'):
            decode(data[:end] + END, 'x', 1)


def test_a_file_without_a_component_is_bad():
    """A scan of one component of three leaves the others grey."""
    data = bytearray(variant('plain'))
    scan = data.index(b'\xff\xda')
    # Ss, of one component: length 8, count 1, its name and tables, all coefficients.
    short = data[:scan] + b'\xff\xda\0\x08\1\1\0\0\x3f\0' + data[scan + 14 :]
    with pytest.raises(BadPicture, match='x ends before 2 of its 3 components'):
        decode(bytes(short), 'x', 1)


def test_a_lost_restart_interval_is_bad():
    """A part between two restart markers that is cut out shows as grey, or shifts what follows."""
    data = variant('restarts')
    marks = [match.start() for match in re.finditer(rb'\xff[\xd0-\xd7]', data)]
    with pytest.raises(BadPicture, match=f'x lacks 2 of its {len(marks)} restart markers'):
        decode(data[: marks[3]] + data[marks[5] :], 'x', 1)


def test_bytes_behind_the_end_do_not_matter():
    """What follows the end, such as a film or a second picture, is not looked at."""
    data = variant('plain')
    np.testing.assert_array_equal(decode(data + data + b'film', 'x', 1), by_pillow(data))


def test_bytes_of_filling_before_markers_are_allowed(tmp_path):
    """Any number of 0xFF may stand before a marker; EXIF behind them still turns the picture."""
    data = encode(picture(), 'JPEG', exif=rotated(6))
    at = data.index(b'\xff\xe1')
    path = tmp_path / 'x.jpg'
    path.write_bytes(data[:at] + b'\xff' * 5 + data[at:])
    np.testing.assert_array_equal(read_file(path, 1), np.rot90(by_pillow(data), -1))
    assert read_size(path, 1) == (112, 80)


@pytest.mark.parametrize(
    'ending', [b'', b'\xff', b'\xff\xff\xff', b'\xff\xda', b'\xff\xe1\0', b'ab']
)
def test_headers_that_lead_nowhere_are_bad(tmp_path, ending):
    """A header that is cut off, or followed by what is no segment, is a bad file by its name."""
    path = tmp_path / 'x.jpg'
    path.write_bytes(b'\xff\xd8\xff\xe0\0\x04ab' + ending)
    for read in (read_file, read_size):
        with pytest.raises(BadPicture, match=r'x\.jpg cannot be'):
            read(path, 1)


@pytest.mark.parametrize(
    ('data', 'plain'),
    [
        (variant('plain'), (112, 80)),
        (variant('grey'), (112, 80)),
        (variant('EXIF'), (112, 80)),
        (variant('restarts'), (112, 80)),
        (variant('plain') + b'behind', (112, 80)),
        (variant('progressive'), None),
        (variant('CMYK'), None),
        (variant('plain')[:-1], None),
        (variant('plain')[:600], None),
        (b'\xff\xd8\xff\xd9', None),
    ],
    ids=[
        'plain',
        'grey',
        'EXIF',
        'restarts',
        'longer',
        'progressive',
        'CMYK',
        'cut',
        'header',
        '-',
    ],
)
def test_plain_files(data, plain):
    """Baseline JPEGs of one scan are plain, whatever metadata they hold; nothing else is."""
    assert bare_jpeg(io.BytesIO(data), False).plain == plain
