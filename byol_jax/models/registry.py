"""Builds networks from encoder names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import FrozenDict
from flax.errors import FlaxError

from byol_jax.errors import UserError
from byol_jax.models.convnext import ConvNeXt
from byol_jax.models.network import constructor_parameters
from byol_jax.models.nnx_network import NnxNetwork
from byol_jax.models.resnet import ResNet
from byol_jax.models.vit import ViT
from byol_jax.names import Registry

# Stage sizes are from He et al. 2015, Table 1; ResNet-200's from He et al. 2016 (arXiv:1603.05027).
_NAMED = {
    'resnet': ResNet,
    'resnet18': functools.partial(ResNet, (2, 2, 2, 2)),
    'resnet34': functools.partial(ResNet, (3, 4, 6, 3)),
    'resnet50': functools.partial(ResNet, (3, 4, 6, 3), bottleneck=True),
    'resnet101': functools.partial(ResNet, (3, 4, 23, 3), bottleneck=True),
    'resnet152': functools.partial(ResNet, (3, 8, 36, 3), bottleneck=True),
    'resnet200': functools.partial(ResNet, (3, 24, 36, 3), bottleneck=True),
    # DeiT, arXiv:2012.12877, Table 1.
    'vit': ViT,
    'vit_ti': functools.partial(ViT, width=192, heads=3),
    'vit_s': functools.partial(ViT, width=384, heads=6),
    'vit_b': functools.partial(ViT, width=768, heads=12),
    # arXiv:2201.03545, Section 3.
    'convnext': ConvNeXt,
    'convnext_t': functools.partial(ConvNeXt, (3, 3, 9, 3), (96, 192, 384, 768)),
}

ENCODERS = Registry('encoder', 'encoder.name', _NAMED, kwargs_key='encoder.kwargs')


def build_encoder(
    name: str, kwargs: Mapping[str, Any], axis_name: str | None = None
) -> nn.Module | NnxNetwork:
    """Builds an encoder.

    Args:
      name: one of ENCODERS, or 'package.module:Class' for any importable Linen or NNX module
        class, or functools.partial of one.
      kwargs: arguments of the class.
      axis_name: mapped axis for batch statistics, passed to classes that have such an argument.

    Returns:
      A Linen module, or an `NnxNetwork` of an NNX class.

    Raises:
      UserError: the name does not exist, or the class does not take the arguments; the message
        lists those it takes.
    """
    constructor = ENCODERS.find(name)
    # Check before calling it: the name may come from somebody else's encoder.json.
    if not _is_a(constructor, nn.Module, nnx.Module):
        raise UserError(
            f"encoder.name='{name}' is not a class derived from flax.linen.Module or "
            'flax.nnx.Module.'
        )
    # `Registry.check_kwargs` cannot see the arguments of NNX classes (`constructor_parameters`).
    known = constructor_parameters(constructor)
    given = {key: _hashable(value) for key, value in kwargs.items()}
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        ours = ('axis_name', 'rngs', *(('parent', 'name') if _is_a(constructor, nn.Module) else ()))
        ENCODERS.check_known(name, kwargs, [key for key in known if key not in ours])
    if 'axis_name' in known:
        given['axis_name'] = axis_name
    try:
        if _is_a(constructor, nnx.Module):
            network = NnxNetwork(constructor, tuple(sorted(given.items())))
            # Runs the constructor once to find its errors.
            jax.eval_shape(network.init, jax.random.key(0), None)
            return network
        return constructor(**given)
    except (TypeError, ValueError, AttributeError, FlaxError) as error:
        raise UserError(f"encoder.kwargs do not fit '{name}': {error}") from error


def _is_a(constructor: Any, *kinds: type) -> bool:
    """Whether something is a class of one of these kinds, or a functools.partial of one."""
    if isinstance(constructor, functools.partial):
        constructor = constructor.func
    return isinstance(constructor, type) and issubclass(constructor, kinds)


def _hashable(value: Any) -> Any:
    """Converts lists and dicts (from JSON or a config) to tuples and FrozenDicts.

    Modules hash their arguments.
    """
    if isinstance(value, Mapping):
        return FrozenDict({key: _hashable(inner) for key, inner in value.items()})
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value
