"""Decodes image files of any format and mode to uint8 RGB arrays."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from byol_jax.errors import BadPicture
from byol_jax.files import not_a_file

# Pillow's own limit would refuse large pictures; `opened` checks data.max_megapixels instead.
Image.MAX_IMAGE_PIXELS = None

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')
# The formats that Pillow may open; it tells them by a file's first bytes, not by its name.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF')
# Loads the readers of all formats now; Pillow would do it in the middle of a run, when it first
# fails to open a file.
Image.init()

# The EXIF tag of the orientation, and the transposition that turns each orientation upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations that swap height and width.
_QUARTER_TURNS = (5, 6, 7, 8)

# PNG 3rd edition, 5.2 and 5.3: a signature, then chunks of length, type, data and checksum. A text
# chunk begins with a keyword and a 0; these two hold XMP, and EXIF as ImageMagick writes it.
_PNG_SIGNATURE, _PNG_CHUNK, _PNG_CHECKSUM = 8, struct.Struct('>I4s'), 4
_PNG_TEXTS = (b'iTXt', b'tEXt', b'zTXt')
_PNG_ORIENTED = (b'XML:com.adobe.xmp\0', b'Raw profile type exif\0')
_PNG_KEYWORD = max(map(len, _PNG_ORIENTED))

# OpenCV decodes plain JPEGs, in two thirds of Pillow's time and to the same pixels. It also decodes
# some damaged files that Pillow refuses, so it gets only files whose markers show that they are
# whole: of 4,000 files damaged at random, both then refused the same ones
# (tests/sources/test_decode.py tries some).
#
# ITU-T T.81, Table B.1, and JFIF: start, end, and the segments of a plain JPEG (SOF0, SOS, DHT,
# DQT, DRI, APP0). Files with others (EXIF, Adobe's colours, progressive) are left to Pillow.
_START, _END = b'\xff\xd8', b'\xff\xd9'
_FRAME, _SCAN = 0xC0, 0xDA
_KNOWN = {_FRAME, _SCAN, 0xC4, 0xDB, 0xDD, 0xE0}

# Any marker except a restart, the only one allowed in the data of a scan (Section B.1.1.5).
_MARKER = re.compile(rb'\xff[^\x00\xff\xd0-\xd7]')

# Pictures with more pixels go to Pillow; OpenCV's own limit (CV_IO_MAX_IMAGE_PIXELS) is 2^30.
_MOST_PIXELS = 2**28

# The errors by which Pillow and the operating system report a file that cannot be read.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error)
_ADVICE = 'Mend or remove the file.'

# A file may have the size of four uncompressed 16-bit channels, and some metadata beside them.
_BYTES_A_PIXEL, _BYTES_BESIDE = 8, 2**28


def decode(data: bytes, name: str, max_megapixels: float) -> np.ndarray:
    """Decodes one image file.

    Grey, palette, 16-bit and CMYK pictures become 8-bit RGB, transparent pixels are laid over
    black, EXIF rotation is applied, and the first frame of an animation is taken.

    Args:
      data: the file's bytes.
      name: the file's name, for errors.
      max_megapixels: pictures whose header declares more are refused before they are decoded.

    Returns:
      uint8 [H, W, 3].

    Raises:
      BadPicture: the file is damaged, empty, no image, or too large.
    """
    if not data:
        raise BadPicture(name, 'is empty', _ADVICE)
    header = plain_jpeg(data)
    if header is not None:
        check_pixels(name, *header, max_megapixels)
        picture = decode_plain(data)
        if picture is not None:
            return picture
    try:
        with opened(io.BytesIO(data), name, max_megapixels) as image:
            return np.asarray(to_rgb(_upright(image)))
    except _UNREADABLE as error:
        raise BadPicture(name, f'cannot be decoded: {_phrase(error)}', _ADVICE) from error


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose would also rewrite the EXIF data, and fail if they are damaged.
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB; transparent pixels are laid over black."""
    if image.mode.startswith('I'):
        # Pillow clips 16-bit values to 255 instead of scaling them.
        wide = np.asarray(image, np.float32)
        return Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8)).convert('RGB')
    if image.mode in ('P', 'PA', 'LA', 'La', 'RGBA', 'RGBa') or 'transparency' in image.info:
        rgba = image.convert('RGBA')
        black = Image.new('RGBA', rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert('RGB')
    # `convert` would copy an RGB image, which takes a tenth of the time of decoding it.
    return image if image.mode == 'RGB' else image.convert('RGB')


def read_size(path: Path, max_megapixels: float) -> tuple[int, int]:
    """Reads from an image file's header the size of the picture that `decode` returns.

    Only a PNG that may hold an orientation behind its pixels is decoded.

    Args:
      path: the file's path.
      max_megapixels: larger pictures are refused.

    Returns:
      (height, width).

    Raises:
      BadPicture: the file cannot be read, is no image, or declares too many pixels.
    """
    try:
        _check_file(path, max_megapixels)
        with path.open('rb') as file, opened(file, str(path), max_megapixels) as image:
            width, height = image.size
            # The `getexif` of Pillow's PNG class decodes the picture to find EXIF data behind the
            # pixels; that of the base class does not.
            own = image.format == 'PNG' and 'exif' not in image.info and _turned_behind_pixels(file)
            exif = image.getexif() if own else Image.Image.getexif(image)
            turned = exif.get(_ORIENTATION, 1) in _QUARTER_TURNS
    except _UNREADABLE as error:
        raise BadPicture(str(path), f'cannot be read: {_phrase(error)}', _ADVICE) from error
    return (width, height) if turned else (height, width)


def _turned_behind_pixels(file: IO[bytes]) -> bool:
    """Whether a PNG has a chunk behind its pixels that may hold an orientation.

    Args:
      file: the PNG file; its position is the same afterwards.
    """
    position = file.tell()
    try:
        return _chunk_behind_pixels(file)
    finally:
        file.seek(position)


def _chunk_behind_pixels(file: IO[bytes]) -> bool:
    file.seek(_PNG_SIGNATURE)
    behind = False
    while len(head := file.read(_PNG_CHUNK.size)) == _PNG_CHUNK.size:
        length, kind = _PNG_CHUNK.unpack(head)
        start = file.tell()
        behind = behind or kind == b'IDAT'
        if behind and kind == b'eXIf':
            return True
        if behind and kind in _PNG_TEXTS and file.read(_PNG_KEYWORD).startswith(_PNG_ORIENTED):
            return True
        file.seek(start + length + _PNG_CHECKSUM)
    return False


def read_file(path: Path, max_megapixels: float) -> np.ndarray:
    """Reads and decodes one image file.

    Args:
      path: the file's path.
      max_megapixels: larger pictures are refused.

    Returns:
      uint8 [H, W, 3].

    Raises:
      BadPicture: as in `decode`; or the file cannot be read, is a folder, pipe or device, or is
        larger than a picture of `max_megapixels` can be.
    """
    try:
        _check_file(path, max_megapixels)
        data = path.read_bytes()
    except OSError as error:
        raise BadPicture(str(path), f'cannot be read: {_phrase(error)}') from error
    return decode(data, str(path), max_megapixels)


def _check_file(path: Path, max_megapixels: float) -> None:
    """Raises BadPicture if a path is not a file, or the file is too large to be read."""
    status = path.stat()
    what = not_a_file(status)
    if what:
        # Reading from a pipe waits for a writer, and some devices never end.
        raise BadPicture(str(path), f'is not a file but {what}', _ADVICE)
    if status.st_size > _BYTES_A_PIXEL * max_megapixels * 1e6 + _BYTES_BESIDE:
        raise BadPicture(
            str(path),
            f'holds {status.st_size:,} bytes, more than a picture within '
            f'data.max_megapixels={max_megapixels:g} needs',
            _ADVICE,
        )


def opened(file: IO[bytes], name: str, max_megapixels: float) -> Image.Image:
    """Opens an image without decoding it.

    Args:
      file: an open image file.
      name: the file's name, for errors.
      max_megapixels: larger pictures are refused.

    Raises:
      BadPicture: the file is not an image of a known format, or the picture is too large.
    """
    try:
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise BadPicture(name, 'is not an image that can be read', _ADVICE) from error
    check_pixels(name, image.width, image.height, max_megapixels)
    return image


def check_pixels(name: str, width: int, height: int, max_megapixels: float) -> None:
    """Raises BadPicture if a picture of `width` x `height` has too many pixels."""
    megapixels = width * height / 1e6
    if megapixels > max_megapixels:
        raise BadPicture(
            name,
            f'declares {width}x{height} pixels ({megapixels:.0f} megapixels), more '
            f'than data.max_megapixels={max_megapixels:g}',
            'Raise the limit if that is right.',
        )


class Header(NamedTuple):
    """The size that a picture's header declares, pixels."""

    width: int
    height: int


def plain_jpeg(data: bytes) -> Header | None:
    """Reads the header of a plain JPEG: whole, baseline, one scan, one or three components.

    Args:
      data: the file's bytes.

    Returns:
      The header; None if the file is not such a JPEG.
    """
    if not (data.startswith(_START) and data.endswith(_END)):
        return None
    at, header, components = len(_START), None, 0
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] in _KNOWN:
        kind, end = data[at + 1], at + 2 + _uint16(data, at + 2)
        body, at = data[at + 4 : end], end
        if kind == _FRAME and len(body) > 5:
            header = Header(_uint16(body, 3), _uint16(body, 1))
            components = body[5]
        if kind == _SCAN:
            if header is None or components not in (1, 3) or body[:1] != bytes([components]):
                return None
            found = _MARKER.search(data, at)
            whole = found is not None and found.start() == len(data) - len(_END)
            return header if whole and 0 < header.width * header.height <= _MOST_PIXELS else None
    return None


def decode_plain(data: bytes) -> np.ndarray | None:
    """Decodes a plain JPEG to uint8 [H, W, 3]; None if that fails."""
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def _uint16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], 'big')


def _phrase(error: Exception) -> str:
    """The message of an error on one line, without the file's name or a full stop."""
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ' '.join(said.split()).rstrip('.') or type(error).__name__
