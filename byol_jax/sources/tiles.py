"""Square tiles cut from the pictures of another source, some of them held out without overlap."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.bad_files import BadFile, bad_file, name_some
from byol_jax.sources.base import Progress, Source, Subset, no_progress


class Tiles(Source):
    """Square tiles of every picture, overlapping or not; the label of a tile is its picture.

    Tiles lie on a grid of `stride` pixels; the last tile of a row or column is shifted to end at
    the border. If an example has pictures of several sizes (low and high resolution), a tile is the
    same part of each, and all lengths count the pixels of one of them; a tile is square in the
    others only if they have the same aspect ratio. A picture whose size cannot be read, or that is
    smaller than a tile, has no tiles.

    Attributes:
      source: the source whose pictures are cut.
      counted: key of the picture whose pixels all lengths count.
      boxes: (picture, top, left) of each tile, int32 [tiles, 3].
      sides: (height, width) of picture `counted` of every example of the source, int32 [N, 2]; 0
        for an example without tiles.
      bad: the pictures left out because their size cannot be read.
      small: (name, height, width) of the pictures left out because they are smaller than a tile.
    """

    labels_are = 'pictures'

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
          source: the source whose pictures are cut.
          tile_size: side of a tile, pixels of picture `key`.
          stride: distance from one tile to the next, pixels; 0 for `tile_size`.
          key: key of the picture whose pixels all lengths count; None for the first key.
          progress: called with the number of sizes read.

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
        """Reads (height, width) of all pictures with tiles; also sets `bad` and `small`."""
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
                    f'No tiles can be cut: of {len(self.source):,} pictures, {len(self.bad):,} '
                    f'have a size that cannot be read, and {len(self.small):,} are smaller than '
                    f'data.tile_size={self.tile_size}. {name_some(self.bad)}.'
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
        """Cuts a tile from any place in a picture.

        Args:
          picture: index of the example in the source.
          top: the tile's top edge, pixels of picture `counted`.
          left: the tile's left edge, pixels of picture `counted`.
          key: which picture of the example to cut.

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
        """The indices of each picture's tiles by picture: ascending, int [any number]."""
        return dict(by_picture(self.boxes[:, 0]))

    def split(self, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Splits the tiles so that no pixel of a held-out tile is ever trained on.

        A block of neighbouring tiles, about `fraction` of the area, is drawn in each picture. Tiles
        inside the block are held out, tiles that overlap it are not used, and the rest are for
        training. If a picture is too small for both parts, all its tiles are for training.

        Args:
          fraction: share of each picture's area to hold out, in [0, 1).
          seed: seed of the blocks' places.

        Returns:
          Indices of the training tiles and of the held-out tiles, int [any number] each.
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
        """The block of each picture that `split` keeps out of training.

        Args:
          fraction: as in `split`.
          seed: as in `split`.

        Returns:
          (top, left) and (bottom, right) of the block, int [2] each, pixels, by picture. Pictures
          that are too small for a block are missing.
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
            # The block begins where a tile does, fits in, and leaves at least one training tile.
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
      pictures: the picture of each example, int [N].

    Returns:
      An iterator over (picture, indices of its examples, ascending, int [any number]).
    """
    # One sort: a search for each picture would take quadratic time.
    order = np.argsort(pictures, kind='stable')
    different, first = np.unique(pictures[order], return_index=True)
    return zip(different.tolist(), np.split(order, first)[1:], strict=True)


def _same_part(part: slice, side: int, other: int) -> slice:
    """Converts a range of pixels to the same part of a smaller or larger copy of the picture.

    Args:
      part: range of pixels along one side of the picture.
      side: length of that side, pixels.
      other: length of the same side of the copy, pixels.

    Returns:
      The range in the copy, at least one pixel.
    """
    scale = other / side
    length = max(1, round((part.stop - part.start) * scale))
    start = min(round(part.start * scale), other - 1)
    return slice(start, start + length)


def _outside(place: np.ndarray, size: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether tiles of `size` at (top, left) `place` [N, 2] lie outside a block: bool [N].

    The block reaches from `low` (top, left) to `high` (bottom, right).
    """
    return np.any((place + size <= low) | (place >= high), axis=1)


def _starts(length: int, size: int, stride: int) -> list[int]:
    """Where tiles of `size` begin along a side of `length` pixels; the last ends at the border."""
    starts = list(range(0, length - size + 1, stride))
    if starts[-1] != length - size:
        starts.append(length - size)
    return starts


# (mask of the tiles, bool [N]; the first and the last (top, left) they may have, int [2] each).
_Part = tuple[np.ndarray, np.ndarray, np.ndarray]


class ShiftedTiles(Subset):
    """Training tiles whose grid is shifted in every epoch; their number stays the same.

    The training part of a picture consists of up to four rectangles around its held-out block. The
    rows and columns of tiles are spread evenly in each rectangle. One offset for the whole picture,
    a function of (seed, epoch, picture), moves them by up to the distance to the next tile. So
    every tile lies in the picture, no pixel of the block is ever shown, and all places in a
    rectangle are equally likely over the epochs.

    If pictures of two sizes are cut, tiles begin only where pixels of both begin, if there is such
    a place at least every half tile.

    `load` and `name` are those of the unshifted tiles, so that evaluation is the same for all runs.
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
          indices: indices of the training tiles, int [N].
          blocks: the blocks that must not be shown, from `Tiles.blocks`.
          seed: seed of the offsets.
          keys: the pictures that are used.
        """
        super().__init__(tiles, indices)
        self._tiles = tiles
        self._seed = seed
        self._pictures = tiles.boxes[self.indices, 0]
        # For rows and columns, [N, 2] each: a tile is number `rank` of `count` tiles, which are
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
        """Sets the ranks and places of the tiles in one rectangle of a picture."""
        inside, low, high = part
        for axis in range(2):
            rows = here[inside]
            values, rank = np.unique(places[inside, axis], return_inverse=True)
            first, last = -(-low[axis] // step[axis]), high[axis] // step[axis]
            if last - first + 1 < len(values):
                # Fewer places than tiles: the tiles stay where they are.
                self._first[rows, axis] = places[inside, axis]
                continue
            self._step[rows, axis] = step[axis]
            self._first[rows, axis], self._room[rows, axis] = first, last - first + 1
            self._rank[rows, axis], self._count[rows, axis] = rank, len(values)

    def place(self, epoch: int, index: int) -> tuple[int, int, int]:
        """(picture, top, left) of a tile in an epoch, in pixels of picture `Tiles.counted`."""
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
    """The place, in range(room), of tile `rank` of `count` for an offset in [0, 1)."""
    # `rank + offset` may be rounded up to `count`.
    return min(int((rank + offset) * room / count), room - 1)


def _parts(
    places: np.ndarray,
    last: np.ndarray,
    size: int,
    block: tuple[np.ndarray, np.ndarray] | None,
) -> Iterator[_Part]:
    """Divides the training tiles of a picture by the rectangles in which they may move.

    Args:
      places: (top, left) of the tiles, int [N, 2]; none overlaps the block.
      last: (top, left) of the picture's last tile, int [2].
      size: side of a tile, pixels.
      block: (top, left) and (bottom, right) of the held-out block; None without one.

    Yields:
      For each rectangle: which tiles lie in it, bool [N], and the first and the last (top, left)
      that they may have.
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
    """The distance between places where pixels of all `keys` begin: pixels down and across."""
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
        return [1, 1]  # The other picture is bad, so training will skip this example.
    # If the places are too far apart, tiles begin at any pixel, and `cut` rounds to the nearest.
    return [s if s <= tiles.tile_size // 2 else 1 for s in step]
