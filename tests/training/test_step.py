"""The training step: the same numbers on any number of devices, equal to the paper's."""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from starts import MEAN, STD, make_byol, make_start

from byol_jax.methods.byol import Byol
from byol_jax.models.tap import TappedEncoder
from byol_jax.training.step import (
    AXIS,
    everywhere,
    feature_std,
    make_train_step,
    pmap_step,
    replicate,
    shard_batch,
    update_target,
)

# Two pending steps on simulated devices can deadlock: every step is awaited, with a time limit.
pytestmark = pytest.mark.timeout(120)

BATCH, SIZE, TOTAL_STEPS = 16, 8, 6
TAU_BASE, WEIGHT_DECAY, PEAK = 0.9, 0.01, 0.5

# Float32 sums in another order; the largest difference seen was 1.5e-6 after one step.
ORDER_OF_SUMS = {'rtol': 2e-5, 'atol': 2e-6}
# A spread near zero is a small difference of large sums: 5e-6 without XLA's optimisations.
SPREAD = {'rtol': 2e-5, 'atol': 2e-5}


class Case(NamedTuple):
    initial: object
    step: object


def make_case(byol, accumulate_steps=1):
    start = make_start(byol, SIZE, peak=PEAK, total_steps=TOTAL_STEPS, weight_decay=WEIGHT_DECAY)
    step = make_train_step(
        byol,
        start.optimizer,
        total_steps=TOTAL_STEPS,
        tau_base=TAU_BASE,
        seed=0,
        schedule=start.schedule,
        accumulate_steps=accumulate_steps,
    )
    return Case(start.initial, pmap_step(step))


def make_batch(step):
    views = np.random.default_rng(step).integers(0, 256, (2, BATCH, SIZE, SIZE, 3), np.uint8)
    return {'view1': views[0], 'view2': views[1]}


def on_host(tree):
    return jax.tree.map(np.array, tree)


def run_step(case, state, step, devices):
    """Makes one step, awaited: (new state, metrics on the host)."""
    state, metrics = case.step(state, shard_batch(make_batch(step), devices))
    return state, on_host(metrics)


class History(NamedTuple):
    """Three steps on four devices.

    Attributes:
      states: states on the host, before the first step and after each.
      metrics: metrics of each step.
      compilations: number of compilations during each step.
      last: the last state, on the devices.
      donated: for each leaf of the last step's input state, whether its memory was taken.
      initial: the run's initial state, after all steps.
    """

    states: list
    metrics: list
    compilations: list
    last: object
    donated: list
    initial: object


@pytest.fixture(scope='module')
def history():
    if jax.local_device_count() < 4 and jax.default_backend() != 'cpu':
        pytest.skip('needs four devices')
    compiled = []

    def listen(event, *_, **__):
        if event == '/jax/core/compile/backend_compile_duration':
            compiled.append(event)

    case = make_case(make_byol(AXIS))
    states, metrics, compilations = [on_host(case.initial)], [], []
    state = replicate(case.initial)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for step in range(3):
            batch = shard_batch(make_batch(step), 4)
            compiled.clear()
            given = state
            state, device_metrics = case.step(given, batch)
            metrics.append(on_host(device_metrics))
            compilations.append(len(compiled))
            states.append(on_host(state))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    donated = [leaf.is_deleted() for leaf in jax.tree.leaves(given)]
    return History(states, metrics, compilations, state, donated, case.initial)


def assert_trees_close(actual, expected, rtol, atol):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, e, rtol, atol, err_msg=jax.tree_util.keystr(path))


def assert_metrics_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = SPREAD if name == 'feature_std' else ORDER_OF_SUMS
        np.testing.assert_allclose(actual[name], value, **tolerance, err_msg=name)


@pytest.mark.parametrize('devices', [1, 2])
def test_the_number_of_devices_does_not_matter(history, devices):
    """One, two and four devices make the same state and metrics from a batch, statistics too."""
    case = make_case(make_byol(AXIS))
    state, metrics = run_step(case, on_host(case.initial), 0, devices)
    assert_trees_close(on_host(state), history.states[1], **ORDER_OF_SUMS)
    assert_metrics_close(metrics, history.metrics[0])


def test_every_device_holds_the_same_state(history):
    """After three steps, the copies on the four devices are equal bit for bit."""
    for leaf in jax.tree.leaves(history.last):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == 3
        for other in others:
            np.testing.assert_array_equal(other, first)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def norm_of(tree):
    return math.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def reference_lars(params, gradients, momentum, rate):
    """One float64 step of LARS, (updates, momentum): only kernels are adapted."""

    def one(path, w, g, m):
        if path[-1].key == 'kernel':
            g = g + WEIGHT_DECAY * w
            g = g * 1e-3 * np.linalg.norm(w) / np.linalg.norm(g)
        return 0.9 * m + g

    momentum = jax.tree_util.tree_map_with_path(one, params, gradients, momentum)
    return jax.tree.map(lambda m: -rate * m, momentum), momentum


def test_three_steps_match_an_independent_composition(history):
    """Three steps equal gradient, LARS, schedule and moving average, composed here in float64."""
    byol = make_byol(axis_name=None)
    value_and_grad = jax.jit(jax.value_and_grad(byol.loss, has_aux=True))
    first = history.states[0]
    online, target = double((first.online_params, first.target_params))
    online_stats, target_stats = first.online_stats, first.target_stats
    momentum = jax.tree.map(np.zeros_like, online)
    for step in range(3):
        batch = make_batch(step)
        (loss, outputs), gradients = value_and_grad(
            *jax.tree.map(jnp.float32, (online, target)), online_stats, target_stats, batch
        )
        online_stats, target_stats = outputs.stats, outputs.target_stats
        projections = np.concatenate(outputs.features['projection'])
        rate = PEAK * (1 + math.cos(math.pi * step / TOTAL_STEPS)) / 2
        tau = 1 - (1 - TAU_BASE) * (math.cos(math.pi * step / TOTAL_STEPS) + 1) / 2
        gradients = double(gradients)
        updates, momentum = reference_lars(online, gradients, momentum, rate)
        online = jax.tree.map(np.add, online, updates)
        theta = {part: online[part] for part in target}
        target = jax.tree.map(lambda xi, t, tau=tau: tau * xi + (1 - tau) * t, target, theta)
        unit = projections / np.linalg.norm(projections, axis=1, keepdims=True)

        state = history.states[step + 1]
        close = {'rtol': 1e-4, 'atol': 5e-6}
        assert state.step == step + 1
        assert_trees_close(state.online_params, online, **close)
        assert_trees_close(state.target_params, target, **close)
        assert_trees_close(state.online_stats, on_host(online_stats), **close)
        assert_trees_close(state.target_stats, on_host(target_stats), **close)
        trace = optax.tree.get(state.optimizer, 'trace')
        assert_trees_close(trace, momentum, rtol=1e-3, atol=5e-5)
        expected = {
            'loss': loss,
            'learning_rate': rate,
            'tau': tau,
            'feature_std': np.asarray(unit, np.float64).std(axis=0).mean(),
            'gradient_norm': norm_of(gradients),
            'update_norm': norm_of(updates),
        }
        assert history.metrics[step] == pytest.approx(jax.tree.map(float, expected), rel=1e-4)


def test_target_follows_the_updated_online_network(history):
    """The moving average uses the new online parameters and the tau of this step."""
    for step in range(3):
        before, after = history.states[step : step + 2]
        tau = 1 - (1 - TAU_BASE) * (math.cos(math.pi * step / TOTAL_STEPS) + 1) / 2
        assert history.metrics[step]['tau'] == pytest.approx(tau, abs=1e-6)
        theta = double({part: after.online_params[part] for part in before.target_params})
        expected = jax.tree.map(
            lambda xi, t, tau=tau: tau * xi + (1 - tau) * t, double(before.target_params), theta
        )
        assert_trees_close(after.target_params, expected, rtol=1e-6, atol=1e-7)


def test_metrics_are_float32_scalars(history):
    """A log line gets one float32 number of each metric."""
    for value in history.metrics[0].values():
        assert value.shape == ()
        assert value.dtype == np.float32
    assert 0 < history.metrics[0]['loss'] < 8


def test_later_steps_are_not_compiled_again(history):
    """Only the first step compiles: a replicated state has the layout that the step returns."""
    assert history.compilations[0] >= 1
    assert history.compilations[1:] == [0, 0]


def test_the_initial_state_survives_donation(history):
    """Steps on a replicated copy do not change the run's initial state."""
    for actual, expected in zip(
        jax.tree.leaves(history.initial), jax.tree.leaves(history.states[0]), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(actual), expected)


def test_the_state_is_donated(history):
    """A step takes over the memory of its input state."""
    assert all(history.donated)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='others may always take it')
def test_the_state_is_kept_with_a_compilation_cache(tmp_path):
    """With JAX's compilation cache, a CPU step does not take the state's memory: that can crash."""
    given = everywhere(np.arange(4.0))
    jax.config.update('jax_compilation_cache_dir', str(tmp_path))
    try:
        step = pmap_step(lambda state, batch: (state + 1, jax.lax.pmean(batch, AXIS)))
    finally:
        jax.config.update('jax_compilation_cache_dir', None)
    jax.block_until_ready(step(given, np.zeros(jax.local_device_count())))
    assert not given.is_deleted()


def test_shard_batch_gives_each_device_a_block():
    """Device d of D gets the d-th block of the batch, in order."""
    sharded = shard_batch({'view1': np.arange(24).reshape(8, 3)}, 4)
    np.testing.assert_array_equal(sharded['view1'][1], [[6, 7, 8], [9, 10, 11]])


class Watching(nn.Module):
    """A layer without normalisation that keeps an unused running mean."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(5, name='fc')(x.mean(axis=(1, 2)))
        mean = self.variable('batch_stats', 'mean', jnp.zeros, 5)
        if train:
            mean.value = 0.9 * mean.value + 0.1 * x.mean(axis=0)
        return Keep(name='out')(x)


class Keep(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(x)


class Head(nn.Module):
    """A projector or predictor without batch normalisation."""

    output_size: int = 4

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(self.output_size, name='out')(jnp.tanh(nn.Dense(6, name='hidden')(x)))


@pytest.fixture(scope='module')
def accumulated():
    """[(initial state, states and metrics of two steps)] with 1 and with 4 microbatches a batch."""
    runs = []
    for passes in (1, 4):
        byol = Byol(TappedEncoder(Watching(), 'out'), Head(), Head(), MEAN, STD)
        case = make_case(byol, accumulate_steps=passes)
        steps, state = [], on_host(case.initial)
        for step in range(2):
            state, metrics = run_step(case, state, step, devices=1)
            steps.append((on_host(state), metrics))
        runs.append((on_host(case.initial), steps))
    return runs


def test_accumulation_equals_the_large_batch(accumulated):
    """Without batch normalisation, four microbatches equal the whole batch."""
    (_, whole), (_, quarters) = accumulated
    for (expected, expected_metrics), (actual, metrics) in zip(whole, quarters, strict=True):
        assert_trees_close(actual.online_params, expected.online_params, **ORDER_OF_SUMS)
        assert_trees_close(actual.target_params, expected.target_params, **ORDER_OF_SUMS)
        assert_trees_close(actual.optimizer, expected.optimizer, **ORDER_OF_SUMS)
        assert_metrics_close(metrics, expected_metrics)


def test_accumulation_moves_step_schedule_and_target_once(accumulated):
    """Four microbatches are one step of the counter, the learning rate and the moving average."""
    _, (initial, steps) = accumulated
    before = initial
    for step, (after, metrics) in enumerate(steps):
        assert after.step == step + 1
        share = (1 + math.cos(math.pi * step / TOTAL_STEPS)) / 2
        assert metrics['learning_rate'] == pytest.approx(PEAK * share, rel=1e-6)
        tau = 1 - (1 - TAU_BASE) * share
        expected = jax.tree.map(
            lambda xi, t, tau=tau: tau * xi + (1 - tau) * t,
            double(before.target_params),
            double({part: after.online_params[part] for part in before.target_params}),
        )
        assert_trees_close(after.target_params, expected, rtol=1e-6, atol=1e-7)
        before = after


def test_accumulation_moves_statistics_with_every_pass(accumulated):
    """Running statistics see every microbatch: view 1, then view 2, in order."""
    _, (initial, steps) = accumulated
    batch = make_batch(0)
    for network in ('online', 'target'):
        fc = double(getattr(initial, f'{network}_params')['encoder']['fc'])
        mean = np.zeros(5)
        for quarter in range(4):
            for view in ('view1', 'view2'):
                images = batch[view][quarter * BATCH // 4 : (quarter + 1) * BATCH // 4]
                colours = ((images / 255 - np.array(MEAN)) / np.array(STD)).mean(axis=(1, 2))
                y = colours @ fc['kernel'] + fc['bias']
                mean = 0.9 * mean + 0.1 * y.mean(axis=0)
        stats = getattr(steps[0][0], f'{network}_stats')
        actual = stats['encoder']['batch_stats']['mean']
        np.testing.assert_allclose(actual, mean, rtol=1e-4, atol=1e-6)


def test_update_target():
    """xi <- tau xi + (1 - tau) theta over encoder and projector; the predictor has no target."""
    rng = np.random.default_rng(3)
    target = {'encoder': {'w': rng.normal(size=(3, 2))}, 'projector': {'b': rng.normal(size=4)}}
    online = jax.tree.map(lambda x: rng.normal(size=x.shape), target)
    online['predictor'] = {'w': rng.normal(size=2)}
    actual = update_target(
        jax.tree.map(jnp.float32, target), jax.tree.map(jnp.float32, online), jnp.float32(0.97)
    )
    expected = {
        'encoder': {'w': 0.97 * target['encoder']['w'] + 0.03 * online['encoder']['w']},
        'projector': {'b': 0.97 * target['projector']['b'] + 0.03 * online['projector']['b']},
    }
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('tau', [0.0, 1.0])
def test_update_target_ends(tau):
    """tau = 1 keeps the target bit for bit, and tau = 0 makes it the online network."""
    rng = np.random.default_rng(4)
    target, online = ({'encoder': {'w': rng.normal(size=9).astype(np.float32)}} for _ in range(2))
    actual = update_target(target, online, jnp.float32(tau))['encoder']['w']
    if tau == 1:
        np.testing.assert_array_equal(actual, target['encoder']['w'])
    else:
        np.testing.assert_allclose(actual, online['encoder']['w'], rtol=1e-6, atol=1e-7)


def test_feature_std_of_random_directions():
    """Projections in random directions have a feature std near 1 / sqrt(P), for any lengths."""
    rng = np.random.default_rng(5)
    z = rng.normal(size=(8192, 64)) * rng.uniform(0.1, 10, (8192, 1))
    assert float(feature_std(jnp.asarray(z, jnp.float32))) == pytest.approx(1 / 8, rel=0.01)


def test_feature_std_matches_numpy():
    """It is the population std of unit rows, averaged over channels."""
    z = np.random.default_rng(6).normal(1, 1, (50, 7))
    expected = (z / np.linalg.norm(z, axis=-1, keepdims=True)).std(axis=0).mean()
    assert float(feature_std(jnp.asarray(z, jnp.float32))) == pytest.approx(expected, rel=1e-5)


def test_feature_std_of_collapsed_projections():
    """Equal directions, even with different lengths, have a feature std of 0."""
    row = np.random.default_rng(7).normal(size=(1, 64))
    z = row * np.linspace(0.1, 10, 100)[:, None]
    assert float(feature_std(jnp.asarray(z, jnp.float32))) < 1e-4
