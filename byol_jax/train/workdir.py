"""The workdir of a run: whose it is, and what may change when a run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from byol_jax.errors import UserError
from byol_jax.report.pictures import write_whole

# Keys that change nothing about the trained weights and may differ when a run goes on.
_FREE = ('log.', 'checkpoint.', 'evaluate.', 'data.workers', 'data.prefetch', 'data.cache_gib')


def claim_workdir(workdir: Path, config: Any) -> None:
    """Makes the workdir and writes config.json, or checks that it belongs to this config.

    Raises:
      UserError: it belongs to another config (the differences are named), or cannot be written.
        Nothing is overwritten then.
    """
    path = workdir / 'config.json'
    resolved = resolve(config)
    if path.exists():
        _check_same(path, resolved, workdir)
        return
    if (workdir / 'checkpoints').exists():
        raise UserError(
            f'{workdir} holds checkpoints but no config.json: it is not clear whose they are. '
            'Give another --workdir, or move them away.'
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(resolved, indent=2, sort_keys=True) + '\n'
        write_whole(path, lambda partial: partial.write_text(text))
    except OSError as error:
        raise UserError(f'--workdir={workdir} cannot be written: {error.strerror}.') from error


def resolve(config: Any) -> dict[str, Any]:
    """The config as plain JSON values."""
    return json.loads(json.dumps(config.to_dict()))


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[f'{prefix}{key}'] = value
    return flat


def _check_same(path: Path, resolved: Mapping[str, Any], workdir: Path) -> None:
    try:
        old = flatten(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f'{path} is damaged ({error}). Give another --workdir.') from error
    new = flatten(resolved)
    missing = '(not there)'
    changed = [
        f'  {key}: {old.get(key, missing)!r} there, {new.get(key, missing)!r} now'
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing) and not key.startswith(_FREE)
    ]
    if changed:
        raise UserError(
            f'{workdir} belongs to a run with another config:\n' + '\n'.join(changed) + '\n'
            'Give another --workdir, or the same config to go on with that run.'
        )
