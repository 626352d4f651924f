"""report.html: one self-contained page about a run, made of sections."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byol_jax.files import write_whole

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff;
       max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .4rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-top: 1px solid #dde3e9;
     padding-top: .9rem; }
h3 { font-size: 1rem; margin: 1.3rem 0 .5rem; }
p.note { color: #55616e; margin: .3rem 0 .8rem; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .35rem 1rem .35rem 0; text-align: left; border-bottom: 1px solid #dde3e9;
         overflow-wrap: normal; }
td.number { text-align: right; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
     gap: .5rem 1.5rem; margin: .5rem 0; }
dt { color: #55616e; font-size: .85rem; } dd { margin: 0; }
progress { width: 100%; height: .8rem; accent-color: #2563a8; }
.verdict { border-left: .5rem solid; border-radius: .3rem; padding: .7rem 1rem;
           margin: .8rem 0; }
.verdict p { margin: .2rem 0; } .verdict .state { font-size: 1.35rem; font-weight: 700; }
.verdict ul { margin: .5rem 0; padding-left: 1.2rem; } .verdict li { margin: .5rem 0; }
.healthy { border-color: #2b8a57; background: #eef8f2; }
.watch { border-color: #d79b00; background: #fdf6e3; }
.collapsed, .stopped { border-color: #c2452d; background: #fdeeea; }
.too { border-color: #7a8794; background: #f3f6f9; }
figure { margin: 0; }
.curves { display: grid; gap: 1.2rem 1.5rem;
          grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .6rem; }
figcaption span { flex-basis: 100%; color: #55616e; font-size: .85rem; line-height: 1.35; }
.latest { font-variant-numeric: tabular-nums; }
.one { max-width: 34rem; }
.chart { display: block; width: 100%; height: auto; font-size: 11px; fill: #46525e; }
.chart .grid { stroke: #e6ebf0; } .chart .axis { stroke: #9aa4ae; }
.chart path.level { stroke: #6b7783; stroke-dasharray: 4 3; }
.chart text.level { fill: #46525e; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
.chart .line { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
img.wide { max-width: 100%; height: auto; }
img.map { width: 100%; min-width: 34rem; max-width: 64rem; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; }
.neighbours { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.2rem, 1fr));
              gap: .35rem; margin: 0 0 1rem; max-width: 44rem; align-items: start; }
.neighbours div { text-align: center; font-size: .8rem; line-height: 1.25; color: #55616e; }
.neighbours img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #f3f6f9;
                  border: 3px solid transparent; }
.neighbours .same img { border-color: #2b8a57; } .neighbours .other img { border-color: #c2452d; }
.neighbours .query img { border-color: #1c2733; }
pre { background: #f3f6f9; padding: .8rem; overflow: auto; font-size: .8rem;
      white-space: pre-wrap; }
summary { cursor: pointer; padding: .5rem 0; }
"""


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Writes the page; it loads nothing from elsewhere.

    Args:
      path: of the page.
      title: its heading.
      sections: HTML, from the top down.

    Raises:
      OSError: it could not be written; what was there still is.
    """
    body = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{chr(10).join(section for section in sections if section)}
</body></html>
"""
    write_html(path, body)


def write_html(path: Path, text: str) -> None:
    """Writes a page whole; what is no UTF-8 in it, as a file's name may be, is escaped.

    Raises:
      OSError: it could not be written; what was there still is.
    """
    encoded = text.encode(errors='backslashreplace')
    write_whole(path, lambda partial: partial.write_bytes(encoded))


def progress_section(step: int, total: int, words: str) -> str:
    """How far a run is, as HTML; the bar goes when it has ended."""
    bar = f'<progress value="{step}" max="{total}"></progress>' if step < total else ''
    return f'<div>{bar}<p class="note">{html.escape(words)}</p></div>'


def facts_section(facts: Mapping[str, str]) -> str:
    """Facts of the run as HTML: label -> value."""
    pairs = ''.join(
        f'<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>' for k, v in facts.items()
    )
    return f'<h2>Run</h2><dl>{pairs}</dl>'


def views_section(uri: str) -> str:
    """The picture of the view pairs, a data: address, as HTML."""
    return (
        '<h2>View pairs</h2><p class="note">Originals, and views 1 and 2 as the network is given '
        f'them.</p><img class="wide" src="{uri}" alt="Originals and their two views">'
    )


def again_section(command: str, config: Mapping[str, Any]) -> str:
    """The command and the resolved config, as HTML."""
    text = json.dumps(config, indent=2, sort_keys=True)
    return (
        f'<h2>Run it again</h2><pre>{html.escape(command)}</pre>'
        f'<details><summary>Config</summary><pre>{html.escape(text)}</pre></details>'
    )
