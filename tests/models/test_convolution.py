"""Convolutions with our own gradient: they equal JAX's, and ResNets train with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from byol_jax.models import resnet
from byol_jax.models.convolution import quick_convolution
from byol_jax.models.flops import count_flops

LAYOUT = ('NHWC', 'HWIO', 'NHWC')
# (height, width), kernel, strides, padding
CASES = {
    'as it is': ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1))),
    'strided': ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    'strided, odd': ((9, 7), (3, 3), (2, 2), ((1, 1), (1, 1))),
    'pixels that no tap sees': ((8, 9), (3, 3), (3, 2), ((0, 0), (1, 0))),
    'stem': ((16, 16), (7, 7), (2, 2), ((3, 3), (3, 3))),
    'SAME': ((8, 7), (3, 3), (2, 2), 'SAME'),
    'VALID': ((8, 7), (3, 2), (2, 1), 'VALID'),
    'one pixel': ((8, 8), (1, 1), (1, 1), ((0, 0), (0, 0))),
    'one pixel, strided': ((8, 7), (1, 1), (2, 2), ((0, 0), (0, 0))),
    'one pixel, SAME': ((8, 7), (1, 1), (2, 3), 'SAME'),
    'nothing comes out': ((4, 4), (3, 3), (2, 2), ((-1, -1), (0, 0))),
    'one pixel, padded': ((8, 8), (1, 1), (2, 2), ((1, 1), (1, 1))),
}


def made(shape, kernel, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(3, *shape, 4)), dtype)
    return images, jnp.asarray(rng.normal(size=(*kernel, 4, 5)), dtype)


def with_gradients(convolution, images, kernel, strides, padding):
    """The result of a convolution, and the gradients of its images and kernel."""
    result, back = jax.vjp(lambda x, w: convolution(x, w, strides, padding), images, kernel)
    weights = jnp.cos(jnp.arange(result.size, dtype=result.dtype)).reshape(result.shape)
    return result, *back(weights)


def plain(images, kernel, strides, padding):
    return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=LAYOUT)


@pytest.mark.parametrize('case', CASES)
def test_gradients_are_those_of_jax(case):
    """The result and both gradients equal JAX's, up to rounding."""
    shape, kernel, strides, padding = CASES[case]
    given = made(shape, kernel)
    expected = with_gradients(plain, *given, strides, padding)
    for actual, wanted in zip(
        with_gradients(quick_convolution, *given, strides, padding), expected, strict=True
    ):
        assert actual.dtype == wanted.dtype
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_summed_in_float32():
    """The products of a weight gradient in bfloat16 are summed in float32."""
    images, kernel = made((8, 8), (3, 3), jnp.bfloat16)
    strides, padding = CASES['as it is'][2:]

    def gradients(images, kernel):
        return with_gradients(quick_convolution, images, kernel, strides, padding)

    equations = jax.make_jaxpr(gradients)(images, kernel).eqns
    products = [e for e in equations if e.primitive.name == 'dot_general']
    assert [e.outvars[0].aval.dtype for e in products] == [jnp.float32] * 9
    assert [x.dtype for x in gradients(images, kernel)] == [jnp.bfloat16] * 3


@pytest.mark.parametrize(
    'option',
    [
        {'lhs_dilation': (1, 2)},
        {'rhs_dilation': (2, 2)},
        {'feature_group_count': 2},
        {'dimension_numbers': ('NWHC', 'HWIO', 'NHWC')},
    ],
)
def test_others_are_refused(option):
    """Dilated and grouped convolutions and other layouts are refused."""
    images, kernel = made((8, 8), (3, 3))
    with pytest.raises(ValueError, match='have no quick gradient'):
        quick_convolution(images, kernel, (1, 1), 'SAME', **option)


@pytest.fixture(scope='module', params=['basic', 'bottleneck'])
def network(request):
    """A small ResNet, its variables and images."""
    module = resnet.ResNet(
        (1, 1), request.param == 'bottleneck', (8, 16), (1, 2), 8, zero_init_residual=False
    )
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.normal(size=(4, 32, 32, 3)), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    # Positive, as variances must be; not compiled, unlike the module's own initialisation.
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.01, 0.3, x.shape), x.dtype), shapes
    )
    return module, variables, images


def loss(network, train=True):
    module, variables, images = network

    def of(params):
        rest = {'batch_stats': variables['batch_stats']}
        out, _ = module.apply({'params': params} | rest, images, train, mutable=['batch_stats'])
        return jnp.sum(jnp.sin(7 * out))

    return of


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='only used on the CPU')
def test_a_resnet_trains_with_it(network, monkeypatch):
    """On the CPU, a ResNet in training uses the fast gradient, which equals the plain one."""
    used = []

    def counted(*arguments, **options):
        used.append(arguments[1].shape)
        return quick_convolution(*arguments, **options)

    monkeypatch.setattr(resnet, 'quick_convolution', counted)
    params = network[1]['params']
    actual = jax.jit(jax.grad(loss(network)))(params)
    assert len(used) == sum(leaf.ndim == 4 for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(resnet, 'quick_convolution', None)
    expected = jax.jit(jax.grad(loss(network)))(params)
    for wanted, given in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-3 * float(abs(wanted).max()))


def test_other_devices_have_their_own(network, monkeypatch):
    """On accelerators, and in evaluation, convolutions are XLA's."""
    monkeypatch.setattr(resnet, 'quick_convolution', 'not to be called')
    jax.eval_shape(loss(network, train=False), network[1]['params'])
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    jax.eval_shape(loss(network), network[1]['params'])


def test_its_operations_are_counted(network, monkeypatch):
    """A forward pass in training counts as many operations as with plain convolutions."""
    params = network[1]['params']
    counts = [count_flops(jax.make_jaxpr(loss(network))(params))['']]
    monkeypatch.setattr(resnet, 'quick_convolution', None)
    counts.append(count_flops(jax.make_jaxpr(loss(network))(params))[''])
    assert counts[0] == counts[1] > 0


def test_frozen_features_have_both_derivatives(network):
    """In evaluation, an encoder has forward-mode derivatives, which equal the backward ones."""
    module, variables, images = network

    def features(x):
        return jnp.sum(jnp.sin(module.apply(variables, x)))

    direction = jnp.ones_like(images)
    forward = jax.jit(lambda x: jax.jvp(features, (x,), (direction,))[1])(images)
    backward = jnp.sum(jax.jit(jax.grad(features))(images) * direction)
    np.testing.assert_allclose(forward, backward, rtol=1e-3)
