"""The sheet of the map: places of pictures without overlap, and their colours."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from byol_jax.app.report.pictures import CELL, grid_cells, legend, map_picture


def test_no_two_pictures_in_one_cell():
    """Each place has its own cell, and the order to the right and upwards is kept."""
    places = np.random.default_rng(1).normal(size=(200, 2))
    places[0] = 1e6
    cells, side = grid_cells(places)
    assert side == 20
    assert len({tuple(cell) for cell in cells}) == 200
    assert cells.min() >= 0
    assert cells.max() < side
    across = np.corrcoef(places[1:, 0], cells[1:, 1])[0, 1]
    up = np.corrcoef(places[1:, 1], cells[1:, 0])[0, 1]
    assert across > 0.9
    assert up < -0.9
    np.testing.assert_array_equal(cells, grid_cells(places)[0])


@pytest.mark.parametrize('count', [1, 2, 7])
def test_equal_places_are_told_apart(count):
    """Pictures at the same place still get different cells."""
    cells, _ = grid_cells(np.zeros((count, 2)))
    assert len({tuple(cell) for cell in cells}) == count


def test_map_shows_every_picture_with_its_border():
    """Each picture has a cell, with its border and the middle of the picture."""
    labels = np.arange(30) % 3
    colours = legend(labels, ['a', 'b', 'c'])
    pictures = [Image.new('RGB', (96, 40), (n, 200, 0)) for n in range(30)]
    places = np.random.default_rng(0).normal(size=(30, 2))
    sheet = np.asarray(map_picture(pictures, places, colours.of_example))
    pitch = CELL + 2
    cells, side = grid_cells(places)
    assert sheet.shape == (side * pitch + 2, side * pitch + 2, 3)
    for number, (row, column) in enumerate(cells):
        top, left = 2 + row * pitch, 2 + column * pitch
        border = '#' + ''.join(f'{c:02x}' for c in sheet[top, left])
        assert border == colours.of_example[number]
        assert tuple(sheet[top + CELL // 2, left + CELL // 2]) == (number, 200, 0)
    plain = np.asarray(map_picture(pictures, places))
    assert tuple(plain[2 + cells[0][0] * pitch, 2 + cells[0][1] * pitch]) == (0, 200, 0)


def test_legend():
    """Up to 20 labels have their own colours; the rarest of more share a grey, which is said."""
    few = legend(np.array([2, 2, 0]), ['x', 'unseen', 'y'])
    assert [name for name, _ in few.names] == ['y', 'x']
    assert few.of_example == [few.names[0][1], few.names[0][1], few.names[1][1]]
    labels = np.concatenate([np.arange(30), np.arange(19)])
    many = legend(labels, [f'n{i}' for i in range(30)])
    assert len({colour for _, colour in many.names}) == 20
    assert many.names[-1][0] == '11 other labels'
    assert many.of_example[25] == many.names[-1][1]
