"""Layers of a user's own network in Flax's transformations: remat, jit and scan."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apis import CLOSE, LINEN, NNX, assert_close, at, call
from network_steps import IMAGES, SHAPE, by_path, features_of, quick_jit

from byol_jax.models.tap import TappedEncoder

# Under nn.jit, masks are drawn with other keys.
TRANSFORMED = [
    pytest.param(LINEN, 'remat', 0.2, id='linen-remat'),
    pytest.param(LINEN, 'jit', 0.0, id='linen-jit', marks=pytest.mark.slow),
    pytest.param(NNX, 'remat', 0.2, id='nnx-remat'),
    pytest.param(NNX, 'jit', 0.2, id='nnx-jit', marks=pytest.mark.slow),
]
BLOCK = {LINEN: 'block', NNX: 'blocks/'}


@pytest.mark.parametrize(('api', 'transformation', 'rate'), TRANSFORMED)
def test_transformed_blocks(api, transformation, rate):
    """Features, gradients and statistics of a block under remat or jit equal the plain block's."""
    block = BLOCK[api]
    plain, variables = api.tap('Blocks', f'{block}1', rate=rate)
    module = api.network('Blocks', transformation=transformation, rate=rate)
    # NNX's transformations of a method hide the layers inside.
    inside = [f'{block}1/bn'] if api is LINEN else []
    for layer in (f'{block}0', f'{block}1', *inside):
        assert TappedEncoder(module, layer).check(SHAPE).shape == (4, 6)

    def results(tapped, variables):
        def f(params):
            trees = {**variables, 'params': params}
            features, state = tapped.apply(trees, IMAGES, True, jax.random.key(1))
            return jnp.sum(features * jnp.arange(1, 7)), (features, state)

        return jax.value_and_grad(f, has_aux=True)(variables['params'])

    wrapped = dataclasses.replace(plain, module=module)
    actual, expected = quick_jit(lambda v: (results(wrapped, v), results(plain, v)))(variables)
    assert_close(actual, expected, 1e-4, 1e-4)


BLOCK_OF_ROUND = {LINEN: 'blocks/block', NNX: 'blocks'}


def scanned_by_hand(api, variables, images):
    """The three rounds of `Scanned`, one by one, in evaluation."""
    x = call(nn.Dense(6), variables, 'stem', images.mean(axis=(1, 2)))
    for i in range(3):
        one = {
            kind: jax.tree.map(lambda leaf, i=i: leaf[i], at(tree, BLOCK_OF_ROUND[api]))
            for kind, tree in variables.items()
        }
        x = nn.relu(call(nn.BatchNorm(True), one, 'bn', call(nn.Dense(6), one, 'fc', x)))
    return x


NOTING = [
    pytest.param(LINEN, {}, id='linen'),
    pytest.param(LINEN, {'noting': True}, id='linen-noting', marks=pytest.mark.slow),
    pytest.param(NNX, {}, id='nnx'),
]


@pytest.mark.parametrize(('api', 'kwargs'), NOTING)
def test_a_scan(api, kwargs):
    """A layer after a scan can be tapped; each round draws and keeps statistics separately."""
    tapped, variables = api.tap('Scanned', 'after', **kwargs)
    tapped.check(SHAPE)
    features, _ = features_of(tapped, variables)
    expected = quick_jit(lambda v, x: scanned_by_hand(api, v, x))(variables, IMAGES)
    np.testing.assert_allclose(features, expected, **CLOSE)
    one, state = features_of(tapped, variables, train=True, seed=0)
    two, _ = features_of(tapped, variables, train=True, seed=1)
    assert np.any(one != two)
    for path, leaf in by_path(state).items():
        old = by_path(variables)[path]
        assert leaf.shape == old.shape == (3, 6)
        assert np.all(np.any(leaf != old, axis=1)), path


@pytest.mark.xfail(strict=True, reason='outputs of nn.scan are not noted, or are noted stacked')
@pytest.mark.parametrize('noting', [False, True])
def test_the_output_of_a_scan(noting):
    """The output of nn.scan itself can be tapped: its carry is the first element."""
    tapped, variables = LINEN.tap('Scanned', 'blocks.0', noting=noting)
    assert tapped.check(SHAPE).shape == (4, 6)
    features, _ = features_of(tapped, variables)
    np.testing.assert_allclose(features, scanned_by_hand(LINEN, variables, IMAGES), **CLOSE)


SYNCHRONISED = [
    pytest.param(LINEN, 'Blocks', {'transformation': 'remat'}, id='linen-remat'),
    pytest.param(LINEN, 'Blocks', {'transformation': 'jit'}, id='linen-jit'),
    pytest.param(LINEN, 'Scanned', {}, id='linen-scan'),
    pytest.param(
        NNX, 'Blocks', {'transformation': 'remat'}, id='nnx-remat', marks=pytest.mark.slow
    ),
    pytest.param(NNX, 'Scanned', {}, id='nnx-scan'),
    pytest.param(NNX, 'Functional', {}, id='nnx-functional'),
]


@pytest.mark.parametrize(('api', 'network', 'kwargs'), SYNCHRONISED)
def test_norms_inside_transformations_are_synchronised(api, network, kwargs):
    """A norm inside remat, jit or a scan also sees the batch of all devices."""
    tapped, variables = api.tap(network, 'output', axis_name='devices', rate=0.0, **kwargs)
    alone = dataclasses.replace(tapped, axis_name=None)
    key = jax.random.key(0)

    @quick_jit
    def both_ways(variables, images):
        apply = jax.vmap(lambda x: tapped.apply(variables, x, True, key), axis_name='devices')
        shares = apply(images.reshape(2, 2, *images.shape[1:]))
        return shares, alone.apply(variables, images, True, key)

    (features, state), (whole, moved) = both_ways(variables, IMAGES)
    np.testing.assert_allclose(features.reshape(whole.shape), whole, 1e-3, 1e-4)
    twice = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), moved)
    assert_close(state, twice, 1e-5, 1e-5)
