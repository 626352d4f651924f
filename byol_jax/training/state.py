"""`TrainState`, everything that a training step changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from byol_jax.methods.base import Method

Tree = Any


class TrainState(NamedTuple):
    """The state of a run. Leaves are replicated arrays without a device axis.

    Attributes:
      step: int32 [], number of optimizer steps made.
      online_params: theta, a dict by part of the method: 'encoder', 'projector', ..
      online_stats: batch statistics of the online network, by part.
      target_params: xi, a dict by target part of the method.
      target_stats: batch statistics of the target network, by target part.
      optimizer: optax state of `online_params`.
      online_probe: an `OnlineProbe`; None for a run without one.
    """

    step: jax.Array
    online_params: Tree
    online_stats: Tree
    target_params: Tree
    target_stats: Tree
    optimizer: Tree
    online_probe: Tree = None


def init_state(
    method: Method,
    optimizer: optax.GradientTransformation,
    params: Tree,
    stats: Tree,
    online_probe: Tree = None,
) -> TrainState:
    """The state before the first step; the target network starts as a copy of the online network.

    Args:
      method: the method; its `target_parts` are copied.
      optimizer: the optimizer of the online network's parameters.
      params: parameters of the online network, from `method.init`.
      stats: statistics of the online network, from `method.init`.
      online_probe: the probe's state, from `start_probe`; None for no probe.
    """
    copy = lambda tree: jax.tree.map(jnp.copy, {p: tree[p] for p in method.target_parts})  # noqa: E731
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        online_params=params,
        online_stats=stats,
        target_params=copy(params),
        target_stats=copy(stats),
        optimizer=optimizer.init(params),
        online_probe=online_probe,
    )
