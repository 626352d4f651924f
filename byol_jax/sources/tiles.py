"""Square tiles cut from the pictures of another source, with some held out without leaking."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.bad_files import BadFile, bad_file, name_some
from byol_jax.sources.base import Progress, Source, Subset, no_progress


class Tiles(Source):
    """Overlapping square tiles of every picture, each labelled with its picture.

    Tiles lie on a grid of `stride` pixels of the first key's picture, the last of a row or column
    moved in to end at the border. Where an example has pictures of several sizes (low and high
    resolution), a tile is the same part of each, a square only where the ratio of sides is the
    same. Of a picture whose size cannot be read, or that is smaller than a tile, there are no
    tiles.

    Attributes:
      counted: the picture of an example in whose pixels sizes are counted.
      bad: the pictures left out because their size cannot be read.
      sides: (height, width) of picture `counted` of every example of the source, int32 [N, 2]; 0
        where there are no tiles.
      small: (name, height, width) of the pictures left out because no tile fits in, pixels.
    """

    def __init__(
        self,
        source: Source,
        tile_size: int,
        stride: int = 0,
        key: str | None = None,
        progress: Progress = no_progress,
    ):
        """Reads sizes from the pictures' headers.

        Args:
          source: whose pictures are cut.
          tile_size: side, pixels of picture `key`.
          stride: pixels from a tile to the next; 0 for `tile_size`.
          key: the picture in whose pixels sizes are counted; by default the first key.
          progress: told of how many pictures the size is read.

        Raises:
          UserError: all pictures are left out.
        """
        self.source = source
        self.keys = source.keys
        self.tile_size = tile_size
        self.counted = key or source.keys[0]
        stride = stride or tile_size
        sizes = self._sizes(progress)
        self.sides = np.zeros((len(source), 2), np.int32)
        self.sides[list(sizes)] = list(sizes.values())
        boxes = [
            (picture, top, left)
            for picture, (height, width) in sizes.items()
            for top in _starts(height, tile_size, stride)
            for left in _starts(width, tile_size, stride)
        ]
        # [N, 3]: picture, top, left.
        self.boxes = np.array(boxes, np.int32)
        self._blocks: dict[tuple[float, int], dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self.labels = self.boxes[:, 0].astype(np.int64)
        self.label_names = [source.name(i) for i in range(len(source))]

    def _sizes(self, progress: Progress) -> dict[int, tuple[int, int]]:
        """(height, width) of each picture that tiles can be cut from; sets `bad` and `small`."""
        self.bad: list[BadFile] = []
        self.small: list[tuple[str, int, int]] = []
        sizes = {}
        for picture in range(len(self.source)):
            try:
                size = self.source.size(picture, self.counted)
            except BadPicture as error:
                self.bad.append(bad_file(error))
                continue
            finally:
                progress('sizes read', picture + 1, len(self.source))
            if min(size) < self.tile_size:
                self.small.append((self.source.name(picture), *size))
            else:
                sizes[picture] = size
        if not sizes:
            if self.bad:
                raise UserError(
                    f'Of {len(self.source):,} pictures the size of {len(self.bad):,} cannot be '
                    f'read, and {len(self.small):,} are smaller than data.tile_size='
                    f'{self.tile_size}: there is nothing to cut tiles from. {name_some(self.bad)}.'
                )
            name, height, width = max(self.small, key=lambda picture: min(picture[1:]))
            raise UserError(
                f'All {len(self.small):,} pictures are smaller than data.tile_size='
                f'{self.tile_size}; the largest, {name}, is {width}x{height} pixels. Use smaller '
                'tiles.'
            )
        return sizes

    def __len__(self) -> int:
        return len(self.boxes)

    def load(self, index: int, key: str) -> np.ndarray:
        picture, top, left = (int(v) for v in self.boxes[index])
        return self.cut(picture, top, left, key)

    def cut(self, picture: int, top: int, left: int, key: str) -> np.ndarray:
        """A tile of any place of a picture, in the pixels that sizes are counted in."""
        image = self.source.load(picture, key)
        parts = slice(top, top + self.tile_size), slice(left, left + self.tile_size)
        if key != self.counted:
            sides = self.sides[picture].tolist()
            rows, columns = map(_same_part, parts, sides, image.shape[:2])
            return image[rows, columns]
        return image[parts]

    def name(self, index: int) -> str:
        picture, top, left = self.boxes[index]
        return f'{self.source.name(int(picture))} @{left},{top}'

    def file(self, index: int, key: str) -> str:
        return self.source.file(int(self.boxes[index, 0]), key)

    @functools.cached_property
    def of_picture(self) -> dict[int, np.ndarray]:
        """By picture that has any, the indices of its tiles: int [its tiles], ascending."""
        return dict(by_picture(self.boxes[:, 0]))

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
        blocks = self.blocks(fraction, seed)
        if not blocks:
            return np.arange(len(self)), np.zeros(0, np.int64)
        train, held_out = [], []
        size = self.tile_size
        for picture, indices in self.of_picture.items():
            place = self.boxes[indices, 1:]
            if picture not in blocks:
                train.append(indices)  # Too small to be divided.
                continue
            low, high = blocks[picture]
            inside = np.all((place >= low) & (place + size <= high), axis=1)
            train.append(indices[_outside(place, size, low, high)])
            held_out.append(indices[inside])
        return np.concatenate(train), np.concatenate([np.zeros(0, np.int64), *held_out])

    def blocks(self, fraction: float, seed: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """The part of each picture that `split` keeps from training.

        Returns:
          By picture, the (top, left) that it begins at and the (bottom, right) that it ends before,
          pixels; without the pictures that are too small to be divided.
        """
        if (fraction, seed) not in self._blocks:
            self._blocks[fraction, seed] = self._draw_blocks(fraction, seed)
        return self._blocks[fraction, seed]

    def _draw_blocks(self, fraction: float, seed: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        if fraction == 0:
            return {}
        blocks = {}
        size = self.tile_size
        for picture, indices in self.of_picture.items():
            place = self.boxes[indices, 1:]
            sides = place.max(axis=0) + size
            side = np.maximum(size, np.rint(sides * np.sqrt(fraction))).astype(int)
            rng = np.random.Generator(np.random.Philox(key=[seed, 1], counter=[0, 0, picture, 0]))
            # The block starts at a tile, leaves itself room and at least one tile to train on.
            room = place[np.all(place <= sides - side, axis=1)]
            apart = [np.any(_outside(place, size, low, low + side)) for low in room]
            room = room[np.array(apart, bool)]
            if len(room):
                low = room[rng.integers(len(room))]
                blocks[picture] = low, low + side
        return blocks


def by_picture(pictures: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each of `pictures`, int [N], and the places it has among them: int [any number], ascending.

    Sorts once: to look for each picture in turn takes a time quadratic in them.
    """
    order = np.argsort(pictures, kind='stable')
    different, first = np.unique(pictures[order], return_index=True)
    return zip(different.tolist(), np.split(order, first)[1:], strict=True)


def _same_part(part: slice, side: int, other: int) -> slice:
    """The part of a side of `other` pixels that shows what `part` of one of `side` pixels does.

    Rounded to pixels, of which there is at least one.
    """
    scale = other / side
    length = max(1, round((part.stop - part.start) * scale))
    start = min(round(part.start * scale), other - 1)
    return slice(start, start + length)


def _outside(place: np.ndarray, size: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which tiles at `place` [N, 2] lie outside the block from `low` to `high`: bool [N]."""
    return np.any((place + size <= low) | (place >= high), axis=1)


def _starts(length: int, size: int, stride: int) -> list[int]:
    starts = list(range(0, length - size + 1, stride))
    if starts[-1] != length - size:
        starts.append(length - size)
    return starts


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
