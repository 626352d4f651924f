"""Encoder names -> Linen modules."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from byol_jax.errors import UserError, did_you_mean
from byol_jax.models.resnet import ResNet

# Stage sizes: He et al. 2015, Table 1; ResNet-200: He et al. 2016 (arXiv:1603.05027).
ENCODERS: Mapping[str, Callable[..., nn.Module]] = {
    'resnet': ResNet,
    'resnet18': functools.partial(ResNet, (2, 2, 2, 2)),
    'resnet34': functools.partial(ResNet, (3, 4, 6, 3)),
    'resnet50': functools.partial(ResNet, (3, 4, 6, 3), bottleneck=True),
    'resnet101': functools.partial(ResNet, (3, 4, 23, 3), bottleneck=True),
    'resnet152': functools.partial(ResNet, (3, 8, 36, 3), bottleneck=True),
    'resnet200': functools.partial(ResNet, (3, 24, 36, 3), bottleneck=True),
}


def build_encoder(name: str, kwargs: Mapping[str, Any], axis_name: str | None = None) -> nn.Module:
    """Builds an encoder.

    Args:
      name: a key of ENCODERS, or 'package.module:Class' for any importable Linen module.
      kwargs: arguments of its constructor.
      axis_name: passed on to constructors that have an `axis_name` argument, for BatchNorm
        synchronised over devices.

    Raises:
      UserError: the name does not exist or the arguments do not fit, saying which do.
    """
    constructor = _constructor(name)
    known = inspect.signature(constructor).parameters
    given = {key: _hashable(value) for key, value in kwargs.items()}
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in given:
        if key not in known and not free:
            names = [k for k in known if k not in ('parent', 'name', 'axis_name')]
            raise UserError(
                f"encoder.kwargs: '{name}' takes no argument '{key}'."
                f'{did_you_mean(key, names)} It takes: {", ".join(names)}.'
            )
    if 'axis_name' in known:
        given['axis_name'] = axis_name
    try:
        encoder = constructor(**given)
    except TypeError as error:
        raise UserError(f"encoder.kwargs do not fit '{name}': {error}") from error
    if not isinstance(encoder, nn.Module):
        raise UserError(
            f"encoder.name='{name}' made a {type(encoder).__name__}, not a flax.linen.Module."
        )
    return encoder


def _constructor(name: str) -> Callable[..., Any]:
    if ':' not in name:
        if name in ENCODERS:
            return ENCODERS[name]
        raise UserError(
            f"encoder.name='{name}' is not a known encoder.{did_you_mean(name, ENCODERS)} "
            f"Known: {', '.join(ENCODERS)}; or give your own as 'package.module:Class'."
        )
    module_name, _, attribute = name.partition(':')
    if not module_name or not attribute:
        raise UserError(f"encoder.name='{name}' must be of the form 'package.module:Class'.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"encoder.name='{name}': module '{error.name}' cannot be imported. Install it, or put "
            'its folder on PYTHONPATH.'
        ) from error
    if not hasattr(module, attribute):
        raise UserError(
            f"encoder.name='{name}': module '{module_name}' has no '{attribute}'."
            f'{did_you_mean(attribute, dir(module))}'
        )
    found = getattr(module, attribute)
    # Checked before it is called: the name may come from an encoder.json made by somebody else.
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"encoder.name='{name}' is no class derived from flax.linen.Module.")
    return found


def _hashable(value: Any) -> Any:
    """Lists (from JSON or a config) as tuples: Linen hashes its attributes."""
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value
