"""A user's own Linen networks: what NNX has no counterpart for."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apis import CLOSE, assert_close, dense
from network_steps import IMAGES, SHAPE, features_of, make_method, quick_jit, small_config, tap
from own_networks import Keep

from byol_jax.models.tap import TappedEncoder

MEANS = IMAGES.mean(axis=(1, 2))


def behind(tapped, variables):
    return dataclasses.replace(tapped, behind=tapped.find_behind(variables, IMAGES))


def passed(tapped, variables, passes):
    """(features of the last of some training passes, variables after them)."""
    for _ in range(passes):
        features, state = features_of(tapped, variables, train=True)
        variables = {**variables, **state}
    return features, variables


class TrainingOnly(nn.Module):
    """Uses its power iteration's vector in training only, and the norm in evaluation."""

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
    _, variables = passed(behind(tapped, variables), variables, 30)
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
    """The power iteration of flax.linen.SpectralNorm continues from pass to pass."""
    tapped, variables = tap(Spectral(), 'output')
    tapped.check(SHAPE)
    features, variables = passed(behind(tapped, variables), variables, 30)
    inner = variables['params']['inner']
    largest = np.linalg.svd(inner['kernel'], compute_uv=False)[0]
    x = MEANS @ (inner['kernel'] / largest) + inner['bias']
    np.testing.assert_allclose(features, dense(variables, 'head', x), 1e-4, 1e-5)


class SowingSums(nn.Module):
    """Sows a sum, as in Flax's documentation for a loss."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        add = {'reduce_fn': jnp.add, 'init_fn': lambda: jnp.zeros(())}
        self.sow('losses', 'l2', jnp.mean(x**2), **add)
        return x


@pytest.mark.xfail(strict=True, reason='only what is sown into tuples is told from state')
def test_a_sown_sum_is_no_state():
    """Values sown with a reduce_fn are reports too: they are no variables, and do not grow."""
    _, variables = tap(SowingSums(), 'output')
    assert set(variables) == {'params'}


class Partitioned(nn.Module):
    """Its parameters are boxes that describe their layout over devices."""

    @nn.compact
    def __call__(self, x):
        layout = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'model'))
        x = nn.Dense(6, kernel_init=layout, name='fc')(x.mean(axis=(1, 2)))
        logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('in', 'out'))
        return x @ self.param('kernel', logical, (6, 5))


def test_partitioned_parameters():
    """Parameters with a layout are plain arrays here, and give Flax's results."""
    tapped, _ = tap(Partitioned(), 'output')
    tapped.check(SHAPE)
    key = jax.random.key(0)
    variables, (expected, boxed) = quick_jit(
        lambda key, x: (tapped.init(key, x), Partitioned().init_with_output(key, x))
    )(key, IMAGES)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    assert isinstance(boxed['params']['fc']['kernel'], nn.Partitioned)
    np.testing.assert_allclose(features_of(tapped, variables)[0], expected, **CLOSE)


class AdoptsType(nn.Module):
    """Keeps the last batch's mean in the type it has."""

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
    """With precision='bfloat16', a network's own statistics stay float32, as in the state."""
    byol = make_method(small_config('ConvNet', 'drop', precision='bfloat16'))
    byol = dataclasses.replace(byol, encoder=TappedEncoder(AdoptsType(), 'output'))
    params, stats = jax.eval_shape(lambda: byol.init(jax.random.key(0), 8))
    images = jax.ShapeDtypeStruct(SHAPE, np.uint8)
    _, after = jax.eval_shape(lambda p, s, x: byol.represent(p, s, x, True), params, stats, images)
    assert after['own']['last'].dtype == stats['encoder']['own']['last'].dtype == np.float32


class Switching(nn.Module):
    """Skips its block at random in training, with nn.cond."""

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
    """A network may skip a layer in training with nn.cond."""
    tapped, variables = tap(Switching(), 'end')
    tapped.check(SHAPE)
    stem = dense(variables, 'stem', MEANS)
    taken, left = (dense(variables, 'end', x) for x in (dense(variables, 'block', stem), stem))
    close = {'rtol': 1e-4, 'atol': 1e-5}
    np.testing.assert_allclose(features_of(tapped, variables)[0], taken, **close)
    seen = set()
    for seed in range(8):
        features, _ = features_of(tapped, variables, train=True, seed=seed)
        seen.add((np.allclose(features, taken, **close), np.allclose(features, left, **close)))
    assert seen == {(True, False), (False, True)}


class Tied(nn.Module):
    """Runs one block four times with nn.scan, with new masks each time."""

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
    """Each round of an nn.scan that splits a stream draws its own numbers."""
    tapped, variables = tap(Tied(), 'output')
    masks, _ = features_of(tapped, variables, train=True, seed=0)
    assert np.any(masks != masks[:, :1])


class HandedIn(nn.Module):
    """Gets its norm as an attribute, and makes its layers in setup()."""

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
    assert_close(state, moved, **CLOSE)
