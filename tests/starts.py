"""Training by the library alone: a method's first state and what optimises it."""

from __future__ import annotations

from typing import NamedTuple

import jax

from byol_jax.training.optimizers import build_optimizer, decay_mask
from byol_jax.training.schedules import learning_rate_schedule
from byol_jax.training.state import TrainState, init_state


class Start(NamedTuple):
    """What optimises a method, and its first state, on the host."""

    optimizer: object
    schedule: object
    initial: TrainState


def make_start(method, size, *, peak, total_steps, warmup_steps=0, weight_decay=0.0, **optimizer):
    """Networks for pictures of a size, initialised from seed 0, under LARS or another optimizer."""
    params, stats = method.init(jax.random.key(0), size)
    schedule = learning_rate_schedule(peak, warmup_steps, total_steps)
    made = build_optimizer(
        optimizer.pop('name', 'lars'),
        optimizer.pop('kwargs', {}),
        learning_rate=schedule,
        weight_decay=weight_decay,
        decay_mask=decay_mask(params, method.untrained()),
        **optimizer,
    )
    return Start(made, schedule, jax.device_get(init_state(method, made, params, stats)))
