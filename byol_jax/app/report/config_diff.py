"""Where resolved configs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Stands for the value of a key that a config does not have.
MISSING = '(not there)'


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The keys in which configs differ, dotted and sorted, with the value in each of them.

    Args:
      configs: nested JSON values. An empty section has no keys.
    """
    flat = [flatten(config) for config in configs]
    keys = sorted(set().union(*flat))
    values = {key: tuple(config.get(key, MISSING) for config in flat) for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[f'{prefix}{key}'] = value
    return flat
