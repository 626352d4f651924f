"""Layers that several networks share: norms, dropout and stochastic depth."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np


def batch_norm(axis_name: str | None, name: str, zero_scale: bool = False) -> nn.BatchNorm:
    """BatchNorm with momentum 0.9 and epsilon 1e-5 (DeepMind byol/configs/byol.py, bn_config)."""
    return nn.BatchNorm(
        momentum=0.9,
        epsilon=1e-5,
        axis_name=axis_name,
        scale_init=nn.initializers.zeros if zero_scale else nn.initializers.ones,
        name=name,
    )


def layer_norm(name: str) -> nn.LayerNorm:
    """LayerNorm over channels with epsilon 1e-6 (MoCo v3 vits.py; ConvNeXt models/convnext.py).

    The variance is the mean of squared deviations. Flax's faster E[x^2] - E[x]^2 loses precision if
    the mean is far from 0, as it is in residual streams.
    """
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


def drop_path_rates(last: float, depth: int) -> tuple[float, ...]:
    """Stochastic depth's rate of each block: linear from 0 at the first to `last` at the last.

    The linear rule is from arXiv:1603.09382, Section 3. The rate of 0 at the first block is from
    timm, DeiT and ConvNeXt (models/convnext.py, dp_rates).

    Args:
      last: the last block's rate, in [0, 1).
      depth: number of blocks.

    Raises:
      ValueError: `last` is not in [0, 1).
    """
    if not 0 <= last < 1:
        raise ValueError(f'drop_path={last} must lie in [0, 1).')
    return tuple(float(rate) for rate in np.linspace(0, last, depth))


def drop_path(branch: jax.Array, rate: float, train: bool, name: str) -> jax.Array:
    """Stochastic depth: drops the whole residual branch, [B, ..., D], of some examples."""
    return dropout(branch, rate, train, name, broadcast_dims=range(1, branch.ndim))


def dropout(
    x: jax.Array, rate: float, train: bool, name: str, broadcast_dims: Sequence[int] = ()
) -> jax.Array:
    """Dropout, for use in a compact method; a rate of 0 adds no layer.

    Args:
      x: float [B, ..., D].
      rate: probability with which a value becomes 0 in training; other values are divided by
        1 - rate. Draws from the 'dropout' stream of random numbers.
      train: whether to drop values; False returns `x`.
      name: name of the layer.
      broadcast_dims: axes along which values are dropped together.
    """
    if not rate:
        return x
    drop = nn.Dropout(rate, broadcast_dims=tuple(broadcast_dims), name=name)
    return drop(x, deterministic=not train)
