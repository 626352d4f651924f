"""What was measured of encoders, as tables: before and after, and evaluation.json."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from byol_jax.app.report.alarm import History

# Metrics that are shares of pictures, by how their names begin.
_SHARES = ('knn_', 'linear', 'probe', 'ridge', 'recall_', 'online_probe_accuracy')

# Metrics of records that are measured at different steps, by how their names begin.
_DURING_TRAINING = (
    (('knn_', 'recall_'), 'During training'),
    (('online_probe_accuracy',), 'The classifier that trains along'),
)


class Result(NamedTuple):
    """A row of the before/after table; accuracy in [0, 1], std of unit-length features."""

    name: str
    accuracy: float | None
    feature_std: float


def results_text(results: Sequence[Result]) -> str:
    """The before/after table for the terminal."""
    width = max(len(r.name) for r in results)
    lines = [f'{"encoder":<{width}}  nearest-neighbour accuracy  feature std']
    for r in results:
        lines.append(f'{r.name:<{width}}  {_accuracy(r):>26}  {r.feature_std:>11.4f}')
    return '\n'.join(lines)


def results_section(results: Sequence[Result], protocol: str) -> str:
    """The before/after table as HTML, and a sentence on how its accuracy was measured."""
    rows = ''.join(
        f'<tr><td>{html.escape(r.name)}</td><td class="number">'
        f'{_accuracy(r)}</td>'
        f'<td class="number">{r.feature_std:.4f}</td></tr>'
        for r in results
    )
    return (
        '<h2>Before and after</h2><div class="scroll"><table><tr><th>Encoder</th>'
        '<th>Nearest neighbours</th><th>Feature std</th></tr>'
        f'{rows}</table></div><p class="note">{html.escape(protocol)}</p>'
    )


def evaluation_section(workdir: Path, records: History) -> str:
    """What evaluation.json and the last evaluation during training say, as HTML; '' without both.

    A file that is none of ours is named, and does no harm.
    """
    parts = []
    path = workdir / 'evaluation.json'
    if path.exists():
        try:
            parts.append(_of_file(json.loads(path.read_text())))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            parts.append(
                '<p class="note">evaluation.json is not what --mode=evaluate writes: '
                f'{html.escape(f"{type(error).__name__}: {error}")}</p>'
            )
    for begins, what in _DURING_TRAINING:
        measured = [r for r in records if any(name.startswith(begins) for name in r)]
        if measured:
            last = measured[-1]
            metrics = {name: value for name, value in last.items() if name.startswith(begins)}
            parts.append(_table(metrics, f'{what}, last at step {last["step"]:,}.'))
    return f'<h2>Evaluation</h2>{"".join(parts)}' if parts else ''


def _of_file(evaluation: Mapping[str, Any]) -> str:
    sha256 = str(evaluation.get('weights_sha256', ''))[:12]
    of = f'evaluation.json: {evaluation["encoder"]}, step {evaluation["step"]:,}'
    return _table(evaluation['metrics'], f'{of}{f", weights {sha256}..." if sha256 else ""}.')


def _table(metrics: Mapping[str, float], note: str) -> str:
    rows = ''.join(
        f'<tr><td>{html.escape(name)}</td><td class="number">'
        f'{f"{value:.1%}" if _is_share(name) else f"{value:.4g}"}</td></tr>'
        for name, value in metrics.items()
    )
    return (
        f'<div class="scroll"><table><tr><th>Metric</th><th>Value</th></tr>{rows}</table></div>'
        f'<p class="note">{html.escape(note)}</p>'
    )


def _accuracy(result: Result) -> str:
    return 'not measured' if result.accuracy is None else f'{result.accuracy:.1%}'


def _is_share(name: str) -> bool:
    return name.startswith(_SHARES)
