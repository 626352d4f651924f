"""Training with the library alone: a method's first state and its optimizer."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax

from byol_jax.methods.byol import Byol
from byol_jax.models.heads import MLP
from byol_jax.models.tap import TappedEncoder
from byol_jax.training.optimizers import build_optimizer, decay_mask
from byol_jax.training.schedules import learning_rate_schedule
from byol_jax.training.state import TrainState, init_state


class Start(NamedTuple):
    """A method's optimizer and first state, on the host."""

    optimizer: object
    schedule: object
    initial: TrainState


def make_start(method, size, *, peak, total_steps, warmup_steps=0, weight_decay=0.0, **optimizer):
    """Networks for pictures of one size, initialised from seed 0, with LARS or other optimizers."""
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


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


class Net(nn.Module):
    """Conv -> BatchNorm -> ReLU -> mean."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False, name='conv')(x)
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name, name='bn')(x)
        return Mean(name='pool')(nn.relu(x))


class Mean(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.mean(axis=(1, 2))


def make_byol(axis_name):
    heads = MLP(8, 4, axis_name), MLP(6, 4, axis_name)
    return Byol(TappedEncoder(Net(axis_name), 'pool'), *heads, MEAN, STD)
