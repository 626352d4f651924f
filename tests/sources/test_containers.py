"""Metadata never condemns pixels, whatever is in it; the orientation is found in sound metadata."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from pictures import encode, png_chunk, rotated, smooth

from byol_jax.errors import BadPicture
from byol_jax.sources.containers import kind_of, orientation, other_kind
from byol_jax.sources.decode import decode, read_file, read_size

EXIF = rotated(6).tobytes().removeprefix(b'Exif\0\0')
XMP = b'<rdf:Description tiff:Orientation="6"/>'


def jpeg_segment(kind: int, data: bytes) -> bytes:
    return struct.pack('>BBH', 0xFF, kind, len(data) + 2) + data


def riff_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack('<I', len(data)) + data + bytes(len(data) % 2)


# What carries a kind of metadata in each kind of file, by what is put in.
CARRIERS: dict[str, dict[str, Callable[[bytes], bytes]]] = {
    'JPEG': {
        'EXIF': lambda data: jpeg_segment(0xE1, b'Exif\0\0' + data[:60_000]),
        'XMP': lambda data: jpeg_segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0' + data[:60_000]),
        'ICC': lambda data: b''.join(
            jpeg_segment(0xE2, b'ICC_PROFILE\0' + bytes([i + 1, 40]) + data[i * 60_000 :][:60_000])
            for i in range(40)
        ),
        'pictures': lambda data: jpeg_segment(0xE2, b'MPF\0' + data[:60_000]),
        'Photoshop': lambda data: jpeg_segment(0xED, b'Photoshop 3.0\x008BIM' + data[:60_000]),
        'comment': lambda data: jpeg_segment(0xFE, data[:60_000]),
    },
    'PNG': {
        'EXIF': lambda data: png_chunk(b'eXIf', data),
        'XMP': lambda data: png_chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + data),
        'compressed XMP': lambda data: png_chunk(b'iTXt', b'XML:com.adobe.xmp\0\1\0\0\0' + data),
        'EXIF as text': lambda data: png_chunk(b'tEXt', b'Raw profile type exif\0' + data),
        'compressed EXIF': lambda data: png_chunk(b'zTXt', b'Raw profile type exif\0\0' + data),
        'ICC': lambda data: png_chunk(b'iCCP', b'name\0\0' + zlib.compress(data)),
        'raw ICC': lambda data: png_chunk(b'iCCP', data),
        'compressed text': lambda data: png_chunk(b'zTXt', b'Comment\0\0' + zlib.compress(data)),
        'physical size': lambda data: png_chunk(b'pHYs', data),
        'animation': lambda data: png_chunk(b'acTL', data),
        **{
            f'text named {key}': lambda data, key=key: png_chunk(
                b'tEXt', key.encode() + b'\0' + data
            )
            for key in ('exif', 'xmp', 'transparency', 'interlace', 'bbox', 'gamma', 'icc_profile')
        },
    },
    'WEBP': {
        'EXIF': lambda data: riff_chunk(b'EXIF', data),
        'XMP': lambda data: riff_chunk(b'XMP ', data),
        'ICC': lambda data: riff_chunk(b'ICCP', data),
        'unknown': lambda data: riff_chunk(b'junk', data),
    },
}

JUNK = {
    'nothing': b'',
    'text': b'0 0 1 1',
    'noise': np.random.default_rng(0).bytes(999),
    'cut TIFF': EXIF[:9],
    'far TIFF': b'II*\0' + struct.pack('<I', 2**32 - 1) + EXIF[8:],
    'endless TIFF': b'MM\0*\0\0\0\x08' + b'\xff\xff' + bytes(40),
    'texts for numbers': b'II*\0\x08\0\0\0\1\0' + struct.pack('<HHI4s', 0x0112, 2, 2, b'6\0'),
    'two megabytes': bytes(2**21),
}


def with_metadata(encoded: bytes, file_format: str, added: bytes, behind: bool = False) -> bytes:
    """A file with a piece of metadata, in front of its pixels or, in a PNG or WebP, behind them."""
    if file_format == 'JPEG':
        return encoded[:2] + added + encoded[2:]
    if file_format == 'PNG':
        place = encoded.index(b'IEND' if behind else b'IDAT') - 4
        return encoded[:place] + added + encoded[place:]
    # VP8X declares all kinds of metadata; 12 bytes of header and the lossless picture follow.
    size = struct.pack('<I', 31)[:3] + struct.pack('<I', 23)[:3]
    extended = riff_chunk(b'VP8X', b'\x2c\0\0\0' + size)
    parts = [encoded[12:], added] if behind else [added, encoded[12:]]
    body = b'WEBP' + extended + b''.join(parts)
    return b'RIFF' + struct.pack('<I', len(body)) + body


@pytest.mark.parametrize('junk', JUNK)
@pytest.mark.parametrize('file_format', CARRIERS)
def test_metadata_never_condemns_pixels(tmp_path, file_format, junk):
    """Junk in any place for metadata changes neither pixels nor size, and raises nothing."""
    encoded = encode(smooth(), file_format, **({'lossless': True} if file_format == 'WEBP' else {}))
    expected = decode(encoded, 'clean', 1)
    path = tmp_path / 'x.bin'
    for name, carrier in CARRIERS[file_format].items():
        for behind in (False, True):
            data = with_metadata(encoded, file_format, carrier(JUNK[junk]), behind)
            path.write_bytes(data)
            np.testing.assert_array_equal(read_file(path, 1), expected, err_msg=name)
            assert read_size(path, 1) == (24, 32), name


@pytest.mark.parametrize('behind', [False, True])
def test_a_png_chunk_of_metadata_with_a_wrong_checksum_is_nothing(behind):
    """It neither condemns the pixels nor turns them."""
    chunk = bytearray(png_chunk(b'eXIf', EXIF))
    chunk[-1] ^= 1
    data = with_metadata(encode(smooth(), 'PNG'), 'PNG', bytes(chunk), behind)
    np.testing.assert_array_equal(decode(data, 'x', 1), smooth())


SOUND = {
    ('JPEG', 'EXIF'): EXIF,
    ('JPEG', 'XMP'): XMP,
    ('PNG', 'EXIF'): EXIF,
    ('PNG', 'XMP'): XMP,
    ('PNG', 'compressed XMP'): zlib.compress(XMP),
    ('PNG', 'EXIF as text'): b'\nexif\n  26\n' + EXIF.hex().encode(),
    ('PNG', 'compressed EXIF'): zlib.compress(b'\nexif\n  26\n' + EXIF.hex().encode()),
    ('WEBP', 'EXIF'): EXIF,
    ('WEBP', 'XMP'): XMP,
}


@pytest.mark.parametrize(('file_format', 'carrier'), SOUND)
def test_junk_does_not_hide_the_orientation(file_format, carrier):
    """A picture is turned by its EXIF or XMP, whatever other metadata stand before that."""
    encoded = encode(smooth(), file_format, **({'lossless': True} if file_format == 'WEBP' else {}))
    expected = np.rot90(decode(encoded, 'clean', 1), -1)
    carriers = CARRIERS[file_format]
    added = carriers[carrier](SOUND[file_format, carrier])
    others = [name for name in carriers if 'EXIF' not in name and 'XMP' not in name]
    junk = b''.join(carriers[name](JUNK['noise']) for name in others)
    data = with_metadata(encoded, file_format, junk + added)
    np.testing.assert_array_equal(decode(data, 'x', 1), expected)


@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize(('kind', 'code'), [(1, 'B'), (3, 'H'), (4, 'I')])
def test_orientation_of_exif(order, kind, code):
    """Either byte order and each integer type is read; what is no orientation, or a text, is 1."""
    mark = {'<': b'II*\0', '>': b'MM\0*'}[order]

    def tiff(tag: int, kind: int, value: bytes) -> bytes:
        head = mark + struct.pack(order + 'IH', 8, 1)
        return head + struct.pack(order + 'HHI', tag, kind, 1) + value.ljust(4, b'\0')

    for value in (1, 6, 8):
        exif = tiff(0x0112, kind, struct.pack(order + code, value))
        assert orientation(exif) == orientation(b'Exif\0\0' + exif) == value
        # EXIF goes before XMP, which is asked where EXIF says nothing.
        assert orientation(exif, b'tiff:Orientation="3"') == value
        assert orientation(tiff(0x0111, kind, b'\6'), b'<tiff:Orientation>3<') == 3
    assert orientation(tiff(0x0112, 2, b'6')) == 1


def test_text_beyond_its_limit_is_not_unpacked():
    """XMP that would unpack to 64 MB takes a few of memory, and is read in part."""
    chunk = CARRIERS['PNG']['compressed XMP'](zlib.compress(XMP + bytes(2**26)))
    data = with_metadata(encode(smooth(), 'PNG'), 'PNG', chunk)
    tracemalloc.start()
    assert decode(data, 'x', 1).shape == (32, 24, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_a_webp_cut_in_its_metadata_has_its_pixels():
    """What is cut off behind the pixels is no loss; in the pixels it is."""
    encoded = encode(smooth(), 'WEBP', lossless=True)
    data = with_metadata(encoded, 'WEBP', riff_chunk(b'XMP ', bytes(500)), behind=True)
    np.testing.assert_array_equal(decode(data[:-300], 'x', 1), smooth())
    with pytest.raises(BadPicture, match='x cannot be decoded'):
        decode(data[:-600], 'x', 1)


KINDS = {
    'TIFF': encode(smooth(), 'TIFF'),
    'JPEG 2000': encode(smooth(), 'JPEG2000'),
    'Netpbm': encode(smooth(), 'PPM'),
    'DDS': encode(smooth(), 'DDS'),
    'AVIF': b'\0\0\0\x1cftypavif\0\0\0\0' + bytes(50),
    'HEIC': b'\0\0\0\x18ftypheic\0\0\0\0' + bytes(50),
    'JPEG XL': b'\xff\x0a' + bytes(50),
    'Photoshop': b'8BPS\0\1' + bytes(50),
    'DICOM': bytes(128) + b'DICM' + bytes(50),
    'SVG': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
}


@pytest.mark.parametrize('kind', KINDS)
def test_sound_files_of_other_kinds_are_told_to_be_converted(tmp_path, kind):
    """A file of a kind that is not read is named with its kind, and nobody is to mend it."""
    path = tmp_path / 'x.png'
    path.write_bytes(KINDS[kind])
    assert kind_of(KINDS[kind]) == ''
    assert other_kind(KINDS[kind]) == kind
    for read in (read_file, read_size):
        with pytest.raises(BadPicture) as caught:
            read(path, 1)
        assert caught.value.reason == f'is of a kind that is not read here ({kind})'
        assert 'Convert it' in str(caught.value)
        assert 'Mend' not in str(caught.value)


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'WEBP', 'GIF', 'BMP'])
def test_kinds_that_are_read(file_format):
    """Each kind is told by its first bytes."""
    assert kind_of(encode(smooth(), file_format)).upper() == file_format
