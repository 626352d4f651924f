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

    Tiles lie on a grid of `stride` pixels; the last of a row or column is moved in to end at the
    border. If an example has pictures of several sizes (low and high resolution), sizes are counted
    in the pixels of one of them, and a tile is the same part of each; it is square in all only if
    they have the same ratio of sides. A picture whose size cannot be read, or that is smaller than
    a tile, has no tiles.

    Attributes:
      source: whose pictures are cut.
      counted: key of the picture in whose pixels sizes are counted.
      boxes: the tiles, int32 [tiles, 3]: picture, top, left.
      sides: (height, width) of picture `counted` of every example of the source, int32 [N, 2]; 0
        if it has no tiles.
      bad: the pictures left out because their size cannot be read.
      small: (name, height, width) of the pictures left out because they are smaller than a tile.
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
        self.boxes = np.array(boxes, np.int32)
        self._blocks: dict[tuple[float, int], dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self.labels = self.boxes[:, 0].astype(np.int64)
        self.label_names = [source.name(i) for i in range(len(source))]

    def _sizes(self, progress: Progress) -> dict[int, tuple[int, int]]:
        """(height, width) by picture that can be cut into tiles; also sets `bad` and `small`."""
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
        """Cuts a tile from any place of a picture.

        Args:
          picture: which example of the source.
          top: of the tile, pixels of picture `counted`.
          left: of the tile, pixels of picture `counted`.
          key: which picture of the example.

        Returns:
          uint8 [H, W, 3].
        """
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
        """The indices of each picture's tiles, ascending, int [any number], by picture."""
        return dict(by_picture(self.boxes[:, 0]))

    def split(self, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Splits the tiles so that no pixel of a held-out tile is ever trained on.

        In each picture a block of neighbouring tiles of about `fraction` of its area is drawn.
        Tiles inside the block are held out, tiles that overlap it are not used, and the rest are
        for training. If a picture is too small for both parts, all its tiles are for training.

        Args:
          fraction: share of each picture's area to hold out, in [0, 1).
          seed: by which the blocks are placed.

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
                train.append(indices)
                continue
            low, high = blocks[picture]
            inside = np.all((place >= low) & (place + size <= high), axis=1)
            train.append(indices[_outside(place, size, low, high)])
            held_out.append(indices[inside])
        return np.concatenate(train), np.concatenate([np.zeros(0, np.int64), *held_out])

    def blocks(self, fraction: float, seed: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """The part of each picture that `split` keeps from training.

        Args:
          fraction: as for `split`.
          seed: as for `split`.

        Returns:
          (top, left), where the block begins, and (bottom, right), where it ends, pixels, by
          picture; pictures that are too small to be divided have none.
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
            # The block starts where a tile does, fits in, and leaves a tile to train on.
            room = place[np.all(place <= sides - side, axis=1)]
            apart = [np.any(_outside(place, size, low, low + side)) for low in room]
            room = room[np.array(apart, bool)]
            if len(room):
                low = room[rng.integers(len(room))]
                blocks[picture] = low, low + side
        return blocks


def by_picture(pictures: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Groups examples by their picture.

    Args:
      pictures: of each example, int [N].

    Yields:
      Each picture, and the indices of its examples, ascending, int [any number].
    """
    # Sorts once: searching for each picture would take quadratic time.
    order = np.argsort(pictures, kind='stable')
    different, first = np.unique(pictures[order], return_index=True)
    return zip(different.tolist(), np.split(order, first)[1:], strict=True)


def _same_part(part: slice, side: int, other: int) -> slice:
    """The pixels of another size of a picture that show the same as some of this size.

    Args:
      part: pixels along one side of this picture.
      side: its length, pixels.
      other: the length of the same side of the other picture, pixels.

    Returns:
      At least one pixel of the other picture.
    """
    scale = other / side
    length = max(1, round((part.stop - part.start) * scale))
    start = min(round(part.start * scale), other - 1)
    return slice(start, start + length)


def _outside(place: np.ndarray, size: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether tiles at `place` [N, 2] lie outside the block from `low` to `high`: bool [N]."""
    return np.any((place + size <= low) | (place >= high), axis=1)


def _starts(length: int, size: int, stride: int) -> list[int]:
    starts = list(range(0, length - size + 1, stride))
    if starts[-1] != length - size:
        starts.append(length - size)
    return starts


# Which tiles, bool [N]; the first and the last (top, left) they may have, int [2] each.
_Part = tuple[np.ndarray, np.ndarray, np.ndarray]


class ShiftedTiles(Subset):
    """Training tiles whose grid is shifted anew in every epoch; their number stays the same.

    The training part of a picture consists of up to four rectangles around its held-out block. In
    each, the rows of tiles are spread evenly, and so are the columns. One offset for the whole
    picture, a function of (seed, epoch, picture), moves them by up to the distance to the next
    one. So every tile lies in the picture, no pixel of the block is ever shown, and over the epochs
    all places in a rectangle are equally likely.

    If pictures of two sizes are cut, tiles begin only where a pixel of both begins, provided that
    there is such a place at least every half tile.

    `load` and `name` are those of the unshifted tiles, by which evaluation is the same for all
    runs.
    """

    def __init__(
        self,
        tiles: Tiles,
        indices: np.ndarray,
        blocks: dict[int, tuple[np.ndarray, np.ndarray]],
        seed: int,
        keys: tuple[str, ...],
    ):
        """Computes where each tile may lie; for pictures of two sizes, reads the other size.

        Args:
          tiles: all tiles.
          indices: those to train on.
          blocks: what must not be shown (`Tiles.blocks`).
          seed: by which the offsets are drawn.
          keys: the pictures that are used.
        """
        super().__init__(tiles, indices)
        self._tiles = tiles
        self._seed = seed
        self._pictures = tiles.boxes[self.indices, 0]
        # For rows and columns, [N, 2] each: a tile is the `rank`-th of `count` tiles, which are
        # spread over `room` places that lie `step` pixels apart, beginning at place `first`.
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
                # There are fewer places than tiles: the tiles stay where they are.
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
    """Place in range(room) of the `rank`-th of `count` tiles, for an offset in [0, 1)."""
    # `rank + offset` may be rounded up to `count`.
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
    """The distance between places where pixels of all pictures begin, down and across, pixels."""
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
        return [1, 1]  # The other picture is bad: training shows another example.
    # If such places are too far apart, tiles begin at any pixel, and `cut` rounds to the nearest.
    return [s if s <= tiles.tile_size // 2 else 1 for s in step]
