"""A config as frozen, typed, checked sections.

configs/default.py has the keys, their meaning and their defaults; this module has their types and
ranges. `Settings.of` checks a config once, and each part of the program takes the section it needs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from byol_jax.errors import UserError, did_you_mean
from byol_jax.names import Named, named

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

# Returns what is wrong with a value, in words that follow 'key=value ', or '' for a right value.
Check = Callable[[Any], str]


def _checked(check: Check) -> Any:
    return dataclasses.field(metadata={'check': check})


def _number(low: float = -math.inf, high: float = math.inf) -> Any:
    """A field whose number, or each of whose numbers, lies in [low, high]; None passes."""

    def check(value: Any) -> str:
        values = value if isinstance(value, tuple) else (value,)
        if all(each is None or low <= each <= high for each in values):
            return ''
        return (
            f'must be at least {low:g}.' if high == math.inf else f'must be in [{low:g}, {high:g}].'
        )

    return _checked(check)


def _positive() -> Any:
    """A field whose number, or each of whose numbers, is above 0."""

    def check(value: Any) -> str:
        values = value if isinstance(value, tuple) else (value,)
        return '' if min(values, default=0) > 0 else 'must be above 0.'

    return _checked(check)


def _different() -> Any:
    """A field of one or more numbers above 0, no two of them equal."""

    def check(value: tuple[float, ...]) -> str:
        usable = value and min(value) > 0 and len(set(value)) == len(value)
        return '' if usable else 'must be different numbers above 0.'

    return _checked(check)


def _range(high: float = math.inf) -> Any:
    """A field of a range (low, high) with 0 < low <= high, and at most the argument `high`."""

    def check(value: tuple[float, float]) -> str:
        if not 0 < value[0] <= value[1]:
            return 'must be a range (low, high) above 0.'
        return '' if value[1] <= high else f'must not exceed {high:g}.'

    return _checked(check)


def _one_of(*known: str) -> Any:
    """A field whose text is one of `known`."""

    def check(value: str) -> str:
        if value in known:
            return ''
        return f'is not one of {", ".join(known)}.{did_you_mean(value, known)}'

    return _checked(check)


def _probability() -> Any:
    return _checked(
        lambda value: '' if 0 <= value <= 1 else 'is a probability: it must lie in [0, 1].'
    )


_SEED = 2**31 - 1


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
    pair_keys: tuple[str, str]
    max_frame_gap: int = _number(0, _SEED)
    tile_size: int = _number(0)
    tile_stride: int = _number(0)
    tile_shift: bool
    held_out_fraction: float = _number(0, 0.9)
    held_out_seed: int = _number(0, _SEED)
    cache_gib: float = _number(0)
    cache: str
    max_megapixels: float = _number(0.001)
    max_bad_fraction: float = _number(0, 1)
    index: str
    workers: int = _number(0, 4096)
    prefetch: int = _number(1, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """One view: its operations, and the arguments of the built-in operations."""

    operations: tuple[Named, ...]
    crop_area: tuple[float, float] = _range(1)
    crop_ratio: tuple[float, float] = _range()
    flip: float = _probability()
    jitter: float = _probability()
    brightness: float = _number(0, 1)
    contrast: float = _number(0, 1)
    saturation: float = _number(0, 1)
    hue: float = _number(0, 0.5)
    gray: float = _probability()
    blur: float = _probability()
    blur_sigma: tuple[float, float] = _range()
    solarize: float = _probability()
    solarize_threshold: float = _number(0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """The two views, and where they are made."""

    image_size: int = _number(2, 8192)
    antialias: bool
    on: str = _one_of(*PLACES)
    mean: tuple[float, float, float] = _number(0, 1)
    std: tuple[float, float, float] = _positive()
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
    freeze_steps: int = _number(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The method, such as 'byol', and its arguments."""

    name: str
    kwargs: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projector:
    """Widths of the projector g's two layers."""

    hidden_size: int = _number(1)
    output_size: int = _number(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """Width of the predictor q's hidden layer; its output has the projector's width."""

    hidden_size: int = _number(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer and its hyperparameters."""

    name: str
    base_learning_rate: float = _number(0)
    weight_decay: float = _number(0)
    kwargs: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The target network, a moving average of the online network."""

    tau_base: float = _number(0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the state is saved."""

    every_epochs: float | None = _number(0)
    every_steps: int | None = _number(0)
    keep: int = _number(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """What is logged, and when."""

    every_steps: int = _number(1)
    tensorboard: bool
    wandb: bool
    lidar_every_steps: int = _number(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """How encoders are measured."""

    every_epochs: float = _number(0)
    online_probe: bool
    protocols: tuple[Named, ...] = _checked(lambda value: '' if value else 'measures nothing.')
    data_path: str | None
    data_split: str | None
    knn_k: tuple[int, ...] = _different()
    knn_temperature: float = _number(1e-6)
    batch_size: int = _number(1)
    max_gallery: int = _number(1)
    max_queries: int = _number(1)
    crop_fraction: float = _number(0.01, 1)
    linear_learning_rates: tuple[float, ...] = _different()
    linear_epochs: int = _number(1)
    linear_batch_size: int = _number(1)
    retrieval_pool: int = _number(1)

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

    name: str
    seed: int = _number(0, _SEED)
    total_epochs: float | None = _number(0)
    total_steps: int | None = _number(0)
    warmup_epochs: float | None = _number(0)
    warmup_steps: int | None = _number(0)
    batch_size: int = _number(1)
    accumulate_steps: int = _number(1)
    precision: str = _one_of(*PRECISIONS)
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
    for key, value in sorted(flat.items(), key=lambda item: item[1] != {}):
        node = tree
        *parents, leaf = key.split('.')
        for parent in parents:
            node = node.setdefault(parent, {})
        if value != {} or leaf not in node:
            node[leaf] = dict(value) if value == {} else value
    return tree


def _section(kind: Any, values: Any, prefix: str) -> Any:
    """Makes a section, a dataclass `kind`, of checked values; its keys start with `prefix`."""
    if not isinstance(values, Mapping):
        raise UserError(f'{prefix[:-1]}={values!r} must be a section of keys.')
    hints = typing.get_type_hints(kind)
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
        found[field.name] = value = _typed(hints[field.name], values[field.name], key)
        check = field.metadata.get('check')
        wrong = check(value) if check else ''
        if wrong:
            raise UserError(f'{key}={value!r} {wrong}')
    return kind(**found)


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
    if origin is tuple:
        return _typed_tuple(arguments, value, key)
    if origin in (Mapping, typing.Mapping) or hint is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f'{key}={value!r} must be a section of arguments.')
        return types.MappingProxyType(dict(value))
    # A config that computes its values may give NumPy scalars.
    if hasattr(value, 'item') and getattr(value, 'ndim', None) == 0:
        value = value.item()
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not hint:
        raise UserError(f'{key}={value!r} must be {_KINDS[hint]}.')
    if hint is float and not math.isfinite(value):
        raise UserError(f'{key}={value!r} must be a finite number.')
    return value


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
        return tuple(named(each, key) for each in value)
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
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise UserError(
            f'{value!r} cannot be written to config.json: give its name as a text.'
        ) from None


def keys(config: Any, prefix: str = '') -> Iterator[str]:
    """All dotted keys of a config, those of sections included."""
    for key in config:
        yield prefix + key
        if hasattr(config[key], 'keys'):
            yield from keys(config[key], f'{prefix}{key}.')
