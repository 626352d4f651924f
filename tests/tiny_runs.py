"""Runs of a tiny network on invented pictures, healthy and broken, for the tests of alarms."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from conftest import QUICK

from byol_jax.app.build import build_training, optimizer_of, step_of
from byol_jax.app.hooks import on_host
from byol_jax.app.plan import make_plan
from byol_jax.evaluation.monitors import measure
from byol_jax.methods.base import Outputs
from byol_jax.methods.byol import Byol
from byol_jax.models.heads import MLP
from byol_jax.models.tap import TappedEncoder
from byol_jax.settings import Settings
from byol_jax.training.optimizers import decay_mask
from byol_jax.training.step import AXIS, pmap_step, shard_batch
from configs import default

SIZE, PICTURES, BATCH = 8, 256, 64
WIDTH, OUTPUT = 32, 16


class Net(nn.Module):
    """A layer of width 32 on whole pictures; `synchronised` chooses its normalisation."""

    synchronised: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(WIDTH, use_bias=False, name='fc')(x.reshape(len(x), -1))
        norm = nn.BatchNorm if self.synchronised else OwnNorm
        x = nn.relu(norm(use_running_average=not train, momentum=0.9, name='bn')(x))
        return Keep(name='out')(x)


class Keep(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * 1.0


class OwnNorm(nn.Module):
    """A custom batch normalisation that does not know of other devices."""

    use_running_average: bool
    momentum: float

    @nn.compact
    def __call__(self, x):
        mean = self.variable('batch_stats', 'mean', jnp.zeros, x.shape[-1])
        var = self.variable('batch_stats', 'var', jnp.ones, x.shape[-1])
        now = (mean.value, var.value)
        if not self.use_running_average:
            now = (x.mean(axis=0), x.var(axis=0))
            mean.value = self.momentum * mean.value + (1 - self.momentum) * now[0]
            var.value = self.momentum * var.value + (1 - self.momentum) * now[1]
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
        return scale * (x - now[0]) / jnp.sqrt(now[1] + 1e-5)


class LinearPredictor(nn.Module):
    """One layer, which follows its target less well than two."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(OUTPUT, use_bias=False, name='linear')(x)


class NoPredictor(nn.Module):
    """Returns the projection; its one parameter, which a network must have, does nothing."""

    @nn.compact
    def __call__(self, x, train):
        return x + 0 * self.param('bias', nn.initializers.zeros, x.shape[-1:])


class NoStopGradient(Byol):
    """BYOL with the online network as its target, and a gradient through both sides."""

    def loss(self, params, target_params, stats, target_stats, batch, rng=None):
        (y1, z1, q1), stats = self.online(params, stats, batch['view1'])
        (y2, z2, q2), stats = self.online(params, stats, batch['view2'])
        loss = jnp.mean(self.distance(q1, z2) + self.distance(q2, z1))
        projection = jnp.stack([z1, z2])
        features = {
            'representation': jnp.stack([y1, y2]),
            'projection': projection,
            'prediction': jnp.stack([q1, q2]),
            'target': projection,
        }
        return loss, Outputs(stats, target_stats, features)


def make_byol(kind=Byol, predictor=None, synchronised=True):
    return kind(
        TappedEncoder(Net(synchronised), 'out', axis_name=AXIS),
        MLP(WIDTH, OUTPUT, AXIS),
        predictor or MLP(WIDTH, OUTPUT, AXIS),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )


def make_config(**changes):
    """The config of a tiny run; `changes` are dotted keys with '__' for the dot."""
    config = default.get_config()
    config.batch_size = BATCH
    config.total_epochs, config.total_steps = None, 1000
    config.warmup_epochs, config.warmup_steps = None, 10
    config.optimizer.base_learning_rate = 2.0
    config.target.tau_base = 0.9
    config.projector.output_size = OUTPUT
    config.views.image_size = SIZE
    config.log.every_steps = 10
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def make_batch(step):
    """Two views of pictures with random brightness, contrast and noise: uint8 by view."""
    fixed = np.random.default_rng(0).normal(size=(PICTURES, SIZE, SIZE, 3))
    rng = np.random.default_rng([1, step])
    pictures = fixed[rng.integers(PICTURES, size=BATCH)]
    batch = {}
    for view in ('view1', 'view2'):
        shift, scale = rng.normal(0, 0.5, (2, BATCH, 1, 1, 1))
        noise = rng.normal(0, 0.5, pictures.shape)
        values = 128 + 50 * (np.exp(scale) * pictures + shift + noise)
        batch[view] = np.clip(values, 0, 255).astype(np.uint8)
    return batch


def run(config: Any, byol: Byol, devices: int = 1, stop: int | None = None, jump=None):
    """The records, as in metrics.jsonl, of a run on invented pictures.

    `stop` ends it early; `jump`, (step, factor), multiplies the learning rate from a step on.
    """
    config = Settings.of(config)
    plan = make_plan(config, PICTURES, devices)
    training = build_training(config, plan, byol)
    if jump is not None:
        smooth = training.schedule

        def schedule(step):
            return smooth(step) * jnp.where(step < jump[0], 1, jump[1])

        mask = decay_mask(training.initial.online_params, byol.untrained())
        optimizer = optimizer_of(config, mask, schedule)
        training = training._replace(schedule=schedule, optimizer=optimizer)
    step_fn = pmap_step(step_of(config, plan, byol, training, plan.monitored), monitored=True)
    state, records = training.initial, []
    first = {key: x[: plan.batch_size] for key, x in make_batch(0).items()}
    compiled = step_fn.lower(state, shard_batch(first, devices)).compile(QUICK)
    for step in range(1, (stop or plan.total_steps) + 1):
        batch = {key: x[: plan.batch_size] for key, x in make_batch(step).items()}
        state, metrics, features = compiled(state, shard_batch(batch, devices))
        # Awaited, because two pending steps on simulated devices can deadlock.
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if step % plan.log_steps == 0:
            records.append({'step': step, **values, **measure(on_host(features))})
    return records
