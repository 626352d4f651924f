"""Line charts as SVG for the HTML pages, with dashed levels and shaded bands."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

# A point of a line: (x, y).
Point = tuple[float, float]

# Size in SVG units. It is about the size in pixels that charts are shown at, so that text of 11
# units stays near 11 pixels, on a phone too.
WIDTH, HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 16, 12, 36
_COLOURS = ('#2563a8', '#c8641b', '#2b8a57', '#8250b8')


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
      points: points to join, in the order of x.
      name: name in the legend; '' for none.
      colour: CSS colour; '' to take the next of the chart's own.
      dash: SVG stroke-dasharray; '' for a solid line.
    """

    points: Sequence[Point]
    name: str = ''
    colour: str = ''
    dash: str = ''


class Level(NamedTuple):
    """A dashed horizontal line at a height, with a label."""

    height: float
    words: str


class Band(NamedTuple):
    """A range of x to shade.

    Attributes:
      start: first x.
      end: last x.
      colour: CSS colour.
      words: tooltip.
    """

    start: float
    end: float
    colour: str
    words: str


def thin(points: Sequence[Point], most: int = 400) -> list[Point]:
    """Reduces a line to at most `most` points without losing spikes.

    Keeps the first and the last point. The points between are cut into stretches of equal length,
    and the lowest and the highest of each stretch are kept.

    Args:
      points: points in the order of x.
      most: number of points to keep, at least 4.
    """
    if len(points) <= most:
        return list(points)
    heights = np.array([y for _, y in points[1:-1]])
    stretches = (most - 2) // 2
    starts = np.arange(stretches + 1) * len(heights) // stretches
    kept = {0, len(points) - 1}
    for start, end in itertools.pairwise(starts.tolist()):
        stretch = heights[start:end]
        kept |= {1 + start + int(stretch.argmin()), 1 + start + int(stretch.argmax())}
    return [points[i] for i in sorted(kept)]


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    x_span: tuple[float, float] | None = None,
    levels: Sequence[Level] = (),
    bands: Sequence[Band] = (),
    from_zero: bool = False,
    log: bool = False,
    words: str = '',
) -> Markup:
    """Draws lines over a common x axis.

    Args:
      lines: lines of finite numbers, above 0 if `log`. A line of one point is drawn as a dot.
      x_label: label under the x axis.
      x_span: first and last x of the axis; None for those of the points.
      levels: dashed horizontal lines; the y axis always includes them.
      bands: ranges of x that are shaded behind the lines.
      from_zero: whether the y axis starts at 0.
      log: whether the y axis is logarithmic.
      words: description for screen readers.

    Returns:
      An <svg> element that loads no other file.
    """
    points = [point for line in lines for point in line.points]
    xs = x_span or [x for x, _ in points] or [0.0]
    ys = [y for _, y in points] + [level.height for level in levels] + [0.0] * from_zero
    x_ticks, (left, right) = _axis(min(xs), max(xs), tight=True)
    if log:
        y_ticks, (bottom, top) = _log_axis(min(ys, default=1.0), max(ys, default=1.0))
    else:
        y_ticks, (bottom, top) = _axis(min(ys, default=0.0), max(ys, default=1.0))

    def across(x: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (x - left) / (right - left)

    def up(y: float) -> float:
        y = math.log10(y) if log else y
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (y - bottom) / (top - bottom)

    parts = []
    for band in bands:
        start, end = (min(max(across(x), _LEFT), WIDTH - _RIGHT) for x in (band.start, band.end))
        parts.append(
            f'<rect x="{start:.1f}" y="{_TOP}" width="{max(end - start, 2):.1f}" '
            f'height="{HEIGHT - _TOP - _BOTTOM}" fill="{band.colour}" fill-opacity=".18">'
            f'<title>{html.escape(band.words)}</title></rect>'
        )
    for tick, label in y_ticks:
        y = up(tick)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for tick, label in x_ticks:
        parts.append(
            f'<text x="{across(tick):.1f}" y="{HEIGHT - _BOTTOM + 14}" '
            f'text-anchor="middle">{label}</text>'
        )
    parts.append(
        f'<path class="axis" d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>'
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">'
        f'{html.escape(x_label)}</text>'
    )
    for level in levels:
        parts.append(f'<path class="level" d="M{_LEFT} {up(level.height):.1f}H{WIDTH - _RIGHT}"/>')
    for number, line in enumerate(lines):
        colour = line.colour or _COLOURS[number % len(_COLOURS)]
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ''
        drawn = [(across(x), up(y)) for x, y in line.points]
        if len(drawn) == 1:
            x, y = drawn[0]
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        elif drawn:
            joined = ' '.join(f'{x:.1f},{y:.1f}' for x, y in drawn)
            parts.append(f'<polyline class="line" stroke="{colour}"{dash} points="{joined}"/>')
        if line.name:
            parts.append(
                f'<text x="{WIDTH - _RIGHT - 4}" y="{_TOP + 12 + 14 * number}" text-anchor="end" '
                f'style="fill:{colour};font-weight:600">{html.escape(line.name)}</text>'
            )
    # After the lines, so that no line hides the labels.
    for level in levels:
        y = up(level.height)
        text = y - 4 if y > _TOP + 12 else y + 12
        parts.append(
            f'<text class="level" x="{WIDTH - _RIGHT - 2}" y="{text:.1f}" text-anchor="end">'
            f'{html.escape(level.words)}</text>'
        )
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(words)}">{"".join(parts)}</svg>'
    )


def short_number(value: float) -> str:
    """Formats a number briefly: 1200000 -> '1.2M', 0.06883 -> '0.0688', 3e-7 -> '3e-07'."""
    size = abs(value)
    if size >= 1e6:
        return f'{value / 1e6:.4g}M'
    if size >= 1e4:
        return f'{value / 1e3:.4g}k'
    return f'{value:.3g}' if size < 100 else f'{value:,.0f}'


_Ticks = list[tuple[float, str]]


def _axis(low: float, high: float, tight: bool = False) -> tuple[_Ticks, tuple[float, float]]:
    """Chooses the ticks of an axis: (round numbers with their labels, (start, end) of the axis)."""
    # There is only one value, or values differ by rounding errors only.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.1 * abs(high) or 1.0
        # Values that are all 0 are usually counts or shares, so the axis starts at 0.
        low, high = (low - margin if high else 0.0), high + margin
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    if tight:
        first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
        span = (low, high)
    else:
        span = (first * step, last * step)
    ticks = [n * step for n in range(first, last + 1)]
    return [(tick, _tick_label(tick, step, max(abs(low), abs(high)))) for tick in ticks], span


def _tick_label(tick: float, step: float, largest: float) -> str:
    if largest >= 1e4 or largest < 1e-2:
        return '0' if tick == 0 else short_number(tick).replace('e-0', 'e-')
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if step / 10.0**-decimals % 1 > 1e-6:
        # A step of 2.5 needs one decimal more.
        decimals += 1
    return f'{tick:.{decimals}f}'


def _log_axis(low: float, high: float) -> tuple[_Ticks, tuple[float, float]]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = math.ceil((last - first) / 5)
    ticks = [(10.0**n, f'1e{n}' if n else '1') for n in range(last, first - 1, -every)]
    return ticks, (first, last)
