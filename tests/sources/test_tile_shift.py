"""Tiles whose grid is shifted in every epoch: where they lie, and where never."""

from __future__ import annotations

import numpy as np
import pytest
from streams import stream_of
from test_sources import SHAPES, Coordinates, div2k_folder  # noqa: F401  (a fixture)

from byol_jax.app.data import build_data
from byol_jax.sources.tiles import ShiftedTiles, Tiles, _moved
from configs import default, div2k


def shifted(
    shapes, size: int, stride: int, fraction: float = 0.0, seed: int = 0, keys=('hr',)
) -> tuple[ShiftedTiles, np.ndarray]:
    """Shifted tiles, and which of all tiles are held out."""
    tiles = Tiles(Coordinates(shapes), size, stride)
    train, held_out = tiles.split(fraction, 0)
    return ShiftedTiles(tiles, train, tiles.blocks(fraction, 0), seed, keys), held_out


def places(tiles: ShiftedTiles, epoch: int) -> np.ndarray:
    """(picture, top, left) of all tiles: int [N, 3]."""
    return np.array([tiles.place(epoch, i) for i in range(len(tiles))])


def draw(shapes, boxes: np.ndarray, size: int) -> list[np.ndarray]:
    """How many tiles show each pixel of each picture."""
    shown = [np.zeros(shape, int) for shape in shapes]
    for picture, top, left in boxes:
        assert top >= 0
        assert left >= 0
        assert top + size <= shapes[picture][0]
        assert left + size <= shapes[picture][1]
        shown[picture][top : top + size, left : left + size] += 1
    return shown


@pytest.mark.parametrize('stride', [7, 16, 32, 45])
@pytest.mark.parametrize('fraction', [0.0, 0.1, 0.3, 0.6])
def test_tiles_stay_in_the_picture_and_out_of_the_held_out_block(stride, fraction):
    """In every epoch there are as many tiles of each picture as on the unshifted grid, all of them
    in the picture, no two at one place, and none shows a pixel of a held-out tile."""
    tiles, held_out = shifted(SHAPES, 32, stride, fraction)
    assert fraction == 0 or len(held_out)
    kept = draw(SHAPES, tiles.source.boxes[held_out], 32)
    for epoch in range(12):
        boxes = places(tiles, epoch)
        np.testing.assert_array_equal(boxes[:, 0], tiles.labels)
        assert len(np.unique(boxes, axis=0)) == len(boxes)
        for shown, never in zip(draw(SHAPES, boxes, 32), kept, strict=True):
            assert not np.any(shown[never > 0])


def test_all_of_the_training_part_is_shown():
    """Every pixel that the unshifted training tiles show is shown in some epoch; in each one, all
    but a margin narrower than the stride is."""
    shape, size, stride = (50, 61), 20, 5
    tiles, _ = shifted([shape], size, stride, 0.1)
    on_grid = draw([shape], tiles.source.boxes[tiles.indices], size)[0] > 0
    over_all = np.zeros(shape, bool)
    for epoch in range(300):
        over_all |= draw([shape], places(tiles, epoch), size)[0] > 0
    assert np.all(over_all[on_grid])

    whole, _ = shifted([shape], size, stride)
    for epoch in range(30):
        shown = draw([shape], places(whole, epoch), size)[0]
        assert np.all(shown[stride:-stride, stride:-stride])


@pytest.mark.parametrize('shape', [(64, 64), (64, 70), (81, 64)])
def test_every_place_is_equally_likely(shape):
    """Over the epochs, a picture's tiles begin at every place alike (chi-squared, 1 in 10,000)."""
    size, stride = 32, 24
    tiles, _ = shifted([shape], size, stride)
    room = np.array(shape) - size + 1
    epochs = 4000
    counts = [np.zeros(room[axis]) for axis in range(2)]
    for epoch in range(epochs):
        # One tile an axis is enough: the others are the same distance away.
        _, top, left = tiles.place(epoch, epoch % len(tiles))
        counts[0][top] += 1
        counts[1][left] += 1
    for count in counts:
        expected = epochs / len(count)
        statistic = np.sum((count - expected) ** 2 / expected)
        freedom = len(count) - 1
        assert statistic < freedom + 3.72 * np.sqrt(2 * freedom) + 10


def test_offsets_are_a_function_of_seed_epoch_and_picture():
    """The same seed, epoch and picture give the same place; another of any gives another offset;
    and all tiles of a picture move together."""
    shapes = [(200, 200)] * 4
    first, again = shifted(shapes, 32, 32)[0], shifted(shapes, 32, 32)[0]
    other = shifted(shapes, 32, 32, seed=1)[0]
    grids = {}
    for epoch in range(4):
        np.testing.assert_array_equal(places(first, epoch), places(again, epoch))
        for name, tiles in (('first', first), ('other', other)):
            boxes = places(tiles, epoch)
            for picture in range(4):
                mine = boxes[boxes[:, 0] == picture, 1:]
                # 49 tiles: seven rows and seven columns.
                assert [len(np.unique(mine[:, axis])) for axis in range(2)] == [7, 7]
                assert np.all(np.abs(np.diff(np.unique(mine[:, 0])) - 169 / 7) < 1)
                grids[name, epoch, picture] = tuple(mine[0])
    assert len(set(grids.values())) == len(grids)


@pytest.mark.parametrize('fraction', [0.0, 0.2])
@pytest.mark.parametrize('keys', [('lr', 'hr'), ('hr', 'lr')])
def test_pictures_of_a_pair_are_cut_alike(keys, fraction):
    """The low-resolution tile is exactly the high-resolution one's part of the scene: it begins at
    an even pixel, and is every second pixel of it."""
    tiles, _ = shifted([(100, 130), (90, 90)], 16, 8, fraction, keys=keys)
    odd = 0
    for epoch in range(5):
        for i in range(0, len(tiles), 7):
            high, low = (tiles.load_in_epoch(epoch, i, key) for key in ('hr', 'lr'))
            np.testing.assert_array_equal(high[::2, ::2], low)
            odd += int(high[0, 0, 0]) % 8 != 0
    assert odd > 0


def test_sizes_without_common_places_are_cut_to_the_nearest_pixel():
    """Where one size is no multiple of the other, tiles still move, as near as pixels are."""

    class Odd(Coordinates):
        def load(self, index, key):
            picture = super().load(index, 'hr')
            return picture if key == 'hr' else np.ascontiguousarray(picture[: 33 * 3 : 3, ::3])

    tiles = Tiles(Odd([(100, 100)]), 16, 8)
    moving = ShiftedTiles(tiles, np.arange(len(tiles)), {}, 0, ('hr', 'lr'))
    tops = set()
    for epoch in range(20):
        high, low = (moving.load_in_epoch(epoch, 0, key) for key in ('hr', 'lr'))
        tops.add(int(high[0, 0, 0]))
        assert abs(int(high[0, 0, 0]) - int(low[0, 0, 0])) <= 3
    assert len(tops) > 3


def test_the_last_place_is_not_passed():
    """An offset that rounds up to 1 leaves the last tile at the last place."""
    almost = np.nextafter(1.0, 0.0)
    assert _moved(2, 3, 50, almost) == 49
    assert _moved(0, 1, 1, almost) == 0
    assert [_moved(i, 4, 4, 0.5) for i in range(4)] == [0, 1, 2, 3]


def test_what_is_evaluated_does_not_move():
    """`load` and `name`, which evaluation uses, know the unshifted tiles."""
    tiles, _ = shifted(SHAPES, 32, 16, 0.1)
    for i in range(0, len(tiles), 9):
        _, top, left = tiles.source.boxes[tiles.indices[i]]
        assert tuple(tiles.load(i, 'hr')[0, 0, :2]) == (top, left)
        assert tiles.name(i).endswith(f'@{left},{top}')


# From the config.


def make_config(path, arg: str = '', **data):
    config = div2k.get_config(arg)
    config.views.image_size = 12
    config.data.update({'path': str(path), 'tile_size': 16, 'tile_stride': 8} | data)
    return config


@pytest.mark.parametrize('arg', ['', 'lr_hr'])
def test_div2k_is_shifted_in_training_only(div2k_folder, arg):  # noqa: F811
    """configs/div2k.py trains on shifted tiles, of both pictures alike; the held-out tiles are
    those of the unshifted grid, and the number of examples is the same."""
    data = build_data(make_config(div2k_folder, arg))
    plain = build_data(make_config(div2k_folder, arg, tile_shift=False))
    assert len(data.train) == len(plain.train)
    for i in range(len(data.held_out)):
        assert data.held_out.name(i) == plain.held_out.name(i)
        for part in (data, plain):
            np.testing.assert_array_equal(
                part.held_out.load_in_epoch(3, i, 'hr'), plain.held_out.load(i, 'hr')
            )
    stream = stream_of(data.train, make_config(div2k_folder, arg))
    seen = set()
    for epoch in range(6):
        position = epoch * len(data.train)
        first, second = stream.load(position).pictures
        _, index = stream.example(position)
        scale = 2 if arg else 1
        np.testing.assert_array_equal(second[::scale, ::scale], first)
        seen.add(tuple(second[0, 0, :2]) != tuple(data.train.load(index, 'hr')[0, 0, :2]))
    assert True in seen


def test_the_sample_and_the_default_are_not_shifted():
    """By default, and in the sample whose figures the README quotes, every epoch is the same."""
    assert default.get_config().data.tile_shift is False
    config = div2k.get_config('sample')
    train = build_data(config).train
    for i in (0, 700):
        np.testing.assert_array_equal(train.load_in_epoch(5, i, 'image'), train.load(i, 'image'))
