"""A user's own network by name and arguments: from a config, from a file, and exported."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apis import (
    LINEN,
    NNX,
    NORMALISED,
    UINT8,
    assert_same,
    at,
    both,
    dense,
    exported,
    saved_and_loaded,
)
from network_steps import SHAPE, make_method, small_config, tap
from own_networks import ConvNet

from byol_jax.models.registry import build_encoder

FIRST = {LINEN: 'conv1', NNX: 'stages/0/layers/0'}


@both
def test_a_partial_of_a_class(api):
    """A functools.partial is an encoder like a class; its arguments may be overridden."""

    def width(network, **kwargs):
        _, variables = api.tap(network, 'output', **kwargs)
        return at(variables['params'], FIRST[api])['kernel'].shape[-1]

    whole, partial = width('ConvNet'), width('PartialConvNet')
    assert whole != partial
    assert width('PartialConvNet', width=8) == 8


def test_a_partial_keeps_its_arguments():
    """Arguments of a partial that are not overridden are the partial's own."""
    assert LINEN.network('PartialConvNet') == ConvNet('group', width=6)
    assert LINEN.network('PartialConvNet', width=2) == ConvNet('group', width=2)


FEATURES = {LINEN: 'features', NNX: 'out_features'}
STAGE = {LINEN: 'stage{}', NNX: 'stages/{}'}


def arguments(api):
    """Takes lists and dicts as arguments."""
    options = {FEATURES[api]: 4, 'use_bias': False}
    return {'stages': [{'width': 5}, {'width': 6}], 'options': options}


@both
def test_arguments_from_a_config(api):
    """Lists and dicts in encoder.kwargs reach the network as sequences and mappings."""
    name, kwargs = api.path('Configured'), arguments(api)
    byol = make_method(small_config(name, 'out', encoder__kwargs=kwargs))
    assert byol.encoder.module == build_encoder(name, kwargs)


@both
def test_arguments_from_json(api, tmp_path):
    """A network with list and dict arguments gives the same features once it is loaded."""
    name, kwargs = api.path('Configured'), arguments(api)
    _, variables = api.tap('Configured', 'out', **kwargs)
    loaded = saved_and_loaded(exported(name, 'out', variables, kwargs), tmp_path)
    if api is LINEN:
        assert loaded.module == build_encoder(name, kwargs)
    x = NORMALISED.reshape(4, -1) if api is LINEN else NORMALISED.mean(axis=(1, 2))
    for i in range(2):
        x = dense(variables, STAGE[api].format(i), x)
    np.testing.assert_allclose(loaded(UINT8), dense(variables, 'out', x), rtol=1e-3, atol=1e-3)


class ListField(nn.Module):
    """Has a list as a default."""

    widths: list = dataclasses.field(default_factory=lambda: [5, 6])

    @nn.compact
    def __call__(self, x):
        x = x.mean(axis=(1, 2))
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f'fc{i}')(x)
        return x


@pytest.mark.parametrize('name', [f'{__name__}:ListField', 'own_networks:Stack'])
def test_attributes_that_cannot_be_hashed(name):
    """A network whose attributes are lists trains like any other, so its export must work."""
    module = build_encoder(name, {})
    tapped, variables = tap(module, 'output')
    tapped.check(SHAPE)
    expected = jax.jit(lambda x: module.apply(variables, x))(NORMALISED)
    expected = expected.mean(axis=(1, 2)) if expected.ndim == 4 else expected
    features = exported(name, 'output', variables)(UINT8)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


class Spectral(nn.Module):
    """Flax's own spectral normalisation; the names of its variables contain a '/'."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.mean(axis=(1, 2))
        return nn.SpectralNorm(nn.Dense(6, name='inner'), name='norm')(x, update_stats=train)


class HalfParameters(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, param_dtype=jnp.bfloat16, name='fc')(x.mean(axis=(1, 2)))


@pytest.mark.parametrize('kind', [Spectral, HalfParameters])
def test_variables_are_exported(kind, tmp_path):
    """Variables with a '/' in their names, and parameters in bfloat16, survive the export."""
    _, variables = tap(kind(), 'output')
    encoder = exported(f'{__name__}:{kind.__name__}', 'output', variables)
    loaded = saved_and_loaded(encoder, tmp_path)
    assert_same(loaded.variables, encoder.variables)
    np.testing.assert_array_equal(loaded(UINT8), encoder(UINT8))
