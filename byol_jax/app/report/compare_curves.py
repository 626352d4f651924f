"""The curves of several runs in one chart a metric."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from byol_jax.app.report.chart import Level, Line, Point, line_chart, thin
from byol_jax.app.report.compare_run import SCALED_STD, RunRecord
from byol_jax.app.report.compare_tables import metric_names

# Okabe and Ito's colours, which are told apart with any colour vision (jfly.uni-koeln.de/color),
# without their yellow, which is too light for a line on white. Further runs get other dashes.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000')
_DASHES = ('', '7 3', '2 3')

# Points of a curve, at most: a stretch of more keeps its extremes.
_MOST = 300

# Their height over 0 says whether a run has collapsed.
_FROM_ZERO = ('loss', 'feature_std', SCALED_STD)
_LEVELS = {SCALED_STD: Level(1, 'even spread: 1')}


def mark(number: int) -> tuple[str, str]:
    """Colour and dash of the run of a number, from 0; of 21 runs no two are alike."""
    return (
        _COLOURS[number % len(_COLOURS)],
        _DASHES[number // len(_COLOURS) % len(_DASHES)],
    )


def swatch(number: int) -> str:
    """A short stretch of a run's line, for legends; SVG."""
    colour, dash = mark(number)
    return (
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5H26" '
        f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dash or "none"}"/></svg>'
    )


def curve_figures(runs: Sequence[RunRecord], axis: str) -> str:
    """A figure with chart and legend for every metric that any run has, as HTML.

    Args:
      runs: to draw, each in its mark.
      axis: 'step' or 'epoch', of the records.
    """
    figures = []
    for metric in metric_names(record for run in runs for record in run.records):
        lines = [
            Line(thin(_points(run, axis, metric), _MOST), '', *mark(number))
            for number, run in enumerate(runs)
        ]
        shown = [n for n, line in enumerate(lines) if line.points]
        if not shown:
            continue
        heights = [y for line in lines for _, y in line.points]
        legend = ''.join(
            f'<li>{swatch(number)}{html.escape(runs[number].name)}</li>' for number in shown
        )
        chart = line_chart(
            lines,
            x_label=axis,
            levels=[_LEVELS[metric]] if metric in _LEVELS else (),
            # Others are shown where they differ.
            from_zero=metric in _FROM_ZERO or 0 <= min(heights) < max(heights) / 2,
            words=f'{metric} over the {axis}s of {", ".join(runs[n].name for n in shown)}',
        )
        figures.append(
            f'<figure><figcaption>{html.escape(metric)}</figcaption>{chart}'
            f'<ul class="legend">{legend}</ul></figure>'
        )
    return ''.join(figures)


def _points(run: RunRecord, axis: str, metric: str) -> list[Point]:
    pairs = ((record.get(axis), record.get(metric)) for record in run.records)
    return [
        (float(x), float(y))
        for x, y in pairs
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y)
    ]
