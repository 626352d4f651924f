"""Helpers for the tests of ViT and ConvNeXt: float64 layers, random weights, recordings."""

from __future__ import annotations

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import scipy.special


def dense(params, x):
    return x @ params['kernel'] + params['bias']


def gelu(x):
    """x times the probability that a standard normal number lies below x."""
    return x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2


def layer_norm(params, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * params['scale'] + params['bias']


def patches(params, x):
    """A convolution without overlap: the weights of a patch times its values, [B, h, w, D]."""
    side, _, _, features = params['kernel'].shape
    batch, height, width, channels = x.shape
    x = x[:, : height // side * side, : width // side * side]
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return np.einsum('bhywxc,yxcd->bhwd', x, params['kernel']) + params['bias'].reshape(features)


def shapes(module, *size):
    """(output shape, variable shapes) for one image of this size, without computing it."""
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(module.init_with_output, jax.random.key(0), images)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


def random_variables(module, *size):
    """float64 variables of the size of trained ones, none near its initial value."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ('scale', 'gamma'):
            return rng.uniform(0.5, 1.5, leaf.shape)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == 'kernel' else 4
        return rng.normal(size=leaf.shape) / np.sqrt(fan_in)

    return jax.tree_util.tree_map_with_path(draw, shapes(module, *size)[1])


def as_type(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


@functools.cache
def compiled(module, train):
    more = {} if train is None else {'train': train}

    def apply(variables, x, rng=None):
        rngs = {} if rng is None else {'dropout': rng}
        return module.apply(variables, x, **more, rngs=rngs, capture_intermediates=True)

    return jax.jit(apply)


def by_path(state):
    """The output of each layer by path, without that of the network itself."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(state['intermediates']):
        names = [key.key for key in path if hasattr(key, 'key')]
        assert names.pop() == '__call__'
        found['/'.join(names)] = leaf
    del found['']
    return found


def run(module, variables, x, train=None, seed=None):
    """(output, outputs by path of the layer), as NumPy arrays."""
    rng = () if seed is None else (jax.random.key(seed),)
    output, state = compiled(module, train)(variables, x, *rng)
    return np.asarray(output), jax.tree.map(np.asarray, by_path(state))


def types(module, variables, x, train):
    """(types of outputs by path, types of all operands of matrix products and convolutions)."""

    def operands(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
                yield from (variable.aval.dtype for variable in equation.invars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from operands(getattr(inner, 'jaxpr', inner))

    jaxpr, (_, state) = jax.make_jaxpr(compiled(module, train), return_shape=True)(
        variables, x, jax.random.key(0)
    )
    return {path: leaf.dtype for path, leaf in by_path(state).items()}, list(operands(jaxpr.jaxpr))


def dropped(branch, after, rate):
    """The examples whose branch was dropped; the others' must be scaled by 1 / (1 - rate)."""
    gone = np.all(after == 0, axis=tuple(range(1, after.ndim)))
    np.testing.assert_allclose(after[~gone], branch[~gone] / (1 - rate), rtol=1e-5)
    assert np.all(np.any(branch != 0, axis=tuple(range(1, branch.ndim))))
    return gone
