"""Square tiles cut from the pictures of another source, with some held out without leaking."""

from __future__ import annotations

import numpy as np

from byol_jax.data.sources.base import Source
from byol_jax.errors import UserError


class Tiles(Source):
    """Overlapping square tiles of every picture, each labelled with its picture.

    Tiles lie on a grid of `stride` pixels of the first key's picture, the last of a row or column
    moved in to end at the border. Where an example has pictures of several sizes (low and high
    resolution), a tile is the same part of each.
    """

    def __init__(self, source: Source, tile_size: int, stride: int = 0, key: str | None = None):
        """Reads sizes from the pictures' headers.

        Args:
          source: whose pictures are cut.
          tile_size: side, pixels of picture `key`.
          stride: pixels from a tile to the next; 0 for `tile_size`.
          key: the picture in whose pixels sizes are counted; by default the first key.

        Raises:
          UserError: a picture is smaller than a tile.
        """
        self.source = source
        self.keys = source.keys
        self.tile_size = tile_size
        self._key = key or source.keys[0]
        stride = stride or tile_size
        sizes = [source.size(picture, self._key) for picture in range(len(source))]
        self._check_sizes(sizes)
        boxes = [
            (picture, top, left)
            for picture, (height, width) in enumerate(sizes)
            for top in _starts(height, tile_size, stride)
            for left in _starts(width, tile_size, stride)
        ]
        # [N, 3]: picture, top, left.
        self.boxes = np.array(boxes, np.int32)
        self.labels = self.boxes[:, 0].astype(np.int64)
        self.label_names = [source.name(i) for i in range(len(source))]

    def _check_sizes(self, sizes: list[tuple[int, int]]) -> None:
        small = [i for i, size in enumerate(sizes) if min(size) < self.tile_size]
        if small:
            least = min(small, key=lambda i: min(sizes[i]))
            height, width = sizes[least]
            raise UserError(
                f'{self.source.name(least)} is {width}x{height} pixels, smaller than '
                f'data.tile_size={self.tile_size}; so are {len(small)} of {len(sizes)} pictures. '
                'Use smaller tiles, or take these pictures out.'
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def load(self, index: int, key: str) -> np.ndarray:
        picture, top, left = (int(v) for v in self.boxes[index])
        image = self.source.load(picture, key)
        size = self.tile_size
        if key != self._key:
            # The same part of a picture of another size.
            scale = image.shape[0] / self.source.size(picture, self._key)[0]
            top, left, size = round(top * scale), round(left * scale), max(1, round(size * scale))
        return image[top : top + size, left : left + size]

    def name(self, index: int) -> str:
        picture, top, left = self.boxes[index]
        return f'{self.source.name(int(picture))} @{left},{top}'

    def split(self, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Splits the tiles so that no pixel of a held-out tile is ever trained on.

        In each picture a block of neighbouring tiles of about `fraction` of its area is drawn:
        tiles inside the block are held out, tiles that overlap it are used for nothing, and the
        rest trains. Of a picture too small for both parts all tiles train.

        Args:
          fraction: share of each picture's area to hold out, in [0, 1).
          seed: of the blocks' places.

        Returns:
          Indices of the training tiles and of the held-out tiles.
        """
        if fraction == 0:
            return np.arange(len(self)), np.zeros(0, np.int64)
        train, held_out = [], []
        size = self.tile_size
        for picture in range(len(self.source)):
            indices = np.flatnonzero(self.boxes[:, 0] == picture)
            place = self.boxes[indices, 1:]
            sides = place.max(axis=0) + size
            side = np.maximum(size, np.rint(sides * np.sqrt(fraction))).astype(int)
            rng = np.random.Generator(np.random.Philox(key=[seed, 1], counter=[0, 0, picture, 0]))
            # The block starts at a tile, leaves itself room and at least one tile to train on.
            room = place[np.all(place <= sides - side, axis=1)]
            apart = [np.any(_outside(place, size, low, low + side)) for low in room]
            room = room[np.array(apart, bool)]
            if not len(room):
                train.append(indices)  # Too small to be divided.
                continue
            low = room[rng.integers(len(room))]
            high = low + side
            inside = np.all((place >= low) & (place + size <= high), axis=1)
            train.append(indices[_outside(place, size, low, high)])
            held_out.append(indices[inside])
        return np.concatenate(train), np.concatenate([np.zeros(0, np.int64), *held_out])


def _outside(place: np.ndarray, size: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which tiles at `place` [N, 2] lie outside the block from `low` to `high`: bool [N]."""
    return np.any((place + size <= low) | (place >= high), axis=1)


def _starts(length: int, size: int, stride: int) -> list[int]:
    starts = list(range(0, length - size + 1, stride))
    if starts[-1] != length - size:
        starts.append(length - size)
    return starts
