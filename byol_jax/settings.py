"""A config as frozen, typed, checked sections.

configs/default.py has the keys, their meaning and their defaults; this module has their types and
ranges. `Settings.of` checks a config once, and each part of the program takes the section it needs.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from byol_jax.errors import UserError, did_you_mean
from byol_jax.names import Named, named
from byol_jax.values import (
    checked,
    different,
    number,
    one_of,
    plain_value,
    positive,
    probability,
    range_above_0,
)

# Old keys, which still work, and their new names.
RENAMED = {
    'target.base_ema': 'target.tau_base',
    'optimizer.momentum': 'optimizer.kwargs.momentum',
    'optimizer.trust_coefficient': 'optimizer.kwargs.trust_coefficient',
    'optimizer.b1': 'optimizer.kwargs.b1',
    'optimizer.b2': 'optimizer.kwargs.b2',
    'optimizer.epsilon': 'optimizer.kwargs.epsilon',
}

# Keys that change nothing about the trained weights.
WITHOUT_INFLUENCE = (
    'log.',
    'checkpoint.',
    'evaluate.',
    'hooks',
    'data.workers',
    'data.prefetch',
    'data.cache',
    'data.cache_gib',
    'data.index',
    'data.max_bad_fraction',
    'data.download',
    'data.label_key',
)

PRECISIONS = ('float32', 'bfloat16')
# Where views are made.
PLACES = ('cpu', 'accelerator')

# Steps and seeds are 32 bits wide on the device.
_LARGEST = 2**31 - 1

# The config key of each argument of the built-in operations and protocols. An argument beside a
# name, ('blur', {'sigma': (1, 2)}), overrides its key and has the same range.
OPERATION_KEYS: Mapping[str, Mapping[str, str]] = {
    'crop': {'area': 'crop_area', 'ratio': 'crop_ratio'},
    'flip': {'probability': 'flip'},
    'jitter': {
        'probability': 'jitter',
        'brightness': 'brightness',
        'contrast': 'contrast',
        'saturation': 'saturation',
        'hue': 'hue',
    },
    'gray': {'probability': 'gray'},
    'blur': {'probability': 'blur', 'sigma': 'blur_sigma'},
    'solarize': {'probability': 'solarize', 'threshold': 'solarize_threshold'},
}
PROTOCOL_KEYS: Mapping[str, Mapping[str, str]] = {
    'knn': {'k': 'knn_k', 'temperature': 'knn_temperature'},
    'linear': {
        'learning_rates': 'linear_learning_rates',
        'epochs': 'linear_epochs',
        'batch_size': 'linear_batch_size',
    },
    'retrieval': {'pool': 'retrieval_pool'},
}
# Factors of what an optimizer remembers, and numbers that it divides by, as optax calls them.
_FACTORS = ('momentum', 'b1', 'b2', 'b3', 'decay')
_ABOVE_0 = ('trust_coefficient', 'eps', 'epsilon')


def _hyperparameter(name: str, value: Any) -> str:
    """Returns what is wrong with an optimizer's argument, or '' for a right or unknown one."""
    if value is None or name not in (*_FACTORS, *_ABOVE_0):
        return ''
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 'must be a number.'
    if name in _FACTORS and not 0 <= value < 1:
        return 'must be in [0, 1).'
    return '' if name in _FACTORS or value > 0 else 'must be above 0.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where pictures come from, and which of them are held out."""

    source: str
    kwargs: Mapping[str, Any]
    path: str | None
    name: str
    split: str
    download: bool
    label_key: str
    exclude: tuple[str, ...] = checked(
        lambda value: '' if all(value) else 'holds an empty pattern.'
    )
    pair_keys: tuple[str, str]
    max_frame_gap: int = number(0, _LARGEST)
    tile_size: int = number(0)
    tile_stride: int = number(0)
    tile_shift: bool
    held_out_fraction: float = number(0, 0.9)
    held_out_seed: int = number(0, _LARGEST)
    cache_gib: float = number(0)
    cache: str
    max_megapixels: float = number(0.001)
    max_bad_fraction: float = number(0, 1)
    index: str
    workers: int = number(0, 4096)
    prefetch: int = number(1, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """One view: its operations, and the arguments of the built-in operations."""

    operations: tuple[Named, ...] = dataclasses.field(metadata={'keys': OPERATION_KEYS})
    crop_area: tuple[float, float] = range_above_0(1)
    crop_ratio: tuple[float, float] = range_above_0()
    flip: float = probability()
    jitter: float = probability()
    brightness: float = number(0, 1)
    contrast: float = number(0, 1)
    saturation: float = number(0, 1)
    hue: float = number(0, 0.5)
    gray: float = probability()
    blur: float = probability()
    blur_sigma: tuple[float, float] = range_above_0()
    solarize: float = probability()
    solarize_threshold: float = number(0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """The two views, and where they are made."""

    image_size: int = number(2, 8192)
    antialias: bool
    on: str = one_of(*PLACES)
    mean: tuple[float, float, float] = number(0, 1)
    std: tuple[float, float, float] = positive(1)
    view1: View
    view2: View

    @property
    def named(self) -> dict[str, View]:
        """The views by name: 'view1', then 'view2'."""
        return {'view1': self.view1, 'view2': self.view2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """The network, and the layer of it that is tapped."""

    name: str
    kwargs: Mapping[str, Any]
    hidden_layer: str | int
    pool: str
    frozen: tuple[str, ...]
    init_from: str
    freeze_steps: int = number(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The method, such as 'byol', and its arguments."""

    name: str
    kwargs: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projector:
    """Widths of the projector g's two layers."""

    hidden_size: int = number(1)
    output_size: int = number(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """Width of the predictor q's hidden layer; its output has the projector's width."""

    hidden_size: int = number(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer and its hyperparameters."""

    name: str
    base_learning_rate: float = number(0)
    weight_decay: float = number(0)
    kwargs: Mapping[str, Any] = dataclasses.field(metadata={'each': _hyperparameter})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The target network, a moving average of the online network."""

    tau_base: float = number(0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the state is saved."""

    every_epochs: float | None = number(0)
    every_steps: int | None = number(0)
    keep: int = number(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """What is logged, and when."""

    every_steps: int = number(1)
    tensorboard: bool
    wandb: bool
    lidar_every_steps: int = number(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """How encoders are measured."""

    every_epochs: float = number(0)
    online_probe: bool
    protocols: tuple[Named, ...] = dataclasses.field(
        metadata={
            'check': lambda value: '' if value else 'measures nothing.',
            'keys': PROTOCOL_KEYS,
        }
    )
    data_path: str | None
    data_split: str | None
    knn_k: tuple[int, ...] = different()
    knn_temperature: float = number(1e-6)
    batch_size: int = number(1)
    max_gallery: int = number(1)
    max_queries: int = number(1)
    crop_fraction: float = number(0.01, 1)
    linear_learning_rates: tuple[float, ...] = different()
    linear_epochs: int = number(1)
    linear_batch_size: int = number(1)
    retrieval_pool: int = number(1)

    @property
    def has_test_set(self) -> bool:
        """Whether a separate test set is named."""
        return bool(self.data_path or self.data_split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole config.

    Attributes:
      plain: the config as plain JSON values, for config.json.
    """

    name: str = checked(lambda value: '' if value.strip() else 'must not be empty.')
    seed: int = number(0, _LARGEST)
    total_epochs: float | None = number(0)
    total_steps: int | None = number(0)
    warmup_epochs: float | None = number(0)
    warmup_steps: int | None = number(0)
    batch_size: int = number(1)
    accumulate_steps: int = number(1)
    precision: str = one_of(*PRECISIONS)
    data: Data
    views: Views
    encoder: Encoder
    method: Method
    projector: Projector
    predictor: Predictor
    optimizer: Optimizer
    target: Target
    checkpoint: Checkpoint
    log: Log
    evaluate: Evaluate
    hooks: tuple[Named, ...]

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Checks a config and returns it as `Settings`.

        Args:
          config: a ConfigDict or dict with the keys of configs/default.py, or `Settings`, which
            are returned as they are. Old keys (`RENAMED`) are accepted.

        Raises:
          UserError: a key is missing or unknown, or a value is of a wrong type or out of range.
        """
        if isinstance(config, Settings):
            return config
        return _section(cls, modern(plain(config)), '')

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that the config's names are of: what its user lets files name too."""
        operations = (name for view in self.views.named.values() for name, _ in view.operations)
        listed = (name for name, _ in (*self.evaluate.protocols, *self.hooks))
        own = (self.encoder.name, self.method.name, self.optimizer.name, self.data.source)
        names = [name for name in (*own, *operations, *listed) if ':' in name]
        return tuple(sorted({name.partition(':')[0] for name in names}))

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        return _jsonable(self)


def plain(config: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values.

    Args:
      config: a ConfigDict, `Settings` or a dict.
    """
    if isinstance(config, Settings):
        return config.plain
    if hasattr(config, 'copy_and_resolve_references'):
        config = config.copy_and_resolve_references()
    return config.to_dict() if hasattr(config, 'to_dict') else dict(config)


def modern(config: Mapping[str, Any], said: list[str] | None = None) -> dict[str, Any]:
    """A config with its old keys under their new names.

    Args:
      config: nested dicts of plain values.
      said: a list to which one line is appended for each old key; None for no lines.
    """
    flat = flatten(config)
    for old, new in RENAMED.items():
        if old in flat:
            # Every config has the new key, with its default: the value of the old key must win.
            flat[new] = flat.pop(old)
            if said is not None:
                said.append(f'config key {old} is called {new} now')
    return unflatten(flat)


# Sections that have `kwargs`, and the key that names what the `kwargs` are for.
NAMED = {
    'data': 'data.source',
    'encoder': 'encoder.name',
    'method': 'method.name',
    'optimizer': 'optimizer.name',
}

# Durations that a config gives either in epochs or in steps.
_DURATIONS = ('total', 'warmup', 'checkpoint.every')


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with some keys changed.

    A duration changed in steps replaces the config's duration in epochs, and the other way round.
    A change of a section's name or `kwargs` drops the `kwargs` that the config had there.

    Args:
      config: nested dicts of plain values.
      changes: new values by dotted key.
    """
    flat = flatten(config)
    for part, key in NAMED.items():
        if key in changes or f'{part}.kwargs' in changes:
            flat = {k: v for k, v in flat.items() if not k.startswith(f'{part}.kwargs')}
            flat[f'{part}.kwargs'] = {}
    for name in _DURATIONS:
        for given, other in (('steps', 'epochs'), ('epochs', 'steps')):
            if f'{name}_{given}' in changes and f'{name}_{other}' not in changes:
                flat[f'{name}_{other}'] = None
    return unflatten(flat | dict(changes))


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """The values of nested dicts by dotted key; an empty dict counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[f'{prefix}{key}'] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from values by dotted key; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    # Empty dicts come first: a later key may put values into them.
    for key, value in sorted(flat.items(), key=lambda item: not _is_empty(item[1])):
        node = tree
        *parents, leaf = key.split('.')
        for parent in parents:
            node = node.setdefault(parent, {})
        if not _is_empty(value) or leaf not in node:
            node[leaf] = {} if _is_empty(value) else value
    return tree


def _is_empty(value: Any) -> bool:
    # `value == {}` would give an array for an array.
    return isinstance(value, Mapping) and not value


def _section(kind: Any, values: Any, prefix: str) -> Any:
    """Makes a section, a dataclass `kind`, of checked values; its keys start with `prefix`."""
    if not isinstance(values, Mapping):
        raise UserError(f'{prefix[:-1]}={values!r} must be a section of keys.')
    hints = _hints(kind)
    for key in values:
        if key not in hints:
            raise UserError(
                f"There is no config key '{prefix}{key}'.{did_you_mean(key, hints)} "
                'configs/default.py lists them.'
            )
    found = {}
    for field in dataclasses.fields(kind):
        key = f'{prefix}{field.name}'
        if field.name not in values:
            raise UserError(f"The config has no key '{key}'. configs/default.py has all of them.")
        found[field.name] = checked_value(kind, field.name, values[field.name], key)
    return kind(**found)


def checked_value(kind: Any, name: str, value: Any, key: str) -> Any:
    """Checks a value of a section, and converts it to the type of its field.

    Args:
      kind: the section, such as `Views`.
      name: name of the field, such as 'mean'.
      value: the given value.
      key: the config key, for messages.

    Raises:
      UserError: the value is of another type, not finite, or out of range.
    """
    field = kind.__dataclass_fields__[name]
    value = _typed(_hints(kind)[name], value, key)
    known = field.metadata.get('keys')
    if known is not None:
        value = tuple(_with_checked(kind, known.get(each.name, {}), each, key) for each in value)
    each_check = field.metadata.get('each')
    for each, given in value.items() if each_check else ():
        wrong = each_check(each, given)
        if wrong:
            raise UserError(f'{key}.{each}={given!r} {wrong}')
    check = field.metadata.get('check')
    wrong = check(value) if check else ''
    if wrong:
        raise UserError(f'{key}={value!r} {wrong}')
    return value


def _with_checked(kind: Any, keys: Mapping[str, str], given: Named, key: str) -> Named:
    """A name with its arguments; those that are also keys of a section are checked like them."""
    arguments = {
        name: checked_value(kind, keys[name], value, f'{key}: {given.name}.{name}')
        if name in keys
        else value
        for name, value in given.kwargs.items()
    }
    return Named(given.name, arguments)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _typed(hint: Any, value: Any, key: str) -> Any:
    """Converts a value to the type of its field: 1 to 1.0 for a float, a list to a tuple.

    Raises:
      UserError: the value is of another type, or not finite.
    """
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, f'{key}.')
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [each for each in arguments if each is not type(None)]
        if len(kinds) > 1 and type(value) in kinds:
            return value
        return _typed(kinds[0], value, key)
    if getattr(value, 'ndim', 0) and hasattr(value, 'tolist'):
        value = value.tolist()
    if origin is tuple:
        return _typed_tuple(arguments, value, key)
    if origin in (Mapping, typing.Mapping) or hint is Mapping:
        # A whole section on the command line is a ConfigDict.
        value = value.to_dict() if hasattr(value, 'to_dict') else value
        if not isinstance(value, Mapping):
            raise UserError(f'{key}={value!r} must be a section of arguments.')
        return types.MappingProxyType(plain_value(value, key))
    # A config that computes its values may give NumPy scalars.
    if hasattr(value, 'item') and getattr(value, 'ndim', None) == 0:
        value = value.item()
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not hint:
        raise UserError(f'{key}={value!r} must be {_KINDS[hint]}.')
    if hint is int and abs(value) > _LARGEST:
        raise UserError(f'{key}={value!r} must not exceed {_LARGEST}.')
    return plain_value(value, key)


_KINDS = {
    str: 'a text',
    int: 'a whole number',
    float: 'a number',
    bool: 'True or False',
}


def _typed_tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if arguments[0] is Named:
        if isinstance(value, str) or not isinstance(value, Sequence):
            value = (value,)
        given = (named(each, key) for each in value)
        return tuple(Named(name, plain_value(kwargs, f'{key}: {name}')) for name, kwargs in given)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f'{key}={value!r} must be several values, such as (a, b).')
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise UserError(f'{key}={tuple(value)!r} must be {len(arguments)} values.')
    return tuple(_typed(arguments[0], each, key) for each in value)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Named):
        return [value.name, _jsonable(value.kwargs)] if value.kwargs else value.name
    if isinstance(value, Mapping):
        return {key: _jsonable(each) for key, each in value.items()}
    return [_jsonable(each) for each in value] if isinstance(value, tuple) else value


def keys(config: Any, prefix: str = '') -> Iterator[str]:
    """All dotted keys of a config, those of sections included."""
    for key in config:
        yield prefix + key
        if hasattr(config[key], 'keys'):
            yield from keys(config[key], f'{prefix}{key}.')
