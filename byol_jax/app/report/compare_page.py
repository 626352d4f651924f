"""The comparison as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from byol_jax.app.report.alarm_log import OVER
from byol_jax.app.report.compare_curves import curve_figures, swatch
from byol_jax.app.report.compare_run import RunRecord
from byol_jax.app.report.compare_tables import Table, per_epoch_differs
from byol_jax.app.report.page import write_html

# In the first bytes of every such page, so that no other file is replaced by one.
_GENERATOR = '<meta name="generator" content="byol_jax --mode=compare">'

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff;
       max-width: 76rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .4rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p.note { color: #55616e; margin: .2rem 0 .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #dde3e9; vertical-align: top; }
thead th, td { text-align: right; min-width: 6.5rem; max-width: 16rem; }
tbody th, thead td { text-align: left; font-weight: 400; position: sticky; left: 0;
                     background: #fff; min-width: 7rem; max-width: 18rem; }
.swatch { width: 26px; height: 10px; margin-right: .35rem; flex: none; }
ul.runs, ul.legend { list-style: none; padding: 0; margin: .3rem 0; }
ul.runs li { margin: .2rem 0; } ul.runs span { color: #55616e; }
ul.legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; font-size: .8rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr));
          gap: 1.2rem; }
.curves figure { margin: 0; } figcaption { font-weight: 600; }
.chart { width: 100%; height: auto; overflow: visible; font: 11px system-ui, sans-serif; }
.chart text { fill: #55616e; } .chart .line { fill: none; stroke-width: 1.8; }
.chart .grid { stroke: #e4e9ee; } .chart .axis { stroke: #8b97a3; }
.chart path.level { stroke: #6b7783; stroke-dasharray: 4 3; }
.axes label { margin-right: 1rem; }
#by-epoch:not(:checked) ~ .by-epoch, #by-step:not(:checked) ~ .by-step { display: none; }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr));
         gap: 1.2rem; } .views figure { margin: 0; } .views img { max-width: 100%; }
pre { background: #f3f6f9; padding: .8rem; white-space: pre-wrap; font-size: .8rem; margin: 0; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; }
@media (max-width: 40rem) {
  body { padding: .7rem; } table { font-size: .85rem; }
  tbody th, thead td { min-width: 6rem; max-width: 8.5rem; }
  thead th, td { min-width: 5.5rem; }
}
"""


def is_comparison(path: Path) -> bool:
    """Whether a file is a page that `write_page` has written."""
    with path.open('rb') as file:
        return _GENERATOR.encode() in file.read(1000)


def write_page(path: Path, runs: Sequence[RunRecord], tables: Sequence[Table]) -> None:
    """Writes the page; it loads nothing from elsewhere and runs no script.

    Args:
      path: of the page.
      runs: in the order of the columns.
      tables: of these runs.
    """
    title = f'{len(runs)} BYOL runs side by side'
    body = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{_GENERATOR}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
{_legend(runs)}
{''.join(_table(runs, table) for table in tables)}
{_alarms(runs)}
<h2>Curves</h2>{_curves(runs)}
<h2>View pairs</h2><p class="note">views.png of each run.</p>
<div class="views">{''.join(_views(n, run) for n, run in enumerate(runs))}</div>
{_commands(runs)}
</body></html>
"""
    write_html(path, body)


def _name(number: int, run: RunRecord) -> str:
    return f'{swatch(number)}{_breakable(run.name)}'


def _breakable(name: str) -> str:
    """HTML of a name that may be broken where its words end."""
    return re.sub('([_./])', r'\1<wbr>', html.escape(name))


def _legend(runs: Sequence[RunRecord]) -> str:
    items = ''.join(
        f'<li>{_name(n, run)} <span>{_breakable(str(run.workdir))}</span></li>'
        for n, run in enumerate(runs)
    )
    return f'<ul class="runs">{items}</ul>'


def _table(runs: Sequence[RunRecord], table: Table) -> str:
    parts = [f'<h2>{html.escape(table.title)}</h2>']
    if table.note:
        parts.append(f'<p class="note">{html.escape(table.note)}</p>')
    if table.rows:
        head = ''.join(f'<th scope="col">{_name(n, run)}</th>' for n, run in enumerate(runs))
        rows = ''.join(
            f'<tr><th scope="row">{_breakable(row.heading)}</th>'
            + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row.cells)
            + '</tr>'
            for row in table.rows
        )
        parts.append(
            f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead>'
            f'<tbody>{rows}</tbody></table></div>'
        )
    return ''.join(parts)


def _alarms(runs: Sequence[RunRecord]) -> str:
    """What the alarms measured, and their causes and remedies, to fold out."""
    parts = []
    for number, run in enumerate(runs):
        raised = [alarm for alarm in run.alarms if alarm['severity'] != OVER]
        if raised:
            entries = ''.join(
                f'<dt>{html.escape(alarm["name"])}, {html.escape(alarm["severity"])} at step '
                f'{alarm["step"]:,}</dt><dd>{html.escape(alarm["evidence"])}. Likely cause: '
                f'{html.escape(alarm["cause"])}. What to do: {html.escape(alarm["remedy"])}.</dd>'
                for alarm in raised
            )
            parts.append(
                f'<details><summary>{_name(number, run)}: what was measured, likely causes and '
                f'remedies</summary><dl>{entries}</dl></details>'
            )
    return ''.join(parts)


def _curves(runs: Sequence[RunRecord]) -> str:
    by_step = curve_figures(runs, 'step')
    if not by_step:
        return '<p class="note">No step is logged yet.</p>'
    if not per_epoch_differs(runs):
        return f'<div class="curves">{by_step}</div>'
    return (
        '<p class="note">A step is another part of an epoch in each run: choose what to compare '
        'at.</p><div class="axes"><input type="radio" name="axis" id="by-step" checked>'
        '<label for="by-step">steps</label><input type="radio" name="axis" id="by-epoch">'
        '<label for="by-epoch">epochs</label>'
        f'<div class="curves by-step">{by_step}</div>'
        f'<div class="curves by-epoch">{curve_figures(runs, "epoch")}</div></div>'
    )


def _views(number: int, run: RunRecord) -> str:
    path = run.workdir / 'views.png'
    shown = '<p class="note">There is none.</p>'
    if path.exists():
        try:
            with Image.open(path) as picture:
                shown = f'<img src="{_jpeg_uri(picture)}" alt="Originals and their two views">'
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            shown = f'<p class="note">It cannot be read: {html.escape(str(error))}</p>'
    return f'<figure><figcaption>{_name(number, run)}</figcaption>{shown}</figure>'


def _jpeg_uri(picture: Image.Image) -> str:
    """A data: address; ten pages of views as PNGs would be 20 MB."""
    buffer = io.BytesIO()
    picture.convert('RGB').save(buffer, 'JPEG', quality=88, subsampling=0)
    return 'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode()


def _commands(runs: Sequence[RunRecord]) -> str:
    parts = [
        f'<h3>{_name(n, run)}</h3><pre>{html.escape(run.command)}</pre>'
        for n, run in enumerate(runs)
        if run.command
    ]
    return '<h2>Commands</h2>' + ''.join(parts) if parts else ''
