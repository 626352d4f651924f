"""Image files without their metadata: what a decoder needs for the pixels, and which side is up.

Metadata never condemns pixels: EXIF, XMP, ICC profiles and text of any kind, damaged or not, are
left out of what a decoder gets to see, since decoders fail over some of it, and take some PNG texts
for settings of their own. The one thing that matters, the orientation, is read here; whatever
cannot be understood says nothing about it.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import IO, NamedTuple

# What a file holds is told by its first bytes, not by its name. Of these kinds pictures are read.
_SIGNATURES = (
    ('JPEG', 0, b'\xff\xd8\xff'),
    ('PNG', 0, b'\x89PNG\r\n\x1a\n'),
    ('WebP', 8, b'WEBPVP8'),
    ('GIF', 0, b'GIF87a'),
    ('GIF', 0, b'GIF89a'),
    ('BMP', 0, b'BM'),
)
# Sound pictures of these kinds are no fault of anybody; a message names the kind.
_OTHERS = (
    ('TIFF', 0, b'II*\0'),
    ('TIFF', 0, b'MM\0*'),
    ('BigTIFF', 0, b'II+\0'),
    ('BigTIFF', 0, b'MM\0+'),
    ('AVIF', 4, b'ftypavif'),
    ('AVIF', 4, b'ftypavis'),
    ('HEIC', 4, b'ftyphei'),
    ('HEIC', 4, b'ftyphev'),
    ('HEIC', 4, b'ftypmif1'),
    ('HEIC', 4, b'ftypmsf1'),
    ('JPEG XL', 0, b'\xff\x0a'),
    ('JPEG XL', 0, b'\0\0\0\x0cJXL '),
    ('JPEG 2000', 0, b'\0\0\0\x0cjP  '),
    ('JPEG 2000', 0, b'\xff\x4f\xff\x51'),
    ('Photoshop', 0, b'8BPS'),
    ('OpenEXR', 0, b'v/1\x01'),
    ('Radiance HDR', 0, b'#?RADIANCE'),
    ('QOI', 0, b'qoif'),
    ('DDS', 0, b'DDS '),
    ('FITS', 0, b'SIMPLE  ='),
    ('PDF', 0, b'%PDF'),
    ('SVG', 0, b'<svg'),
    ('DICOM', 128, b'DICM'),
    *(('Netpbm', 0, b'P%d%c' % (number, space)) for number in range(1, 7) for space in b' \n'),
)
# Bytes that tell the kind.
SNIFFED = 132

# Metadata that is read, at most: XMP of a picture is a few kilobytes.
_MOST_BYTES = 2**20


class Bare(NamedTuple):
    """An image file without its metadata.

    Attributes:
      data: what is left, which decodes to the same pixels.
      orientation: which side is up, as EXIF numbers it; 1 where nothing says otherwise.
      plain: (width, height), pixels, if it is a JPEG of the most usual kind (see `jpeg`).
      lacks: what is missing, a phrase that follows the file's name; ''.
    """

    data: bytes
    orientation: int = 1
    plain: tuple[int, int] | None = None
    lacks: str = ''


def kind_of(start: bytes) -> str:
    """The kind of image file that begins with some bytes; '' for none that can be read.

    Args:
      start: the first `SNIFFED` bytes of the file, or all of it.
    """
    return _named(start, _SIGNATURES)


def other_kind(start: bytes) -> str:
    """The kind of a file that may well be sound, and is not read here; '' for none that is known.

    Args:
      start: see `kind_of`.
    """
    return _named(start, _OTHERS)


def _named(start: bytes, signatures: tuple[tuple[str, int, bytes], ...]) -> str:
    for kind, offset, signature in signatures:
        if start[offset : offset + len(signature)] == signature:
            return kind
    return ''


# Orientation.

# TIFF 6.0, Section 2: integer types that a tag may have, and EXIF 2.32, Table 4: the tag.
_INTEGERS = {1: 'B', 3: 'H', 4: 'I'}
_ORIENTATION = 0x0112
_EXIF_PREFIX = re.compile(rb'(Exif\0\0){0,2}')
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def orientation(exif: bytes, xmp: bytes = b'') -> int:
    """The orientation that EXIF gives or, where it has none, XMP; 1 if neither can be understood.

    Args:
      exif: a TIFF structure, perhaps with 'Exif' and two zeros before it.
      xmp: text.
    """
    found = _exif_orientation(exif[_EXIF_PREFIX.match(exif).end() :])  # type: ignore[union-attr]
    if found is None:
        match = _XMP_ORIENTATION.search(xmp)
        found = int(match[1]) if match else 1
    return found


def _exif_orientation(tiff: bytes) -> int | None:
    order = {b'II*\0': '<', b'MM\0*': '>'}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return None
    (start,) = struct.unpack_from(order + 'I', tiff, 4)
    entries = tiff[start + 2 :]
    count = int.from_bytes(tiff[start : start + 2], 'little' if order == '<' else 'big')
    found = None
    for place in range(0, 12 * min(count, len(entries) // 12), 12):
        tag, kind, number = struct.unpack_from(order + 'HHI', entries, place)
        if tag == _ORIENTATION and kind in _INTEGERS and number == 1:
            (found,) = struct.unpack_from(order + _INTEGERS[kind], entries, place + 8)
    return found


# PNG 3rd edition, 5.2 and 5.3: a signature, then chunks of length, type, data and checksum. A text
# chunk begins with a keyword and a 0; these two hold XMP, and EXIF as ImageMagick writes it.

_PNG_SIGNATURE, _PNG_CHUNK, _PNG_CHECKSUM = 8, struct.Struct('>I4s'), 4
_PNG_END = b'\0\0\0\0IEND\xaeB`\x82'
_PNG_TEXTS = (b'iTXt', b'tEXt', b'zTXt')
_PNG_XMP, _PNG_EXIF = b'XML:com.adobe.xmp\0', b'Raw profile type exif\0'
_PNG_KEYWORD = max(len(_PNG_XMP), len(_PNG_EXIF))
# Lines in front of the hexadecimal digits: an empty one, the name, the number of bytes.
_PNG_EXIF_LINES = 3


def bare_png(file: IO[bytes], header: bool) -> Bare:
    """Reads a PNG without its metadata.

    Args:
      file: at its beginning.
      header: read only what precedes the pixels, and the orientation, wherever it stands.
    """
    kept = [file.read(_PNG_SIGNATURE)]
    found: dict[bytes, bytes] = {}
    pixels = False
    while len(head := file.read(_PNG_CHUNK.size)) == _PNG_CHUNK.size:
        length, kind = _PNG_CHUNK.unpack(head)
        start = file.tell()
        if kind == b'IEND' or (pixels and kind == b'fcTL'):
            break  # The next frame of an animation follows, of which the first is taken.
        if kind == b'IDAT':
            if header:
                kept += [] if pixels else [head]
            else:
                kept += [head, file.read(length + _PNG_CHECKSUM)]
            pixels = True
            if b'eXIf' in found and header:
                break
        elif not kind.isalpha():
            # No chunk begins here: behind the pixels that is no matter, else the decoder says what
            # is wrong.
            kept += [] if pixels else [head, file.read(0 if header else -1)]
            break
        elif kind == b'tRNS' or kind[:1].isupper():
            kept += [head, file.read(length + _PNG_CHECKSUM)]
        elif kind == b'eXIf' or kind in _PNG_TEXTS:
            _note_png(file, kind, length, found)
        file.seek(start + length + _PNG_CHECKSUM)
    if pixels and not header:
        kept.append(_PNG_END)
    exif = found.get(b'eXIf', found.get(_PNG_EXIF, b''))
    return Bare(b''.join(kept), orientation(exif, found.get(_PNG_XMP, b'')))


def _note_png(file: IO[bytes], kind: bytes, length: int, found: dict[bytes, bytes]) -> None:
    """Notes the EXIF or XMP of a chunk, if it holds any and its checksum is right."""
    data = file.read(min(length, _PNG_KEYWORD))
    keyword = next((word for word in (_PNG_XMP, _PNG_EXIF) if data.startswith(word)), None)
    if length > _MOST_BYTES or (kind != b'eXIf' and keyword is None):
        return
    data += file.read(length - len(data))
    if file.read(_PNG_CHECKSUM) != struct.pack('>I', zlib.crc32(kind + data)):
        return
    if keyword is None:
        found[b'eXIf'] = data
        return
    text = _png_text(kind, data[len(keyword) :])
    if keyword == _PNG_EXIF:
        digits = b''.join(text.split(b'\n')[_PNG_EXIF_LINES:])
        found[keyword] = _from_hex(digits)
    else:
        found[keyword] = text


def _png_text(kind: bytes, rest: bytes) -> bytes:
    """The text of a chunk, from what follows its keyword; b'' if it cannot be read."""
    compressed = kind == b'zTXt'
    if kind == b'iTXt':
        # A flag, the method; then the language and the translated keyword, each with a 0.
        compressed = rest[:1] == b'\1'
        rest = b''.join(rest[2:].split(b'\0', 2)[2:])
    elif compressed:
        rest = rest[1:]
    if not compressed:
        return rest
    try:
        return zlib.decompressobj().decompress(rest, _MOST_BYTES)
    except zlib.error:
        return b''


def _from_hex(digits: bytes) -> bytes:
    try:
        return bytes.fromhex(digits.decode('ascii', 'replace'))
    except ValueError:
        return b''


# WebP: RFC 9649, 2.3 to 2.7. RIFF, the size of what follows, 'WEBP'; then chunks of type, size and
# data, padded to an even number of bytes.

_RIFF = struct.Struct('<4sI4s')
_RIFF_CHUNK = struct.Struct('<4sI')
_WEBP_METADATA = (b'EXIF', b'XMP ', b'ICCP')
# The bits of VP8X that are not about metadata: alpha, animation.
_WEBP_FLAGS = 0x12


def bare_webp(file: IO[bytes], header: bool) -> Bare:
    """Reads a WebP without its metadata.

    Args:
      file: at its beginning.
      header: makes no difference: the decoder wants all of it.
    """
    data = file.read()
    # Behind the size that the file declares decoders read nothing.
    data = data[: 8 + int.from_bytes(data[4:8], 'little')]
    found: dict[bytes, bytes] = {}
    kept, at = [], _RIFF.size
    while at + _RIFF_CHUNK.size <= len(data):
        kind, length = _RIFF_CHUNK.unpack_from(data, at)
        end = at + _RIFF_CHUNK.size + length + length % 2
        if kind in _WEBP_METADATA:
            found.setdefault(kind, data[at + _RIFF_CHUNK.size :][:length])
        elif kind == b'VP8X':
            flags = bytes(each & _WEBP_FLAGS for each in data[at + 8 : min(at + 9, end)])
            kept += [data[at : at + 8], flags, data[at + 9 : end]]
        else:
            kept.append(data[at:end])
        at = end
    body = b''.join(kept)
    # What is cut off in the metadata still holds its pixels; in these, the decoder sees it.
    return Bare(
        _RIFF.pack(b'RIFF', 4 + len(body), b'WEBP') + body,
        orientation(found.get(b'EXIF', b''), found.get(b'XMP ', b'')),
    )
