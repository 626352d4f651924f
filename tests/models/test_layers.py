"""LayerNorm, dropout and stochastic depth: alone, in a ViT and in a ConvNeXt."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_reference import (
    as_type,
    dropped,
    random_variables,
    run,
    types,
)
from layer_reference import layer_norm as reference_norm

from byol_jax.models.convnext import ConvNeXt
from byol_jax.models.layers import DropPathRates, layer_norm
from byol_jax.models.vit import ViT

NETWORKS = {
    'vit': (ViT, {'width': 8, 'depth': 2, 'heads': 2, 'patch_size': 4}),
    'convnext': (ConvNeXt, {'depths': (1, 2), 'channels': (4, 6)}),
}


def network(name, **kwargs):
    """A tiny network and random float32 weights for it."""
    build, arguments = NETWORKS[name]
    module = build(**arguments | kwargs)
    return module, as_type(random_variables(module, 8, 8), 'float32')


def images(batch):
    return jax.random.normal(jax.random.key(1), (batch, 8, 8, 3))


@pytest.mark.parametrize('mean', [0, 1000])
def test_norm_does_not_cancel(mean):
    """LayerNorm keeps its precision if all channels are far from 0."""
    rng = np.random.default_rng(0)
    x = (mean + rng.normal(size=(50, 16))).astype(np.float32)
    params = {'scale': rng.uniform(0.5, 1.5, 16), 'bias': rng.normal(size=16)}
    actual = layer_norm('norm').apply({'params': as_type(params, 'float32')}, x)
    np.testing.assert_allclose(
        actual, reference_norm(params, np.float64(x)), atol=1e-3 if mean else 1e-5
    )


def test_rates_rise_linearly():
    """Stochastic depth's rates go from 0 at the first block to the given one at the last."""
    assert tuple(DropPathRates(0.0, 3)) == (0, 0, 0)
    assert tuple(DropPathRates(0.5, 1)) == (0,)
    for depth in (2, 4, 12, 17):
        rates, expected = DropPathRates(0.3, depth), np.linspace(0, 0.3, depth)
        np.testing.assert_array_equal(rates, expected)
        np.testing.assert_array_equal(rates[1:][:3], expected[1:4])
    assert DropPathRates(0.3, 10**30)[1:][0] == pytest.approx(3e-31)
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f'drop_path={wrong}'):
            DropPathRates(wrong, 4)


def test_drop_path_in_a_vit():
    """A branch is dropped for a whole example, or scaled, at its block's rate, twice in a block."""
    module, variables = network('vit', depth=3, drop_path=0.5)
    x = images(4000)
    _, found = run(module, variables, x, train=True, seed=0)
    before, drops = found['block1'], []
    assert not [path for path in found if path.startswith('block1/drop')]
    for block, rate in (('block2', 0.25), ('block3', 0.5)):
        first, second = (found[f'{block}/drop_path{i}'] for i in (1, 2))
        drops.append(dropped(found[f'{block}/attention'], first, rate))
        drops.append(dropped(found[f'{block}/mlp'], second, rate))
        assert [drop.mean() for drop in drops[-2:]] == pytest.approx([rate] * 2, abs=0.03)
        np.testing.assert_allclose(found[block], before + first + second, rtol=1e-5, atol=1e-5)
        before = found[block]
    # Four independent draws.
    assert np.abs(np.corrcoef(drops) - np.eye(4)).max() < 0.06


def test_drop_path_in_a_convnext():
    """A branch is dropped for a whole example, or scaled, at a rate that rises over all stages."""
    module, variables = network('convnext', drop_path=0.5)
    _, found = run(module, variables, images(4000), train=True, seed=0)
    assert 'stage1/block1/drop_path' not in found
    before = found['stage2/downsample_conv']
    for block, rate in (('stage2/block1', 0.25), ('stage2/block2', 0.5)):
        gamma = variables['params']['stage2'][block.removeprefix('stage2/')]['gamma']
        branch = found[f'{block}/pwconv2'] * np.asarray(gamma)
        gone = dropped(branch, found[f'{block}/drop_path'], rate)
        assert gone.mean() == pytest.approx(rate, abs=0.03)
        np.testing.assert_allclose(
            found[block], before + found[f'{block}/drop_path'], rtol=1e-5, atol=1e-5
        )
        before = found[block]


def test_dropout_in_a_vit():
    """Dropout follows the positions and every linear layer except query, key and value."""
    module, variables = network('vit', dropout=0.25)
    _, found = run(module, variables, images(200), train=True, seed=0)
    inside = ('attention/drop', 'mlp/drop1', 'mlp/drop2')
    names = {'drop', *(f'block{i}/{name}' for i in (1, 2) for name in inside)}
    assert {path for path in found if 'drop' in path} == names
    for name in names:
        assert np.mean(found[name] == 0) == pytest.approx(0.25, abs=0.03)
    out, after = found['block1/attention/out'], found['block1/attention/drop']
    np.testing.assert_allclose(after[after != 0], out[after != 0] / 0.75, rtol=1e-5)


@pytest.mark.parametrize('name', NETWORKS)
def test_evaluation_draws_nothing(name):
    """In evaluation, the default, rates change nothing and need no random numbers."""
    module, variables = network(name, drop_path=0.5)
    plain = network(name)[0]
    expected = run(plain, variables, images(9))[0]
    np.testing.assert_array_equal(run(module, variables, images(9))[0], expected)
    # Training needs none either if the rates are 0.
    np.testing.assert_array_equal(run(plain, variables, images(9), train=True)[0], expected)


@pytest.mark.parametrize('name', NETWORKS)
def test_training_draws_from_the_seed(name):
    """In training, one seed gives one result, another seed another, and neither is an error."""
    module, variables = network(name, drop_path=0.5)
    first, same, other = (run(module, variables, images(9), True, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert np.any(first != other)
    with pytest.raises(flax.errors.InvalidRngError):
        run(module, variables, images(9), True)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('vit', {'dropout': 0.1}),
        ('vit', {'class_token': False}),
        ('vit', {'learned_position': True}),
        ('convnext', {}),
    ],
)
def test_bfloat16_stays(name, kwargs, train):
    """bfloat16 weights and pictures give bfloat16 in every layer, without float32 products."""
    module, variables = network(name, drop_path=0.5, num_classes=3, **kwargs)
    layers, products = types(module, *as_type((variables, images(2)), jnp.bfloat16), train)
    assert len(layers) > 15
    assert {path for path, kind in layers.items() if kind != jnp.bfloat16} == set()
    assert len(products) > 12
    assert set(products) == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize('name', NETWORKS)
def test_bfloat16_is_near(name):
    """The output in bfloat16, with 8 binary digits, is within a few hundredths of float32's."""
    module, variables = network(name)
    exact = run(module, variables, images(9))[0]
    near = run(module, *as_type((variables, images(9)), jnp.bfloat16))[0]
    np.testing.assert_allclose(np.float32(near), exact, atol=0.05 * np.abs(exact).max())
