"""alarms.jsonl: when an alarm was raised, changed and cleared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byol_jax.app.metrics import read_metrics, read_records
from byol_jax.app.report.alarm import ALARM, Alarm, Facts, Record
from byol_jax.app.report.alarms import standing
from byol_jax.files import write_whole

# The severity with which an alarm is cleared.
OVER = 'over'


class AlarmLog:
    """Judges every record of a run, and keeps `workdir/alarms.jsonl`; it is there only if needed.

    Each line is an `Alarm` as a JSON object. One is written, and handed to the caller for the log,
    when an alarm is raised, when its severity changes, and, with severity 'over', when it clears.
    """

    def __init__(self, workdir: Path, facts: Facts, start_step: int):
        """Args:
        workdir: must exist; metrics.jsonl must hold the records up to `start_step` and no others.
        facts: of the run's config.
        start_step: the step the run goes on from; later lines are taken out, as `MetricsLog` does.
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
        """A line on what stood when the run stopped; '' if nothing did."""
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
    """The lines of `workdir/alarms.jsonl`, if any; a last one cut off by a kill is left out."""
    return read_records(workdir / 'alarms.jsonl')


def raised(alarms: Sequence[Alarm]) -> list[Alarm]:
    """Those that still stand after all lines of alarms.jsonl: of each name the last line."""
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
