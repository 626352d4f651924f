"""Pictures, files and sources for the tests."""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from byol_jax.sources.base import Source

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
    """A PNG of a hundred bytes whose header declares this size."""
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + png_chunk(b'IHDR', header)
        + png_chunk(b'IDAT', zlib.compress(bytes(100)))
        + png_chunk(b'IEND', b'')
    )


# Wrappers and tiles.


class Coordinates(Source):
    """Every pixel has its place as its value: (row, column, picture), in pixels of 'hr'.

    'lr' has half as many pixels a side. Picture i has shape `shapes[i]`; loads are counted.
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


SHAPES = [(200, 250), (96, 130), (64, 240), (240, 64), (97, 97), (150, 151)]


def write_div2k(root: Path) -> Path:
    """Writes DIV2K's official folders with pictures of 64x80; 'lr' has every second pixel."""
    for subset, numbers in (('train', (1, 2, 10)), ('valid', (801,))):
        for number in numbers:
            picture = Coordinates([(64, 80)] * 900).load(number % 256, 'hr')
            write(root / f'DIV2K_{subset}_HR/{number:04}.png', picture)
            low = root / f'DIV2K_{subset}_LR_bicubic/X2/{number:04}x2.png'
            write(low, picture[::2, ::2])
            write(root / f'DIV2K_{subset}_LR_bicubic/X4/{number:04}x4.png', picture[::4, ::4])
    return root
