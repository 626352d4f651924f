"""The count of floating-point operations: by hand, against XLA, and layer by layer."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.extend.core.primitives
import jax.numpy as jnp
import pytest
from jax import lax

from byol_jax.models import flops
from byol_jax.models.flops import count_flops, layer_paths, layer_scope
from byol_jax.models.registry import build_encoder


def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def total(function, *operands, **options):
    return count_flops(jax.make_jaxpr(function)(*operands), **options)['']


def scope(path):
    return jax.named_scope(layer_scope(path))


def layered(module, *operands, **kwargs):
    """The jaxpr of a module in which every call of a layer has the layer's scope."""

    def within(call, args, kwargs, context):
        if context.method_name != '__call__':
            return call(*args, **kwargs)
        with scope('/'.join(context.module.path)):
            return call(*args, **kwargs)

    def apply(variables, *operands):
        with nn.intercept_methods(within):
            return module.apply(variables, *operands, **kwargs)

    variables = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, **kwargs), *operands)
    return jax.make_jaxpr(apply)(variables, *operands)


def xla_total(function, *operands):
    """XLA's count for a lowered computation; it counts transcendentals separately."""
    cost = jax.jit(function).lower(*operands).cost_analysis()
    return cost['flops'] + cost.get('transcendentals', 0)


def test_dense():
    """A dense layer costs two operations for each weight and example, and one for each bias."""

    def dense(x, kernel, bias):
        return x @ kernel + bias

    assert total(dense, floats(5, 7), floats(7, 11), floats(11)) == 2 * 5 * 7 * 11 + 5 * 11


@pytest.mark.parametrize(
    ('equation', 'left', 'right', 'expected'),
    [
        ('bij,bjk->bik', (3, 4, 5), (3, 5, 6), 2 * 3 * 4 * 5 * 6),
        ('bqhd,bkhd->bhqk', (2, 7, 3, 5), (2, 9, 3, 5), 2 * 2 * 3 * 7 * 9 * 5),
        ('bhqk,bkhd->bqhd', (2, 3, 7, 9), (2, 9, 3, 5), 2 * 2 * 3 * 7 * 9 * 5),
        ('bij,ijk->bk', (2, 3, 4), (3, 4, 5), 2 * 2 * 3 * 4 * 5),
        # Even if nothing is contracted, it is a product of matrices of depth 1.
        ('i,j->ij', (3,), (4,), 2 * 3 * 4),
    ],
)
def test_products(equation, left, right, expected):
    """Batch dimensions count once, and contracted ones as multiply-adds, as in attention."""

    def product(x, y):
        return jnp.einsum(equation, x, y)

    assert total(product, floats(*left), floats(*right)) == expected
    assert total(product, *(floats(*s, dtype=jnp.bfloat16) for s in (left, right))) == expected


LAYOUT = ('NHWC', 'HWIO', 'NHWC')
# Taps that meet an input value, for kernel 3 on 5 values with 1 value of padding on either side:
# 2 + 3 + 3 + 3 + 2; with dilation 2 and 2 values of padding: 2 + 2 + 3 + 2 + 2.
SAME, DILATED = 13, 11
# (images, kernel, arguments, operations).
CONVOLUTIONS = {
    'valid': ((2, 8, 8, 3), (3, 3, 3, 4), {'padding': 'VALID'}, 2 * 2 * 6 * 6 * 4 * 27),
    'padded': ((2, 5, 5, 3), (3, 3, 3, 4), {'padding': 'SAME'}, 2 * 2 * SAME**2 * 3 * 4),
    'strided': (
        (1, 9, 9, 3),
        (3, 3, 3, 4),
        {'padding': 'VALID', 'window_strides': (2, 3)},
        2 * (4 * 3) * 9 * 3 * 4,
    ),
    'grouped': (
        (2, 5, 5, 8),
        (3, 3, 2, 12),
        {'padding': 'SAME', 'feature_group_count': 4},
        2 * 2 * SAME**2 * 2 * 12,
    ),
    'depthwise': (
        (2, 5, 5, 8),
        (3, 3, 1, 8),
        {'padding': 'SAME', 'feature_group_count': 8},
        2 * 2 * SAME**2 * 8,
    ),
    'batch groups': (
        (6, 5, 5, 4),
        (3, 3, 4, 9),
        {'padding': 'SAME', 'batch_group_count': 3},
        2 * 2 * SAME**2 * 4 * 9,
    ),
    'dilated': (
        (1, 5, 5, 3),
        (3, 3, 3, 4),
        {'padding': [(2, 2), (1, 1)], 'rhs_dilation': (2, 1)},
        2 * DILATED * SAME * 3 * 4,
    ),
    # Of two neighbours in a row of values with zeros between them, one is a value.
    'transposed': (
        (1, 3, 3, 3),
        (2, 2, 3, 4),
        {'padding': [(0, 0), (0, 0)], 'lhs_dilation': (2, 2)},
        2 * (4 * 4) * 3 * 4,
    ),
    'cropped': ((1, 8, 8, 3), (3, 3, 3, 4), {'padding': [(-1, -1), (0, -2)]}, 2 * 16 * 27 * 4),
    'uneven': (
        (2, 11, 6, 4),
        (4, 2, 2, 6),
        {
            'padding': [(3, 0), (0, 2)],
            'window_strides': (2, 1),
            'lhs_dilation': (1, 3),
            'rhs_dilation': (2, 3),
            'feature_group_count': 2,
        },
        None,
    ),
}


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_convolutions(name):
    """Convolutions count the taps that meet an input value, as by hand and by XLA."""
    images, kernel, arguments, expected = CONVOLUTIONS[name]
    arguments = {'window_strides': (1, 1), 'dimension_numbers': LAYOUT, **arguments}

    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, **arguments)

    operands = floats(*images), floats(*kernel)
    found = total(convolve, *operands)
    assert found == xla_total(convolve, *operands)
    assert expected in (None, found)
    outputs = math.prod(jax.eval_shape(convolve, *operands).shape)
    assert total(convolve, *operands, every_tap=True) == 2 * outputs * math.prod(kernel[:3])


def test_the_layout_of_a_convolution_does_not_matter():
    """Dimensions are found from the convolution's own layout, for any number of them."""

    def line(x, kernel):
        layout = ('NCW', 'OIW', 'CWN')
        return lax.conv_general_dilated(x, kernel, (1,), 'SAME', dimension_numbers=layout)

    def volume(x, kernel):
        return lax.conv(x, kernel, (1, 1, 1), 'SAME')

    assert total(line, floats(2, 3, 5), floats(4, 3, 3)) == 2 * 2 * SAME * 3 * 4
    cube = total(volume, floats(2, 3, 5, 5, 5), floats(4, 3, 3, 3, 3))
    assert cube == 2 * 2 * SAME**3 * 3 * 4


@pytest.mark.parametrize(
    ('function', 'expected'),
    [
        (lambda x: -x + x * x / (x - 1), 5 * 12),
        (lambda x: lax.erf(jnp.tanh(lax.rsqrt(jnp.exp(jnp.log(x))))), 5 * 12),
        (lambda x: x**3, 12),
        (lambda x: jnp.maximum(x, 0), 12),
        (jax.nn.relu, 12),
        (jax.nn.silu, 2 * 12),
        (lambda x: x.sum(), 12),
        (lambda x: x.max(axis=0), 12),
        (lambda x: x.argmax(axis=1), 12),
        (lax.cumsum, 12),
        (lambda x: lax.reduce(x, 0.0, lambda a, b: a + b, (0,)), 12),
        (lambda x: jnp.where(x > 0, x, 0).T.reshape(2, 6).astype(jnp.bfloat16), 0),
        (lambda x: jnp.concatenate([x, x])[::2], 0),
        (lambda x: jax.random.bits(jax.random.key(0), x.shape), 0),
        (lambda x: jnp.arange(12) * 2 + 1, 0),
        (lambda x: (x > 0).sum(), 0),
        (lambda x: x.astype(jnp.int32) @ x.astype(jnp.int32).T, 0),
    ],
)
def test_other_operations(function, expected):
    """Arithmetic costs one for each output, reductions one for each input, the rest nothing."""
    assert total(function, floats(4, 3)) == expected


@pytest.mark.parametrize('pool', [nn.max_pool, nn.avg_pool])
def test_pooling(pool):
    """Pooling costs one operation for each value in a window; an average also the division."""
    divisions = 2 * 4 * 4 * 3 if pool is nn.avg_pool else 0
    found = total(lambda x: pool(x, (3, 2), (2, 2), 'SAME'), floats(2, 8, 8, 3))
    assert found == 2 * 4 * 4 * 3 * 6 + divisions


def test_layer_norm():
    """A norm costs a few operations for each value: more than one, fewer than the width."""
    values = 64 * 128
    assert 4 * values < count_flops(layered(nn.LayerNorm(), floats(64, 128)))[''] < 12 * values


def test_the_tables_name_real_operations():
    """A misspelt operation would count as nothing, without an error."""
    known = {
        primitive.name
        for primitive in vars(jax.extend.core.primitives).values()
        if hasattr(primitive, 'name')
    }
    newer_than_the_oldest_jax = {'log2', 'one_minus_square'}
    listed = flops.ELEMENTWISE | flops.REDUCTIONS | flops.WINDOWS
    assert listed - known <= newer_than_the_oldest_jax


@jax.custom_vjp
def with_own_gradient(x):
    return jnp.sin(x)


with_own_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, t: (t * jnp.cos(x),))


@jax.custom_jvp
def with_own_derivative(x):
    with scope('inner'):
        return jnp.sin(x)


with_own_derivative.defjvp(lambda x, t: (jnp.sin(x[0]), t[0] * jnp.cos(x[0])))


def inner(x):
    with scope('inner'):
        return jnp.sin(x)


def scanned(x):
    return lax.scan(lambda carry, _: (inner(carry), None), x, None, length=5)[0]


def looped(x):
    return lax.while_loop(lambda x: x.sum() < 0, inner, x)


def chosen(x):
    return lax.cond(True, inner, lambda x: inner(inner(x)), x)


CALLS = {
    'plainly': (inner, 1, 0),
    'jit': (jax.jit(inner), 1, 0),
    'jit in jit': (jax.jit(jax.jit(inner)), 1, 0),
    'remat': (jax.checkpoint(inner), 1, 0),
    'vmap': (jax.vmap(inner), 1, 0),
    'custom_jvp': (with_own_derivative, 1, 0),
    'scan': (scanned, 5, 0),
    'scan in scan': (
        lambda x: lax.scan(lambda c, _: (scanned(c), None), x, None, length=3)[0],
        15,
        0,
    ),
    # The condition is the sum.
    'while': (looped, 1, 1),
    'the dearer branch': (chosen, 2, 0),
}


@pytest.mark.parametrize('name', CALLS)
def test_calls(name):
    """A call counts for its layer and for the layers inside, however JAX wraps it."""
    function, times, besides = CALLS[name]

    def outer(x):
        with scope('outer'):
            return function(x) + 1

    assert count_flops(jax.make_jaxpr(outer)(floats(3, 4))) == {
        '': 12 * (times + besides + 1),
        'outer': 12 * (times + besides + 1),
        'inner': 12 * times,
    }


@pytest.mark.parametrize(
    ('function', 'each'),
    [
        (jax.nn.relu, 1),
        (jax.nn.silu, 2),
        (lambda x: jax.nn.gelu(x, approximate=False), 5),
        (with_own_gradient, 1),
    ],
)
def test_activations_count_for_their_layer(function, each):
    """Functions with their own gradient are counted, and their gradient is not."""

    def layer(x):
        with scope('layer'):
            return function(x)

    assert count_flops(jax.make_jaxpr(layer)(floats(12))) == {'': 12 * each, 'layer': 12 * each}


def test_a_layer_inside_itself_counts_once():
    """A scope that is open twice counts once; two calls in sequence count twice."""

    def nested(x):
        with scope('a'), scope('b'), scope('a'):
            x = jnp.sin(x)
        with scope('a'):
            return jax.jit(lambda x: inner(with_scope_a(x)))(x)

    def with_scope_a(x):
        with scope('a'):
            return jnp.sin(x)

    expected = {'': 3, 'a': 3, 'b': 1, 'inner': 1}
    assert count_flops(jax.make_jaxpr(nested)(floats())) == expected


PATHS = [
    'conv1',
    'stage1/block1/conv1',
    'a.b',
    '',
    ' a b',
    'a%2Fb',
    'a>b<c',
    'Größe',
    'jvp(a)',
    '~',
]


@pytest.mark.parametrize('path', PATHS)
def test_paths_survive_scopes(path):
    """A path is found among the scopes that Flax, JAX and the network add around it."""
    assert layer_paths(f'jvp(Net/vmap({layer_scope(path)})/{layer_scope("x/y")}/z)') == [
        path,
        'x/y',
    ]
    assert '/' not in layer_scope(path)

    def run(x):
        with jax.named_scope('Net/a.b'), scope(path), jax.named_scope('free<text>'):
            return jnp.sin(x)

    plain = jax.make_jaxpr(run)(floats(4))
    derived = jax.make_jaxpr(jax.grad(lambda x: jax.vmap(run)(x).sum()))(floats(4))
    assert count_flops(plain) == {'': 4, path: 4}
    # Sine and, for the gradient, cosine and the product; then the sum outside the layer.
    assert count_flops(derived) == ({'': 16} if path == '' else {'': 16, path: 12})


def test_names_that_begin_alike_are_told_apart():
    """'conv1' includes neither 'conv10' nor, by its name alone, 'conv1/a'."""

    def run(x):
        for path in ('conv1', 'conv10', 'conv1/a'):
            with scope(path):
                x = jnp.sin(x)
        return x

    assert count_flops(jax.make_jaxpr(run)(floats())) == {
        '': 3,
        'conv1': 1,
        'conv10': 1,
        'conv1/a': 1,
    }


class Block(nn.Module):
    """Attention and an MLP, each after a norm."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name='norm1')(x)
        x = x + nn.MultiHeadDotProductAttention(4, name='attention')(y, y)
        y = nn.Dense(128, name='up')(nn.LayerNorm(name='norm2')(x))
        return x + nn.Dense(32, name='down')(nn.gelu(y))


class Transformer(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        return block(name='block2')(block(name='block1')(x))


class Stacked(nn.Module):
    """Three blocks that are scanned."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={'params': 0},
            split_rngs={'params': True},
            length=3,
        )
        return scan(Block(name='block'), x, None)[0]


TOKENS = floats(2, 16, 32)


@pytest.mark.parametrize('remat', [False, True])
def test_a_layer_includes_the_layers_inside(remat):
    """Blocks cost the same, add up to the network, and include their layers and arithmetic."""
    found = count_flops(layered(Transformer(remat), TOKENS))
    assert found['block1'] == found['block2'] == found[''] / 2
    inside = [path for path in found if path.startswith('block1/') and path.count('/') == 1]
    assert sorted(inside) == [
        'block1/attention',
        'block1/down',
        'block1/norm1',
        'block1/norm2',
        'block1/up',
    ]
    values, hidden = 2 * 16 * 32, 2 * 16 * 128
    own = 2 * values + total(nn.gelu, floats(2, 16, 128))
    assert found['block1'] == sum(found[path] for path in inside) + own
    assert found['block1/up'] == 2 * values * 128 + hidden
    # Two products of queries, keys and values, and four dense layers; the rest is the softmax.
    scores = 2 * 4 * 16 * 16
    attention = found['block1/attention'] - 2 * 2 * scores * 8 - 4 * (2 * values * 32 + values)
    assert 4 * scores < attention < 8 * scores


def test_scanned_layers_count_every_round():
    """Scanned layers count once for each round, under one path."""
    found = count_flops(layered(Stacked(), TOKENS))
    # Older versions of Flax leave a constant of the first round outside the scan.
    once = count_flops(layered(Block(), TOKENS))['']
    assert found['block'] == pytest.approx(3 * once, abs=10)
    assert found['block/up'] == 3 * (2 * 2 * 16 * 32 * 128 + 2 * 16 * 128)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i, features in enumerate((16, 32)):
            x = nn.Conv(features, (3, 3), strides=(2, 2), name=f'conv{i}')(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, name=f'norm{i}')(x))
            x = nn.Conv(features, (3, 3), feature_group_count=features, name=f'depthwise{i}')(x)
        return nn.Dense(10, name='head')(nn.max_pool(x, (2, 2), (2, 2)).mean(axis=(1, 2)))


@pytest.mark.parametrize(
    ('module', 'images', 'tolerance'),
    [
        (ConvNet(), floats(2, 33, 33, 3), 0.005),
        (Transformer(), TOKENS, 0.005),
        (build_encoder('resnet18', {'num_classes': 10}), floats(1, 64, 64, 3), 0.001),
    ],
    ids=['ConvNet', 'Transformer', 'ResNet-18'],
)
def test_whole_networks_cost_what_xla_says(module, images, tolerance):
    """The total equals XLA's, except for what is defined differently.

    XLA counts comparisons, every multiplication of an integer power (in GELU), and a reduction of n
    values as n - 1.
    """
    counted = count_flops(layered(module, images))['']
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), images)
    assert counted == pytest.approx(xla_total(module.apply, variables, images), rel=tolerance)


@pytest.fixture(scope='module')
def resnet50():
    encoder = build_encoder('resnet50', {'num_classes': 1000})
    return layered(encoder, floats(1, 224, 224, 3), train=False)


def test_resnet50_costs_what_is_published(resnet50, monkeypatch):
    """torchvision states 4.09 G multiply-adds for ResNet-50 at 224 pixels, padding included."""
    every_tap = count_flops(resnet50, every_tap=True)['']
    counted = count_flops(resnet50)['']
    assert 1.02 < every_tap / counted < 1.04
    monkeypatch.setattr(flops, 'ELEMENTWISE', frozenset())
    monkeypatch.setattr(flops, 'REDUCTIONS', frozenset())
    monkeypatch.setattr(flops, 'WINDOWS', frozenset())
    products = count_flops(resnet50, every_tap=True)['']
    assert products / 2 == 4_089_184_256
    assert products < every_tap < 1.01 * products


def test_resnet50_by_layer(resnet50):
    """The parts of a ResNet add up, and its head counts as a matrix product."""
    found = count_flops(resnet50)
    parts = {path: count for path, count in found.items() if path and '/' not in path}
    assert found['head'] == 2 * 2048 * 1000 + 1000
    # The rest is the ReLU after the stem.
    assert found[''] - sum(parts.values()) == 112 * 112 * 64
    assert found['stage3'] == sum(found[f'stage3/block{i}'] for i in range(1, 7))


def test_nothing_is_compiled_or_run():
    """Counting takes none of the computation's memory and time: this one needs terabytes."""
    huge = floats(10**6, 10**6)
    assert total(lambda x: jnp.tanh(x @ x), huge) == 2 * 10**18 + 10**12
