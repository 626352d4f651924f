"""Training tiles whose grid lies elsewhere in every epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from byol_jax.errors import BadPicture
from byol_jax.sources.base import Subset
from byol_jax.sources.tiles import Tiles, by_picture

# (top, left) of some tiles, int [N, 2]; the first and the last place a tile may have, int [2] each.
_Part = tuple[np.ndarray, np.ndarray, np.ndarray]


class ShiftedTiles(Subset):
    """Some tiles, as many in every epoch, but of a grid that is shifted anew in each.

    The training part of a picture consists of up to four rectangles around its held-out block. In
    each, the rows of tiles are spread evenly over all places there are, and likewise the columns;
    one offset for the whole picture, a function of (seed, epoch, picture), moves them by up to the
    distance to the next one. So every tile lies in the picture, no pixel of the block is ever
    shown, and over the epochs all places of a rectangle are equally likely.

    Where pictures of two sizes are cut, tiles begin only where a pixel of each begins, as far as
    the sizes have such places at least every half tile.

    `load` and `name` know the unshifted tiles: evaluation is the same whatever was trained on.
    """

    def __init__(
        self,
        tiles: Tiles,
        indices: np.ndarray,
        blocks: dict[int, tuple[np.ndarray, np.ndarray]],
        seed: int,
        keys: tuple[str, ...],
    ):
        """Computes where each tile may lie; of two pictures an example, reads both sizes.

        Args:
          tiles: all tiles.
          indices: those to train on.
          blocks: what must not be shown (`Tiles.blocks`).
          seed: of the offsets.
          keys: the pictures that are used.
        """
        super().__init__(tiles, indices)
        self._tiles = tiles
        self._seed = seed
        self._pictures = tiles.boxes[self.indices, 0]
        # [N, 2] each, for rows and columns. A tile is the `rank`-th of `count` that are spread over
        # `room` places; these lie `step` pixels apart, from `first` on.
        shape = (len(self.indices), 2)
        self._rank, self._count = np.zeros(shape, np.int32), np.ones(shape, np.int32)
        self._first, self._room = np.zeros(shape, np.int32), np.ones(shape, np.int32)
        self._step = np.ones(shape, np.int32)
        for picture, here in by_picture(self._pictures):
            places = tiles.boxes[self.indices[here], 1:]
            last = tiles.boxes[tiles.of_picture[picture], 1:].max(axis=0)
            step = _common_step(tiles, picture, keys)
            for part in _parts(places, last, tiles.tile_size, blocks.get(picture)):
                self._spread(here, places, part, step)

    def _spread(self, here: np.ndarray, places: np.ndarray, part: _Part, step: list[int]) -> None:
        inside, low, high = part
        for axis in range(2):
            rows = here[inside]
            values, rank = np.unique(places[inside, axis], return_inverse=True)
            first, last = -(-low[axis] // step[axis]), high[axis] // step[axis]
            if last - first + 1 < len(values):
                # Not enough places: these tiles stay where they are.
                self._first[rows, axis] = places[inside, axis]
                continue
            self._step[rows, axis] = step[axis]
            self._first[rows, axis], self._room[rows, axis] = first, last - first + 1
            self._rank[rows, axis], self._count[rows, axis] = rank, len(values)

    def place(self, epoch: int, index: int) -> tuple[int, int, int]:
        """(picture, top, left) of a tile in an epoch, pixels of `tiles.counted`."""
        picture = int(self._pictures[index])
        rng = np.random.Generator(
            np.random.Philox(key=[self._seed, 5], counter=[0, 0, picture, epoch])
        )
        top, left = (
            int(self._step[index, axis])
            * (
                int(self._first[index, axis])
                + _moved(
                    int(self._rank[index, axis]),
                    int(self._count[index, axis]),
                    int(self._room[index, axis]),
                    rng.random(),
                )
            )
            for axis in range(2)
        )
        return picture, top, left

    def load_in_epoch(self, epoch: int, index: int, key: str) -> np.ndarray:
        return self._tiles.cut(*self.place(epoch, index), key)


def _moved(rank: int, count: int, room: int, offset: float) -> int:
    """Place of the `rank`-th of `count` tiles spread over range(room), for an offset in [0, 1)."""
    # The sum may be rounded up to `count`.
    return min(int((rank + offset) * room / count), room - 1)


def _parts(
    places: np.ndarray,
    last: np.ndarray,
    size: int,
    block: tuple[np.ndarray, np.ndarray] | None,
) -> Iterator[_Part]:
    """Divides the training tiles of a picture by the rectangle that each may move in.

    Args:
      places: (top, left) of the tiles, int [N, 2]; none overlaps the block.
      last: of the last tile of the picture, int [2].
      size: side of a tile.
      block: (top, left) and (bottom, right) of what is held out.

    Yields:
      Which tiles, bool [N], and the first and the last (top, left) they may have.
    """
    start = np.zeros(2, np.int64)
    if block is None:
        yield np.ones(len(places), bool), start, last
        return
    low, high = block
    above = places[:, 0] + size <= low[0]
    below = places[:, 0] >= high[0]
    beside = ~above & ~below
    left = beside & (places[:, 1] + size <= low[1])
    first_beside, last_beside = max(0, low[0] - size + 1), min(last[0], high[0] - 1)
    for inside, first, end in (
        (above, start, np.array([low[0] - size, last[1]])),
        (below, np.array([high[0], 0]), last),
        (left, np.array([first_beside, 0]), np.array([last_beside, low[1] - size])),
        (beside & ~left, np.array([first_beside, high[1]]), np.array([last_beside, last[1]])),
    ):
        if inside.any():
            yield inside, first, end


def _common_step(tiles: Tiles, picture: int, keys: tuple[str, ...]) -> list[int]:
    """Pixels, down and across, from one place where pixels of all pictures begin to the next."""
    step = [1, 1]
    others = [key for key in dict.fromkeys(keys) if key != tiles.counted]
    if not others:
        return step
    try:
        sides = tiles.sides[picture].tolist()
        for key in others:
            for axis, side in enumerate(tiles.source.size(picture, key)):
                step[axis] = math.lcm(step[axis], sides[axis] // math.gcd(sides[axis], side))
    except BadPicture:
        return [1, 1]  # It will be replaced.
    # Sizes that are no multiples of each other; as of all such tiles, the nearest pixel is taken.
    return [s if s <= tiles.tile_size // 2 else 1 for s in step]
