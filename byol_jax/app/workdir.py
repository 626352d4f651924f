"""The workdir of a run: whose it is, and what may change when a run goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from byol_jax.errors import UserError
from byol_jax.files import write_whole
from byol_jax.settings import WITHOUT_INFLUENCE, Settings, flatten, modern, unflatten

if TYPE_CHECKING:
    from byol_jax.sources.data import Data

# Names put into the digest at once.
_CHUNK = 4096

# Stands for the value of a key that a config does not have.
MISSING = '(not there)'

# The locks this process holds, by workdir; they end with it, however it ends.
_locks: dict[Path, IO[str]] = {}


def claim_workdir(workdir: Path, config: Any, data: Mapping[str, Any], command: str = '') -> None:
    """Makes the workdir and writes config.json, or checks that it belongs to this config.

    The workdir is then locked for this process.

    Args:
      workdir: of the run.
      config: of the run.
      data: what the run trains on (`fingerprint`); kept in data.json.
      command: that started this; kept in command.txt for people, the newest one.

    Raises:
      UserError: it belongs to another config or other data (the differences are named), another
        process is training there, or it cannot be written. Nothing is overwritten then.
    """
    path = workdir / 'config.json'
    if path.exists():
        check_workdir(workdir, config)
        _check_data(workdir / 'data.json', data)
        _lock(workdir)
        try:
            _write_command(workdir, command)
        except OSError:
            release_workdir(workdir)
            raise
        return
    if (workdir / 'checkpoints').exists():
        raise UserError(
            f'{workdir} holds checkpoints but no config.json: it is not clear whose they are. '
            'Give another --workdir, or move them away.'
        )
    plain = Settings.of(config).plain
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _lock(workdir)
        _write_json(workdir / 'data.json', data)
        _write_json(path, plain)
        _write_command(workdir, command)
    except OSError as error:
        release_workdir(workdir)
        raise UserError(f'--workdir={workdir} cannot be written: {error.strerror}.') from error


def check_workdir(workdir: Path, config: Any) -> None:
    """Raises UserError if a workdir belongs to another config; one without config.json to none."""
    path = workdir / 'config.json'
    if path.exists():
        _check_same(path, Settings.of(config), workdir)


def fingerprint(data: Data) -> dict[str, Any]:
    """What identifies a data set: the numbers of its examples and a digest of their names.

    Of an array, which has no names of its own, a digest of the pictures too.
    """
    names = hashlib.sha256()
    for part in (data.train, data.held_out):
        for start in range(0, len(part), _CHUNK):
            chunk = np.arange(start, min(start + _CHUNK, len(part)))
            lines = ''.join(f'{name}\n' for name in part.names(chunk))
            # A file's name need not be text.
            names.update(lines.encode(errors='surrogatepass'))
    return {
        'examples': len(data.train),
        'held_out': len(data.held_out),
        'names_sha256': names.hexdigest(),
        **({} if data.array is None else {'pictures_sha256': data.array.sha256}),
    }


def _check_data(path: Path, data: Mapping[str, Any]) -> None:
    old = json.loads(path.read_text()) if path.exists() else dict(data)
    if old != data:
        pictures = ', or other pictures in the array' if 'pictures_sha256' in data else ''
        raise UserError(
            f'The data is not what this run began with: {old["examples"]:,} training and '
            f'{old["held_out"]:,} held-out examples then, {data["examples"]:,} and '
            f'{data["held_out"]:,} now, or other names{pictures}. The order of the data and the '
            'schedules would change. Restore the files (an empty one in place of one that is lost '
            'will do, if no tiles are cut: it counts as bad), or start anew in another --workdir.'
        )


def _lock(workdir: Path) -> None:
    file = (workdir / '.lock').open('w')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f'Another process is training in {workdir}. Wait for it, or stop it.'
        ) from error
    _locks[workdir.resolve()] = file


def release_workdir(workdir: Path) -> None:
    """Lets other runs have a workdir that this process has claimed, if it has."""
    lock = _locks.pop(workdir.resolve(), None)
    if lock is not None:
        lock.close()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + '\n'
    write_whole(path, lambda partial: partial.write_text(text))


def _write_command(workdir: Path, command: str) -> None:
    if command:
        write_whole(workdir / 'command.txt', lambda partial: partial.write_text(f'{command}\n'))


def config_of_run(workdir: Path) -> Settings:
    """The config that a run began with.

    Raises:
      UserError: it is damaged, or lacks keys that have no meaning of old.
    """
    path = workdir / 'config.json'
    try:
        return Settings.of(completed(json.loads(path.read_text())))
    except ValueError as error:
        raise UserError(f'{path} is damaged ({error}).') from error


def _check_same(path: Path, config: Settings, workdir: Path) -> None:
    try:
        old = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'{path} is damaged ({error}). Give another --workdir.') from error
    changed = [
        f'  {key}: {there!r} there, {now!r} now'
        for key, (there, now) in differences((completed(old), completed(config.plain))).items()
        if not key.startswith(WITHOUT_INFLUENCE)
    ]
    if changed:
        raise UserError(
            f'{workdir} belongs to a run with another config:\n' + '\n'.join(changed) + '\n'
            'Give another --workdir, or the same config to go on with that run.'
        )


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The keys in which configs differ, dotted and sorted, with the value in each of them.

    Args:
      configs: nested JSON values. An empty section has no keys.
    """
    flat = [{k: v for k, v in flatten(config).items() if v != {}} for config in configs]
    keys = sorted(set().union(*flat))
    values = {key: tuple(config.get(key, MISSING) for config in flat) for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def completed(old: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with its old keys under their new names, and later keys at their defaults.

    Args:
      old: what is in it.
    """
    there = flatten(modern(old))
    defaults = _HYPERPARAMETERS.get(there.get('optimizer.name', ''))
    if defaults is not None:
        for name in set().union(*_HYPERPARAMETERS.values()):
            key = f'optimizer.kwargs.{name}'
            # Both optimizers' arguments stood in every old config.
            if name not in defaults or there.get(key) == defaults[name]:
                there.pop(key, None)
    if not any(key.startswith('optimizer.kwargs') for key in there):
        there['optimizer.kwargs'] = {}
    return unflatten({**flatten(_NEW_KEYS), **there})


# What the optimizers' arguments were before they were `optimizer.kwargs`. One that is given with
# this value now changes nothing either.
_HYPERPARAMETERS: Mapping[str, Mapping[str, float]] = {
    'lars': {'momentum': 0.9, 'trust_coefficient': 1e-3},
    'adamw': {'b1': 0.9, 'b2': 0.999, 'epsilon': 1e-8},
}
# Keys that older runs lack, at what they stand for there.
_OPERATIONS = ['crop', 'flip', 'jitter', 'gray', 'blur', 'solarize']
_NEW_KEYS = {
    'data': {'kwargs': {}},
    'views': {name: {'operations': _OPERATIONS} for name in ('view1', 'view2')},
    'method': {'name': 'byol', 'kwargs': {}},
    'hooks': [],
}
