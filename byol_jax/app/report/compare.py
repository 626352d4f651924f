"""--mode=compare: shows runs side by side, in the terminal and as an HTML page."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from PIL import Image

from byol_jax.app.records import OVER
from byol_jax.app.report.charts import Level, Line, Point, line_chart, thin
from byol_jax.app.report.compare_tables import (
    SCALED_STD,
    Row,
    RunRecord,
    Table,
    metric_names,
    per_epoch_differs,
    read_runs,
    tables,
)
from byol_jax.app.report.page import data_uri, write_page
from byol_jax.errors import UserError, printable

_DEFAULT = Path('compare.html')

# Marks the pages of this mode in their first bytes, so that no other file is overwritten.
_GENERATOR = Markup('<meta name="generator" content="byol_jax --mode=compare">')

# Longest cell and heading in the terminal, in characters. Longer ones are cut in the middle; the
# page shows them whole.
_CELL, _HEADING = 40, 40
_GAP = '  '

# The colours of Okabe and Ito, which colour-blind people can tell apart (jfly.uni-koeln.de/color),
# without their yellow, which is too light on white. Further runs get dashed lines.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000')
_DASHES = ('', '7 3', '2 3')

# Number of points of a curve, at most.
_MOST = 300

# Metrics that are always drawn from 0, because a value near 0 means collapse.
_FROM_ZERO = ('loss', 'feature_std', SCALED_STD)
_LEVELS = {SCALED_STD: Level(1, 'even spread: 1')}


def compare(workdirs: str | None, output: Path | None) -> None:
    """Prints a comparison of runs and writes it as a page. Changes nothing in their workdirs.

    Args:
      workdirs: workdirs of two or more runs, separated by commas.
      output: the page to write; None for compare.html in the current folder.

    Raises:
      UserError: the runs cannot be compared, or the page would overwrite another file.
    """
    path = output or _DEFAULT
    given = [name.strip() for name in (workdirs or '').split(',')]
    runs = read_runs([Path(name).expanduser() for name in given if name])
    _check_output(path)
    made = tables(runs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_comparison(path, runs, made)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}.') from error
    width = shutil.get_terminal_size().columns
    print(printable(text_of([run.name for run in runs], made, width), keep='\n'))
    print(f'\nwritten: {path}')


def _check_output(path: Path) -> None:
    if path.suffix.lower() not in ('.html', '.htm'):
        raise UserError(f'--output={path}: a comparison is written to a file that ends in .html.')
    if path.is_dir():
        raise UserError(f'--output={path} is a folder: give the name of a file.')
    if path.exists() and not _is_comparison(path):
        raise UserError(
            f'{path} exists and is not a page of --mode=compare, so it is not replaced. '
            'Give another --output=FILE.html.'
        )


def _is_comparison(path: Path) -> bool:
    with path.open('rb') as file:
        return _GENERATOR.encode() in file.read(1000)


def text_of(names: Sequence[str], tables: Sequence[Table], width: int) -> str:
    """Formats tables as text for the terminal.

    Args:
      names: names of the runs, which are the columns.
      tables: the tables.
      width: characters per line. Columns that do not fit are continued in a block below.
    """
    parts = []
    for table in tables:
        lines = [table.title.upper()]
        if table.rows:
            lines += _blocks(names, table.rows, width)
        if table.note:
            lines.append(table.note)
        parts.append('\n'.join(lines))
    return '\n\n'.join(parts)


def _blocks(names: Sequence[str], rows: Sequence[Row], width: int) -> list[str]:
    headings = [_cut(row.heading, _HEADING) for row in rows]
    first = max(map(len, headings))
    columns = [
        [_cut(name, _CELL), *(_cut(row.cells[i], _CELL) for row in rows)]
        for i, name in enumerate(names)
    ]
    lines: list[str] = []
    while columns:
        count, used = 0, first
        for column in columns:
            used += len(_GAP) + max(map(len, column))
            if count and used > width:
                break
            count += 1
        shown, columns = columns[:count], columns[count:]
        widths = [max(map(len, column)) for column in shown]
        if lines:
            lines.append('')
        for number, heading in enumerate(['', *headings]):
            cells = [
                f'{column[number]:>{each}}' for column, each in zip(shown, widths, strict=True)
            ]
            lines.append(_GAP.join([f'{heading:<{first}}', *cells]).rstrip())
    return lines


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head = (most - 3) // 2
    return f'{text[:head]}...{text[len(text) - (most - 3 - head) :]}'


class _ShownRun(NamedTuple):
    """A run as templates/compare.html shows it.

    Attributes:
      name: name of the run.
      workdir: its workdir, as given.
      swatch: a short piece of its line for legends, SVG.
      alarms: lines of alarms.jsonl that raised an alarm.
      views: views.png as a data: URI; '' if it cannot be shown.
      no_views: why `views` is ''.
      command: the command line that started it.
    """

    name: str
    workdir: str
    swatch: Markup
    alarms: list[dict[str, Any]]
    views: str
    no_views: str
    command: str


class _Figure(NamedTuple):
    """A chart (SVG) of a metric over all runs, and the runs that have the metric."""

    metric: str
    chart: Markup
    runs: list[_ShownRun]


def write_comparison(path: Path, runs: Sequence[RunRecord], tables: Sequence[Table]) -> None:
    """Writes the page.

    Args:
      path: file to write.
      runs: the runs, in the order of the columns.
      tables: the tables of these runs.

    Raises:
      OSError: it cannot be written; an older file of that name is kept.
    """
    shown = [_shown(number, run) for number, run in enumerate(runs)]
    write_page(
        path,
        'compare.html',
        title=f'{len(runs)} runs side by side',
        generator=_GENERATOR,
        runs=shown,
        tables=tables,
        by_step=_figures(runs, shown, 'step'),
        by_epoch=_figures(runs, shown, 'epoch') if per_epoch_differs(runs) else [],
    )


def mark(number: int) -> tuple[str, str]:
    """Colour and dash of the line of run `number`, counted from 0; they repeat after 21 runs."""
    return (
        _COLOURS[number % len(_COLOURS)],
        _DASHES[number // len(_COLOURS) % len(_DASHES)],
    )


def _shown(number: int, run: RunRecord) -> _ShownRun:
    colour, dash = mark(number)
    swatch = Markup(
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5H26" '
        f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dash or "none"}"/></svg>'
    )
    raised = [alarm for alarm in run.alarms if alarm['severity'] != OVER]
    views, no_views = '', 'There is none.'
    path = run.workdir / 'views.png'
    if path.exists():
        try:
            with Image.open(path) as picture:
                views = data_uri(picture)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            no_views = f'It cannot be read: {error}'
    return _ShownRun(run.name, str(run.workdir), swatch, raised, views, no_views, run.command)


def _figures(runs: Sequence[RunRecord], shown: Sequence[_ShownRun], axis: str) -> list[_Figure]:
    """Draws a chart for every metric that any run has.

    Args:
      runs: the runs.
      shown: the same runs, for the legends.
      axis: 'step' or 'epoch', the x axis.
    """
    figures = []
    for metric in metric_names(record for run in runs for record in run.records):
        lines = [
            Line(thin(_points(run, axis, metric), _MOST), '', *mark(number))
            for number, run in enumerate(runs)
        ]
        drawn = [each for each, line in zip(shown, lines, strict=True) if line.points]
        if not drawn:
            continue
        heights = [y for line in lines for _, y in line.points]
        chart = line_chart(
            lines,
            x_label=axis,
            levels=[_LEVELS[metric]] if metric in _LEVELS else (),
            # Otherwise the axis zooms in on the range in which the runs differ.
            from_zero=metric in _FROM_ZERO or 0 <= min(heights) < max(heights) / 2,
            words=f'{metric} over the {axis}s of {", ".join(each.name for each in drawn)}',
        )
        figures.append(_Figure(metric, chart, drawn))
    return figures


def _points(run: RunRecord, axis: str, metric: str) -> list[Point]:
    pairs = ((record.get(axis), record.get(metric)) for record in run.records)
    return [
        (float(x), float(y))
        for x, y in pairs
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y)
    ]
