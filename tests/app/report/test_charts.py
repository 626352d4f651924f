"""Line charts: they stay in their frame, and thinning loses no spike."""

from __future__ import annotations

import re

import numpy as np
import pytest

from byol_jax.app.report.charts import HEIGHT, WIDTH, Level, Line, line_chart, short_number, thin


def test_thin_keeps_ends_and_extremes():
    """Has at most the wanted number of points, in order, with both ends, lowest and highest."""
    values = np.random.default_rng(0).normal(size=5_003)
    points = [(float(i), float(v)) for i, v in enumerate(values)]
    kept = thin(points, 100)
    assert len(kept) <= 100
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert {points[0], points[-1], points[values.argmin()], points[values.argmax()]} <= set(kept)
    assert thin(points[:100], 100) == points[:100]


@pytest.mark.parametrize(
    ('points', 'options'),
    [
        ([(1, 2.0), (2, 3.0), (3, -1.0)], {}),
        ([(5, 0.25)], {}),
        ([(1, 7.0), (2, 7.0)], {}),
        ([(1, 0.0), (2, 0.0)], {'from_zero': True}),
        ([(0, 1e-9), (1, 3e-9)], {'from_zero': True}),
        ([(1, 1.0), (400, 1e-6)], {'log': True}),
        ([(1, 2.0), (2, 3.0)], {'levels': [Level(40.0, 'far')]}),
        ([(10_000, 123_456.0), (2_000_000, 3e6)], {}),
    ],
    ids=['plain', 'one-point', 'constant', 'zeros', 'tiny', 'log', 'level', 'large'],
)
def test_charts_stay_in_their_frame(points, options):
    """Lines, levels, ticks and their words lie within the drawing; each axis has two ticks."""
    text = line_chart([Line(points)], x_label='step', **options)
    drawn = re.findall(r'points="([^"]+)"', text) or [
        ','.join(re.search(r'cx="([\d.]+)" cy="([\d.]+)"', text).groups())
    ]
    places = [tuple(map(float, pair.split(','))) for pair in drawn[0].split()]
    assert len(places) == len(points)
    places += [
        tuple(map(float, p)) for p in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"', text)
    ]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    labels = re.findall(r'text-anchor="end">([^<]+)</text>', text)
    assert len(set(labels)) >= 2
    # Higher values are drawn higher.
    if len({y for _, y in points}) > 1:
        highest = max(range(len(points)), key=lambda i: points[i][1])
        assert places[highest][1] == min(y for _, y in places[: len(points)])


def test_short_numbers():
    """Numbers beside the curves are short and right."""
    values = (1_234_567, 12_345, 0.068_83, 3e-7, 42.04, 0)
    assert [*map(short_number, values)] == ['1.235M', '12.35k', '0.0688', '3e-07', '42', '0']
