"""Layers that several networks share: norms, dropout and stochastic depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax


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


@dataclasses.dataclass(frozen=True)
class DropPathRates(Sequence[float]):
    """Stochastic depth's rate of each block: linear from 0 at the first to `last` at the last.

    The linear rule is from arXiv:1603.09382, Section 3. The rate of 0 at the first block is from
    timm, DeiT and ConvNeXt (models/convnext.py, dp_rates). Each is computed when it is asked for:
    a file may declare more blocks than there is memory for.

    Attributes:
      last: rate of the last block, in [0, 1).
      depth: number of blocks.
      blocks: those whose rates these are; None for all.
    """

    last: float
    depth: int
    blocks: range | None = None

    def __post_init__(self) -> None:
        """Raises ValueError if `last` is not in [0, 1)."""
        if not 0 <= self.last < 1:
            raise ValueError(f'drop_path={self.last} must lie in [0, 1).')

    def __getitem__(self, index: Any) -> Any:
        block = (range(self.depth) if self.blocks is None else self.blocks)[index]
        if isinstance(block, range):
            return dataclasses.replace(self, blocks=block)
        # As numpy.linspace rounds.
        if 0 < block < self.depth - 1:
            return block * (self.last / (self.depth - 1))
        return self.last if block else 0.0

    def __len__(self) -> int:
        return self.depth if self.blocks is None else len(self.blocks)


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
