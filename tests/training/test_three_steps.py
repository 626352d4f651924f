"""Three whole updates of a tiny BYOL against float64 NumPy, with gradients derived by hand."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from starts import make_start

from byol_jax.methods.byol import Byol
from byol_jax.models.heads import MLP
from byol_jax.models.tap import TappedEncoder
from byol_jax.training.step import AXIS, make_train_step, pmap_step, replicate, shard_batch

pytestmark = pytest.mark.timeout(120)

BATCH, SIZE, TOTAL_STEPS, WARMUP = 16, 4, 6, 1
TAU_BASE, WEIGHT_DECAY, PEAK = 0.9, 0.05, 2.0
MEAN, STD = np.array((0.5, 0.4, 0.3)), np.array((0.2, 0.3, 0.25))


class Identity(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


class Net(nn.Module):
    """Linear -> BatchNorm -> ReLU on flattened pictures."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name='linear')(x.reshape(len(x), -1))
        x = nn.BatchNorm(
            not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name, name='bn'
        )(x)
        return Identity(name='out')(nn.relu(x))


class Tape:
    """Runs layers forward, remembers how to go back, and collects gradients and statistics."""

    def __init__(self):
        self.back = []
        self.moments = {}

    def linear(self, x, p, name):
        def back(dy, grads):
            grads[name] = {'kernel': x.T @ dy}
            if 'bias' in p:
                grads[name]['bias'] = dy.sum(axis=0)
            return dy @ p['kernel'].T

        self.back.append(back)
        return x @ p['kernel'] + p.get('bias', 0.0)

    def norm(self, x, p, name):
        mean, variance = x.mean(axis=0), x.var(axis=0)
        width = np.sqrt(variance + 1e-5)
        unit = (x - mean) / width
        self.moments[name] = {'mean': mean, 'var': variance}

        def back(dy, grads):
            grads[name] = {'scale': (dy * unit).sum(axis=0), 'bias': dy.sum(axis=0)}
            d = dy * p['scale']
            return (d - d.mean(axis=0) - unit * (d * unit).mean(axis=0)) / width

        self.back.append(back)
        return unit * p['scale'] + p['bias']

    def relu(self, x):
        self.back.append(lambda dy, grads: dy * (x > 0))
        return np.maximum(x, 0)

    def gradients(self, dy):
        grads = {}
        for back in reversed(self.back):
            dy = back(dy, grads)
        return dy, grads


def run_encoder(p, x):
    tape = Tape()
    y = tape.relu(tape.norm(tape.linear(x, p['linear'], 'linear'), p['bn'], 'bn'))
    return y, tape


def run_head(p, x):
    tape = Tape()
    y = tape.relu(tape.norm(tape.linear(x, p['linear1'], 'linear1'), p['bn'], 'bn'))
    return tape.linear(y, p['linear2'], 'linear2'), tape


def run(params, x, parts):
    tapes = {}
    for part in parts:
        x, tapes[part] = (run_encoder if part == 'encoder' else run_head)(params[part], x)
    return x, tapes


def moved(stats, tapes):
    """Running statistics after one more view: momentum 0.9, biased variance."""
    return {
        part: {
            'batch_stats': {
                'bn': {
                    k: 0.9 * old + 0.1 * tapes[part].moments['bn'][k]
                    for k, old in stats[part]['batch_stats']['bn'].items()
                }
            }
        }
        for part in stats
    }


def loss_and_gradient(prediction, projection):
    """The mean of 2 - 2 cos over the rows, and its gradient for the prediction."""
    n = np.linalg.norm(prediction, axis=1, keepdims=True)
    q, z = prediction / n, projection / np.linalg.norm(projection, axis=1, keepdims=True)
    cosine = (q * z).sum(axis=1, keepdims=True)
    return float((2 - 2 * cosine).mean()), -2 * (z - cosine * q) / n / len(q)


def reference_step(state, batch, step):
    """One update in float64: (state, loss)."""
    online, target, online_stats, target_stats, momentum = state
    ends, losses = {}, []
    for view in ('view1', 'view2'):
        x = ((batch[view] / 255 - MEAN) / STD).reshape(BATCH, -1)
        prediction, tapes = run(online, x, ('encoder', 'projector', 'predictor'))
        projection, target_tapes = run(target, x, ('encoder', 'projector'))
        ends[view] = prediction, projection, tapes
        online_stats = moved(online_stats, tapes)
        target_stats = moved(target_stats, {**target_tapes, 'predictor': None})
    grads = None
    for view, other in (('view1', 'view2'), ('view2', 'view1')):
        loss, d = loss_and_gradient(ends[view][0], ends[other][1])
        losses.append(loss)
        new = {}
        for part in ('predictor', 'projector', 'encoder'):
            d, new[part] = ends[view][2][part].gradients(d)
        grads = new if grads is None else jax.tree.map(np.add, grads, new)
    if step < WARMUP:
        rate = PEAK * step / WARMUP
    else:
        rate = PEAK * (1 + math.cos(math.pi * (step - WARMUP) / (TOTAL_STEPS - WARMUP))) / 2

    def lars(path, w, g, m):
        if path[-1].key == 'kernel':
            g = g + WEIGHT_DECAY * w
            g = g * 1e-3 * np.linalg.norm(w) / np.linalg.norm(g)
        return 0.9 * m + g

    momentum = jax.tree_util.tree_map_with_path(lars, online, grads, momentum)
    online = jax.tree.map(lambda w, m: w - rate * m, online, momentum)
    tau = 1 - (1 - TAU_BASE) * (math.cos(math.pi * step / TOTAL_STEPS) + 1) / 2
    theta = {part: online[part] for part in target}
    target = jax.tree.map(lambda xi, t: tau * xi + (1 - tau) * t, target, theta)
    return (online, target, online_stats, target_stats, momentum), sum(losses)


def assert_close(actual, expected):
    """Each leaf is within 1e-5 of its reference, relative to the reference's norm.

    A bias before batch normalisation has no gradient, so only rounding may be in it.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        error, length = np.linalg.norm(np.asarray(a, np.float64) - e), np.linalg.norm(e)
        limit = 1e-5 * length if length > 1e-12 else 2e-6
        assert error <= limit, jax.tree_util.keystr(path)


def make_case():
    heads = MLP(12, 6, AXIS), MLP(10, 6, AXIS)
    byol = Byol(TappedEncoder(Net(AXIS), 'out'), *heads, tuple(MEAN), tuple(STD))
    start = make_start(
        byol,
        SIZE,
        peak=PEAK,
        total_steps=TOTAL_STEPS,
        warmup_steps=WARMUP,
        weight_decay=WEIGHT_DECAY,
    )
    step = make_train_step(
        byol, start.optimizer, total_steps=TOTAL_STEPS, tau_base=TAU_BASE, seed=0
    )
    return start.initial, pmap_step(step)


def test_three_steps_match_numpy():
    """Parameters, target, statistics and momentum of three updates equal float64 to 1e-5."""
    devices = jax.local_device_count()
    initial, step_fn = make_case()
    double = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)  # noqa: E731
    reference = (
        double(initial.online_params),
        double(initial.target_params),
        double(initial.online_stats),
        double(initial.target_stats),
        jax.tree.map(lambda x: np.zeros(x.shape), initial.online_params),
    )
    state = replicate(initial)
    for step in range(3):
        views = np.random.default_rng(step).integers(0, 256, (2, BATCH, SIZE, SIZE, 3), np.uint8)
        batch = {'view1': views[0], 'view2': views[1]}
        reference, loss = reference_step(reference, batch, step)
        state, metrics = step_fn(state, shard_batch(batch, devices))
        assert float(metrics['loss']) == pytest.approx(loss, rel=1e-5)
        online, target, online_stats, target_stats, momentum = reference
        assert_close(state.online_params, online)
        assert_close(state.target_params, target)
        assert_close(state.online_stats, online_stats)
        assert_close(state.target_stats, target_stats)
        assert_close(optax.tree.get(state.optimizer, 'trace'), momentum)
