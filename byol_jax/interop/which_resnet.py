"""Finds which ResNet a state dict belongs to, from torchvision's names and the shapes."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from byol_jax.errors import UserError, shown
from byol_jax.interop.state_dict import Weights
from byol_jax.models.registry import build_encoder

_NAMED = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnet200')
# What wrappers put before every name: DataParallel; Lightning; SimCLR, DINO, segmentation; classes
# with a head; MoCo (github.com/facebookresearch/moco, whose `encoder_k` is the moving average);
# MoCo v3. Any of them may stand before another.
_WRAPPERS = ('module', 'model', 'backbone', 'encoder', 'encoder_q', 'base_encoder')
_BN = r'(weight|bias|running_mean|running_var|num_batches_tracked)'
_NAME = re.compile(
    rf'conv1\.weight|bn1\.{_BN}'
    rf'|layer(?P<stage>[1-4])\.(?P<block>0|[1-9]\d{{0,2}})\.'
    rf'(conv[123]\.weight|bn[123]\.{_BN}|downsample\.0\.weight|downsample\.1\.{_BN})'
)
_WRAPPED = rf'(?:(?:{"|".join(_WRAPPERS)})\.)*'
_PREFIXED = re.compile(rf'({_WRAPPED})(?:{_NAME.pattern})')
# The classifier, or what MoCo puts in its place.
_HEAD = re.compile(rf'{_WRAPPED}fc\.')

# Takes a line for the user.
Say = Callable[[str], None]


def no_say(line: str) -> None:
    """Says nothing."""


def plain_names(weights: Weights, path: Path, say: Say) -> Weights:
    """Takes the names of a ResNet from under their prefix, drops fc.*, refuses other networks.

    Args:
      weights: arrays by name, from `read_state_dict`.
      path: the file they come from, for messages.
      say: gets a line if there is a prefix.

    Returns:
      The arrays by torchvision's names.

    Raises:
      UserError: there are no weights of a ResNet, there are two ResNets, or a name under the prefix
        is not one of torchvision's ResNet.
    """
    prefix = _prefix(weights, path)
    if prefix:
        others = [name for name in weights if not name.startswith(prefix)]
        left = (
            f'; {len(others):,} other name(s) left out, such as {shown(others[0])}'
            if others
            else ''
        )
        say(f"{path.name}: the ResNet is under '{prefix}'{left}")
    inside = (name.removeprefix(prefix) for name in weights if name.startswith(prefix))
    named = {name: weights[prefix + name] for name in inside if not _HEAD.match(name)}
    if not named:
        raise UserError(f'{path} holds no weights of a ResNet besides fc.')
    for name in named:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: '{prefix}{name}' is no weight of a torchvision ResNet. Only plain "
                'ResNets can be loaded: no other stems, no attention, and no prefix of names but '
                f'{", ".join(f"{each}." for each in _WRAPPERS)}.'
            )
    return named


def _prefix(weights: Weights, path: Path) -> str:
    """What stands before the names of the ResNet."""
    found: dict[str, list[str]] = {}
    for name in weights:
        if match := _PREFIXED.fullmatch(name):
            found.setdefault(match[1], []).append(name)
    whole = [prefix for prefix, names in found.items() if f'{prefix}conv1.weight' in names]
    if len(whole) > 1:
        raise UserError(
            f'{path} holds {len(whole)} ResNets, under '
            f'{" and ".join(repr(prefix) for prefix in whole)}. Save the one to load by itself.'
        )
    return max(whole or found, key=lambda prefix: len(found[prefix]), default='')


def find_architecture(weights: Weights, path: Path) -> tuple[str, dict[str, Any]]:
    """Finds the encoder that the weights belong to: its name in the registry, and its arguments.

    Args:
      weights: arrays by name, from `plain_names`.
      path: the file they come from, for messages.

    Raises:
      UserError: a block or the first convolution of a stage is missing, or the network is a
        ResNeXt or a wide ResNet.
    """
    found: dict[int, set[int]] = {stage: set() for stage in (1, 2, 3, 4)}
    for name in weights:
        if (match := _NAME.fullmatch(name)) and match['stage']:
            found[int(match['stage'])].add(int(match['block']))
    for stage, blocks in found.items():
        gaps = set(range(max(blocks, default=0) + 1)) - blocks
        if gaps:
            get_weight(weights, f'layer{stage}.{min(gaps)}.conv1.weight', path)
    stage_sizes = tuple(len(blocks) for blocks in found.values())
    # By majority, so that a single missing or stray conv3 is reported as an error.
    bottleneck = 2 * sum(name.endswith('.conv3.weight') for name in weights) > sum(stage_sizes)
    if bottleneck:
        _refuse_relatives(weights, path)
    kwargs: dict[str, Any] = {}
    if (width := _width(weights, path)) != 1:
        kwargs['width'] = width
    if get_weight(weights, 'conv1.weight', path, ndim=4).shape[2:] == (3, 3):
        kwargs['small_images'] = True
    for name in _NAMED:
        module: Any = build_encoder(name, {})
        if (module.stage_sizes, module.bottleneck) == (stage_sizes, bottleneck):
            return name, kwargs
    return 'resnet', {'stage_sizes': list(stage_sizes), 'bottleneck': bottleneck, **kwargs}


def _refuse_relatives(weights: Weights, path: Path) -> None:
    """Refuses ResNeXts and wide ResNets by their shapes; their names are those of a ResNet."""
    stem = get_weight(weights, 'conv1.weight', path, ndim=4).shape[0]
    shapes = [
        get_weight(weights, f'layer1.0.conv{i}.weight', path, ndim=4).shape[:2] for i in (1, 2, 3)
    ]
    (inner, _), (same, group), (outer, again) = shapes
    if inner == same == again and inner > group and inner % group == 0:
        raise UserError(
            f"{path}: 'layer1.0.conv2.weight' is a convolution in {inner // group} groups: this "
            'is a ResNeXt, which this package does not have.'
        )
    if inner == same == group == again and outer == 4 * stem != 4 * inner:
        raise UserError(
            f"{path}: 'layer1.0.conv2.weight' has {inner} channels and the block {outer}, not "
            f'{4 * inner}: this is a wide ResNet (wide_resnet50_2 or a relative), wide inside its '
            'blocks only, which this package does not have; its width multiplies all channels.'
        )


def _width(weights: Weights, path: Path) -> float:
    """The width: the factor that, times 64, 128, .. and rounded, gives the numbers of channels."""
    # Channels at width 1: He et al. 2015, Table 1.
    layers = [(64, 'conv1.weight')]
    layers += [(64 * 2**i, f'layer{i + 1}.0.conv1.weight') for i in range(4)]
    channels = [(base, get_weight(weights, name, path, ndim=4).shape[0]) for base, name in layers]
    # The median, so that a single wrong layer is reported when shapes are compared.
    width = statistics.median(found / base for base, found in channels)
    # Channels are rounded, so a width such as 0.3 is the shortest decimal that explains them.
    for candidate in (width, *(round(width, digits) for digits in range(10))):
        if all(round(base * candidate) == found for base, found in channels):
            width = candidate
            break
    return int(width) if width == int(width) else width


def get_weight(weights: Weights, name: str, path: Path, ndim: int | None = None) -> np.ndarray:
    """The float array of a name, checked.

    Args:
      weights: arrays by name.
      name: name of the array.
      path: the file they come from, for messages.
      ndim: number of axes it must have; None for any.

    Raises:
      UserError: there is no such array, it is empty, holds no floats, or has other axes.
    """
    if name not in weights:
        raise UserError(f"{path}: '{name}' is missing.")
    array = weights[name]
    # JAX's issubdtype knows bfloat16 and the 8-bit floats; NumPy's does not.
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{path}: '{name}' holds {array.dtype}, not floats.")
    if 0 in array.shape or ndim not in (None, array.ndim):
        raise UserError(f"{path}: '{name}' has the shape {list(array.shape)}.")
    return array
