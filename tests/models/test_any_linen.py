"""Any Linen network: what `encoder.name` and `encoder.hidden_layer` promise to a user's own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from network_steps import (
    BATCH,
    IMAGES,
    SHAPE,
    as_trained,
    by_path,
    encoder_of,
    features_of,
    make_batch,
    make_case,
    make_method,
    normalised,
    quick_jit,
    small_config,
    tap,
)
from own_networks import ConvNet, Everything, Keep, Mlp, TokenNet

from byol_jax.errors import UserError
from byol_jax.interop.encoder import make_encoder
from byol_jax.interop.export import load_encoder, save_encoder
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder
from byol_jax.training.step import shard_batch

# Steps on simulated devices can deadlock: every one is awaited, under a hard limit.
pytestmark = pytest.mark.timeout(120)

# Float32 against the same layers called one by one, fused otherwise.
CLOSE = {'rtol': 1e-5, 'atol': 2e-6}


def call(layer, variables, name, *args, **kwargs):
    """Flax's own layer on the variables of one name, by itself."""
    own = {kind: tree[name] for kind, tree in variables.items() if name in tree}
    return layer.apply(own, *args, **kwargs)


# Values at the tap.


def conv_net_by_hand(variables, x, norm):
    """(output of norm2, output of the network) in evaluation."""
    for i, width in ((1, 4), (2, 8)):
        x = call(nn.Conv(width, (3, 3), strides=2), variables, f'conv{i}', x)
        if norm == 'batch':
            x = call(nn.BatchNorm(use_running_average=True), variables, f'norm{i}', x)
        elif norm == 'group':
            x = call(nn.GroupNorm(2), variables, f'norm{i}', x)
        before, x = x, nn.relu(x)
    return before, call(nn.Dense(3), variables, 'head', x.mean(axis=(1, 2)))


@pytest.mark.parametrize('norm', ['batch', 'group', 'none'])
def test_a_convnet(norm):
    """The features of a convnet, whatever its norm, are its layers' called one by one."""
    layer = 'conv2' if norm == 'none' else 'norm2'
    tapped, variables = tap(ConvNet(norm), layer)
    assert tapped.check(SHAPE).shape == (4, 2, 2, 8)
    by_hand = quick_jit(conv_net_by_hand, static_argnums=2)
    hidden, output = by_hand(variables, IMAGES, norm)
    features, _ = features_of(tapped, variables)
    np.testing.assert_allclose(features, hidden.mean(axis=(1, 2)), **CLOSE)
    features, _ = features_of(TappedEncoder(ConvNet(norm), 'output'), variables)
    np.testing.assert_allclose(features, output, **CLOSE)


def tokens_by_hand(variables, x):
    """Output of block0 [B, tokens, D]."""
    x = call(nn.Conv(6, (4, 4), strides=4), variables, 'patches', x).reshape(len(x), -1, 6)
    params = variables['params']
    x = jnp.concatenate([jnp.tile(params['cls'], (len(x), 1, 1)), x], axis=1)
    x = x + params['positions']
    inside = {'params': params['block0']}
    y = call(nn.LayerNorm(), inside, 'norm1', x)
    x = x + call(nn.MultiHeadDotProductAttention(2), inside, 'attention', y, y)
    y = nn.gelu(call(nn.Dense(8), inside, 'fc1', call(nn.LayerNorm(), inside, 'norm2', x)))
    return x + call(nn.Dense(6), inside, 'fc2', y)


def test_tokens_and_their_pools():
    """Tokens [B, N, D] are averaged, or the first is taken, or all are laid side by side."""
    _, variables = tap(TokenNet(), 'block0')
    tokens = np.asarray(quick_jit(tokens_by_hand)(variables, IMAGES))
    assert tokens.shape == (4, 5, 6)
    expected = {'mean': tokens.mean(axis=1), 'cls': tokens[:, 0], 'flatten': tokens.reshape(4, -1)}
    for pool, value in expected.items():
        tapped = TappedEncoder(TokenNet(), 'block0', pool)
        assert tapped.check(SHAPE).shape == (4, 5, 6)
        features, _ = features_of(tapped, variables)
        np.testing.assert_allclose(features, value, **CLOSE)


@pytest.mark.parametrize(('pool', 'size'), [('cls', 6), ('flatten', 30)])
def test_the_projector_takes_the_features_as_they_are(pool, size):
    """The projector is made for D features, or N x D of 'flatten'."""
    byol = make_method(small_config('TokenNet', 'block0', encoder__pool=pool))
    params, _ = jax.eval_shape(lambda: byol.init(jax.random.key(0), 8))
    assert params['projector']['linear1']['kernel'].shape == (size, 8)


def test_an_mlp():
    """A network that flattens its pictures and knows no modes works at any of its layers."""
    tapped, variables = tap(Mlp(), 'hidden2')
    assert tapped.check(SHAPE).shape == (4, 6)
    p = variables['params']
    x = IMAGES.reshape(4, -1).astype(np.float64)
    x = np.maximum(x @ p['hidden1']['kernel'] + p['hidden1']['bias'], 0)
    expected = x @ p['hidden2']['kernel'] + p['hidden2']['bias']
    for train in (False, True):
        features, state = features_of(tapped, variables, train=train, seed=0)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
        assert state == {}


class Setup(nn.Module):
    """setup() style: a list, a dict and a Sequential of layers."""

    def setup(self):
        self.stem = nn.Dense(6)
        self.blocks = [nn.Dense(6) for _ in range(2)]
        self.sides = {'left': nn.Dense(6), 'right': nn.Dense(6)}
        self.end = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(4)])

    def __call__(self, x):
        x = nn.relu(self.stem(x.mean(axis=(1, 2))))
        for block in self.blocks:
            x = nn.relu(block(x))
        return self.end(self.sides['left'](x) * self.sides['right'](x))


def test_layers_made_in_setup():
    """Layers in lists, dicts and Sequentials of setup() go by the names Flax gives them."""
    _, variables = tap(Setup(), 'stem')
    dense = lambda name, size, x: call(nn.Dense(size), variables, name, x)  # noqa: E731
    x = nn.relu(dense('stem', 6, IMAGES.mean(axis=(1, 2))))
    expected = {'blocks_0': dense('blocks_0', 6, x)}
    x = nn.relu(dense('blocks_1', 6, nn.relu(expected['blocks_0'])))
    expected['sides_right'] = dense('sides_right', 6, x)
    x = dense('sides_left', 6, x) * expected['sides_right']
    inside = {'params': variables['params']['end']}
    expected['end/layers_0'] = call(nn.Dense(5), inside, 'layers_0', x)
    expected['end'] = call(nn.Dense(4), inside, 'layers_2', nn.relu(expected['end/layers_0']))
    for layer, value in expected.items():
        features, _ = features_of(TappedEncoder(Setup(), layer), variables)
        np.testing.assert_allclose(features, value, **CLOSE)


# Being told whether it trains.


class SeveralWords(nn.Module):
    """Told in several words at once."""

    @nn.compact
    def __call__(self, x, train, *, deterministic, use_running_average=False, is_training=None):
        assert train is is_training is (not deterministic) is (not use_running_average)
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        x = nn.BatchNorm(use_running_average, momentum=0.9, name='bn')(x)
        return nn.Dropout(0.5, deterministic=deterministic, name='drop')(x)


class Attribute(nn.Module):
    """Told by an attribute of its own."""

    deterministic: bool = True

    def setup(self):
        self.fc = nn.Dense(6)
        self.bn = nn.BatchNorm(use_running_average=self.deterministic, momentum=0.9)
        self.drop = nn.Dropout(0.5, deterministic=self.deterministic)

    def __call__(self, x):
        return self.drop(self.bn(self.fc(x.mean(axis=(1, 2)))))


class Merged(nn.Module):
    """Told by an attribute or by an argument, as Flax's own layers are."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        quiet = nn.merge_param('deterministic', self.deterministic, deterministic)
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        x = nn.BatchNorm(use_running_average=quiet, momentum=0.9, name='bn')(x)
        return nn.Dropout(0.5, name='drop')(x, deterministic=quiet)


class Both(nn.Module):
    """The norm is told by an argument, the dropout by an attribute."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='bn')(x)
        return nn.Dropout(0.5, deterministic=self.deterministic, name='drop')(x)


@pytest.mark.parametrize(
    'kind',
    [
        SeveralWords,
        Attribute,
        Merged,
        Both,
    ],
)
def test_however_it_is_told(kind):
    """In training, and only then, statistics are the batch's and move, and dropout drops."""
    tapped, variables = tap(kind(), 'drop')
    tapped.check(SHAPE)
    fc, bn = variables['params']['fc'], variables['params']['bn']
    hidden = IMAGES.mean(axis=(1, 2)).astype(np.float64) @ fc['kernel'] + fc['bias']
    stats = variables['batch_stats']['bn']

    def normed(mean, var):
        return (hidden - mean) / np.sqrt(var + 1e-5) * bn['scale'] + bn['bias']

    features, kept = features_of(tapped, variables)
    np.testing.assert_allclose(features, normed(stats['mean'], stats['var']), 1e-4, 1e-5)
    assert_same(kept['batch_stats']['bn'], stats)
    features, moved = features_of(tapped, variables, train=True, seed=1)
    mean, var = hidden.mean(axis=0), hidden.var(axis=0)
    expected = {'mean': 0.9 * stats['mean'] + 0.1 * mean, 'var': 0.9 * stats['var'] + 0.1 * var}
    for name, value in expected.items():
        np.testing.assert_allclose(moved['batch_stats']['bn'][name], value, 1e-4, 1e-6)
    dropped = features == 0
    assert 0 < dropped.sum() < dropped.size
    np.testing.assert_allclose(features[~dropped], 2 * normed(mean, var)[~dropped], 1e-3, 1e-4)


class Flagged(nn.Module):
    """Has a switch that has nothing to do with training, and does the same in both modes."""

    @nn.compact
    def __call__(self, x, all_tokens: bool = False):
        x = nn.LayerNorm(name='norm')(nn.Dense(6, name='fc')(x.reshape(len(x), -1, 3)))
        return x if all_tokens else x.mean(axis=1)


def test_a_switch_that_is_not_about_training():
    """An argument that is true or false, and of which nothing is known, is left at its default."""
    tapped, variables = tap(Flagged(), 'output')
    tapped.check(SHAPE)
    x = call(nn.Dense(6), variables, 'fc', IMAGES.reshape(4, -1, 3))
    expected = call(nn.LayerNorm(), variables, 'norm', x).mean(axis=1)
    np.testing.assert_allclose(features_of(tapped, variables)[0], expected, **CLOSE)


def assert_same(actual, expected):
    """Trees are equal bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(a, e, err_msg=jax.tree_util.keystr(path))


# Random layers.


def test_stochastic_depth_draws_from_its_own_stream():
    """A stream of any name and dropout inside attention draw in training, by the key alone."""
    tapped, variables = tap(TokenNet(rate=0.5), 'block0')
    tapped.check(SHAPE)
    still, _ = features_of(tapped, variables)
    one, two, again = (
        features_of(tapped, variables, train=True, seed=seed)[0] for seed in (1, 2, 1)
    )
    np.testing.assert_array_equal(one, again)
    for drawn, other in ((one, two), (one, still), (two, still)):
        assert not np.allclose(drawn, other)


class TwoStreams(nn.Module):
    """Puts out what it draws: two layers of one stream, one of another."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(2, name='fc')(x.mean(axis=(1, 2)))
        if not train:
            return x
        draws = [jax.random.uniform(self.make_rng(name), (len(x), 2)) for name in 'aab']
        return jnp.concatenate([x, *draws, Drawing(name='inner')(x)], axis=1)


class Drawing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.random.uniform(self.make_rng('a'), (len(x), 2))


def test_every_draw_of_a_pass_is_its_own():
    """Two draws of a stream, of two streams, or of two layers of one stream never agree."""
    tapped, variables = tap(TwoStreams(), 'output')
    features, _ = features_of(tapped, variables, train=True, seed=0)
    draws = features[:, 2:]
    assert len(np.unique(draws)) == draws.size


class Tied(nn.Module):
    """Runs one block four times with nn.scan; its masks are drawn anew each time."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        if train:
            scanned = nn.scan(
                TiedBlock,
                variable_broadcast='params',
                split_rngs={'params': False, 'drop_path': True},
                length=4,
            )
            return scanned(name='blocks')(x, None)[1].T
        return x


class TiedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kept = jax.random.bernoulli(self.make_rng('drop_path'), 0.5, (len(x),))
        return x * kept[:, None], kept.astype(jnp.float32)


@pytest.mark.xfail(
    strict=True, reason="a stream of its own name falls back on 'params', which is not split"
)
def test_a_scan_splits_the_stream_it_names():
    """Of a stream that nn.scan is told to split, each round of the scan draws for itself."""
    tapped, variables = tap(Tied(), 'output')
    masks, _ = features_of(tapped, variables, train=True, seed=0)
    assert np.any(masks != masks[:, :1])


class AlwaysNoisy(nn.Module):
    """Draws whether or not it trains."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        return nn.Dropout(0.5, deterministic=False, name='drop')(x)


def test_drawing_outside_of_training_is_refused():
    """A network whose features would differ from call to call is refused before it trains."""
    with pytest.raises(UserError) as caught:
        TappedEncoder(AlwaysNoisy(), 'drop').check(SHAPE)
    assert 'AlwaysNoisy draws random numbers outside of training' in str(caught.value)
    assert '`deterministic` argument' in str(caught.value)


# Collections of variables.


class Statistics(nn.Module):
    """Keeps a running mean, counts its passes, and iterates for a spectral norm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='bn')(x)
        x = x.mean(axis=(1, 2))
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (3, 6))
        u = self.variable('power', 'u', lambda: jnp.ones(6) / jnp.sqrt(6.0))
        v = kernel @ u.value / jnp.linalg.norm(kernel @ u.value)
        sigma = jnp.linalg.norm(kernel.T @ v)
        x = x @ (kernel / sigma)
        mean = self.variable('centre', 'mean', jnp.zeros, 6)
        passes = self.variable('centre', 'passes', jnp.zeros, (), jnp.int32)
        y = x - mean.value + 0 * passes.value
        if train:
            u.value = jax.lax.stop_gradient(kernel.T @ v / sigma)
            mean.value = 0.75 * mean.value + 0.25 * x.mean(axis=0)
            passes.value += 1
        return Keep(name='features')(y)


def test_statistics_of_its_own():
    """Collections of any name move in training by the network's own rule, and only then."""
    tapped, variables = tap(Statistics(), 'features')
    tapped.check(SHAPE)
    old = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    _, kept = features_of(tapped, variables)
    assert_same(kept, {name: tree for name, tree in variables.items() if name != 'params'})
    features, moved = features_of(tapped, variables, train=True)
    kernel = old['params']['kernel']
    v = kernel @ old['power']['u']
    v /= np.linalg.norm(v)
    sigma = np.linalg.norm(kernel.T @ v)
    scale, bias = old['params']['bn']['scale'], old['params']['bn']['bias']
    x = (IMAGES - IMAGES.mean(axis=(0, 1, 2))) / np.sqrt(IMAGES.var(axis=(0, 1, 2)) + 1e-5)
    x = (x * scale + bias).mean(axis=(1, 2)) @ kernel / sigma
    np.testing.assert_allclose(features, x - old['centre']['mean'], 1e-4, 1e-5)
    np.testing.assert_allclose(moved['power']['u'], kernel.T @ v / sigma, 1e-5, 1e-6)
    mean = 0.75 * old['centre']['mean'] + 0.25 * x.mean(axis=0)
    np.testing.assert_allclose(moved['centre']['mean'], mean, 1e-4, 1e-6)
    assert moved['centre']['passes'] == 1


def behind(tapped, variables):
    return dataclasses.replace(tapped, behind=tapped.find_behind(variables, IMAGES))


class TrainingOnly(nn.Module):
    """Uses the vector of its power iteration in training only, the norm it gives elsewhere."""

    @nn.compact
    def __call__(self, x, train=False):
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (3, 6))
        u = self.variable('power', 'u', lambda: jnp.ones(6) / jnp.sqrt(6.0))
        sigma = self.variable('power', 'sigma', jnp.ones, ())
        if train:
            v = kernel @ u.value / jnp.linalg.norm(kernel @ u.value)
            sigma.value = jnp.linalg.norm(kernel.T @ v)
            u.value = jax.lax.stop_gradient(kernel.T @ v / sigma.value)
        return Keep(name='features')(x.mean(axis=(1, 2)) @ (kernel / sigma.value))


def test_a_statistic_read_in_training_only():
    """Many passes of a power iteration find the largest singular value."""
    tapped, variables = tap(TrainingOnly(), 'features')
    tapped = behind(tapped, variables)
    for _ in range(30):
        _, state = features_of(tapped, variables, train=True)
        variables = {**variables, **state}
    largest = np.linalg.svd(variables['params']['kernel'], compute_uv=False)[0]
    np.testing.assert_allclose(variables['power']['sigma'], largest, rtol=1e-4)


class Spectral(nn.Module):
    """Flax's own spectral normalisation."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.mean(axis=(1, 2))
        x = nn.SpectralNorm(nn.Dense(6, name='inner'), name='norm')(x, update_stats=train)
        return nn.Dense(4, name='head')(x)


def test_spectral_normalisation():
    """The power iteration of flax.linen.SpectralNorm goes on from pass to pass."""
    tapped, variables = tap(Spectral(), 'output')
    tapped.check(SHAPE)
    tapped = behind(tapped, variables)
    for _ in range(30):
        features, state = features_of(tapped, variables, train=True)
        variables = {**variables, **state}
    inner = variables['params']['inner']
    largest = np.linalg.svd(inner['kernel'], compute_uv=False)[0]
    x = IMAGES.mean(axis=(1, 2)) @ (inner['kernel'] / largest) + inner['bias']
    expected = call(nn.Dense(4), variables, 'head', x)
    np.testing.assert_allclose(features, expected, 1e-4, 1e-5)


def exported(name, layer, variables, kwargs=None):
    """The encoder of a class of this module."""
    return make_encoder(
        name=f'{__name__}:{name}',
        kwargs=kwargs or {},
        hidden_layer=layer,
        variables=variables,
        image_size=8,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        step=1,
    )


UINT8 = np.random.default_rng(1).integers(0, 256, SHAPE, np.uint8)


def test_spectral_normalisation_is_exported(tmp_path):
    """Variables whose names hold a '/', as those of SpectralNorm, survive the export."""
    _, variables = tap(Spectral(), 'output')
    encoder = exported('Spectral', 'output', variables)
    save_encoder(encoder, tmp_path)
    np.testing.assert_array_equal(load_encoder(tmp_path)(UINT8), encoder(UINT8))


class Sowing(nn.Module):
    """Sows what it sees, in Flax's collection and one of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name='bn')(x.mean(axis=(1, 2)))
        x = nn.Dense(6, name='fc')(x)
        self.sow('intermediates', 'hidden', x)
        self.sow('reports', 'hidden', x)
        return nn.relu(x)


def test_what_is_sown_is_no_state():
    """Collections made by sow are no variables, and do not appear or grow in training."""
    tapped, variables = tap(Sowing(), 'output')
    tapped.check(SHAPE)
    assert set(variables) == {'params', 'batch_stats'}
    structure = jax.tree.structure(variables)
    for _ in range(3):
        _, state = features_of(tapped, variables, train=True)
        variables = {**variables, **state}
        assert jax.tree.structure(variables) == structure
    features, _ = features_of(tapped, variables)
    x = call(nn.BatchNorm(True), variables, 'bn', IMAGES.mean(axis=(1, 2)))
    np.testing.assert_allclose(features, nn.relu(call(nn.Dense(6), variables, 'fc', x)), **CLOSE)


class SowingSums(nn.Module):
    """Sows a sum, as Flax's documentation does for a loss."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        add = {'reduce_fn': jnp.add, 'init_fn': lambda: jnp.zeros(())}
        self.sow('losses', 'l2', jnp.mean(x**2), **add)
        return x


@pytest.mark.xfail(strict=True, reason='only what is sown into tuples is told from state')
def test_a_sown_sum_is_no_state():
    """What is sown with a reduce_fn is a report too: no variable, and it does not grow."""
    _, variables = tap(SowingSums(), 'output')
    assert set(variables) == {'params'}


class Partitioned(nn.Module):
    """Its parameters come in boxes that say how they may be laid out over devices."""

    @nn.compact
    def __call__(self, x):
        layout = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'model'))
        x = nn.Dense(6, kernel_init=layout, name='fc')(x.mean(axis=(1, 2)))
        logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('in', 'out'))
        return x @ self.param('kernel', logical, (6, 5))


def test_partitioned_parameters():
    """Parameters with a layout are plain arrays here, and give what they give in Flax."""
    tapped, _ = tap(Partitioned(), 'output')
    tapped.check(SHAPE)
    key = jax.random.key(0)
    variables = quick_jit(tapped.init)(key, IMAGES)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    expected, boxed = quick_jit(Partitioned().init_with_output)(key, IMAGES)
    assert isinstance(boxed['params']['fc']['kernel'], nn.Partitioned)
    np.testing.assert_allclose(features_of(tapped, variables)[0], expected, **CLOSE)


class AdoptsType(nn.Module):
    """Keeps the last batch's mean as it comes."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        last = self.variable('own', 'last', jnp.zeros, 6)
        y = x - last.value
        if train:
            last.value = x.mean(axis=0)
        return y


@pytest.mark.xfail(strict=True, reason='a statistic that adopts the compute type changes its own')
def test_statistics_keep_their_type_in_bfloat16():
    """With precision='bfloat16' a network's own statistics stay float32, as the state must."""
    byol = make_method(small_config('ConvNet', 'drop', precision='bfloat16'))
    byol = dataclasses.replace(byol, encoder=TappedEncoder(AdoptsType(), 'output'))
    params, stats = jax.eval_shape(lambda: byol.init(jax.random.key(0), 8))
    images = jax.ShapeDtypeStruct(SHAPE, np.uint8)
    _, after = jax.eval_shape(lambda p, s, x: byol.represent(p, s, x, True), params, stats, images)
    assert after['own']['last'].dtype == stats['encoder']['own']['last'].dtype == np.float32


class Block(nn.Module):
    """Dense, norm, dropout."""

    rate: float = 0.2

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, name='fc')(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='bn')(x)
        return nn.Dropout(self.rate, deterministic=not train, name='drop')(nn.relu(x))


class Blocks(nn.Module):
    """Two blocks under a transformation of Flax, or under none."""

    transformation: str = 'none'
    rate: float = 0.2

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name='stem')(x.mean(axis=(1, 2)))
        wrap = {'none': lambda kind: kind, 'remat': static(nn.remat), 'jit': static(nn.jit)}
        for i in (0, 1):
            x = wrap[self.transformation](Block)(self.rate, name=f'block{i}')(x, train)
        return nn.Dense(3, name='head')(x)


def static(transformation):
    return functools.partial(transformation, static_argnums=(2,))


# Under nn.jit masks are drawn from other keys than outside of it.
@pytest.mark.parametrize(
    ('transformation', 'rate'),
    [('remat', 0.2), pytest.param('jit', 0.0, marks=pytest.mark.slow)],
)
def test_transformed_blocks(transformation, rate):
    """Features and gradients of a block under nn.remat or nn.jit are those of the plain block."""
    for layer in ('block0', 'block1', 'block1/bn'):
        wrapped = TappedEncoder(Blocks(transformation, rate), layer)
        assert wrapped.check(SHAPE).shape == (4, 6)
    layer = 'block1'
    plain, variables = tap(Blocks(rate=rate), layer)

    def results(tapped):
        def f(params, images):
            trees = {**variables, 'params': params}
            features, state = tapped.apply(trees, images, True, jax.random.key(1))
            return jnp.sum(features * jnp.arange(1, 7)), (features, state)

        return quick_jit(jax.value_and_grad(f, has_aux=True))(variables['params'], IMAGES)

    actual, expected = (results(TappedEncoder(m, layer)) for m in (wrapped.module, plain.module))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


class Scanned(nn.Module):
    """Three blocks in one nn.scan, each rematerialised."""

    noting: bool = False
    rate: float = 0.2

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name='stem')(x.mean(axis=(1, 2)))
        axes = {'params': 0, 'batch_stats': 0, **({'intermediates': 0} if self.noting else {})}
        blocks = nn.scan(
            nn.remat(Round, static_argnums=(2,)),
            variable_axes=axes,
            split_rngs={'params': True, 'dropout': True},
            in_axes=nn.broadcast,
            length=3,
        )
        x, _ = blocks(self.rate, name='blocks')(x, train)
        return Keep(name='behind_the_scan')(x)


class Round(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, train):
        return Block(self.rate, name='block')(x, train), None


def scanned_by_hand(variables):
    x = call(nn.Dense(6), variables, 'stem', IMAGES.mean(axis=(1, 2)))
    for i in range(3):
        one = {
            kind: jax.tree.map(lambda leaf, i=i: leaf[i], tree['blocks'])
            for kind, tree in variables.items()
        }
        x = call(Block(), one, 'block', x, False)
    return x


@pytest.mark.parametrize('noting', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_scan(noting):
    """What follows nn.scan is tapped as anywhere, and the scan's statistics move in training."""
    tapped, variables = tap(Scanned(noting), 'behind_the_scan')
    tapped.check(SHAPE)
    features, _ = features_of(tapped, variables)
    np.testing.assert_allclose(features, quick_jit(scanned_by_hand)(variables), **CLOSE)
    _, state = features_of(tapped, variables, train=True, seed=0)
    for path, leaf in by_path(state).items():
        old = by_path(variables)[path]
        assert leaf.shape == old.shape
        assert np.all(np.any(leaf != old, axis=1)), path


@pytest.mark.xfail(strict=True, reason='outputs of nn.scan are not noted, or are noted stacked')
@pytest.mark.parametrize('noting', [False, True])
def test_the_output_of_a_scan(noting):
    """The output of nn.scan itself can be tapped: its carry is the first of what it puts out."""
    tapped, variables = tap(Scanned(noting), 'blocks.0')
    assert tapped.check(SHAPE).shape == (4, 6)
    features, _ = features_of(tapped, variables)
    np.testing.assert_allclose(features, scanned_by_hand(variables), **CLOSE)


@pytest.mark.parametrize('module', [Blocks('remat', 0.0), Blocks('jit', 0.0), Scanned(rate=0.0)])
def test_norms_inside_transformations_are_synchronised(module):
    """A norm inside nn.remat, nn.jit or nn.scan sees the batch of all devices too."""
    tapped, variables = tap(module, 'output', axis_name='devices')
    apply = lambda v, x: tapped.apply(v, x, True)  # noqa: E731
    mapped = quick_jit(jax.vmap(apply, (None, 0), axis_name='devices'))
    features, state = mapped(variables, IMAGES.reshape(2, 2, 8, 8, 3))
    alone = dataclasses.replace(tapped, axis_name=None)
    whole, moved = features_of(alone, variables, train=True)
    np.testing.assert_allclose(features.reshape(whole.shape), whole, 1e-3, 1e-4)
    for a, e in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, np.stack([e, e]), 1e-5, 1e-5)


class Switching(nn.Module):
    """Leaves its block out at random in training, by nn.cond."""

    def setup(self):
        self.stem = nn.Dense(6)
        self.block = nn.Dense(6)
        self.end = nn.Dense(4)

    def __call__(self, x, train=False):
        x = self.stem(x.mean(axis=(1, 2)))
        if self.is_initializing() or not train:
            x = self.block(x)
        else:
            taken = jax.random.bernoulli(self.make_rng('layers'))
            x = nn.cond(taken, lambda own, x: own.block(x), lambda own, x: x, self, x)
        return self.end(x)


def test_a_layer_left_out_by_cond():
    """A network may run a layer, or not, by nn.cond in training."""
    tapped, variables = tap(Switching(), 'end')
    tapped.check(SHAPE)
    stem = call(nn.Dense(6), variables, 'stem', IMAGES.mean(axis=(1, 2)))
    blocked = call(nn.Dense(6), variables, 'block', stem)
    taken, left = (call(nn.Dense(4), variables, 'end', x) for x in (blocked, stem))
    np.testing.assert_allclose(features_of(tapped, variables)[0], taken, **CLOSE)
    seen = set()
    for seed in range(8):
        features, _ = features_of(tapped, variables, train=True, seed=seed)
        seen.add((np.allclose(features, taken, **CLOSE), np.allclose(features, left, **CLOSE)))
    assert seen == {(True, False), (False, True)}


class HandedIn(nn.Module):
    """Its norm is an attribute, and its layers are made in setup()."""

    norm: nn.Module

    def setup(self):
        self.fc = nn.Dense(6)

    def __call__(self, x, training):
        return self.fc(self.norm(x, use_running_average=not training).mean(axis=(1, 2)))


def test_a_norm_handed_in_stays_as_it_was():
    """A BatchNorm given as an attribute is synchronised, and the user's object is not changed."""
    norm = nn.BatchNorm(momentum=0.9)
    tapped, variables = tap(HandedIn(norm), 'fc', axis_name='devices')
    two = IMAGES.reshape(2, 2, 8, 8, 3)
    apply = jax.vmap(
        lambda v, x: tapped.apply(v, x, True), (None, 0), (0, None), axis_name='devices'
    )
    features, state = quick_jit(apply)(variables, two)
    assert norm.axis_name is None
    assert tapped.module.norm is norm
    whole, moved = features_of(TappedEncoder(tapped.module, 'fc'), variables, train=True)
    np.testing.assert_allclose(features.reshape(4, 6), whole, 1e-4, 1e-5)
    for a, e in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, e, **CLOSE)


class Twice(nn.Module):
    """Calls the same layer twice, and one of its layers both inside and outside of it."""

    def setup(self):
        self.fc = nn.Dense(3)
        self.last = nn.Dense(2)

    def __call__(self, x):
        return self.last(self.fc(nn.tanh(self.fc(x.mean(axis=(1, 2))))))


def test_a_layer_called_twice():
    """Of a layer called twice the last output is tapped, and both calls give it gradients."""
    tapped, variables = tap(Twice(), 'fc')
    fc = variables['params']['fc']
    dense = lambda x, p: x @ p['kernel'] + p['bias']  # noqa: E731
    by_hand = lambda p: dense(jnp.tanh(dense(IMAGES.mean(axis=(1, 2)), p)), p)  # noqa: E731
    features, _ = features_of(tapped, variables)
    np.testing.assert_allclose(features, by_hand(fc), **CLOSE)
    total = lambda p: jnp.sum(tapped.apply({'params': p}, IMAGES, True)[0] ** 2)  # noqa: E731
    gradient = quick_jit(jax.grad(total))(variables['params'])
    expected = quick_jit(jax.grad(lambda p: jnp.sum(by_hand(p) ** 2)))(fc)
    for name in ('kernel', 'bias'):
        np.testing.assert_allclose(gradient['fc'][name], expected[name], 1e-4, 1e-5)
    assert not np.any(gradient['last']['kernel'])


# Several outputs.


class Pair(NamedTuple):
    first: Any
    second: Any


@flax.struct.dataclass
class Outputs:
    features: Any
    more: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    features: Any
    more: Any


PACKED = {
    'tuple': (lambda x, y: (x, y), '0', '1'),
    'list': (lambda x, y: [x, None, y], '0', '2'),
    'dict': (lambda x, y: {'features': x, 'more': {'deep': y}}, 'features', 'more.deep'),
    'namedtuple': (Pair, 'first', 'second'),
    'struct': (lambda x, y: Outputs(x, [y]), 'features', 'more.0'),
    'dataclass': (Registered, 'features', 'more'),
}


class Packing(nn.Module):
    """Its block, and the network itself, put out two arrays in a container."""

    kind: str

    @nn.compact
    def __call__(self, x):
        return PackingBlock(self.kind, name='block')(x.mean(axis=(1, 2)))


class PackingBlock(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name='fc1')(x)
        return PACKED[self.kind][0](x, nn.Dense(4, name='fc2')(x))


@pytest.mark.parametrize('kind', PACKED)
def test_several_outputs(kind):
    """Each array of a layer's or the network's output is tapped by its index, key or field."""
    _, first, second = PACKED[kind]
    _, variables = tap(Packing(kind), 'block/fc1')
    inside = {'params': variables['params']['block']}
    x = call(nn.Dense(6), inside, 'fc1', IMAGES.mean(axis=(1, 2)))
    y = call(nn.Dense(4), inside, 'fc2', x)
    layers = TappedEncoder(Packing(kind), 'output').layers(SHAPE)
    wanted = {f'{where}.{part}' for where in ('block', 'output') for part in (first, second)}
    assert {layer.path for layer in layers} == {'block/fc1', 'block/fc2'} | wanted
    apply = lambda where: TappedEncoder(Packing(kind), where).apply(variables, IMAGES, False)  # noqa: E731
    for where in ('block', 'output'):
        np.testing.assert_allclose(apply(f'{where}.{first}')[0], x, **CLOSE)
        np.testing.assert_allclose(apply(f'{where}.{second}')[0], y, **CLOSE)


class NamedOutput(nn.Module):
    """Has a layer that is called 'output', and puts out something else."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name='output')(x.mean(axis=(1, 2)))
        return nn.Dense(4, name='after')(x)


def test_a_layer_called_output():
    """A layer called 'output' is what 'output' taps, not the network's own output."""
    tapped, variables = tap(NamedOutput(), 'output')
    assert tapped.check(SHAPE).shape == (4, 5)
    assert [layer.path for layer in tapped.layers(SHAPE)] == ['output', 'after']
    expected = call(nn.Dense(5), variables, 'output', IMAGES.mean(axis=(1, 2)))
    np.testing.assert_allclose(features_of(tapped, variables)[0], expected, **CLOSE)


# Refusals.


@pytest.mark.parametrize('layer', ['conv3', 'head.0'])
def test_an_unknown_layer(layer):
    """The nearest name and the list of layers with shapes are given, and nothing is compiled."""
    compiled = []

    def listen(event, *_, **__):
        if event == '/jax/core/compile/backend_compile_duration':
            compiled.append(event)

    make_method(small_config('ConvNet', 'conv2'))  # Keys are made by then.
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with pytest.raises(UserError) as caught:
            make_method(small_config('ConvNet', layer, encoder__kwargs={'width': 5}))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    message = str(caught.value)
    assert f"encoder.hidden_layer='{layer}'" in message
    assert 'Did you mean' in message
    rows = message.split('Its layers are:\n')[1]
    listing = re.findall(r'^ +(\S+) +(\[.*?\])', rows, re.MULTILINE)
    assert listing == [
        ('conv1', '[2, 4, 4, 5]'),
        ('norm1', '[2, 4, 4, 5]'),
        ('conv2', '[2, 2, 2, 10]'),
        ('norm2', '[2, 2, 2, 10]'),
        ('drop', '[2, 2, 2, 10]'),
        ('head', '[2, 3]'),
        ('output', '[2, 3]'),
    ]


@pytest.mark.parametrize('pool', ['cls', 'flatten'])
def test_a_pool_for_tokens_on_a_feature_map(pool):
    """A pool for tokens is refused on a feature map and on a vector, saying what it puts out."""
    for layer, shape in (('conv2', r'\[4, 2, 2, 8\]'), ('head', r'\[4, 3\]')):
        with pytest.raises(UserError, match=f"encoder.pool='{pool}' is for .*{shape}"):
            TappedEncoder(ConvNet(), layer, pool).check(SHAPE)


class FailsInTraining(nn.Module):
    """Works as long as it does not train."""

    error: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        if train and self.error == 'shape':
            return x.reshape(5, 7)
        if train and self.error == 'parameter':
            return nn.Dense(6, name='only_in_training')(x)
        if train and self.error == 'axis':
            return jax.lax.pmean(x, 'batch')
        if train:
            raise NotImplementedError('training is for another day')
        return x


@pytest.mark.parametrize(
    'error',
    [
        'shape',
        'parameter',
        'axis',
        'other',
    ],
)
def test_failing_in_training_only(error):
    """A network that fails in training mode only is refused at the start, in one sentence."""
    with pytest.raises(UserError, match='FailsInTraining fails in training mode on images of 8x8'):
        TappedEncoder(FailsInTraining(error), 'fc', axis_name='devices').check(SHAPE)


class ForeignAxis(nn.Module):
    """Averages its norm over an axis of another training program, as Flax's ImageNet example."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        return nn.BatchNorm(use_running_average=not train, axis_name='batch', name='bn')(x)


def test_a_norm_with_an_axis_of_its_own():
    """A norm bound to an axis that is not there is refused, naming the axis."""
    with pytest.raises(UserError, match='batch'):
        TappedEncoder(ForeignAxis(), 'bn', axis_name='devices').check(SHAPE)


class Windows(nn.Module):
    """Cuts pictures into four windows that it lines up along the batch."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(4 * len(x), -1, 3)
        x = nn.Dense(6, name='windows')(x)
        return nn.Dense(4, name='head')(x.reshape(len(x) // 4, -1, 6).mean(axis=1))


class Backwards(nn.Module):
    """Puts out tokens before images."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name='backwards')(x.reshape(len(x), -1, 3).swapaxes(0, 1))
        return nn.Dense(4, name='head')(x.mean(axis=0))


@pytest.mark.parametrize(('module', 'layer'), [(Windows(), 'windows'), (Backwards(), 'backwards')])
def test_an_output_without_a_row_for_each_image(module, layer):
    """A layer whose first axis is not the images is refused: its rows are no representations."""
    with pytest.raises(UserError, match=layer):
        TappedEncoder(module, layer).check(SHAPE)


# Names and arguments.


def test_a_partial_of_a_class():
    """A functools.partial is an encoder's name like a class; its arguments may be overridden."""
    assert build_encoder('own_networks:WideConvNet', {}) == ConvNet('group', width=6)
    assert build_encoder('own_networks:WideConvNet', {'width': 2}) == ConvNet('group', width=2)
    with pytest.raises(UserError, match=r"no argument 'widht'\. Did you mean 'width'\?"):
        build_encoder('own_networks:WideConvNet', {'widht': 2})


ARGUMENTS = {'stages': [{'width': 5}, {'width': 6}], 'options': {'features': 4, 'use_bias': False}}


def test_arguments_from_a_config():
    """Lists and dicts in encoder.kwargs reach the network as sequences and mappings."""
    byol = make_method(small_config('Configured', 'out', encoder__kwargs=ARGUMENTS))
    assert byol.encoder.module == build_encoder('own_networks:Configured', ARGUMENTS)


def test_arguments_from_json(tmp_path):
    """A network with lists and dicts for arguments gives the same features once it is loaded."""
    module = build_encoder('own_networks:Configured', ARGUMENTS)
    _, variables = tap(module, 'out')
    encoder = make_encoder(
        name='own_networks:Configured',
        kwargs=ARGUMENTS,
        hidden_layer='out',
        variables=variables,
        image_size=8,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        step=1,
    )
    save_encoder(encoder, tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.module == module
    x = ((UINT8 / 255 - 0.5) / 0.25).reshape(4, -1)
    for name in ('stage0', 'stage1'):
        x = x @ variables['params'][name]['kernel'] + variables['params'][name]['bias']
    expected = x @ variables['params']['out']['kernel']
    np.testing.assert_allclose(loaded(UINT8), expected, rtol=1e-3, atol=1e-3)


class ListField(nn.Module):
    """A list for a default."""

    widths: list = dataclasses.field(default_factory=lambda: [5, 6])

    @nn.compact
    def __call__(self, x):
        x = x.mean(axis=(1, 2))
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f'fc{i}')(x)
        return x


@pytest.mark.parametrize('name', [f'{__name__}:ListField', 'own_networks:Stack'])
def test_attributes_that_cannot_be_hashed(name):
    """A network whose attributes are lists trains like any; so its export must give features."""
    module = build_encoder(name, {})
    tapped, variables = tap(module, 'output')
    tapped.check(SHAPE)
    expected = module.apply(variables, (UINT8 / 255 - 0.5) / 0.25)
    expected = expected.mean(axis=(1, 2)) if expected.ndim == 4 else expected
    encoder = make_encoder(
        name=name,
        kwargs={},
        hidden_layer='output',
        variables=variables,
        image_size=8,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        step=1,
    )
    np.testing.assert_allclose(encoder(UINT8), expected, rtol=1e-4, atol=1e-4)


class HalfParameters(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, param_dtype=jnp.bfloat16, name='fc')(x.mean(axis=(1, 2)))


def test_bfloat16_parameters_are_exported(tmp_path):
    """Parameters that a network keeps in bfloat16 survive the export."""
    _, variables = tap(HalfParameters(), 'fc')
    encoder = exported('HalfParameters', 'fc', variables)
    save_encoder(encoder, tmp_path)
    assert_same(load_encoder(tmp_path).variables, encoder.variables)


# In the training step.


FROZEN = {'params/conv/kernel', 'params/conv/bias'}
HEAD = {'params/head/kernel', 'params/head/bias'}


@pytest.fixture(scope='module')
def everything():
    """Three steps of `Everything` on four devices, two passes each: (case, states, again).

    `again` is the first step made a second time from the same state.
    """
    config = small_config(
        'Everything', 'features', accumulate_steps=2, encoder__frozen=('conv',), batch_size=BATCH
    )
    case = make_case(config, devices=4)
    return case, [case.initial, *case.run(3)], case.run(1)[0]


def passes_by_hand(case, network):
    """Norms and peak of a network's encoder after the first step, from Flax's layers alone.

    Each pass of each view takes one half of every device's share; its norms see all of that.
    """
    params = getattr(case.initial, f'{network}_params')['encoder']
    stats = getattr(case.initial, f'{network}_stats')['encoder']
    shares = {view: x.reshape(4, 2, BATCH // 8, 8, 8, 3) for view, x in make_batch(0).items()}
    passes = [
        np.float32(normalised(case.byol, shares[view][:, number].reshape(-1, 8, 8, 3)))
        for number in range(2)
        for view in ('view1', 'view2')
    ]
    return _statistics(params, stats['batch_stats'], stats['own']['peak'], passes)


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


@pytest.mark.parametrize('network', ['online', 'target'])
def test_norms_see_the_batch_of_all_devices(everything, network):
    """BatchNorm that knows of no axis, made inside or handed in, is synchronised over devices."""
    case, states, _ = everything
    norms, _ = passes_by_hand(case, network)
    actual = getattr(states[1], f'{network}_stats')['encoder']['batch_stats']
    assert jax.tree.structure(actual) == jax.tree.structure(norms)
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(norms), strict=True):
        np.testing.assert_allclose(a, e, 1e-6, 1e-6, err_msg=jax.tree_util.keystr(path))
    assert Everything().norm.axis_name is None


@pytest.mark.parametrize('network', ['online', 'target'])
def test_other_statistics_are_averaged_over_devices(everything, network):
    """A statistic that is no batch normalisation ends as the mean of the devices' own."""
    case, states, _ = everything
    _, peak = passes_by_hand(case, network)
    actual = getattr(states[1], f'{network}_stats')['encoder']['own']['peak']
    np.testing.assert_allclose(actual, peak, rtol=1e-4, atol=1e-5)


def test_every_device_holds_the_same_state(everything):
    """After a step parameters and statistics are equal on all devices, bit for bit."""
    case, states, _ = everything
    state, _ = case.step(states[1], shard_batch(make_batch(1), 4))
    for leaf in jax.tree.leaves(state):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == 3
        for other in others:
            np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize('network', ['online', 'target'])
def test_frozen_layers_and_those_behind_stay_bit_for_bit(everything, network):
    """Three steps with strong weight decay move all parameters but the frozen and the head's."""
    case, states, _ = everything
    assert case.byol.encoder.frozen == FROZEN
    assert case.byol.encoder.behind == HEAD
    first, *later = (encoder_of(state, network) for state in states)
    for state in later:
        for path, leaf in state.items():
            same = np.array_equal(leaf, first[path])
            assert same == (path in FROZEN | HEAD), path


def test_a_layer_to_freeze_that_is_none():
    """A name in encoder.frozen that is no layer with parameters is answered with the nearest."""
    for wrong, near in (('convv', 'conv'), ('bn1', 'bn'), ('features', 'fc')):
        config = small_config('Everything', 'features', encoder__frozen=('fc', wrong))
        with pytest.raises(UserError, match=f"encoder.frozen: '{wrong}' is no layer") as caught:
            make_method(config)
        if wrong != 'features':
            assert f"Did you mean '{near}'?" in str(caught.value)


def masks_of(state, network):
    """[pass, stream, unit]: the means over devices of the masks of a step's four passes."""
    return getattr(state, f'{network}_stats')['encoder']['seen']['masks']


def test_every_pass_draws_for_itself(everything):
    """Devices, passes, views, networks, streams and steps all get masks of their own."""
    _, states, _ = everything
    drawn = [masks_of(state, network) for state in states[1:] for network in ('online', 'target')]
    rows = np.concatenate(drawn).reshape(-1, 32)
    assert len(np.unique(rows, axis=0)) == len(rows) == 3 * 2 * 4 * 2
    # A mean that is neither 0 nor 1 is of devices that differ.
    assert np.all(np.any((rows > 0) & (rows < 1), axis=1))


def test_a_step_repeats_itself_bit_for_bit(everything):
    """The same state and batch give the same state, whatever has been drawn in between."""
    _, states, again = everything
    assert_same(again, states[1])


@pytest.mark.slow
def test_another_seed_draws_otherwise(everything):
    """From the same state and batch, a run with another seed draws other masks."""
    case, states, _ = everything
    config = small_config('Everything', 'features', accumulate_steps=2, seed=1)
    other = make_case(config, devices=4)
    assert_same(other.initial.online_params, case.initial.online_params)
    state = other.run(1, states[0])[0]
    for network in ('online', 'target'):
        assert np.any(masks_of(state, network) != masks_of(states[1], network))


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'lars'])
def test_freeze_steps(optimizer):
    """For encoder.freeze_steps real steps the encoder is held bit for bit; then it moves."""
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
            # A bias in front of a norm has no gradient but rounding.
            assert not moved if held else moved | {'params/hidden2/bias'} == trained
        for part in ('projector', 'predictor'):
            old, new = by_path(before.online_params[part]), by_path(after.online_params[part])
            assert all(np.any(old[path] != new[path]) for path in old if 'kernel' in path)


def test_as_trained_leaves_nothing_at_its_first_value():
    """The variables of these tests tell scale from bias and mean from variance."""
    variables = as_trained(jax.eval_shape(ConvNet().init, jax.random.key(0), IMAGES))
    for path, leaf in by_path(variables).items():
        assert not np.any((leaf == 0) | (leaf == 1)), path
