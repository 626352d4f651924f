"""Flax's two APIs for networks, for tests that hold in both, and single layers of theirs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import linen_networks
import network_steps
import nnx_networks
import numpy as np
import pytest

from byol_jax.interop.encoder import Encoder, make_encoder
from byol_jax.interop.export import load_encoder, save_encoder
from byol_jax.models.registry import build_encoder

# Tolerance of float32 against the same layers called one by one, which XLA fuses differently.
CLOSE = {'rtol': 1e-5, 'atol': 2e-6}
UINT8 = np.random.default_rng(1).integers(0, 256, network_steps.SHAPE, np.uint8)
# What an exported encoder makes of them.
NORMALISED = np.float32((UINT8 / 255 - 0.5) / 0.25)


@dataclasses.dataclass(frozen=True)
class Api:
    """One of the two APIs, and the module that holds its networks."""

    name: str
    networks: Any

    def path(self, network: str) -> str:
        """A network as a config names it."""
        return f'{self.networks.__name__}:{network}'

    def network(self, network: str, **kwargs: Any) -> Any:
        return build_encoder(self.path(network), kwargs)

    def tap(self, network, layer, pool='mean', axis_name=None, **kwargs):
        """(tapped encoder, variables as after some training) of a network."""
        return network_steps.tap(self.network(network, **kwargs), layer, pool, axis_name=axis_name)


LINEN = Api('linen', linen_networks)
NNX = Api('nnx', nnx_networks)


def of_both(name: str, linen: list[Any], nnx: list[Any]) -> pytest.MarkDecorator:
    """Parametrises a test over values that differ between the two APIs."""
    cases = [(LINEN, value) for value in linen] + [(NNX, value) for value in nnx]
    ids = [f'{api.name}-{value}' for api, value in cases]
    return pytest.mark.parametrize(('api', name), cases, ids=ids)


both = pytest.mark.parametrize('api', [LINEN, NNX], ids=['linen', 'nnx'])


def at(tree, path):
    """The part of nested dicts at a path such as 'stages/0'; None if there is none."""
    for key in path.split('/'):
        if key not in tree:
            return None
        tree = tree[key]
    return tree


def call(layer: nn.Module, variables, path, *args, **kwargs):
    """Calls a single Linen layer with the variables at one path.

    NNX's layers have the same names, shapes and orders of axes.
    """
    own = {kind: at(tree, path) for kind, tree in variables.items()}
    own = {kind: tree for kind, tree in own.items() if tree is not None}
    return layer.apply(own, *args, **kwargs)


def dense(variables, path, x):
    """A dense layer in NumPy, in float64."""
    p = at(variables['params'], path)
    return np.asarray(x, np.float64) @ p['kernel'] + p.get('bias', 0)


def normed(variables, path, x, mean=None, var=None):
    """A batch normalisation in NumPy, with the running statistics unless others are given."""
    p, running = at(variables['params'], path), at(variables['batch_stats'], path)
    mean, var = (running['mean'], running['var']) if mean is None else (mean, var)
    return (x - mean) / np.sqrt(var + 1e-5) * p['scale'] + p['bias']


def assert_same(actual, expected):
    """Trees are equal bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(a, e, err_msg=jax.tree_util.keystr(path))


def assert_close(actual, expected, rtol, atol):
    """Trees are equal up to a tolerance."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, e, rtol, atol, err_msg=jax.tree_util.keystr(path))


def exported(
    name: str, layer: str, variables: Any, kwargs: dict[str, Any] | None = None
) -> Encoder:
    """The encoder of a network named 'module:Class'; it takes pictures of 8x8 pixels."""
    return make_encoder(
        name=name,
        kwargs=kwargs or {},
        hidden_layer=layer,
        variables=variables,
        image_size=network_steps.SIZE,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        step=1,
    )


def saved_and_loaded(encoder: Encoder, folder: Path) -> Encoder:
    """An encoder, saved to its two files and loaded again."""
    save_encoder(encoder, folder)
    return load_encoder(folder)
