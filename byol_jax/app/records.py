"""metrics.jsonl and alarms.jsonl read: a JSON object a line, whatever has happened to the file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from byol_jax.app.alarms import ALARM, WATCH, Alarm
from byol_jax.app.hosts import say
from byol_jax.files import Damaged, read_bytes, write_whole

METRICS, ALARMS = 'metrics.jsonl', 'alarms.jsonl'

# The severity in the line of an alarm that is cleared.
OVER = 'over'

# Records that are more often than this as far apart from their neighbours are regular.
_REGULAR = 3

# What every record of metrics.jsonl has; all else is numbers too.
_ALWAYS = ('step', 'loss')


class Log(NamedTuple):
    """The records of a file, oldest first, and what is wrong with it.

    Attributes:
      path: the file.
      records: sound ones, each once.
      damaged: how many lines are none; a last line that a kill has cut off is not counted.
      repeated: how many lines are left out because their record is there again.
      other: what is there in place of a file; '' for a file, or nothing.
    """

    path: Path
    records: list[dict[str, Any]]
    damaged: int = 0
    repeated: int = 0
    other: str = ''

    @property
    def wrong(self) -> str:
        """What is wrong, for people; '' if nothing is."""
        parts = [
            f'{self.damaged:,} damaged line(s) left out' if self.damaged else '',
            f'{self.repeated:,} repeated line(s) counted once' if self.repeated else '',
            self.other,
        ]
        return ', '.join(filter(None, parts))


def metrics_log(workdir: Path) -> Log:
    """metrics.jsonl of a run; of several records of one step the last counts.

    Raises:
      UserError: it cannot be read.
    """
    return _read(workdir / METRICS, _is_record, lambda record: record['step'])


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of `workdir/metrics.jsonl`, as `metrics_log` finds them."""
    return metrics_log(workdir).records


def alarms_log(workdir: Path) -> Log:
    """alarms.jsonl of a run; lines that are the same are one.

    Raises:
      UserError: it cannot be read.
    """
    return _read(workdir / ALARMS, _is_alarm, lambda line: tuple(line.values()))


def read_alarms(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `workdir/alarms.jsonl`, as `alarms_log` finds them."""
    return alarms_log(workdir).records


def _read(path: Path, sound: Callable[[Any], bool], key: Callable[[dict[str, Any]], Any]) -> Log:
    try:
        content = read_bytes(path)
    except Damaged as error:
        return Log(path, [], other=error.what)
    *lines, last = (content or b'').split(b'\n')
    found: dict[Any, dict[str, Any]] = {}
    damaged = repeated = 0
    for line in lines:
        record = _object(line)
        if record is None or not sound(record):
            damaged += 1
            continue
        repeated += key(record) in found
        # At the place of the last one.
        found.pop(key(record), None)
        found[key(record)] = record
    # Without a line end it may be one that is being written, but a whole object is whole.
    record = _object(last)
    if record is not None and sound(record):
        found.setdefault(key(record), record)
    records = sorted(found.values(), key=lambda each: each['step'])
    return Log(path, records, damaged, repeated)


def _object(line: bytes) -> Any:
    """A line's JSON value; None if there is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_record(value: Any) -> bool:
    """Whether a value is a step's numbers by name."""
    return (
        _has_step(value)
        and all(name in value for name in _ALWAYS)
        and all(map(_is_number, value.values()))
    )


def _is_alarm(value: Any) -> bool:
    """Whether a value is an `Alarm`, or the end of one."""
    return (
        _has_step(value)
        and value.keys() == set(Alarm._fields)
        and all(isinstance(value[name], str) for name in Alarm._fields if name != 'step')
        and value['severity'] in (ALARM, WATCH, OVER)
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # A longer whole number is no float.
    return isinstance(value, float) or abs(value) < 2**63


def _has_step(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    step = value.get('step')
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53


def keep_damaged(log: Log) -> None:
    """Keeps a file with damage under another name, and says so, before it is written anew.

    The file itself stays where it is.
    """
    if not log.wrong:
        return
    words = f'{log.path}: {log.wrong}'
    content = read_bytes(log.path) if log.damaged and not log.other else None
    if content is not None:
        # Kept already, if an earlier start found the same and could not write the file anew.
        number, kept = 1, log.path.with_name(f'{log.path.name}.damaged')
        while kept.exists() and kept.read_bytes() != content:
            number += 1
            kept = log.path.with_name(f'{log.path.name}.damaged-{number}')
        try:
            write_whole(kept, lambda partial: partial.write_bytes(content))
        except OSError as error:
            say(f'{words}; {kept.name} cannot be written: {error.strerror or error}')
            return
        words += f'; the file as it was is {kept.name}'
    say(words)


def gaps(steps: Sequence[int], every: int, last: int) -> list[tuple[int, int]]:
    """Stretches of steps without a record that should be there.

    Args:
      steps: of the records, ascending.
      every: steps from one record to the next.
      last: the step up to which records should be there.

    Returns:
      (first, last) of each stretch.
    """
    ends = [0, *steps]
    spacings = [b - a for a, b in itertools.pairwise(ends)]
    found = []
    for place, spacing in enumerate(spacings):
        # As many steps apart several times: log.every_steps was another then.
        regular = spacings[max(0, place - _REGULAR) : place + _REGULAR + 1].count(spacing)
        if spacing > every and regular <= _REGULAR:
            found.append((ends[place] + 1, ends[place + 1] - 1))
    if last - ends[-1] >= every:
        found.append((ends[-1] + 1, last))
    return found


def gap_words(path: Path, found: Iterable[tuple[int, int]]) -> str:
    """A line that names gaps; '' for none."""
    stretches = [f'{first:,} to {last:,}' for first, last in found]
    more = f' and {len(stretches) - 5:,} more' if len(stretches) > 5 else ''
    return f'{path} has no record of steps {", ".join(stretches[:5])}{more}' if stretches else ''
