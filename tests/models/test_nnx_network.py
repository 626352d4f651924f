"""A user's own NNX networks: what Linen has no counterpart for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import nnx_networks
import numpy as np
import pytest
from apis import CLOSE, NNX, NORMALISED, UINT8, assert_same, exported, saved_and_loaded
from flax import nnx
from network_steps import IMAGES, SHAPE, by_path, features_of, tap

from byol_jax.errors import UserError
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder


def recipe(kind, **kwargs):
    """The network of a class in this module, as a config's `encoder.name` gives it."""
    return build_encoder(f'{kind.__module__}:{kind.__name__}', kwargs)


def live(kind, variables):
    """A module of the class, made by Flax alone, with these values."""
    # Drawing initial values, only to replace them, would take most of these tests' time.
    model = nnx.eval_shape(lambda: kind(rngs=nnx.Rngs(0)))
    values = {path.partition('/')[2]: leaf for path, leaf in by_path(variables).items()}
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.RngKey):
            keys = jax.random.key(1)
            shape = variable.shape
            variable.set_value(jax.random.split(keys, shape) if shape else keys)
        elif isinstance(variable, nnx.RngCount):
            variable.set_value(jnp.zeros(variable.shape, variable.dtype))
        elif isinstance(variable, nnx.Variable):
            variable.set_value(jnp.asarray(values.pop('/'.join(map(str, path)))))
    assert not values
    model.eval()
    return model


@nnx.jit
def outputs(model):
    return model(IMAGES)


def test_training_without_a_key_is_refused():
    """A network with random layers says that training it needs a key."""
    tapped, variables = NNX.tap('ConvNet', 'drop')
    with pytest.raises(UserError, match='NnxConvNet has random streams'):
        tapped.apply(variables, IMAGES, True)


def test_drawing_behind_the_tap():
    """Draws behind the tap do no harm, in training and in evaluation."""
    TappedEncoder(NNX.network('AlwaysNoisy'), 'fc').check(SHAPE)


class Table(nnx.Module):
    """Has a table that is not a Variable, as fixed position embeddings often are."""

    def __init__(self, numpy: bool, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3, 6, rngs=rngs)
        self.table = np.arange(6, dtype=np.float32) if numpy else jnp.arange(6.0)

    def __call__(self, x):
        return self.fc(x.mean(axis=(1, 2))) + self.table


@pytest.mark.parametrize('numpy', [True, False])
def test_an_array_that_is_no_variable(numpy):
    """An array in a plain attribute is refused by its name; the message says how to keep it."""
    with pytest.raises(UserError, match=r"plain array as its attribute 'table'.*nnx\.Variable"):
        TappedEncoder(recipe(Table, numpy=numpy), 'output').check(SHAPE)


def test_blocks_handed_to_transformed_functions():
    """Layers in nnx.remat and nnx.jit of a function train as usual; their outputs are no taps."""
    tapped, variables = NNX.tap('Functional', 'head')
    tapped.check(SHAPE)
    expected = outputs(live(nnx_networks.Functional, variables))
    np.testing.assert_allclose(features_of(tapped, variables)[0], expected, **CLOSE)
    _, state = features_of(tapped, variables, train=True, seed=0)
    for path, leaf in by_path(state).items():
        assert not np.array_equal(leaf, by_path(variables)[path]), path
    with pytest.raises(UserError, match=r"encoder\.hidden_layer='first' is not a layer"):
        TappedEncoder(NNX.network('Functional'), 'first').check(SHAPE)


class Particular(nnx.Module):
    """Compares the exact classes of its layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3, 6, rngs=rngs)
        self.bn = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        x = x.mean(axis=(1, 2))
        for layer in (self.fc, self.bn):
            if type(layer) is nnx.Linear:
                x = nnx.relu(layer(x))
            elif type(layer) is nnx.BatchNorm:
                x = layer(x)
        return x


@pytest.mark.xfail(strict=True, reason='a pass swaps the classes of layers for subclasses')
def test_layers_are_what_they_are():
    """A network that asks for `type(layer)` computes the same as on its own."""
    tapped, variables = tap(recipe(Particular), 'output')
    expected = outputs(live(Particular, variables))
    features, _ = features_of(tapped, variables)
    assert features.shape == expected.shape
    np.testing.assert_allclose(features, expected, **CLOSE)


class Forwarding(nnx_networks.Mlp):
    """Passes its arguments on, as many subclasses do."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


def test_a_constructor_that_hands_its_arguments_on():
    """A constructor that takes any keyword also gets `rngs`."""
    TappedEncoder(recipe(Forwarding), 'hidden2').check(SHAPE)


def test_the_loaded_module_lives(tmp_path):
    """encoder.module is an nnx.Module in evaluation mode, which the caller may change."""
    _, variables = NNX.tap('Methods', 'output')
    loaded = saved_and_loaded(exported(NNX.path('Methods'), 'output', variables), tmp_path)
    model = loaded.module
    assert type(model) is nnx_networks.Methods
    assert type(model.bn) is nnx.BatchNorm
    features = loaded(UINT8)
    np.testing.assert_allclose(model(NORMALISED), features, **CLOSE)
    model.train()
    assert np.any(model(NORMALISED) == 0)
    model.eval()
    assert not np.allclose(model(NORMALISED), features, atol=1e-3)  # Its statistics have changed.
    np.testing.assert_array_equal(loaded(UINT8), features)


@pytest.mark.xfail(strict=True, reason='variables that are NumPy arrays are written to in place')
def test_fine_tuning_from_the_loaded_variables(tmp_path):
    """encoder.apply trains on the loaded variables, and does not change them."""
    _, variables = NNX.tap('Methods', 'output')
    loaded = saved_and_loaded(exported(NNX.path('Methods'), 'output', variables), tmp_path)
    loaded.apply(loaded.variables, UINT8, train=True, rng=jax.random.key(0))
    assert_same(loaded.variables, variables)
