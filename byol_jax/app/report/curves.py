"""The curves of the report: every metric over the steps, with healthy levels and alarms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from byol_jax.app.alarms import ALARM, Alarm, Facts, History, LossScale
from byol_jax.app.records import OVER
from byol_jax.app.report.charts import Band, Level, Line, Point, line_chart, short_number, thin

# A metric computed from two others: the norm of an update over the norm of the weights.
UPDATE_SHARE = 'update_norm / parameter_norm'

_SIMSIAM = 'SimSiam, arXiv:2011.10566, Section 4.1'
_SPHERE = 'arXiv:2005.10242'
_OWN = 'measured, docs/monitors.md'


class Curve(NamedTuple):
    """How the report shows a metric.

    Attributes:
      metric: name of the metric in the records.
      title: title of the chart.
      note: what the metric means, briefly.
      from_zero: whether the y axis starts at 0.
    """

    metric: str
    title: str
    note: str
    from_zero: bool = False


class Figure(NamedTuple):
    """The chart of a curve.

    Attributes:
      title: title of the chart.
      latest: the last value, as text.
      note: what the metric means and the source of its level.
      chart: the chart, SVG.
    """

    title: str
    latest: str
    note: str
    chart: Markup


class Group(NamedTuple):
    """Figures under a common title."""

    title: str
    figures: list[Figure]


# The curves by the title of their group. A curve is drawn only if the records have its metric.
GROUPS: dict[str, tuple[Curve, ...]] = {
    'Learning': (
        Curve('loss', 'Loss', 'it also falls in a collapse'),
        Curve('knn_20', '20 nearest neighbours', 'accuracy on held-out pictures', True),
        Curve('knn_200', '200 nearest neighbours', 'accuracy on held-out pictures', True),
        Curve('online_probe_accuracy', 'Online probe', 'accuracy of a linear classifier', True),
        Curve('online_probe_loss', 'Online probe, loss', 'cross-entropy of that classifier', True),
        Curve('recall_1', 'Recall at 1', 'a view is nearest to the other of its picture', True),
        Curve('recall_5', 'Recall at 5', 'the other view is among the nearest five', True),
    ),
    'Features': (
        Curve('feature_std', 'Feature std', 'of unit-length projections; 0 is collapse', True),
        Curve('rankme_projection', 'RankMe, projection', 'directions in use', True),
        Curve('rankme_representation', 'RankMe, representation', 'directions in use', True),
        Curve('representation_std', 'Representation std', 'compare with its first value', True),
        Curve('alignment', 'Alignment', 'distance between two views of a picture', True),
        Curve('uniformity', 'Uniformity', 'spread of different pictures; 0 is collapse'),
        Curve('online_target_cosine', 'Online and target', 'cosine of their projections'),
        Curve('prediction_target_cosine', 'Prediction and target', 'cosine, of different views'),
        Curve('prediction_projection_cosine', 'Prediction and projection', 'cosine'),
        Curve('lidar', 'LiDAR', 'directions that tell pictures apart, arXiv:2312.04000', True),
    ),
    'Optimisation': (
        Curve('learning_rate', 'Learning rate', 'linear warm-up, then cosine to 0', True),
        Curve('tau', 'tau', 'of the target network; rises to 1'),
        Curve('gradient_norm', 'Gradient', 'norm over all online parameters', True),
        Curve('update_norm', 'Update', 'norm over all online parameters', True),
        Curve('parameter_norm', 'Weights', 'norm of all online parameters'),
        Curve(UPDATE_SHARE, 'Update / weights', 'how far a step moves the weights', True),
        Curve('stats_spread', 'Batch statistics', 'difference between devices', True),
    ),
    'Speed': (
        Curve('images_per_second', 'Images a second', 'pairs of views, over all devices', True),
        Curve('input_wait_fraction', 'Input wait', 'share of the time without a batch', True),
        Curve('bad_files', 'Bad files', 'files that could not be read', True),
    ),
}

# The metrics on whose charts an alarm is marked.
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
    """The level to compare each metric with, and the source of that level, by metric."""
    size, chance = facts.projection_size, facts.loss_scale.chance
    return {
        'loss': (Level(chance, f'chance: {chance:g}'), 'a prediction unrelated to its target'),
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


def draw_curves(records: History, facts: Facts, alarms: Sequence[Alarm]) -> list[Group]:
    """Draws every metric of the records over the steps, in groups.

    Metrics that are not in GROUPS, such as a method's own, come last, under their own names.

    Args:
      records: records of metrics.jsonl, oldest first. Long lines are thinned and keep their
        extremes.
      facts: facts of the run, for the levels.
      alarms: the lines of alarms.jsonl; each alarm is shaded from raised to cleared.
    """
    if not records:
        return []
    known = {curve.metric for group in GROUPS.values() for curve in group}
    others = sorted({name for record in records for name in record} - known - {'step', 'epoch'})
    groups = GROUPS | {'Other': tuple(Curve(name, name, '') for name in others)}
    levels = levels_of(facts)
    span = (0.0, float(records[-1]['step']))
    bands = _bands(alarms, span[1])
    drawn = []
    for title, group in groups.items():
        figures = []
        for curve in group:
            points = _points(records, curve.metric)
            if not points:
                continue
            level = levels.get(curve.metric)
            shown = _with_scale(curve, facts.loss_scale) if curve.metric == 'loss' else curve
            figures.append(_figure(shown, points, level, bands.get(curve.metric, ()), span))
        if figures:
            drawn.append(Group(title, figures))
    return drawn


def _with_scale(loss: Curve, scale: LossScale) -> Curve:
    """Adds the range of the method's loss to the note of the loss curve."""
    if math.isfinite(scale.highest):
        spanned = f'{scale.lowest:g} to {scale.highest:g}'
    else:
        spanned = f'{scale.lowest:g} and more'
    return loss._replace(note=f'{spanned}; {loss.note}', from_zero=scale.lowest == 0)


def _figure(
    curve: Curve,
    points: list[Point],
    level: tuple[Level, str] | None,
    bands: Sequence[Band],
    span: tuple[float, float],
) -> Figure:
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
    return Figure(curve.title, short_number(points[-1][1]), note, chart)


def _points(records: History, metric: str) -> list[Point]:
    """The finite values of a metric: (step, value)."""
    if metric == UPDATE_SHARE:
        step, weights = 'update_norm', 'parameter_norm'
        pairs = [(r['step'], r[step] / r[weights]) for r in records if step in r and r.get(weights)]
    else:
        pairs = [(r['step'], r[metric]) for r in records if metric in r]
    return [pair for pair in pairs if -math.inf < pair[1] < math.inf]


def _bands(alarms: Sequence[Alarm], last_step: float) -> dict[str, list[Band]]:
    """The bands that mark alarms, from raised to cleared, by metric."""
    bands: dict[str, list[Band]] = {}
    # Join near bands, so that an alarm that flickers with every record is not thousands of bands.
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
