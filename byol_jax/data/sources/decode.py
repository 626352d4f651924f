"""Image files -> uint8 RGB arrays, whatever their format and mode."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from byol_jax.errors import UserError

# `opened` checks data.max_megapixels instead, before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')
# By contents, whatever the name says.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF')
# Loads the readers of all formats; by itself Pillow loads them one failure at a time.
Image.init()

# Header tag of the EXIF orientation; 5 to 8 turn the picture by a quarter, swapping its sides.
_ORIENTATION = 0x0112


def decode(data: bytes, name: str, max_megapixels: float) -> np.ndarray:
    """Decodes one image file: uint8 [H, W, 3].

    Grey, palette, 16-bit and CMYK pictures become 8-bit RGB, alpha is laid over black, EXIF
    rotation is applied, and of an animation the first frame is taken.

    Args:
      data: the file's bytes.
      name: named in errors.
      max_megapixels: pictures whose header declares more are refused before any decoding.

    Raises:
      UserError: the file is damaged, no image, or too large.
    """
    try:
        with opened(io.BytesIO(data), name, max_megapixels) as image:
            return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f'{name} cannot be decoded: {error}. Mend or remove the file.') from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, alpha over black."""
    if image.mode.startswith('I'):
        # Pillow clips 16-bit values to 255 instead of scaling them.
        wide = np.asarray(image, np.float32)
        return Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8)).convert('RGB')
    if image.mode in ('P', 'PA', 'LA', 'La', 'RGBA', 'RGBa') or 'transparency' in image.info:
        rgba = image.convert('RGBA')
        black = Image.new('RGBA', rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert('RGB')
    return image.convert('RGB')


def read_size(path: Path, max_megapixels: float) -> tuple[int, int]:
    """(height, width) of an image file as `decode` would return it, from the header alone."""
    try:
        with path.open('rb') as file, opened(file, str(path), max_megapixels) as image:
            width, height = image.size
            # The base class's method: the one of PNGs decodes the whole picture.
            turned = Image.Image.getexif(image).get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f'{path} cannot be read: {error}. Mend or remove the file.') from error
    return (width, height) if turned else (height, width)


def read_file(path: Path, max_megapixels: float) -> np.ndarray:
    """Reads and decodes one image file: uint8 [H, W, 3]. Raises UserError as `decode` does."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}.') from error
    return decode(data, str(path), max_megapixels)


def opened(file: IO[bytes], name: str, max_megapixels: float) -> Image.Image:
    """Opens an image without decoding it; raises UserError if it is none, or too large."""
    try:
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UserError(f'{name} is not an image that can be read.') from error
    check_pixels(name, image.width, image.height, max_megapixels)
    return image


def check_pixels(name: str, width: int, height: int, max_megapixels: float) -> None:
    """Raises UserError if a file declares more pixels a picture than are allowed."""
    megapixels = width * height / 1e6
    if megapixels > max_megapixels:
        raise UserError(
            f'{name} declares {width}x{height} pixels ({megapixels:.0f} megapixels), '
            f'more than data.max_megapixels={max_megapixels:g}. Raise the limit if that is right.'
        )
