"""alarms.jsonl, which records when alarms are raised, changed and cleared; and a run's verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
from byol_jax.app.metrics import as_line
from byol_jax.app.records import OVER, alarms_log, keep_damaged, read_alarms, read_metrics
from byol_jax.app.side_files import SideFile

# States of a run, from good to bad.
EARLY = 'too early to say'
HEALTHY = 'healthy'
WATCHED = 'watch'
COLLAPSED = 'collapsed'
WRONG = 'wrong input'
STOPPED = 'stopped: not finite'

_MEANING = {
    EARLY: f'Trends are judged from step {FIRST_STEP} on, once there are two records.',
    HEALTHY: 'No alarm stands, and the monitors have the values of good runs.',
    WATCHED: 'Something looks wrong. The run may still be worth continuing.',
    COLLAPSED: 'All pictures have nearly the same features; more steps will not fix that.',
    WRONG: 'The first pictures or views cannot be what was meant: they can teach nothing.',
    STOPPED: 'A number became infinite or NaN, so the run stopped.',
}

# Alarms that mean a collapse.
_COLLAPSES = ('collapse', 'trivial_loss')

# Feature std as a share of 1/sqrt(P). The tiny and sample runs of docs/monitors.md have 0.74 and
# more after the warm-up.
_HEALTHY_STD = 0.7


class AlarmLog:
    """Judges every record of a run and writes changes of alarms to `workdir/alarms.jsonl`.

    Each line is an `Alarm` as a JSON object. A line is written, and a text returned for the log,
    when an alarm is raised, when its severity changes, and when it clears (severity 'over'). There
    is no file as long as no alarm was raised.
    """

    def __init__(self, workdir: Path, facts: Facts, start_step: int):
        """Reads the alarms so far and removes those after `start_step`, as `MetricsLog` does.

        Args:
          workdir: folder of the run; its metrics.jsonl must hold the records up to `start_step` and
            no others.
          facts: facts of the run.
          start_step: the step the run resumes from.
        """
        self._file, self._facts = SideFile(workdir / 'alarms.jsonl'), facts
        self._history: list[Record] = list(read_metrics(workdir))
        log = alarms_log(workdir)
        keep_damaged(log)
        kept = [a for a in log.records if a['step'] <= start_step]
        if kept:
            self._file.rewrite(b''.join(map(as_line, kept)))
        else:
            self._file.remove()
        self._severities = {a.name: a.severity for a in raised([Alarm(**a) for a in kept])}

    def still_raised(self) -> str:
        """A line on the alarms that stood when the run was stopped; '' if there were none."""
        names = ', '.join(f'{name} ({severity})' for name, severity in self._severities.items())
        if not names:
            return ''
        return f'still raised from before: {names}; {self._file.path} says why and what to do'

    def begin(self) -> list[str]:
        """Raises what stands before the first step; returns a line for each alarm."""
        return [] if self._history else self._raise(standing((), self._facts))

    def judge(self, record: Record) -> list[str]:
        """Judges the next record; returns a line for each alarm raised, changed or cleared."""
        self._history.append(record)
        found = standing(self._history, self._facts)
        lines = self._raise(found)
        for name in sorted(self._severities.keys() - {alarm.name for alarm in found}):
            self._severities.pop(name)
            self._write(Alarm(record['step'], name, OVER, '', '', ''))
            lines.append(f'Over at step {record["step"]}: {name}')
        return lines

    def _raise(self, found: Sequence[Alarm]) -> list[str]:
        """Adds the alarms that do not stand yet, or stood with another severity."""
        return [
            self.add(alarm) for alarm in found if self._severities.get(alarm.name) != alarm.severity
        ]

    def add(self, alarm: Alarm) -> str:
        """Writes an alarm that stands from now on, and returns its line for the log."""
        self._severities[alarm.name] = alarm.severity
        self._write(alarm)
        return alarm.line()

    def _write(self, alarm: Alarm) -> None:
        self._file.append(as_line(alarm._asdict()))


def raised(alarms: Sequence[Alarm]) -> list[Alarm]:
    """The alarms that still stand, given all lines of alarms.jsonl: the last line of each name."""
    last = {alarm.name: alarm for alarm in alarms}
    return [alarm for alarm in last.values() if alarm.severity != OVER]


def summary(workdir: Path) -> str:
    """The alarms that were ever raised in a run, each at its worst, for the report; or 'none'."""
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
      state: EARLY, HEALTHY, WATCHED, COLLAPSED, WRONG or STOPPED.
      reasons: the alarms that stand, the worst first.
      measured: the last record in words; '' if there is none.
      over: names of alarms that were raised and have cleared.
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
      records: the records of metrics.jsonl, oldest first.
      alarms: all lines of alarms.jsonl.
      facts: facts of the run.
    """
    # Evidence is that of the last record; step and severity are those of the raised alarm.
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
    elif severe & {alarm.name for alarm in facts.pixels}:
        state = WRONG
    elif severe & set(_COLLAPSES):
        state = COLLAPSED
    elif reasons:
        state = WATCHED
    else:
        state = HEALTHY if judged(records) else EARLY
    return Verdict(state, tuple(reasons), _measured(records[-1], facts) if records else '', over)


def _low_std(records: History, facts: Facts) -> list[Alarm]:
    """An alarm if the feature std of the last two records is below that of good runs.

    Only records after the warm-up count.
    """
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
    """The last record in words, with the healthy ranges."""
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
