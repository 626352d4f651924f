"""Tiles: where they lie, which are held out, and how their grid is shifted."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import SHAPES, Coordinates
from streams import stream_of

from byol_jax.app.data import build_data
from byol_jax.errors import UserError
from byol_jax.sources.base import Cached
from byol_jax.sources.tiles import ShiftedTiles, Tiles, _moved
from configs import default, div2k


def test_cached_tiles_decode_each_picture_once():
    """Cutting every tile of a cached example decodes each of its pictures once."""
    source = Coordinates([(64, 64)])
    tiles = Tiles(Cached(source, 10**6), 16)
    source.loads.clear()
    for i in range(len(tiles)):
        tiles.load(i, 'hr')
        tiles.load(i, 'lr')
    assert max(source.loads.values()) == 1


@pytest.mark.parametrize(
    ('shape', 'size', 'stride', 'tops', 'lefts'),
    [
        ((64, 96), 32, 0, [0, 32], [0, 32, 64]),
        ((64, 96), 32, 16, [0, 16, 32], [0, 16, 32, 48, 64]),
        ((70, 33), 32, 32, [0, 32, 38], [0, 1]),
        ((32, 32), 32, 8, [0], [0]),
        ((40, 100), 16, 30, [0, 24], [0, 30, 60, 84]),
    ],
)
def test_tiles_lie_on_a_grid_that_ends_at_the_border(shape, size, stride, tops, lefts):
    """Tiles start every `stride` pixels, and a last one ends at the border if none does."""
    tiles = Tiles(Coordinates([shape]), size, stride)
    corners = []
    for i in range(len(tiles)):
        tile = tiles.load(i, 'hr')
        assert tile.shape == (size, size, 3)
        corners.append(tuple(tile[0, 0, :2]))
        np.testing.assert_array_equal(tile[-1, -1, :2], tile[0, 0, :2] + size - 1)
        assert tiles.name(i) == f'0000.png @{corners[-1][1]},{corners[-1][0]}'
    assert corners == [(top, left) for top in tops for left in lefts]


def test_tiles_are_labelled_with_their_picture():
    """A tile's label is the picture from which it is cut, named as by the source."""
    tiles = Tiles(Coordinates([(32, 64), (32, 32), (64, 32)]), 32)
    assert tiles.labels.tolist() == [0, 0, 1, 2, 2]
    assert list(tiles.label_names) == ['0000.png', '0001.png', '0002.png']
    for i in range(len(tiles)):
        assert np.all(tiles.load(i, 'hr')[..., 2] == tiles.labels[i])


@pytest.mark.parametrize('shape', [(31, 64), (64, 31)])
@pytest.mark.parametrize('fraction', [0.0, 0.1])
def test_a_picture_smaller_than_a_tile_is_left_out(shape, fraction):
    """A picture smaller than a tile has none and is named; the others' tiles do not change."""
    tiles = Tiles(Coordinates([(200, 64), shape, (64, 200)]), 32)
    whole = Tiles(Coordinates([(200, 64), (64, 64), (64, 200)]), 32)
    assert tiles.small == [('0001.png', *shape)]
    assert tiles.bad == []
    np.testing.assert_array_equal(tiles.boxes, whole.boxes[whole.labels != 1])
    for part, of_whole in zip(tiles.split(fraction, 0), whole.split(fraction, 0), strict=True):
        kept = whole.boxes[of_whole]
        np.testing.assert_array_equal(tiles.boxes[part], kept[kept[:, 0] != 1])


def test_pictures_all_smaller_than_a_tile_are_an_error():
    """If no picture has a tile, the error has the largest picture and its size."""
    with pytest.raises(UserError, match=r'All 2 pictures .*tile_size=32.*0001\.png, is 30x40'):
        Tiles(Coordinates([(10, 90), (40, 30)]), 32)


@pytest.mark.parametrize('keys', [('hr', 'lr'), ('lr', 'hr')])
def test_tiles_of_a_pair_show_the_same_part_of_the_scene(keys):
    """A tile's low- and high-resolution pictures begin and end at the same place."""
    source = Coordinates([(64, 96), (48, 40)], keys)
    tiles = Tiles(source, 16, 8)
    for i in range(len(tiles)):
        high, low = tiles.load(i, 'hr'), tiles.load(i, 'lr')
        assert high.shape[0] == 2 * low.shape[0] == (16 if keys[0] == 'hr' else 32)
        np.testing.assert_array_equal(high[::2, ::2], low)


def held_out_pixels(tiles: Tiles, held_out: np.ndarray) -> list[np.ndarray]:
    masks = [np.zeros(shape, bool) for shape in tiles.source.shapes]
    for picture, top, left in tiles.boxes[held_out]:
        masks[picture][top : top + tiles.tile_size, left : left + tiles.tile_size] = True
    return masks


@pytest.mark.parametrize('stride', [0, 31, 16, 8, 13, 40])
@pytest.mark.parametrize('fraction', [0.05, 0.1, 0.2, 0.4])
def test_no_pixel_of_a_held_out_tile_is_trained_on(fraction, stride):
    """Held-out and training tiles share no pixel."""
    tiles = Tiles(Coordinates(SHAPES), 32, stride)
    for seed in range(10):
        train, held_out = tiles.split(fraction, seed)
        masks = held_out_pixels(tiles, held_out)
        for picture, top, left in tiles.boxes[train]:
            assert not masks[picture][top : top + 32, left : left + 32].any()
        assert len(train) > 0


@pytest.mark.parametrize('stride', [0, 31, 16, 8, 13, 40])
@pytest.mark.parametrize('fraction', [0.05, 0.1, 0.2, 0.4])
def test_every_picture_trains_and_is_held_out(fraction, stride):
    """Every picture with two or more tiles a side has tiles of both kinds, so classes agree."""
    tiles = Tiles(Coordinates(SHAPES), 32, stride)
    for seed in range(10):
        for part in tiles.split(fraction, seed):
            assert set(tiles.labels[part].tolist()) == set(range(len(SHAPES)))


@pytest.mark.parametrize('fraction', [0.1, 0.2, 0.3])
def test_held_out_part_is_about_the_asked_fraction(fraction):
    """In a picture of many tiles, about the fraction of its area is held out."""
    tiles = Tiles(Coordinates([(250, 250)]), 10, 5)
    _, held_out = tiles.split(fraction, 0)
    share = held_out_pixels(tiles, held_out)[0].mean()
    # Blocks end on the grid of 5 pixels: up to 5 of at least 79 pixels a side are lost.
    assert 0.85 * fraction < share < 1.02 * fraction


def test_split_is_a_function_of_its_seed():
    """The same seed holds out the same tiles, another seed others, drawn for each picture."""
    tiles = Tiles(Coordinates([(200, 200)] * 6), 32, 16)
    first, again, other = (tiles.split(0.1, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert set(first[1]) != set(other[1])
    places = {tuple(tiles.boxes[first[1]][tiles.labels[first[1]] == i][0, 1:]) for i in range(6)}
    assert len(places) > 1


def test_split_of_nothing():
    """A fraction of 0 trains on every tile."""
    tiles = Tiles(Coordinates([(64, 64)]), 32, 16)
    train, held_out = tiles.split(0.0, 0)
    assert train.tolist() == list(range(9))
    assert held_out.tolist() == []


@pytest.mark.parametrize('shape', [(32, 32), (50, 50), (40, 63)])
def test_a_picture_too_small_to_be_split_still_trains(shape):
    """A picture without two disjoint tiles is for training as a whole, or an error."""
    tiles = Tiles(Coordinates([(200, 200), shape]), 32, 16)
    message, trained = '', []
    try:
        trained = tiles.labels[tiles.split(0.1, 0)[0]]
    except UserError as error:
        message = str(error)
    assert 1 in trained or '0001.png' in message


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
    """In every epoch, each picture has as many tiles as on the unshifted grid, all inside it, at
    different places, and without a pixel of a held-out tile.
    """
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
    """Over the epochs, every pixel of the unshifted training tiles is shown; in each epoch, all but
    a margin narrower than the stride.
    """
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
    """Over the epochs, tiles begin equally often at every place (chi-squared, 1 in 10,000)."""
    size, stride = 32, 24
    tiles, _ = shifted([shape], size, stride)
    room = np.array(shape) - size + 1
    epochs = 4000
    counts = [np.zeros(room[axis]) for axis in range(2)]
    for epoch in range(epochs):
        # One tile an axis is enough, since the others keep their distance from it.
        _, top, left = tiles.place(epoch, epoch % len(tiles))
        counts[0][top] += 1
        counts[1][left] += 1
    for count in counts:
        expected = epochs / len(count)
        statistic = np.sum((count - expected) ** 2 / expected)
        freedom = len(count) - 1
        assert statistic < freedom + 3.72 * np.sqrt(2 * freedom) + 10


def test_offsets_are_a_function_of_seed_epoch_and_picture():
    """The same seed, epoch and picture give the same place; changing one gives another offset; all
    tiles of a picture move together.
    """
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
    """The low-resolution tile is exactly the same part of the scene: it begins at an even pixel,
    and has every second pixel.
    """
    tiles, _ = shifted([(100, 130), (90, 90)], 16, 8, fraction, keys=keys)
    odd = 0
    for epoch in range(5):
        for i in range(0, len(tiles), 7):
            high, low = (tiles.load_in_epoch(epoch, i, key) for key in ('hr', 'lr'))
            np.testing.assert_array_equal(high[::2, ::2], low)
            odd += int(high[0, 0, 0]) % 8 != 0
    assert odd > 0


def test_sizes_without_common_places_are_cut_to_the_nearest_pixel():
    """If one size is not a multiple of the other, tiles still move, to the nearest pixel."""

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
    """An offset that rounds up to 1 keeps the last tile at the last place."""
    almost = np.nextafter(1.0, 0.0)
    assert _moved(2, 3, 50, almost) == 49
    assert _moved(0, 1, 1, almost) == 0
    assert [_moved(i, 4, 4, 0.5) for i in range(4)] == [0, 1, 2, 3]


def test_what_is_evaluated_does_not_move():
    """`load` and `name`, which evaluation uses, are those of the unshifted tiles."""
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
def test_div2k_is_shifted_in_training_only(div2k_folder, arg):
    """configs/div2k.py trains on shifted tiles, of both pictures alike; held-out tiles are not
    shifted, and the number of examples is the same.
    """
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
    """By default, and in the sample whose numbers the README has, all epochs have equal tiles."""
    assert default.get_config().data.tile_shift is False
    config = div2k.get_config('sample')
    train = build_data(config).train
    for i in (0, 700):
        np.testing.assert_array_equal(train.load_in_epoch(5, i, 'image'), train.load(i, 'image'))
