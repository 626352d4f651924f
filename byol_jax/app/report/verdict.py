"""The verdict at the top of the report: is the run healthy, and if not, what to do."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

from byol_jax.app.report.alarm import ALARM, WATCH, Alarm, Facts, History, Record
from byol_jax.app.report.alarm_log import raised
from byol_jax.app.report.alarms import FIRST_STEP, judged, share_of_std, standing

# From good to bad; STOPPED is a run that met a number that is not finite.
EARLY, HEALTHY, WATCHED, COLLAPSED, STOPPED = (
    'too early to say',
    'healthy',
    'watch',
    'collapsed',
    'stopped: not finite',
)
_COLLAPSES = ('collapse', 'trivial_loss')
_MEANING = {
    EARLY: f'Trends are judged from step {FIRST_STEP} and the second record on.',
    HEALTHY: 'No alarm stands, and the monitors are where those of good runs are.',
    WATCHED: 'Something is not as it should be. The run may still be worth its time.',
    COLLAPSED: 'All pictures are given nearly the same features: more steps will not mend that.',
    STOPPED: 'A number became infinite or NaN, and the run ended by itself.',
}

# The tiny and sample runs of docs/monitors.md have 0.74 and more after the warm-up.
_HEALTHY_STD = 0.7


class Verdict(NamedTuple):
    """What is to be thought of a run.

    Attributes:
      state: EARLY, HEALTHY, WATCHED, COLLAPSED or STOPPED.
      reasons: why, the worst first; a reason is an `Alarm`, with its remedy.
      measured: what the last record says, in words; '' before the first.
      over: names of alarms that were raised and no longer stand.
    """

    state: str
    reasons: tuple[Alarm, ...]
    measured: str
    over: tuple[str, ...] = ()


def verdict(records: History, alarms: Sequence[Alarm], facts: Facts) -> Verdict:
    """Judges a run by its last records and the alarms that stand now.

    Args:
      records: of metrics.jsonl, oldest first.
      alarms: all lines of alarms.jsonl.
      facts: of the run's config.
    """
    # What was measured when an alarm was raised may be long ago: the words are those of now.
    now = {alarm.name: alarm for alarm in standing(records, facts)}
    raised_now = [
        now.get(a.name, a)._replace(step=a.step, severity=a.severity) for a in raised(alarms)
    ]
    names = {alarm.name for alarm in raised_now}
    over = tuple(sorted({alarm.name for alarm in alarms} - names))
    reasons = raised_now + ([] if names & set(_COLLAPSES) else _low_std(records, facts))
    reasons.sort(key=lambda alarm: (alarm.severity != ALARM, alarm.step))
    severe = {alarm.name for alarm in raised_now if alarm.severity == ALARM}
    if 'non_finite' in names:
        state = STOPPED
    elif severe & set(_COLLAPSES):
        state = COLLAPSED
    elif reasons:
        state = WATCHED
    else:
        state = HEALTHY if judged(records) else EARLY
    return Verdict(state, tuple(reasons), _measured(records[-1], facts) if records else '', over)


def verdict_box(judgement: Verdict) -> str:
    """The verdict as HTML."""
    reasons = ''.join(
        f'<li><b>{html.escape(a.name)}</b> ({html.escape(a.severity)}, since step {a.step:,}): '
        f'{html.escape(a.evidence)}.<br>Likely cause: {html.escape(a.cause)}.<br>'
        f'<b>What to do:</b> {html.escape(a.remedy)}.</li>'
        for a in judgement.reasons
    )
    over = ', '.join(judgement.over)
    style = judgement.state.split(':')[0].split()[0]
    return (
        f'<section class="verdict {style}" aria-label="Verdict"><p class="state">'
        f'{html.escape(judgement.state)}</p><p>{html.escape(_MEANING[judgement.state])}</p>'
        + (f'<ul>{reasons}</ul>' if reasons else '')
        + (f'<p class="note">{html.escape(judgement.measured)}</p>' if judgement.measured else '')
        + (f'<p class="note">Was raised and is over: {html.escape(over)}.</p>' if over else '')
        + '</section>'
    )


def _low_std(records: History, facts: Facts) -> list[Alarm]:
    """A feature std below that of good runs, in the last two records after the warm-up."""
    if not judged(records) or records[-2]['step'] <= facts.warmup_steps:
        return []
    share = max(share_of_std(record, facts) for record in records[-2:])
    if share >= _HEALTHY_STD:
        return []
    return [
        Alarm(
            records[-2]['step'],
            'feature_std',
            WATCH,
            f'the feature std is {share:.0%} of 1/sqrt({facts.projection_size}) (healthy: 70 % and '
            'more)',
            'the projections are on the way to become alike, or the learning rate is high',
            'see whether it falls further; if so, lower optimizer.base_learning_rate='
            f'{facts.base_learning_rate:g} or raise target.tau_base={facts.base_ema:g}, in a new '
            'workdir',
        )
    ]


def _measured(record: Record, facts: Facts) -> str:
    """What the last record says, with what is healthy."""
    parts = [
        f'loss {record["loss"]:.3g} of 8',
        f'feature std {share_of_std(record, facts):.0%} of 1/sqrt({facts.projection_size}) '
        '(healthy: 70 % and more)',
    ]
    if 'rankme_projection' in record:
        parts.append(
            f'{record["rankme_projection"]:.1f} of {facts.projection_size} directions used (RankMe)'
        )
    if 'input_wait_fraction' in record:
        parts.append(f'input wait {record["input_wait_fraction"]:.0%} (healthy: below 5 %)')
    return f'At step {record["step"]:,}: {", ".join(parts)}.'
