"""The workdir of a run: which run it belongs to, and what may differ when the run resumes."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from byol_jax.app.side_files import SideFile
from byol_jax.errors import UserError
from byol_jax.files import write_whole
from byol_jax.settings import WITHOUT_INFLUENCE, Settings, flatten, modern, unflatten

if TYPE_CHECKING:
    from byol_jax.sources.data import Data

# Number of names that are added to the digest at once.
_CHUNK = 4096

# Shown in place of a value where a config lacks the key.
MISSING = '(not there)'

# Locks that this process holds, by workdir. The system frees them when the process ends, even if
# it is killed.
_locks: dict[Path, IO[str]] = {}


def claim_workdir(workdir: Path, config: Any, data: Mapping[str, Any], command: str = '') -> None:
    """Creates the workdir with its config.json, or checks that it belongs to this config and data.

    Then locks it for this process.

    Args:
      workdir: the workdir of the run.
      config: the run's config, whatever `Settings.of` takes.
      data: what the run trains on, from `fingerprint`; written to data.json.
      command: the command line; written to command.txt for people to read.

    Raises:
      UserError: the workdir belongs to another config or other data (the message names the
        differences), another process is training there, or it cannot be written. Nothing is
        overwritten in these cases.
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
    """Raises UserError if a workdir has a config.json that differs from this config."""
    path = workdir / 'config.json'
    if path.exists():
        _check_same(path, Settings.of(config), workdir)


def fingerprint(data: Data) -> dict[str, Any]:
    """Identifies a data set by its numbers of examples and a digest of their names.

    An array has no names of its own, so its entry has a digest of the pictures too.
    """
    names = hashlib.sha256()
    for part in (data.train, data.held_out):
        for start in range(0, len(part), _CHUNK):
            chunk = np.arange(start, min(start + _CHUNK, len(part)))
            lines = ''.join(f'{name}\n' for name in part.names(chunk))
            # Names of files may hold bytes that are no valid text.
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
    """Releases the lock on a workdir if this process holds it."""
    lock = _locks.pop(workdir.resolve(), None)
    if lock is not None:
        lock.close()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + '\n'
    write_whole(path, lambda partial: partial.write_text(text))


def _write_command(workdir: Path, command: str) -> None:
    if command:
        # A path on a command line may hold bytes that are no valid text.
        text = f'{command}\n'.encode(errors='surrogateescape')
        SideFile(workdir / 'command.txt').replace(lambda partial: partial.write_bytes(text))


def config_of_run(workdir: Path) -> Settings:
    """Reads the config that a run was started with.

    Raises:
      UserError: config.json is damaged, or lacks a key that has no default for older runs.
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
    """The keys in which configs differ, with their values.

    Args:
      configs: nested JSON values. An empty section counts as absent.

    Returns:
      Dotted key -> its value in each config (`MISSING` where it lacks the key), sorted by key.
    """
    flat = [{k: v for k, v in flatten(config).items() if v != {}} for config in configs]
    keys = sorted(set().union(*flat))
    values = {key: tuple(config.get(key, MISSING) for config in flat) for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def completed(old: Mapping[str, Any]) -> dict[str, Any]:
    """Brings the content of an older config.json up to date.

    Args:
      old: the content of a config.json of any version.

    Returns:
      The same config with renamed keys under their new names, and newer keys at their defaults.
    """
    there = flatten(modern(old))
    defaults = _HYPERPARAMETERS.get(there.get('optimizer.name', ''))
    if defaults is not None:
        for name in set().union(*_HYPERPARAMETERS.values()):
            key = f'optimizer.kwargs.{name}'
            # Older configs listed the arguments of both optimizers, whichever was used.
            if name not in defaults or there.get(key) == defaults[name]:
                there.pop(key, None)
    if not any(key.startswith('optimizer.kwargs') for key in there):
        there['optimizer.kwargs'] = {}
    return unflatten({**flatten(_NEW_KEYS), **there})


# Defaults of the optimizers' arguments in configs that predate `optimizer.kwargs`. Giving one of
# them explicitly with the same value is no difference.
_HYPERPARAMETERS: Mapping[str, Mapping[str, float]] = {
    'lars': {'momentum': 0.9, 'trust_coefficient': 1e-3},
    'adamw': {'b1': 0.9, 'b2': 0.999, 'epsilon': 1e-8},
}
# Keys that older configs lack, with the values that those runs used.
_OPERATIONS = ['crop', 'flip', 'jitter', 'gray', 'blur', 'solarize']
_NEW_KEYS = {
    'data': {'kwargs': {}, 'exclude': []},
    'views': {name: {'operations': _OPERATIONS} for name in ('view1', 'view2')},
    'method': {'name': 'byol', 'kwargs': {}},
    'hooks': [],
}
