"""Any Flax network: what `encoder.name` and `encoder.hidden_layer` promise for a user's own."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apis import (
    CLOSE,
    LINEN,
    NNX,
    assert_close,
    assert_same,
    both,
    call,
    dense,
    normed,
    of_both,
)
from network_steps import IMAGES, SHAPE, features_of, make_method, quick_jit, small_config
from packed import PACKED

from byol_jax.errors import UserError
from byol_jax.models.tap import TappedEncoder

MEANS = IMAGES.mean(axis=(1, 2))


def features_at(tapped, layer, variables):
    """Features of another layer of a tapped network, in evaluation."""
    return features_of(dataclasses.replace(tapped, hidden_layer=layer), variables)[0]


# Values at the tap.


CONV_NET = {
    LINEN: [('conv1', 'norm1'), ('conv2', 'norm2')],
    NNX: [(f'stages/{i}/layers/0', f'stages/{i}/layers/1') for i in (0, 1)],
}


def conv_net_by_hand(variables, x, names, norm):
    """(output before the last ReLU, output of the network) in evaluation."""
    for width, (conv_name, norm_name) in zip((4, 8), names, strict=True):
        x = call(nn.Conv(width, (3, 3), strides=2), variables, conv_name, x)
        if norm == 'batch':
            x = call(nn.BatchNorm(use_running_average=True), variables, norm_name, x)
        elif norm == 'group':
            x = call(nn.GroupNorm(2), variables, norm_name, x)
        before, x = x, nn.relu(x)
    return before, call(nn.Dense(3), variables, 'head', x.mean(axis=(1, 2)))


@both
@pytest.mark.parametrize('norm', ['batch', 'group', 'none'])
def test_a_convnet(api, norm):
    """A convnet's features, for any norm, equal those of its layers called one by one."""
    names = CONV_NET[api]
    layer = names[1][0] if norm == 'none' else names[1][1]
    tapped, variables = api.tap('ConvNet', layer, norm=norm)
    assert tapped.check(SHAPE).shape == (4, 2, 2, 8)
    by_hand = quick_jit(lambda v, x: conv_net_by_hand(v, x, names, norm))
    hidden, output = by_hand(variables, IMAGES)
    features, _ = features_of(tapped, variables)
    np.testing.assert_allclose(features, hidden.mean(axis=(1, 2)), **CLOSE)
    np.testing.assert_allclose(features_at(tapped, 'output', variables), output, **CLOSE)


# A block, its two dense layers, and the width between them.
TOKEN_NET = {
    LINEN: ('block0', 'fc1', 'fc2', 8),
    NNX: ('blocks/0', 'mlp/layers/0', 'mlp/layers/2', 12),
}


def tokens_of(api, variables):
    """Outputs [B, tokens, D] of the network's block, from its layers called one by one."""
    block, fc1, fc2, width = TOKEN_NET[api]

    @quick_jit
    def by_hand(variables, x):
        params = variables['params']
        x = call(nn.Conv(6, (4, 4), strides=4), variables, 'patches', x).reshape(len(x), -1, 6)
        x = jnp.concatenate([jnp.tile(params['cls'], (len(x), 1, 1)), x], axis=1)
        x = x + params['positions']
        y = call(nn.LayerNorm(), variables, f'{block}/norm1', x)
        x = x + call(nn.MultiHeadDotProductAttention(2), variables, f'{block}/attention', y, y)
        y = call(nn.LayerNorm(), variables, f'{block}/norm2', x)
        y = nn.gelu(call(nn.Dense(width), variables, f'{block}/{fc1}', y))
        return x + call(nn.Dense(6), variables, f'{block}/{fc2}', y)

    return np.asarray(by_hand(variables, IMAGES))


@both
def test_tokens_and_their_pools(api):
    """Tokens [B, N, D] are averaged, or the first is taken, or all are concatenated."""
    tapped, variables = api.tap('TokenNet', TOKEN_NET[api][0])
    assert tapped.check(SHAPE).shape == (4, 5, 6)
    tokens = tokens_of(api, variables)
    expected = {'mean': tokens.mean(axis=1), 'cls': tokens[:, 0], 'flatten': tokens.reshape(4, -1)}
    for pool, value in expected.items():
        features, _ = features_of(dataclasses.replace(tapped, pool=pool), variables)
        np.testing.assert_allclose(features, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('api', 'pool', 'size'), [(LINEN, 'cls', 6), (NNX, 'flatten', 30)])
def test_the_projector_takes_the_features_as_they_are(api, pool, size):
    """The projector has the right input size: D, or N x D with 'flatten'."""
    byol = make_method(small_config(api.path('TokenNet'), TOKEN_NET[api][0], encoder__pool=pool))
    params, _ = jax.eval_shape(lambda: byol.init(jax.random.key(0), 8))
    assert params['projector']['linear1']['kernel'].shape == (size, 8)


@both
def test_an_mlp(api):
    """A network that flattens its pictures and has no modes works at any of its layers."""
    tapped, variables = api.tap('Mlp', 'hidden2')
    assert tapped.check(SHAPE).shape == (4, 6)
    x = np.maximum(dense(variables, 'hidden1', IMAGES.reshape(4, -1)), 0)
    expected = dense(variables, 'hidden2', x)
    for train in (False, True):
        features, state = features_of(tapped, variables, train=train, seed=0)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
        assert state == {}


@of_both('between', linen=['_'], nnx=['/'])
def test_layers_in_containers(api, between):
    """Layers in lists, dicts and Sequentials have the names that Flax gives them."""
    blocks, sides, layers = (f'{name}{between}' for name in ('blocks', 'sides', 'layers'))
    tapped, variables = api.tap('Containers', 'output')
    x = np.maximum(dense(variables, 'stem', MEANS), 0)
    expected = {
        'stem': dense(variables, 'stem', MEANS),
        f'{blocks}0': dense(variables, f'{blocks}0', x),
    }
    x = np.maximum(expected[f'{blocks}0'], 0)
    expected[f'{blocks}1'] = dense(variables, f'{blocks}1', x)
    x = np.maximum(expected[f'{blocks}1'], 0)
    expected[f'{sides}left'] = dense(variables, f'{sides}left', x)
    expected[f'{sides}right'] = dense(variables, f'{sides}right', x)
    x = expected[f'{sides}left'] * expected[f'{sides}right']
    first = expected[f'end/{layers}0'] = dense(variables, f'end/{layers}0', x)
    last = dense(variables, f'end/{layers}2', np.maximum(first, 0))
    expected |= {f'end/{layers}2': last, 'end': last, 'output': last}
    assert [layer.path for layer in tapped.layers(SHAPE)] == list(expected)

    @quick_jit
    def features(variables, images):
        at = lambda layer: dataclasses.replace(tapped, hidden_layer=layer)  # noqa: E731
        return {layer: at(layer).apply(variables, images, False)[0] for layer in expected}

    assert_close(features(variables, IMAGES), expected, rtol=1e-4, atol=1e-4)


@both
def test_a_layer_called_twice(api):
    """The last output of a layer that is called twice is tapped, and both calls give gradients.

    A layer with two names has the first as its path.
    """
    tapped, variables = api.tap('Twice', 'fc')
    assert [layer.path for layer in tapped.layers(SHAPE)] == ['fc', 'last', 'output']
    one = lambda x, p: x @ p['kernel'] + p['bias']  # noqa: E731
    by_hand = lambda p: one(jnp.tanh(one(MEANS, p)), p)  # noqa: E731
    apply = lambda p: tapped.apply({'params': p}, IMAGES, True)[0]  # noqa: E731

    @quick_jit
    def both_ways(params):
        total = lambda p: jnp.sum(apply(p) ** 2)  # noqa: E731
        total_by_hand = lambda p: jnp.sum(by_hand(p['fc']) ** 2)  # noqa: E731
        ours = apply(params), jax.grad(total)(params)
        return ours, (by_hand(params['fc']), jax.grad(total_by_hand)(params))

    (features, gradient), (expected, expected_gradient) = both_ways(variables['params'])
    np.testing.assert_allclose(features, expected, **CLOSE)
    assert_close(gradient, expected_gradient, 1e-4, 1e-5)
    assert not np.any(gradient['last']['kernel'])


# How a network is told whether it trains.


@of_both(
    'kind',
    linen=['SeveralWords', 'Attribute', 'Merged', 'Both'],
    nnx=['SeveralWords', 'Methods', 'Listening'],
)
def test_however_it_is_told(api, kind):
    """In training only, statistics are the batch's and are updated, and dropout drops."""
    tapped, variables = api.tap(kind, 'drop')
    tapped.check(SHAPE)
    hidden = dense(variables, 'fc', MEANS)
    stats = variables['batch_stats']['bn']
    features, kept = features_of(tapped, variables)
    np.testing.assert_allclose(features, normed(variables, 'bn', hidden), 1e-4, 1e-5)
    assert_same(kept['batch_stats']['bn'], stats)
    features, moved = features_of(tapped, variables, train=True, seed=1)
    mean, var = hidden.mean(axis=0), hidden.var(axis=0)
    expected = {'mean': 0.9 * stats['mean'] + 0.1 * mean, 'var': 0.9 * stats['var'] + 0.1 * var}
    assert_close(moved['batch_stats']['bn'], expected, 1e-4, 1e-6)
    dropped = features == 0
    assert 0 < dropped.sum() < dropped.size
    whole = normed(variables, 'bn', hidden, mean, var)
    np.testing.assert_allclose(features[~dropped], 2 * whole[~dropped], 1e-3, 1e-4)


@both
def test_a_switch_that_is_not_about_training(api):
    """A boolean argument of unknown meaning keeps its default."""
    tapped, variables = api.tap('Flagged', 'output')
    tapped.check(SHAPE)
    x = np.float32(dense(variables, 'fc', IMAGES.reshape(4, -1, 3)))
    expected = quick_jit(lambda v, x: call(nn.LayerNorm(), v, 'norm', x).mean(axis=1))(variables, x)
    np.testing.assert_allclose(features_of(tapped, variables)[0], expected, **CLOSE)


# Random layers.


@both
def test_random_layers_draw_by_the_key_alone(api):
    """Attention dropout, and stochastic depth with its own stream, draw in training only."""
    tapped, variables = api.tap('TokenNet', TOKEN_NET[api][0], rate=0.5)
    tapped.check(SHAPE)
    still, _ = features_of(tapped, variables)
    one, two, again = (
        features_of(tapped, variables, train=True, seed=seed)[0] for seed in (1, 2, 1)
    )
    np.testing.assert_array_equal(one, again)
    for drawn, other in ((one, two), (one, still), (two, still)):
        assert not np.allclose(drawn, other)


@both
def test_every_draw_of_a_pass_is_its_own(api):
    """Draws of a stream, of two streams, of two layers, or with two keys are all different."""
    tapped, variables = api.tap('Streams', 'output')
    passes = [features_of(tapped, variables, train=True, seed=seed)[0][:, 2:] for seed in (0, 1)]
    draws = np.concatenate(passes)
    assert len(np.unique(draws)) == draws.size


@both
def test_drawing_outside_of_training_is_refused(api):
    """A network whose features would differ from call to call is refused before training."""
    with pytest.raises(UserError) as caught:
        TappedEncoder(api.network('AlwaysNoisy'), 'output').check(SHAPE)
    assert 'AlwaysNoisy draws random numbers outside of training' in str(caught.value)
    assert '`deterministic` argument' in str(caught.value)


# Variables of its own.


# The collections of its running mean, its count of passes and its constants.
STATISTICS = {
    LINEN: ('centre', 'centre', 'constants'),
    NNX: ('batch_stats', 'variable', 'variable'),
}


@both
def test_statistics_of_its_own(api):
    """Variables of any kind change by the network's own rule, in training only."""
    means, counts, constants = STATISTICS[api]
    tapped, variables = api.tap('Statistics', 'output')
    tapped.check(SHAPE)
    assert set(variables) == {'params', 'batch_stats', 'power', means, counts, constants}
    order = np.array([5, 4, 3, 2, 1, 0], np.int32)
    variables[constants]['order'] = order
    old = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    _, kept = features_of(tapped, variables)
    assert_same(kept, {name: tree for name, tree in variables.items() if name != 'params'})
    features, moved = features_of(tapped, variables, train=True)
    kernel = old['params']['kernel']
    v = kernel @ old['power']['u']
    v /= np.linalg.norm(v)
    sigma = np.linalg.norm(kernel.T @ v)
    x = normed(old, 'bn', IMAGES, IMAGES.mean(axis=(0, 1, 2)), IMAGES.var(axis=(0, 1, 2)))
    x = x.mean(axis=(1, 2)) @ kernel / sigma
    np.testing.assert_allclose(features, x[:, ::-1] - old[means]['mean'], 1e-4, 1e-5)
    np.testing.assert_allclose(moved['power']['u'], kernel.T @ v / sigma, 1e-5, 1e-6)
    mean = 0.75 * old[means]['mean'] + 0.25 * x.mean(axis=0)
    np.testing.assert_allclose(moved[means]['mean'], mean, 1e-4, 1e-6)
    assert moved[counts]['passes'] == 1
    np.testing.assert_array_equal(moved[constants]['order'], order)


@both
@pytest.mark.filterwarnings('ignore:Using .Module.sow')
def test_what_is_sown_is_no_state(api):
    """Sown values are not variables, and neither appear nor grow in training."""
    tapped, variables = api.tap('Sowing', 'output')
    tapped.check(SHAPE)
    assert set(variables) == {'params', 'batch_stats'}
    structure = jax.tree.structure(variables)
    for _ in range(3):
        _, state = features_of(tapped, variables, train=True)
        variables = {**variables, **state}
        assert jax.tree.structure(variables) == structure
    features, _ = features_of(tapped, variables)
    expected = np.maximum(dense(variables, 'fc', normed(variables, 'bn', MEANS)), 0)
    np.testing.assert_allclose(features, expected, 1e-4, 1e-5)


# Several outputs.


@both
@pytest.mark.parametrize('container', PACKED)
def test_several_outputs(api, container):
    """Each array of an output, of a layer or the network, has its index, key or field as a tap."""
    _, first, second = PACKED[container]
    tapped, variables = api.tap('Packing', 'output', container=container)
    x = dense(variables, 'block/fc1', MEANS)
    y = dense(variables, 'block/fc2', x)
    wanted = {f'{where}.{part}' for where in ('block', 'output') for part in (first, second)}
    layers = {layer.path for layer in tapped.layers(SHAPE)}
    assert layers == {'block/fc1', 'block/fc2'} | wanted
    for where in ('block', 'output'):
        for part, value in ((first, x), (second, y)):
            at = dataclasses.replace(tapped, hidden_layer=f'{where}.{part}')
            features, _ = at.apply(variables, IMAGES, False)
            np.testing.assert_allclose(features, value, 1e-4, 1e-5)


@both
def test_a_layer_called_output(api):
    """'output' taps a layer of that name, rather than the network's own output."""
    tapped, variables = api.tap('NamedOutput', 'output')
    assert tapped.check(SHAPE).shape == (4, 5)
    assert [layer.path for layer in tapped.layers(SHAPE)] == ['output', 'after']
    expected = dense(variables, 'output', MEANS)
    np.testing.assert_allclose(features_of(tapped, variables)[0], expected, 1e-4, 1e-5)
