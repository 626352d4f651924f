"""Decodes image files of any format and mode to uint8 RGB arrays."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from byol_jax.errors import BadPicture, UserError, shown
from byol_jax.files import not_a_file
from byol_jax.sources.containers import SNIFFED, Bare, bare_png, bare_webp, kind_of, other_kind
from byol_jax.sources.jpeg import bare_jpeg

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')

# Pillow's reader of each kind. Not `Image.open`, whose limit of pixels is a setting of the whole
# process and refuses large pictures: `check_pixels` is asked before a pixel is decoded.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    'JPEG': JpegImageFile,
    'PNG': PngImageFile,
    'WebP': WebPImageFile,
    'GIF': GifImageFile,
    'BMP': BmpImageFile,
}
# What takes the metadata out. Of GIF and BMP decoders read none that could do harm.
_BARE: dict[str, Callable[[IO[bytes], bool], Bare]] = {
    'JPEG': bare_jpeg,
    'PNG': bare_png,
    'WebP': bare_webp,
}

# What turns a picture of each EXIF orientation upright, one of uint8 [H, W, 3].
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda picture: cv2.flip(picture, 1),
    3: lambda picture: cv2.rotate(picture, cv2.ROTATE_180),
    4: lambda picture: cv2.flip(picture, 0),
    5: cv2.transpose,
    6: lambda picture: cv2.rotate(picture, cv2.ROTATE_90_CLOCKWISE),
    7: lambda picture: cv2.transpose(cv2.rotate(picture, cv2.ROTATE_180)),
    8: lambda picture: cv2.rotate(picture, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
# Orientations that swap height and width.
_QUARTER_TURNS = (5, 6, 7, 8)

# Pictures with more pixels go to Pillow; OpenCV's own limit (CV_IO_MAX_IMAGE_PIXELS) is 2^30.
_MOST_PIXELS = 2**28

_ADVICE = 'Mend or remove the file.'

# A file may have the size of four uncompressed 16-bit channels, and some metadata beside them.
_BYTES_A_PIXEL, _BYTES_BESIDE = 8, 2**28


@contextlib.contextmanager
def decoding(file: str, what: str = 'cannot be decoded', advice: str = _ADVICE) -> Iterator[None]:
    """Turns whatever a decoder raises into a BadPicture; only calls of decoders belong inside.

    No decoder says what it raises for a damaged or odd file, and that changes between versions:
    SyntaxError, TypeError, struct.error, zlib.error, RuntimeError and AssertionError were seen. A
    type that nobody thought of must not end a run, so here, and nowhere else, every exception is
    caught. A `UserError` passes: it says by itself what is wrong.

    Args:
      file: that holds the picture, as `Source.file` names it.
      what: goes before the decoder's own words.
      advice: what to do, a sentence.

    Raises:
      BadPicture: anything else was raised.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise BadPicture(file, f'{what}: {_phrase(error)}', advice) from error


def decode(data: bytes, name: str, max_megapixels: float) -> np.ndarray:
    """Decodes one image file.

    Grey, palette, 16-bit and CMYK pictures become 8-bit RGB, transparent pixels are laid over
    black, the orientation in EXIF or XMP is applied, and the first frame of an animation is taken.

    Args:
      data: the file's bytes.
      name: the file's name, for errors.
      max_megapixels: pictures whose header declares more are refused before they are decoded.

    Returns:
      uint8 [H, W, 3].

    Raises:
      BadPicture: the file is damaged, empty, no image, of a kind that is not read, or too large.
    """
    kind = _kind(data[:SNIFFED], name)
    with decoding(name):
        found = _BARE[kind](io.BytesIO(data), False) if kind in _BARE else Bare(data)
        if found.lacks:
            raise BadPicture(name, found.lacks, _ADVICE)
        picture = None
        if found.plain is not None:
            check_pixels(name, *found.plain, max_megapixels)
            picture = decode_plain(found)
        if picture is None:
            with opened(io.BytesIO(found.data), name, max_megapixels) as image:
                picture = np.asarray(to_rgb(image))
        turn = _UPRIGHT.get(found.orientation)
        return picture if turn is None else turn(picture)


def _kind(start: bytes, name: str) -> str:
    """The kind of an image file by its first bytes, a key of `_READERS`.

    Raises:
      BadPicture: it is none.
    """
    if not start:
        raise BadPicture(name, 'is empty', _ADVICE)
    kind = kind_of(start)
    if kind:
        return kind
    other = other_kind(start)
    if other:
        raise BadPicture(
            name,
            f'is of a kind that is not read here ({other})',
            'Convert it, to PNG say, or leave it out.',
        )
    raise BadPicture(name, 'is not an image that can be read', _ADVICE)


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

    Args:
      path: the file's path.
      max_megapixels: larger pictures are refused.

    Returns:
      (height, width).

    Raises:
      BadPicture: the file cannot be read, is no image, or declares too many pixels.
    """
    with decoding(str(path), 'cannot be read'):
        _check_file(path, max_megapixels)
        with path.open('rb') as file:
            height, width, orientation = read_header(file, str(path), max_megapixels)
    return (width, height) if orientation in _QUARTER_TURNS else (height, width)


def read_header(file: IO[bytes], name: str, max_megapixels: float) -> tuple[int, int, int]:
    """What an image file declares; no pixel is decoded.

    Args:
      file: at its beginning.
      name: named in errors.
      max_megapixels: larger pictures are refused.

    Returns:
      (height, width) of the picture as it is stored, and its EXIF orientation.

    Raises:
      BadPicture: it is no image, or declares too many pixels.
    """
    kind = _kind(file.read(SNIFFED), name)
    file.seek(0)
    with decoding(name, 'cannot be read'):
        found = _BARE[kind](file, True) if kind in _BARE else None
        header = file if found is None else io.BytesIO(found.data)
        with opened(header, name, max_megapixels) as image:
            return image.height, image.width, 1 if found is None else found.orientation


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


def opened(file: IO[bytes], name: str, max_megapixels: float) -> ImageFile.ImageFile:
    """Opens an image without decoding it.

    Args:
      file: at its beginning; with metadata, over which Pillow may fail.
      name: named in errors.
      max_megapixels: larger pictures are refused.

    Raises:
      BadPicture: it is no image, damaged, or too large.
    """
    kind = _kind(file.read(SNIFFED), name)
    file.seek(0)
    with decoding(name):
        image = _READERS[kind](file)
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


def decode_plain(found: Bare) -> np.ndarray | None:
    """Decodes a plain JPEG by OpenCV: in two thirds of Pillow's time, with the same pixels.

    Args:
      found: whose `plain` is given.

    Returns:
      uint8 [H, W, 3], not turned; None if it fails.
    """
    if found.plain is None or not 0 < found.plain[0] * found.plain[1] <= _MOST_PIXELS:
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(found.data, np.uint8), flags)


def _phrase(error: Exception) -> str:
    """The message of an error on one line, without the file's name or a full stop."""
    words = (getattr(error, 'strerror', None) or str(error)).split()
    # They may hold words of the file.
    said = shown(' '.join(words)).rstrip('.')
    if isinstance(error, OSError | SyntaxError | ValueError) and said:
        return said
    # Of other types the message alone may say nothing: that of a KeyError is a key.
    return f'{type(error).__name__}: {said}' if said else type(error).__name__
