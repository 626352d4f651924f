"""config.json of any version: its keys under their present names, and how configs differ."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byol_jax.app.recipes import load_recipe, recipes_folder
from byol_jax.files import Damaged
from byol_jax.settings import Settings, flatten, modern, unflatten

# Stands for the value of a key that a config does not have.
MISSING = '(not there)'


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
    defaults = _HYPERPARAMETERS.get(str(there.get('optimizer.name', '')))
    if defaults is not None:
        for name in set().union(*_HYPERPARAMETERS.values()):
            key = f'optimizer.kwargs.{name}'
            # Both optimizers' arguments stood in every old config.
            if name not in defaults or there.get(key) == defaults[name]:
                there.pop(key, None)
    if not any(key.startswith('optimizer.kwargs') for key in there):
        there['optimizer.kwargs'] = {}
    return unflatten({**_defaults(), **there})


# What the optimizers' arguments were before they were `optimizer.kwargs`. One that is given with
# this value now changes nothing either.
_HYPERPARAMETERS: Mapping[str, Mapping[str, float]] = {
    'lars': {'momentum': 0.9, 'trust_coefficient': 1e-3},
    'adamw': {'b1': 0.9, 'b2': 0.999, 'epsilon': 1e-8},
}


# Durations: a config has one of the two keys, in epochs or in steps.
DURATIONS = ('total', 'warmup', 'checkpoint.every')


@functools.cache
def _defaults() -> Mapping[str, Any]:
    """The default of every key, for configs of a version that had not all of them."""
    flat = flatten(Settings.of(load_recipe(str(recipes_folder() / 'default.py'))).plain)
    return flat | {f'{name}_{unit}': None for name in DURATIONS for unit in ('epochs', 'steps')}


def check_config(path: Path, content: Mapping[str, Any]) -> None:
    """Checks that an object has the form of a config, of whatever version.

    Args:
      path: where it was read.
      content: what was read there.

    Raises:
      Damaged: a section is no section; names it.
    """
    sections = {key.rpartition('.')[0] for key in _defaults()} - {''}
    for section in sorted(sections | {'encoder.kwargs', 'data.kwargs', 'method.kwargs'}):
        value: Any = content
        for name in section.split('.'):
            value = value.get(name, {})
            if not isinstance(value, Mapping):
                raise Damaged(path, f"its '{section}' is {value!r}, and no section of keys")
