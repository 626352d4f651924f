"""The method against float64 NumPy, written from the paper (arXiv:2006.07733, Section 3)."""

from __future__ import annotations

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from byol_jax.methods.base import l2_normalize
from byol_jax.methods.byol import Byol, regression_loss
from byol_jax.models.heads import MLP
from byol_jax.models.tap import TappedEncoder

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
SIZE = 2
BATCH = 8


class Linear(nn.Module):
    """The smallest encoder with batch normalisation: pixels -> Dense -> BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(5, name='fc')(x.reshape(len(x), -1))
        return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name='bn')(x)


def make_byol(dtype=jnp.float32):
    return Byol(TappedEncoder(Linear(), 'bn'), MLP(7, 4), MLP(12, 4), MEAN, STD, dtype)


@pytest.fixture(scope='module')
def byol():
    return make_byol()


def randomised(tree, rng):
    """The tree with every leaf changed from its initial value; variances stay positive."""

    def moved(path, x):
        noise = 0.3 * rng.normal(size=x.shape)
        return (x + (np.abs(noise) if path[-1].key == 'var' else noise)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(moved, tree)


@pytest.fixture(scope='module')
def inputs(byol):
    """Online and target parameters and statistics, all different, and two views."""
    rng = np.random.default_rng(2)
    online, stats = byol.init(jax.random.key(0), SIZE)
    parts = ('encoder', 'projector')
    online = randomised(online, rng)
    target = randomised({part: online[part] for part in parts}, rng)
    online_stats = randomised(stats, rng)
    target_stats = randomised({part: stats[part] for part in parts}, rng)
    view1, view2 = rng.integers(0, 256, (2, BATCH, SIZE, SIZE, 3), np.uint8)
    return online, target, online_stats, target_stats, {'view1': view1, 'view2': view2}


@pytest.fixture(scope='module')
def result(byol, inputs):
    """((loss, outputs), (online and target gradient))."""
    return jax.jit(jax.value_and_grad(byol.loss, (0, 1), has_aux=True))(*inputs)


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True))


def reference_norm(params, stats, x):
    """Batch normalisation in training mode; updates the running statistics in place."""
    mean, variance = x.mean(axis=0), x.var(axis=0)
    stats['mean'] = 0.9 * stats['mean'] + 0.1 * mean
    stats['var'] = 0.9 * stats['var'] + 0.1 * variance
    return (x - mean) / np.sqrt(variance + 1e-5) * params['scale'] + params['bias']


def reference_mlp(params, stats, x):
    x = x @ params['linear1']['kernel'] + params['linear1']['bias']
    x = np.maximum(reference_norm(params['bn'], stats['batch_stats']['bn'], x), 0)
    return x @ params['linear2']['kernel']


def reference_projection(params, stats, images):
    x = (images / 255 - np.array(MEAN)) / np.array(STD)
    fc = params['encoder']['fc']
    y = x.reshape(len(x), -1) @ fc['kernel'] + fc['bias']
    y = reference_norm(params['encoder']['bn'], stats['encoder']['batch_stats']['bn'], y)
    return reference_mlp(params['projector'], stats['projector'], y)


def reference_loss(online, target, online_stats, target_stats, batch):
    """The symmetric loss, and the statistics of both networks after it."""
    view1, view2 = batch['view1'], batch['view2']
    online_stats, target_stats = copy.deepcopy((online_stats, target_stats))
    predictions, targets = [], []
    for view in (view1, view2):
        z = reference_projection(online, online_stats, view)
        predictions.append(reference_mlp(online['predictor'], online_stats['predictor'], z))
    for view in (view1, view2):
        targets.append(reference_projection(target, target_stats, view))
    cosine = sum(
        np.sum(unit(q) * unit(z), axis=-1)
        for q, z in zip(predictions, reversed(targets), strict=True)
    )
    return np.mean(4 - 2 * cosine), online_stats, target_stats


@pytest.fixture(scope='module')
def exact(inputs):
    """The inputs in float64."""
    *trees, batch = inputs
    return *jax.tree.map(lambda x: np.asarray(x, np.float64), trees), batch


def assert_trees_close(actual, expected, rtol, atol):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, e, rtol, atol, err_msg=jax.tree_util.keystr(path))


def test_loss_matches_numpy(result, exact):
    """The symmetric loss is the paper's, from uint8 pixels to the number."""
    (loss, _), _ = result
    np.testing.assert_allclose(loss, reference_loss(*exact)[0], rtol=1e-5)


def test_loss_gradient_matches_numpy(result, exact):
    """The online gradient is that of the loss with fixed targets, found by central differences."""
    _, (gradient, _) = result
    online, *rest = exact
    online = copy.deepcopy(online)
    step = 1e-5
    for (path, leaf), actual in zip(
        jax.tree.leaves_with_path(online), jax.tree.leaves(gradient), strict=True
    ):
        expected = np.zeros_like(leaf)
        for index in np.ndindex(leaf.shape):
            value = leaf[index]
            leaf[index] = value + step
            high = reference_loss(online, *rest)[0]
            leaf[index] = value - step
            low = reference_loss(online, *rest)[0]
            leaf[index] = value
            expected[index] = (high - low) / (2 * step)
        np.testing.assert_allclose(
            actual, expected, rtol=1e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path)
        )


def test_no_gradient_reaches_the_target(result):
    """The target network gets no gradient."""
    _, (online, target) = result
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(target))
    assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(online))


def test_statistics_see_one_view_at_a_time(result, exact):
    """Both networks' running statistics move with momentum 0.9, for view 1 and then for view 2."""
    (_, outputs), _ = result
    _, expected_online, expected_target = reference_loss(*exact)
    assert_trees_close(outputs.stats, expected_online, rtol=1e-5, atol=1e-6)
    assert_trees_close(outputs.target_stats, expected_target, rtol=1e-5, atol=1e-6)


def test_loss_is_symmetric_in_the_views(byol, inputs, result):
    """Swapping the views changes neither the loss nor its gradient."""
    *trees, batch = inputs
    turned = {'view1': batch['view2'], 'view2': batch['view1']}
    (swapped, _), gradient = jax.jit(jax.value_and_grad(byol.loss, has_aux=True))(*trees, turned)
    (loss, _), (expected, _) = result
    np.testing.assert_allclose(swapped, loss, rtol=1e-6)
    assert_trees_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_features_are_those_of_both_views(result, exact):
    """The monitors get the networks' features, [V, B, size], view 1 before view 2."""
    (_, outputs), _ = result
    features = outputs.features
    online, target, stats, target_stats, batch = copy.deepcopy(exact)
    views = batch['view1'], batch['view2']
    projection = [reference_projection(online, stats, view) for view in views]
    other = [reference_projection(target, target_stats, view) for view in views]
    prediction = [
        reference_mlp(online['predictor'], stats['predictor'], each) for each in projection
    ]
    close = {'rtol': 1e-4, 'atol': 1e-5}
    np.testing.assert_allclose(features['projection'], projection, **close)
    np.testing.assert_allclose(features['target'], other, **close)
    np.testing.assert_allclose(features['prediction'], prediction, **close)
    assert features['representation'].shape == (2, BATCH, 5)
    assert outputs.metrics == {}


def test_regression_loss_matches_numpy():
    """Equation 2 and its gradient: 2 - 2 cos for each row, for any lengths."""
    rng = np.random.default_rng(1)
    q, z = rng.normal(size=(2, 8, 5)) * rng.uniform(0.1, 10, (2, 8, 1))
    cosine = np.sum(unit(q) * unit(z), axis=-1)
    np.testing.assert_allclose(regression_loss(q, z), 2 - 2 * cosine, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda q: regression_loss(q, z).sum())(jnp.asarray(q, jnp.float32))
    length = np.linalg.norm(q, axis=-1, keepdims=True)
    expected = -2 * (unit(z) - cosine[:, None] * unit(q)) / length
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_regression_loss_extremes():
    """A term is 0 for parallel, 2 for orthogonal and 4 for opposite vectors, so the sum is 0..8."""
    q = np.array([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]], np.float32)
    z = np.array([[0.5, 0.0], [0.0, 0.5], [-0.5, 0.0]], np.float32)
    np.testing.assert_allclose(regression_loss(q, z), [0, 2, 4], atol=1e-6)


class Flip(nn.Module):
    """A head that multiplies by a constant."""

    factor: float
    output_size: int = 3

    @nn.compact
    def __call__(self, x, train):
        return x * self.param('scale', nn.initializers.constant(self.factor), ())


class Colours(nn.Module):
    """The mean colour of a picture."""

    @nn.compact
    def __call__(self, x):
        return Flip(1.0, name='tap')(x.mean(axis=(1, 2)), True)


@pytest.mark.parametrize(('factor', 'expected'), [(2.0, 0.0), (-2.0, 8.0)])
def test_total_loss_extremes(factor, expected):
    """The total is 0 if predictions equal the targets, and 8 if they are opposite."""
    byol = Byol(TappedEncoder(Colours(), 'tap'), Flip(1.0), Flip(factor), MEAN, STD)
    params, stats = byol.init(jax.random.key(0), SIZE)
    view = np.random.default_rng(2).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    target = {part: params[part] for part in ('encoder', 'projector')}
    target_stats = {part: stats[part] for part in ('encoder', 'projector')}
    batch = {'view1': view, 'view2': view}
    loss, _ = byol.loss(params, target, stats, target_stats, batch)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    assert expected in (byol.loss_scale.lowest, byol.loss_scale.highest)


def test_zero_projection_has_a_finite_gradient():
    """A row of zeros, as dead ReLUs give, leads to neither NaN nor infinity."""
    zeros, z = jnp.zeros((1, 4)), jnp.ones((1, 4))
    value, gradient = jax.value_and_grad(lambda q: regression_loss(q, z).sum())(zeros)
    np.testing.assert_allclose(value, 1, rtol=1e-6)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(l2_normalize(zeros)) == 0)


def test_normalize(byol):
    """Every pixel value of every channel becomes (value / 255 - mean) / std."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    expected = (ramp / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(byol.normalize(jnp.asarray(ramp)), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(inputs, result):
    """With bfloat16, all products are bfloat16; parameters, gradients, stats, loss are float32."""
    byol = make_byol(jnp.bfloat16)
    params, stats = byol.init(jax.random.key(0), SIZE)
    traced = jax.jit(jax.value_and_grad(byol.loss, has_aux=True)).trace(*inputs)
    products = [line for line in str(traced.jaxpr).splitlines() if 'dot_general' in line]
    assert products
    assert all(':bf16' in line for line in products)
    (loss, aux), gradient = traced.lower().compile()(*inputs)
    features = dict(aux.features)
    assert features.pop('representation').dtype == jnp.bfloat16
    kept = (params, stats, loss, aux.stats, aux.target_stats, features, gradient)
    for leaf in jax.tree.leaves(kept):
        assert leaf.dtype == jnp.float32
    (expected, outputs), (expected_gradient, _) = result
    np.testing.assert_allclose(loss, expected, rtol=0.02)
    assert_trees_close(
        (aux.stats, aux.target_stats), (outputs.stats, outputs.target_stats), rtol=0.02, atol=0.02
    )
    actual, wanted = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (gradient, expected_gradient)
    )
    assert np.dot(unit(actual), unit(wanted)) > 0.99


def test_init_makes_three_parts(byol):
    """A fresh network has an encoder, a projector and a predictor of the given sizes."""
    params, stats = byol.init(jax.random.key(0), SIZE)
    assert set(params) == set(stats) == {'encoder', 'projector', 'predictor'}
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes['projector']['linear1']['kernel'] == (5, 7)
    assert shapes['predictor']['linear1']['kernel'] == (4, 12)
    assert 'bias' not in params['projector']['linear2']
