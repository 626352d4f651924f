"""Training steps of a user's own networks on several devices."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apis import LINEN, NNX, assert_close, assert_same, call
from network_steps import (
    BATCH,
    IMAGES,
    as_trained,
    by_path,
    encoder_of,
    make_batch,
    make_case,
    normalised,
    quick_jit,
    small_config,
)
from own_networks import ConvNet, Everything

from byol_jax.training.step import shard_batch

# Steps on simulated devices can deadlock: each is awaited, with a time limit.
pytestmark = pytest.mark.timeout(120)

FROZEN = {'params/conv/kernel', 'params/conv/bias'}
HEAD = {'params/head/kernel', 'params/head/bias'}


@pytest.fixture(scope='module', params=[LINEN, NNX], ids=['linen', 'nnx'])
def everything(request):
    """Three steps of `Everything` on four devices, two microbatches: (api, case, states, again).

    `again` is the first step, made a second time from the same state.
    """
    api = request.param
    config = small_config(
        api.path('Everything'), 'features', accumulate_steps=2, encoder__frozen=('conv',)
    )
    case = make_case(config, devices=4)
    return api, case, [case.initial, *case.run(3)], case.run(1)[0]


def passes_by_hand(case, network, peak):
    """Norms and peak of a network's encoder after the first step, with Flax's layers alone.

    Each microbatch of each view has half of every device's share; its norms see all of it.
    """
    params = getattr(case.initial, f'{network}_params')['encoder']
    stats = getattr(case.initial, f'{network}_stats')['encoder']
    shares = {view: x.reshape(4, 2, BATCH // 8, 8, 8, 3) for view, x in make_batch(0).items()}
    passes = [
        np.float32(normalised(case.byol, shares[view][:, number].reshape(-1, 8, 8, 3)))
        for number in range(2)
        for view in ('view1', 'view2')
    ]
    return _statistics(params, stats['batch_stats'], stats[peak]['peak'], passes)


@quick_jit
def _statistics(params, norms, peak, passes):
    norm = nn.BatchNorm(use_running_average=False, momentum=0.9)

    def normed(x, name):
        variables = {'params': params[name], 'batch_stats': norms[name]}
        y, changed = norm.apply(variables, x, mutable=['batch_stats'])
        norms[name] = changed['batch_stats']
        return y

    peaks = jnp.tile(peak, (4, 1))
    for images in passes:
        x = call(nn.Conv(4, (3, 3), strides=2), {'params': params}, 'conv', images)
        x = nn.relu(normed(x, 'norm')).mean(axis=(1, 2))
        x = normed(call(nn.Dense(6), {'params': params}, 'fc', x), 'bn')
        peaks = 0.5 * peaks + 0.5 * x.reshape(4, -1, 6).max(axis=1)
    return norms, peaks.mean(axis=0)


PEAK = {LINEN: 'own', NNX: 'peak'}


@pytest.mark.parametrize('network', ['online', 'target'])
def test_statistics_after_a_step(everything, network):
    """BatchNorm sees the batch of all devices; other statistics are averaged over them."""
    api, case, states, _ = everything
    norms, peak = passes_by_hand(case, network, PEAK[api])
    stats = getattr(states[1], f'{network}_stats')['encoder']
    assert_close(stats['batch_stats'], norms, 1e-6, 1e-6)
    np.testing.assert_allclose(stats[PEAK[api]]['peak'], peak, rtol=1e-4, atol=1e-5)
    assert Everything().norm.axis_name is None


def test_every_device_holds_the_same_state(everything):
    """After a step, parameters and statistics are equal on all devices bit for bit."""
    _, case, states, _ = everything
    state, _ = case.step(states[1], shard_batch(make_batch(1), 4))
    for leaf in jax.tree.leaves(state):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == 3
        for other in others:
            np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize('network', ['online', 'target'])
def test_frozen_layers_and_those_behind_stay_bit_for_bit(everything, network):
    """Three steps with strong weight decay change all parameters but the frozen and the head's."""
    _, case, states, _ = everything
    assert case.byol.encoder.frozen == FROZEN
    assert case.byol.encoder.behind == HEAD
    first, *later = (encoder_of(state, network) for state in states)
    for state in later:
        for path, leaf in state.items():
            same = np.array_equal(leaf, first[path])
            assert same == (path in FROZEN | HEAD), path


def masks_of(state, network):
    """[microbatch, stream, unit]: means over devices of the masks of a step's four passes."""
    return getattr(state, f'{network}_stats')['encoder']['seen']['masks']


def test_every_pass_draws_for_itself(everything):
    """Devices, microbatches, views, networks, streams and steps all have their own masks."""
    _, _, states, _ = everything
    drawn = [masks_of(state, network) for state in states[1:] for network in ('online', 'target')]
    rows = np.concatenate(drawn).reshape(-1, 32)
    assert len(np.unique(rows, axis=0)) == len(rows) == 3 * 2 * 4 * 2
    # A mean other than 0 and 1 comes from devices that differ.
    assert np.all(np.any((rows > 0) & (rows < 1), axis=1))


def test_a_step_repeats_itself_bit_for_bit(everything):
    """The same state and batch give the same state, whatever was drawn in between."""
    _, _, states, again = everything
    assert_same(again, states[1])


@pytest.mark.slow
def test_another_seed_draws_otherwise(everything):
    """From the same state and batch, another seed draws other masks."""
    api, case, states, _ = everything
    config = small_config(api.path('Everything'), 'features', accumulate_steps=2, seed=1)
    other = make_case(config, devices=4)
    assert_same(other.initial.online_params, case.initial.online_params)
    state = other.run(1, states[0])[0]
    for network in ('online', 'target'):
        assert np.any(masks_of(state, network) != masks_of(states[1], network))


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'lars'])
def test_freeze_steps(optimizer):
    """The encoder keeps its bits for encoder.freeze_steps real steps, and then changes."""
    config = small_config(
        'Mlp', 'hidden2', optimizer__name=optimizer, encoder__freeze_steps=2, total_steps=6
    )
    config.optimizer.base_learning_rate = 0.1
    case = make_case(config, devices=2)
    states = [case.initial, *case.run(4)]
    trained = {f'params/hidden{i}/{leaf}' for i in (1, 2) for leaf in ('kernel', 'bias')}
    for before, after in itertools.pairwise(states):
        held = before.step < 2
        for network in ('online', 'target'):
            old, new = encoder_of(before, network), encoder_of(after, network)
            moved = {path for path in old if not np.array_equal(old[path], new[path])}
            # A bias before a norm has no gradient except rounding.
            assert not moved if held else moved | {'params/hidden2/bias'} == trained
        for part in ('projector', 'predictor'):
            old, new = by_path(before.online_params[part]), by_path(after.online_params[part])
            assert all(np.any(old[path] != new[path]) for path in old if 'kernel' in path)


def test_as_trained_leaves_nothing_at_its_first_value():
    """The variables of these tests tell scale from bias and mean from variance."""
    variables = as_trained(jax.eval_shape(ConvNet().init, jax.random.key(0), IMAGES))
    for path, leaf in by_path(variables).items():
        assert not np.any((leaf == 0) | (leaf == 1)), path
