"""Real training steps of own networks, small enough for tests."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
from conftest import QUICK

from byol_jax.app.build import method_of, optimizer_of
from byol_jax.app.plan import make_plan
from byol_jax.methods.base import Method
from byol_jax.models.tap import TappedEncoder
from byol_jax.settings import Settings
from byol_jax.training.optimizers import decay_mask
from byol_jax.training.schedules import learning_rate_schedule
from byol_jax.training.state import TrainState, init_state
from byol_jax.training.step import make_train_step, pmap_step, shard_batch
from configs import default

BATCH, SIZE = 16, 8
SHAPE = (4, SIZE, SIZE, 3)
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)

IMAGES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


class Case(NamedTuple):
    """The networks of a config, their state before the first step, and the mapped step."""

    byol: Method
    initial: TrainState
    step: object
    devices: int

    def run(self, steps, state=None):
        """The states, on the host, after each of some steps; every step is awaited."""
        states = [self.initial if state is None else state]
        for _ in range(steps):
            batch = shard_batch(make_batch(int(states[-1].step)), self.devices)
            # Fetch the copies of all devices: fetching one would not wait for the others.
            state, _ = jax.block_until_ready(self.step(states[-1], batch))
            states.append(jax.device_get(state))
        return states[1:]


def small_config(name, layer, **changes):
    """The default config for a network of own_networks, with strong weight decay.

    Keys of `changes` are dotted with two underscores: encoder__pool='cls'.
    """
    config = default.get_config()
    config.batch_size = BATCH
    config.total_epochs, config.total_steps = None, 6
    config.warmup_epochs, config.warmup_steps = None, 0
    config.views.image_size = SIZE
    config.encoder.name = name if ':' in name else f'own_networks:{name}'
    config.encoder.hidden_layer = layer
    config.projector.hidden_size = config.predictor.hidden_size = 8
    config.projector.output_size = 4
    config.optimizer.weight_decay = 0.1
    config.optimizer.base_learning_rate = 10.0
    changes = {key.replace('__', '.'): value for key, value in changes.items()}
    if 'encoder.kwargs' in changes:
        config.encoder.kwargs = changes.pop('encoder.kwargs')
    config.update_from_flattened_dict(changes)
    return config


def make_method(config):
    """The networks of a config."""
    return method_of(Settings.of(config))


def make_case(config, devices):
    """What a run of this config trains, without its data; the weights are as after training."""
    config = Settings.of(config)
    byol = make_method(config)
    plan = make_plan(config, examples=100, device_count=devices)
    shapes = jax.eval_shape(lambda: byol.init(jax.random.key(0), SIZE))
    params, stats = as_trained({'params': shapes[0]})['params'], as_trained(shapes[1])
    mask = decay_mask(params, byol.untrained())
    schedule = learning_rate_schedule(plan.learning_rate, plan.warmup_steps, plan.total_steps)
    optimizer = optimizer_of(config, mask, schedule)
    step = make_train_step(
        byol,
        optimizer,
        total_steps=plan.total_steps,
        tau_base=0.9,
        seed=config.seed,
        schedule=schedule,
        accumulate_steps=plan.accumulate_steps,
        freeze_steps=plan.freeze_steps,
    )
    initial = jax.device_get(init_state(byol, optimizer, params, stats))
    batch = shard_batch(make_batch(0), devices)
    return Case(byol, initial, pmap_step(step).lower(initial, batch).compile(QUICK), devices)


def make_batch(step):
    """The batch of a step, independent of the number of devices."""
    shape = (2, BATCH, SIZE, SIZE, 3)
    view1, view2 = np.random.default_rng(step).integers(0, 256, shape, np.uint8)
    return {'view1': view1, 'view2': view2}


def normalised(byol, images):
    """uint8 images as a network gets them, computed in float64."""
    return (images / 255 - np.array(byol.mean)) / np.array(byol.std)


def by_path(tree):
    """{'params/conv1/kernel': array, ..} on the host."""
    return {
        '/'.join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def encoder_of(state, network='online'):
    """All variables of a network's encoder by path."""
    params, stats = (getattr(state, f'{network}_{part}') for part in ('params', 'stats'))
    return by_path({'params': params['encoder'], **stats['encoder']})


def as_trained(shapes, seed=0):
    """Variables of these shapes as after training: no initial values, and integers at 0.

    Nothing is compiled. Variances, and all others that are not parameters, are positive.
    """
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if not np.issubdtype(leaf.dtype, np.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        if path[0].key == 'params':
            return np.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype)
        return np.asarray(rng.uniform(0.2, 1, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def tap(module, layer, pool='mean', **attributes):
    """(tapped encoder, variables as after some training) of a network."""
    tapped = TappedEncoder(module, layer, pool, **attributes)
    images = jax.ShapeDtypeStruct(SHAPE, np.float32)
    return tapped, as_trained(jax.eval_shape(tapped.init, jax.random.key(0), images))


def features_of(tapped, variables, images=IMAGES, train=False, seed=None):
    """The features, and the other collections after the pass, on the host."""
    rng = None if seed is None else jax.random.key(seed)
    return jax.device_get(_applied(tapped, train)(variables, images, rng))


@functools.lru_cache(maxsize=64)
def _applied(tapped, train):
    return quick_jit(lambda variables, images, rng: tapped.apply(variables, images, train, rng))
