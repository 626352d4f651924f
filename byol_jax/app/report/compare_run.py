"""A run as its workdir tells of it, whether finished or under way: read, never executed."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from byol_jax.app.metrics import read_metrics
from byol_jax.app.plan import total_steps
from byol_jax.app.report.alarm_log import read_alarms
from byol_jax.errors import UserError, did_you_mean

# Of every record that has a feature std: how near the projections are to an even spread, at which
# it is 1 / sqrt(P). Unlike the feature std itself it compares over different P.
SCALED_STD = 'feature_std x sqrt(P)'


class RunRecord(NamedTuple):
    """What is known of a run.

    Attributes:
      name: short, another for each run of a comparison.
      workdir: as it was given.
      state: for people: finished, under way or stopped, and at which step.
      config: resolved, JSON values.
      examples: of the training data; 0 if data.json is not there.
      records: of metrics.jsonl, oldest first, with SCALED_STD.
      alarms: lines of alarms.jsonl.
      evaluation: of evaluation.json. results: of results.json; {} if they are not there.
      command: that started it; '' if it is not known.
    """

    name: str
    workdir: Path
    state: str
    config: dict[str, Any]
    examples: int
    records: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    evaluation: dict[str, Any]
    results: dict[str, Any]
    command: str

    @property
    def step(self) -> int:
        """The last one logged; 0 before the first."""
        return self.records[-1]['step'] if self.records else 0


def read_runs(workdirs: Sequence[Path]) -> list[RunRecord]:
    """Reads runs to compare, and writes nothing.

    Raises:
      UserError: there are fewer than two, one is there twice, or is no run, or is damaged.
    """
    for workdir in workdirs:
        _check_is_run(workdir)
    seen: dict[Path, Path] = {}
    for workdir in workdirs:
        same = seen.setdefault(workdir.resolve(), workdir)
        if same is not workdir:
            raise UserError(
                f'--workdirs has {workdir} twice'
                + (f', as {same} too' if same != workdir else '')
                + ': give each run once.'
            )
    if len(workdirs) < 2:
        given = f'only {workdirs[0]}' if workdirs else 'no run'
        others = _runs_in(workdirs[0].resolve().parent) if workdirs else []
        beside = [p.name for p in others if p.resolve() not in seen]
        raise UserError(
            f'--mode=compare puts two runs or more side by side; --workdirs names {given}.'
            + (f' Beside it: {_some(beside)}.' if beside else '')
            + ' Write --workdirs=A,B.'
        )
    return [
        _read_run(workdir, name) for workdir, name in zip(workdirs, names(workdirs), strict=True)
    ]


def names(workdirs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as make every name another."""
    parts = [workdir.resolve().parts for workdir in workdirs]
    for count in range(1, max(map(len, parts)) + 1):
        found = ['/'.join(p[-count:]) for p in parts]
        if len(set(found)) == len(found):
            break
    return found


def _check_is_run(workdir: Path) -> None:
    if not workdir.is_dir():
        near = [str(p) for p in _folders(workdir.parent)] + [str(p) for p in _runs_in(Path('runs'))]
        what = 'is no folder' if workdir.exists() else 'does not exist'
        raise UserError(f'--workdirs: {workdir} {what}.{did_you_mean(str(workdir), near)}')
    if not (workdir / 'config.json').exists():
        inside = [str(p) for p in _runs_in(workdir)]
        raise UserError(
            f'--workdirs: {workdir} holds no run: there is no config.json in it. '
            + (
                f'It has runs inside: {_some(inside)}; name these.'
                if inside
                else 'Give the folder that was the --workdir of a run (by default '
                'runs/<config name>).'
            )
        )


def _read_run(workdir: Path, name: str) -> RunRecord:
    config = _read_json(workdir / 'config.json')
    examples = _read_json(workdir / 'data.json').get('examples', 0)
    try:
        channels = config['projector']['output_size']
        total = total_steps(
            config['total_epochs'], config['total_steps'], config['batch_size'], examples
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f'{workdir / "config.json"} is not the config of a run of byol_jax: {error} is missing '
            'or no value of its kind.'
        ) from error
    records = read_metrics(workdir)
    for record in records:
        if isinstance(record.get('feature_std'), int | float):
            record[SCALED_STD] = record['feature_std'] * channels**0.5
    command = workdir / 'command.txt'
    return RunRecord(
        name,
        workdir,
        _state(workdir, records[-1]['step'] if records else 0, total),
        config,
        examples,
        records,
        read_alarms(workdir),
        _read_json(workdir / 'evaluation.json'),
        _read_json(workdir / 'results.json'),
        command.read_text().strip() if command.exists() else '',
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} if it is not there."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f'{path} is damaged: it is not JSON ({error}).') from error
    if not isinstance(content, dict):
        raise UserError(f'{path} is damaged: it is no JSON object.')
    return content


def _state(workdir: Path, step: int, total: int) -> str:
    of = f'step {step:,}' if step else 'no step logged yet'
    # Without the data's size, a length in epochs says nothing about steps.
    of += f' of {total:,}' if total else ''
    if _is_training(workdir):
        return f'under way: {of}'
    if total and step >= total and (workdir / 'encoder' / 'encoder.json').exists():
        return f'finished: {of}'
    return f'stopped: {of}'


def _is_training(workdir: Path) -> bool:
    """Whether a process on this host holds the workdir's lock."""
    path = workdir / '.lock'
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _folders(parent: Path) -> list[Path]:
    return sorted(p for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []


def _runs_in(parent: Path) -> list[Path]:
    return [p for p in _folders(parent) if (p / 'config.json').exists()]


def _some(names: Sequence[str]) -> str:
    shown = ', '.join(names[:8])
    return f'{shown} and {len(names) - 8} more' if len(names) > 8 else shown
