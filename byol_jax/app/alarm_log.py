"""alarms.jsonl: when an alarm was raised, changed and cleared; and the verdict on the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from byol_jax.app.alarms import (
    ALARM,
    FIRST_STEP,
    WATCH,
    Alarm,
    Facts,
    History,
    Record,
    judged,
    loss_words,
    share_of_std,
    standing,
    std_words,
)
from byol_jax.app.metrics import read_metrics, read_records
from byol_jax.files import write_whole

# The severity in the line of an alarm that is cleared.
OVER = 'over'

# States of a run, from good to bad.
EARLY = 'too early to say'
HEALTHY = 'healthy'
WATCHED = 'watch'
COLLAPSED = 'collapsed'
STOPPED = 'stopped: not finite'

_MEANING = {
    EARLY: f'Trends are judged from step {FIRST_STEP} and the second record on.',
    HEALTHY: 'No alarm stands, and the monitors are where those of good runs are.',
    WATCHED: 'Something is not as it should be. The run may still be worth its time.',
    COLLAPSED: 'All pictures are given nearly the same features: more steps will not mend that.',
    STOPPED: 'A number became infinite or NaN, and the run ended by itself.',
}

# Alarms that mean a collapse.
_COLLAPSES = ('collapse', 'trivial_loss')

# The tiny and sample runs of docs/monitors.md have 0.74 and more after the warm-up.
_HEALTHY_STD = 0.7


class AlarmLog:
    """Judges every record of a run and keeps `workdir/alarms.jsonl`, which exists only if needed.

    Each line is an `Alarm` as a JSON object. A line is written, and returned for the log, when an
    alarm is raised, when its severity changes, and, with severity 'over', when it clears.
    """

    def __init__(self, workdir: Path, facts: Facts, start_step: int):
        """Reads the alarms so far, and removes those after `start_step`, as `MetricsLog` does.

        Args:
          workdir: must exist; metrics.jsonl must hold the records up to `start_step` and no others.
          facts: of the run.
          start_step: the step the run goes on from.
        """
        self._path, self._facts = workdir / 'alarms.jsonl', facts
        self._history: list[Record] = list(read_metrics(workdir))
        kept = [a for a in read_alarms(workdir) if a['step'] <= start_step]
        text = ''.join(json.dumps(a) + '\n' for a in kept)
        if text:
            write_whole(self._path, lambda partial: partial.write_text(text))
        else:
            self._path.unlink(missing_ok=True)
        self._severities = {a.name: a.severity for a in raised([Alarm(**a) for a in kept])}

    def still_raised(self) -> str:
        """A line on the alarms that stood when the run stopped; '' if there were none."""
        names = ', '.join(f'{name} ({severity})' for name, severity in self._severities.items())
        return names and f'still raised from before: {names}; {self._path} says why and what to do'

    def judge(self, record: Record) -> list[str]:
        """Takes the next record; returns a line for each alarm it raises, changes or clears."""
        self._history.append(record)
        found = {alarm.name: alarm for alarm in standing(self._history, self._facts)}
        lines = []
        for name, alarm in found.items():
            if self._severities.get(name) != alarm.severity:
                lines.append(self.add(alarm))
        for name in sorted(self._severities.keys() - found.keys()):
            self._severities.pop(name)
            self._write(Alarm(record['step'], name, OVER, '', '', ''))
            lines.append(f'Over at step {record["step"]}: {name}')
        return lines

    def add(self, alarm: Alarm) -> str:
        """Writes an alarm that stands from now on, and returns its line."""
        self._severities[alarm.name] = alarm.severity
        self._write(alarm)
        return alarm.line()

    def _write(self, alarm: Alarm) -> None:
        with self._path.open('a') as file:
            file.write(json.dumps(alarm._asdict()) + '\n')


def read_alarms(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `workdir/alarms.jsonl`, if any; a last line cut off by a kill is left out."""
    return read_records(workdir / 'alarms.jsonl')


def raised(alarms: Sequence[Alarm]) -> list[Alarm]:
    """The alarms that still stand after all lines of alarms.jsonl: the last line of each name."""
    last = {alarm.name: alarm for alarm in alarms}
    return [alarm for alarm in last.values() if alarm.severity != OVER]


def summary(workdir: Path) -> str:
    """What was raised in a run, for its report: 'none', or each alarm at its worst."""
    worst: dict[str, tuple[str, int]] = {}
    for alarm in read_alarms(workdir):
        name, severity = alarm['name'], alarm['severity']
        if name not in worst or (severity == ALARM and worst[name][0] != ALARM):
            worst[name] = severity, alarm['step']
    if not worst:
        return 'none'
    named = ', '.join(
        f'{name} ({severity}, step {step:,})' for name, (severity, step) in worst.items()
    )
    return f'{named}; alarms.jsonl says why and what to do'


class Verdict(NamedTuple):
    """The judgement of a run.

    Attributes:
      state: EARLY, HEALTHY, WATCHED, COLLAPSED or STOPPED.
      reasons: why, the worst first.
      measured: the last record in words; '' before the first.
      over: names of alarms that were raised and no longer stand.
    """

    state: str
    reasons: tuple[Alarm, ...]
    measured: str
    over: tuple[str, ...] = ()

    @property
    def meaning(self) -> str:
        """The state in a sentence or two."""
        return _MEANING[self.state]


def verdict(records: History, alarms: Sequence[Alarm], facts: Facts) -> Verdict:
    """Judges a run by its last records and the alarms that stand now.

    Args:
      records: of metrics.jsonl, oldest first.
      alarms: all lines of alarms.jsonl.
      facts: of the run.
    """
    # The evidence of the last record, with the step at which the alarm was raised.
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


def _low_std(records: History, facts: Facts) -> list[Alarm]:
    """A feature std below that of good runs, in the last two records after the warm-up."""
    if not judged(records) or records[-2]['step'] <= facts.warmup_steps:
        return []
    shares = [share_of_std(record, facts) for record in records[-2:]]
    measured = [share for share in shares if share is not None]
    if len(measured) < 2 or max(measured) >= _HEALTHY_STD:
        return []
    return [
        Alarm(
            records[-2]['step'],
            'feature_std',
            WATCH,
            f'the feature std is {std_words(max(measured), facts)}',
            'the projections are becoming alike, or the learning rate is high',
            'see whether it falls further; if so, lower optimizer.base_learning_rate='
            f'{facts.base_learning_rate:g} or raise target.tau_base={facts.tau_base:g}, in a new '
            'workdir',
        )
    ]


def _measured(record: Record, facts: Facts) -> str:
    """The last record in words, with what is healthy."""
    parts = [f'loss {loss_words(record["loss"], facts.loss_scale)}']
    share = share_of_std(record, facts)
    if share is not None:
        parts.append(f'feature std {std_words(share, facts)}')
    if 'rankme_projection' in record:
        parts.append(
            f'{record["rankme_projection"]:.1f} of {facts.projection_size} directions used (RankMe)'
        )
    if 'input_wait_fraction' in record:
        parts.append(f'input wait {record["input_wait_fraction"]:.0%} (healthy: below 5 %)')
    return f'At step {record["step"]:,}: {", ".join(parts)}.'
