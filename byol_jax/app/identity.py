"""What of a config makes a run what it is: its meaning, not its spelling."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

from byol_jax.app.old_config import completed, differences
from byol_jax.app.plan import total_steps
from byol_jax.errors import UserError
from byol_jax.methods.base import METHODS
from byol_jax.models.registry import ENCODERS
from byol_jax.names import Registry
from byol_jax.settings import OPERATION_KEYS, WITHOUT_INFLUENCE, Settings, flatten, unflatten
from byol_jax.training.optimizers import OPTIMIZERS

# Durations, of which a config has one in epochs or in steps.
_DURATIONS = ('total', 'warmup')

# Sections with arguments of what the key names.
_NAMED: Mapping[str, tuple[str, Registry]] = {
    'encoder.kwargs': ('encoder.name', ENCODERS),
    'method.kwargs': ('method.name', METHODS),
    'optimizer.kwargs': ('optimizer.name', OPTIMIZERS),
}


def changed_keys(
    then: Mapping[str, Any],
    now: Settings,
    examples: int = 0,
    layers: tuple[str, str] = ('', ''),
) -> dict[str, tuple[Any, Any]]:
    """The keys that make another run, with the values then and now.

    Args:
      then: config.json of the run, perhaps of an older version.
      now: the config.
      examples: that the run trains on; 0: not known, so an epoch is no number of steps.
      layers: paths of the tapped layers then and now, which may be named in several ways; '': not
        known.

    Raises:
      UserError: the run's config has no meaning here; names the key.
    """
    there, here = flatten(completed(then)), flatten(now.plain)
    # What does not matter need not be valid any more.
    there = {k: v for k, v in there.items() if not k.startswith(WITHOUT_INFLUENCE)}
    there |= {k: v for k, v in here.items() if k.startswith(WITHOUT_INFLUENCE)}
    old = Settings.of(unflatten(there))
    defaults = _arguments(now)
    a, b = (_meaning(config, examples, defaults) for config in (old, now))
    if layers[0] and layers[0] == layers[1]:
        a['encoder.hidden_layer'] = b['encoder.hidden_layer']
    groups = {group for group in a.keys() | b.keys() if a.get(group) != b.get(group)}
    return {
        key: (values[0], values[1])
        for key, values in differences((old.plain, now.plain)).items()
        if _group(key) in groups
    }


def _group(key: str) -> str:
    """The keys that have one meaning together are one group; most are one by themselves."""
    for name in _DURATIONS:
        if key in (f'{name}_epochs', f'{name}_steps'):
            return name
    for name in _NAMED:
        if key.startswith(name):
            return name
    parts = key.split('.')
    return '.'.join(parts[:2]) if parts[0] == 'views' and len(parts) > 2 else key


def _meaning(config: Settings, examples: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What decides about the trained weights, by group of keys; JSON values."""
    flat = flatten(config.plain)
    found = {
        key: value
        for key, value in flat.items()
        if _group(key) == key and not key.startswith(WITHOUT_INFLUENCE) and key not in _idle(config)
    }
    # What is there is compared, wherever it lies.
    for key in ('data.path', 'encoder.init_from'):
        found[key] = bool(flat[key])
    for name in _DURATIONS:
        epochs, steps = flat[f'{name}_epochs'], flat[f'{name}_steps']
        found[name] = [epochs, steps]
        if examples and (epochs is None) != (steps is None):
            found[name] = total_steps(epochs, steps, config.batch_size, examples)
    for section, without in defaults.items():
        given = _at(config.plain, section)
        found[section] = {k: v for k, v in given.items() if k not in without or v != without[k]}
    found['encoder.frozen'] = sorted(set(flat['encoder.frozen']))
    if 'data.tile_stride' in found:
        found['data.tile_stride'] = flat['data.tile_stride'] or flat['data.tile_size']
    for name in ('view1', 'view2'):
        found[f'views.{name}'] = _operations(config.plain['views'][name])
    return found


def _idle(config: Settings) -> set[str]:
    """Keys that change nothing where others are as they are."""
    # The name of a config names its default workdir.
    data, idle = config.data, {'name'}
    if data.source != 'video':
        idle.add('data.max_frame_gap')
    if data.source != 'tfds':
        idle |= {'data.name', 'data.split'}
    if not data.tile_size:
        idle |= {'data.tile_stride', 'data.tile_shift'}
    if not data.held_out_fraction:
        idle.add('data.held_out_seed')
    return idle


def _operations(view: Mapping[str, Any]) -> list[Any]:
    """The operations of a view with their arguments; without ours that never happen."""
    listed = [(each, {}) if isinstance(each, str) else each for each in view['operations']]
    names = [name for name, _ in listed]
    found = []
    for name, kwargs in listed:
        keys = OPERATION_KEYS.get(name, {})
        arguments = {argument: view[key] for argument, key in keys.items()} | kwargs
        # A second one of its name would draw as the first.
        if keys and arguments.get('probability') == 0 and names.count(name) == 1:
            continue
        found.append([name, arguments])
    return found


def _arguments(config: Settings) -> dict[str, dict[str, Any]]:
    """By section of arguments those of what it names that have a default, with it."""
    found: dict[str, dict[str, Any]] = {}
    for section, (key, registry) in _NAMED.items():
        named = registry.find(_at(config.plain, key))
        parameters: list[inspect.Parameter] = []
        # Some built-in functions do not say what they take.
        with contextlib.suppress(TypeError, ValueError):
            parameters = list(inspect.signature(named).parameters.values())
        found[section] = {
            p.name: list(p.default) if isinstance(p.default, tuple) else p.default
            for p in parameters
            if p.default is not p.empty
        }
    return found


def _at(tree: Mapping[str, Any], key: str) -> Any:
    for name in key.split('.'):
        tree = tree[name]
    return tree


def refusal(workdir: Any, changed: Mapping[str, tuple[Any, Any]]) -> UserError:
    """What a user is told whose config makes another run."""
    lines = [f'  {key}: {there!r} there, {now!r} now' for key, (there, now) in changed.items()]
    return UserError(
        f'{workdir} belongs to a run with another config:\n' + '\n'.join(lines) + '\n'
        'Give another --workdir, or the same config to go on with that run.'
    )
