"""report.html: one self-contained page about a run."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from byol_jax.files import write_whole
from byol_jax.report.pictures import CURVES, curve_svg, data_uri

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff;
       max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .4rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.note { color: #55616e; margin: .2rem 0 .8rem; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem .3rem 0; text-align: left;
       border-bottom: 1px solid #dde3e9; } td.number { text-align: right; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.curves svg { width: 100%; height: auto; } .curves figure { margin: 0; }
figcaption { font-weight: 600; } figcaption span { font-weight: 400; color: #55616e; }
img.wide { max-width: 100%; image-rendering: auto; }
.neighbours { display: flex; flex-wrap: wrap; gap: .35rem; margin: 0 0 .7rem; align-items: end; }
.neighbours div { text-align: center; font-size: .75rem; color: #55616e; width: 5rem; }
.neighbours img { width: 5rem; height: 5rem; object-fit: contain; border: 3px solid transparent; }
.neighbours .same img { border-color: #2b8a57; } .neighbours .other img { border-color: #c2452d; }
.neighbours .query { margin-right: .8rem; }
pre { background: #f3f6f9; padding: .8rem; overflow: auto; font-size: .8rem; }
"""


class Thumbnail(NamedTuple):
    """A small picture with a caption; `same` says whether its label is the query's."""

    picture: Image.Image
    caption: str
    same: bool | None = None


class Result(NamedTuple):
    """A row of the before/after table; accuracy in [0, 1], std of unit-length features."""

    name: str
    accuracy: float | None
    feature_std: float


def write_report(
    path: Path,
    *,
    title: str,
    summary: Mapping[str, str],
    results: Sequence[Result],
    protocol: str,
    records: Sequence[Mapping[str, Any]],
    projection_size: int,
    views: Path,
    neighbours: Sequence[tuple[Thumbnail, Sequence[Thumbnail]]],
    config: Mapping[str, Any],
    command: str,
) -> None:
    """Writes the page; it loads nothing from elsewhere.

    Args:
      path: of the page.
      title: the run's name.
      summary: facts in a table: label -> value.
      results: the before/after table.
      protocol: one sentence on how its accuracy was measured.
      records: of metrics.jsonl.
      projection_size: P; 1/sqrt(P) is drawn as the healthy level of the feature std.
      views: views.png.
      neighbours: held-out pictures with their nearest training pictures.
      config: the resolved config.
      command: that runs this again.
    """
    facts = ''.join(
        f'<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>' for k, v in summary.items()
    )
    curves = ''.join(
        f'<figure><figcaption>{name} <span>{note}</span></figcaption>'
        f'{curve_svg(records, metric, _reference(metric, projection_size))}</figure>'
        for metric, name, note in CURVES
    )
    with Image.open(views) as picture:
        views_uri = data_uri(picture)
    body = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)} - BYOL run</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<table>{facts}</table>
<h2>Before and after</h2>
{_results_table(results)}
<p class="note">{html.escape(protocol)}</p>
<h2>Curves</h2><div class="curves">{curves}</div>
<h2>View pairs</h2><p class="note">Originals, and views 1 and 2 as the network is given them.</p>
<img class="wide" src="{views_uri}" alt="Originals and their two views">
{_neighbour_rows(neighbours)}
<h2>Run it again</h2><pre>{html.escape(command)}</pre>
<h2>Config</h2><pre>{html.escape(json.dumps(config, indent=2, sort_keys=True))}</pre>
</body></html>
"""
    write_whole(path, lambda partial: partial.write_text(body, encoding='utf-8'))


def results_text(results: Sequence[Result]) -> str:
    """The before/after table for the terminal."""
    width = max(len(r.name) for r in results)
    lines = [f'{"encoder":<{width}}  nearest-neighbour accuracy  feature std']
    for r in results:
        accuracy = 'no labels' if r.accuracy is None else f'{r.accuracy:.1%}'
        lines.append(f'{r.name:<{width}}  {accuracy:>26}  {r.feature_std:>11.4f}')
    return '\n'.join(lines)


def _results_table(results: Sequence[Result]) -> str:
    rows = ''.join(
        f'<tr><td>{html.escape(r.name)}</td><td class="number">'
        f'{"no labels" if r.accuracy is None else f"{r.accuracy:.1%}"}</td>'
        f'<td class="number">{r.feature_std:.4f}</td></tr>'
        for r in results
    )
    return (
        '<table><tr><th>Encoder</th><th>Nearest-neighbour accuracy</th><th>Feature std</th></tr>'
        f'{rows}</table>'
    )


def _reference(metric: str, projection_size: int) -> float | None:
    return projection_size**-0.5 if metric == 'feature_std' else None


def _neighbour_rows(neighbours: Sequence[tuple[Thumbnail, Sequence[Thumbnail]]]) -> str:
    if not neighbours:
        return ''
    rows = ''.join(
        '<div class="neighbours">'
        + _thumbnail(query, 'query')
        + ''.join(_thumbnail(t, {True: 'same', False: 'other', None: ''}[t.same]) for t in found)
        + '</div>'
        for query, found in neighbours
    )
    return (
        '<h2>Nearest neighbours</h2><p class="note">Left: a held-out picture. Right: the training '
        'pictures the trained encoder finds most alike, with their cosine; green for the same '
        f'label, red for another.</p>{rows}'
    )


def _thumbnail(thumbnail: Thumbnail, style: str) -> str:
    return (
        f'<div class="{style}"><img src="{data_uri(thumbnail.picture)}" alt="">'
        f'<br>{html.escape(thumbnail.caption)}</div>'
    )
