"""The curves of the report: every monitor over the steps, with its healthy level and alarms."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from byol_jax.app.report.alarm import ALARM, Alarm, Facts, History
from byol_jax.app.report.alarm_log import OVER
from byol_jax.app.report.chart import Band, Level, Line, Point, line_chart, short_number, thin

# How far a step moves the weights, of their length: made of two of the record's values.
UPDATE_SHARE = 'update_norm / parameter_norm'

_SIMSIAM = 'SimSiam, arXiv:2011.10566, Section 4.1'
_SPHERE = 'arXiv:2005.10242'
_OWN = 'measured, docs/monitors.md'


class Curve(NamedTuple):
    """What the report says of a metric.

    Attributes:
      metric: its name in the records.
      title: for people. note: what to read from it.
      from_zero: its axis starts at 0.
    """

    metric: str
    title: str
    note: str
    from_zero: bool = False


# By subject. A curve is there if the records have its metric.
GROUPS: dict[str, tuple[Curve, ...]] = {
    'Learning': (
        Curve('loss', 'Loss', '0 to 8; it falls in a collapse too', True),
        Curve('knn_20', '20 nearest neighbours', 'accuracy on held-out pictures', True),
        Curve('knn_200', '200 nearest neighbours', 'accuracy on held-out pictures', True),
        Curve('online_probe_accuracy', 'Online probe', 'accuracy of a linear classifier', True),
        Curve('online_probe_loss', 'Online probe, loss', 'cross-entropy of that classifier', True),
        Curve('recall_1', 'Recall at 1', 'its other view is the nearest picture', True),
        Curve('recall_5', 'Recall at 5', 'its other view is among the nearest five', True),
    ),
    'Features': (
        Curve('feature_std', 'Feature std', 'of projections at unit length; 0 is collapse', True),
        Curve('rankme_projection', 'RankMe, projection', 'directions that are used', True),
        Curve('rankme_representation', 'RankMe, representation', 'directions that are used', True),
        Curve('representation_std', 'Representation std', 'compare with its start', True),
        Curve('alignment', 'Alignment', 'distance of two views of a picture', True),
        Curve('uniformity', 'Uniformity', 'of different pictures; 0 is collapse'),
        Curve('online_target_cosine', 'Online and target', 'cosine of their projections'),
        Curve('prediction_target_cosine', 'Prediction and target', 'cosine; 1 - loss / 4'),
        Curve('prediction_projection_cosine', 'Prediction and projection', 'cosine'),
        Curve('lidar', 'LiDAR', 'directions that tell pictures apart, arXiv:2312.04000', True),
    ),
    'Optimisation': (
        Curve('learning_rate', 'Learning rate', 'linear warm-up, then cosine to 0', True),
        Curve('tau', 'tau', 'of the target network; rises to 1'),
        Curve('gradient_norm', 'Gradient', 'length over all online parameters', True),
        Curve('update_norm', 'Step', 'length over all online parameters', True),
        Curve('parameter_norm', 'Weights', 'length of all online parameters'),
        Curve(UPDATE_SHARE, 'Step / weights', 'how far a step moves the weights', True),
        Curve('stats_spread', 'Batch statistics', 'how far devices differ', True),
    ),
    'Speed': (
        Curve('images_per_second', 'Images a second', 'pairs of views, over all devices', True),
        Curve('input_wait_fraction', 'Input wait', 'share of the time without a batch', True),
        Curve('bad_files', 'Bad files', 'could not be read', True),
    ),
}

# What an alarm is about: the curves on which it is marked.
_MARKED = {
    'collapse': ('feature_std', 'rankme_projection'),
    'trivial_loss': ('loss', 'feature_std'),
    'learning_rate': ('loss', UPDATE_SHARE),
    'weight_decay': ('parameter_norm',),
    'target_follows': ('online_target_cosine',),
    'small_norm_batch': ('stats_spread',),
    'input_bound': ('input_wait_fraction',),
    'non_finite': ('loss',),
}


def levels_of(facts: Facts) -> dict[str, tuple[Level, str]]:
    """The healthy levels, by metric, each with its source."""
    size = facts.projection_size
    return {
        'loss': (Level(4, 'chance: 4'), 'orthogonal prediction and target; paper, Equation 2'),
        'feature_std': (Level(size**-0.5, f'even spread: 1/sqrt({size})'), _SIMSIAM),
        'rankme_projection': (
            Level(min(5, size / 4), f'healthy: above {min(5, size / 4):g}'),
            _OWN,
        ),
        'uniformity': (Level(-1.5, 'healthy: below -1.5'), f'{_OWN}; {_SPHERE}, Section 4.1'),
        'prediction_projection_cosine': (Level(1, '1: no predictor'), _OWN),
        UPDATE_SHARE: (Level(0.02, 'healthy: below 0.02'), _OWN),
        'input_wait_fraction': (Level(0.05, 'healthy: below 0.05'), _OWN),
        'stats_spread': (Level(1e-3, 'synchronised: below 0.001'), _OWN),
    }


def curves_section(records: History, facts: Facts, alarms: Sequence[Alarm]) -> str:
    """The curves as HTML, by subject; what is in the records and has no place comes last.

    Args:
      records: of metrics.jsonl, oldest first; of a long run the extremes of stretches are drawn.
      facts: of the run's config, for the healthy levels.
      alarms: the lines of alarms.jsonl, marked from where one was raised to where it was over.
    """
    if not records:
        return '<h2>Curves</h2><p class="note">No step is logged yet.</p>'
    known = {curve.metric for group in GROUPS.values() for curve in group}
    others = sorted({name for record in records for name in record} - known - {'step', 'epoch'})
    groups = GROUPS | {'Other': tuple(Curve(name, name, '') for name in others)}
    levels = levels_of(facts)
    span = (0.0, float(records[-1]['step']))
    bands = _bands(alarms, span[1])
    parts = []
    for title, group in groups.items():
        figures = []
        for curve in group:
            points = _points(records, curve.metric)
            if points:
                level = levels.get(curve.metric)
                figures.append(_figure(curve, points, level, bands.get(curve.metric, ()), span))
        if figures:
            parts.append(f'<h3>{title}</h3><div class="curves">{"".join(figures)}</div>')
    shaded = ' Shaded: while an alarm stood.' if bands else ''
    return (
        '<h2>Curves</h2><p class="note">Over the steps; the number is the latest. Dashed: what to '
        f'compare with.{shaded}</p>{"".join(parts)}'
    )


def _figure(
    curve: Curve,
    points: list[Point],
    level: tuple[Level, str] | None,
    bands: Sequence[Band],
    span: tuple[float, float],
) -> str:
    note = curve.note
    if level:
        note += f'{"; " if note else ""}dashed: {level[1]}'
    chart = line_chart(
        [Line(thin(points))],
        x_label='step',
        x_span=span,
        levels=[level[0]] if level else (),
        bands=bands,
        from_zero=curve.from_zero,
        words=f'{curve.title} over the steps',
    )
    return (
        f'<figure><figcaption><b>{html.escape(curve.title)}</b>'
        f'<b class="latest">{short_number(points[-1][1])}</b>'
        f'<span>{html.escape(note)}</span></figcaption>{chart}</figure>'
    )


def _points(records: History, metric: str) -> list[Point]:
    """The finite values of a metric, by step."""
    if metric == UPDATE_SHARE:
        step, weights = 'update_norm', 'parameter_norm'
        pairs = [(r['step'], r[step] / r[weights]) for r in records if step in r and r.get(weights)]
    else:
        pairs = [(r['step'], r[metric]) for r in records if metric in r]
    return [pair for pair in pairs if -math.inf < pair[1] < math.inf]


def _bands(alarms: Sequence[Alarm], last_step: float) -> dict[str, list[Band]]:
    """Where alarms stood, by metric."""
    bands: dict[str, list[Band]] = {}
    # An alarm that comes and goes with every record is one band, or a page of many thousands.
    near = last_step / 200
    for number, alarm in enumerate(alarms):
        if alarm.severity == OVER:
            continue
        ends = [a.step for a in alarms[number + 1 :] if a.name == alarm.name]
        colour = '#c2452d' if alarm.severity == ALARM else '#e0a100'
        words = f'{alarm.name} ({alarm.severity}) from step {alarm.step}'
        for metric in _MARKED.get(alarm.name, ()):
            band = Band(alarm.step, ends[0] if ends else last_step, colour, words)
            found = bands.setdefault(metric, [])
            if found and found[-1].colour == colour and band.start - found[-1].end <= near:
                found[-1] = found[-1]._replace(end=band.end)
            else:
                found.append(band)
    return bands
