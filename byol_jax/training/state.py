"""Everything that a training step changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Tree = Any


class TrainState(NamedTuple):
    """The state of a run, one replicated array a leaf (no device axis).

    Attributes:
      step: int32 [], optimizer steps made.
      online_params: theta, a dict of 'encoder', 'projector' and 'predictor'.
      online_stats: batch statistics of the online network, by part.
      target_params: xi, a dict of 'encoder' and 'projector'.
      target_stats: batch statistics of the target network, by part.
      optimizer: optax state over `online_params`.
      online_probe: an `OnlineProbe`; None in a run without one.
    """

    step: jax.Array
    online_params: Tree
    online_stats: Tree
    target_params: Tree
    target_stats: Tree
    optimizer: Tree
    online_probe: Tree = None


def init_state(optimizer: optax.GradientTransformation, params: Tree, stats: Tree) -> TrainState:
    """The state before the first step; the target starts as a copy of the online network.

    Args:
      optimizer: whose state is made.
      params, stats: of the online network, from `Byol.init`.
    """
    parts = ('encoder', 'projector')
    copy = lambda tree: jax.tree.map(jnp.copy, {part: tree[part] for part in parts})  # noqa: E731
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        online_params=params,
        online_stats=stats,
        target_params=copy(params),
        target_stats=copy(stats),
        optimizer=optimizer.init(params),
    )
