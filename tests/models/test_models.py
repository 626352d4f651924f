"""Networks: sizes against torchvision, arithmetic against float64 NumPy, and the registry."""

from __future__ import annotations

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from byol_jax.errors import UserError
from byol_jax.models.heads import MLP
from byol_jax.models.registry import ENCODERS, build_encoder
from byol_jax.models.resnet import ResNet
from byol_jax.models.tap import TappedEncoder

# Stage sizes, and whether blocks have a bottleneck: He et al. 2015, Table 1; 2016 for ResNet-200.
RESNETS = {
    'resnet18': ((2, 2, 2, 2), False),
    'resnet34': ((3, 4, 6, 3), False),
    'resnet50': ((3, 4, 6, 3), True),
    'resnet101': ((3, 4, 23, 3), True),
    'resnet152': ((3, 8, 36, 3), True),
    'resnet200': ((3, 24, 36, 3), True),
}

# Numbers of parameters of torchvision.models.resnet* without `fc`.
TORCHVISION = {
    'resnet18': 11_176_512,
    'resnet34': 21_284_672,
    'resnet50': 23_508_032,
    'resnet101': 42_500_160,
    'resnet152': 58_143_808,
}


def reference_count(stages, bottleneck, width=1):
    """Parameters of a ResNet, added up over its convolutions (no bias) and norms (2 a channel)."""

    def conv_norm(kernel, inputs, outputs):
        return kernel**2 * inputs * outputs + 2 * outputs

    inputs = 64 * width
    total = conv_norm(7, 3, inputs)
    for stage, blocks in enumerate(stages):
        inner = 64 * 2**stage * width
        outputs = inner * (4 if bottleneck else 1)
        for block in range(blocks):
            if bottleneck:
                total += conv_norm(1, inputs, inner) + conv_norm(3, inner, inner)
                total += conv_norm(1, inner, outputs)
            else:
                total += conv_norm(3, inputs, inner) + conv_norm(3, inner, inner)
            if block == 0 and (inputs != outputs or stage > 0):
                total += conv_norm(1, inputs, outputs)
            inputs = outputs
    return total


def shapes(module, size=32):
    """(output shape, variable shapes) for a picture of this size, without computing it."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(module.init_with_output, jax.random.key(0), images)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


@pytest.mark.parametrize('name', RESNETS)
def test_parameter_count(name):
    """A named ResNet has exactly as many parameters as torchvision's, or as the paper's table."""
    stages, bottleneck = RESNETS[name]
    expected = reference_count(stages, bottleneck)
    assert expected == TORCHVISION.get(name, expected)
    output, variables = shapes(build_encoder(name, {}))
    assert count(variables) == expected
    assert output.shape == (1, 2048 if bottleneck else 512)


def test_width_multiplies_all_channels():
    """ResNet-50 at width 2 has the parameters and features of the paper's 2x network."""
    output, variables = shapes(build_encoder('resnet50', {'width': 2}))
    assert count(variables) == reference_count((3, 4, 6, 3), True, width=2)
    assert output.shape == (1, 4096)


def test_width_may_be_a_fraction():
    """Half a width halves every number of channels."""
    output, variables = shapes(build_encoder('resnet18', {'width': 0.5}))
    assert output.shape == (1, 256)
    assert variables['params']['conv1']['kernel'].shape == (7, 7, 3, 32)


def test_layer_names():
    """Every layer has its own name to tap, and stages halve the resolution."""
    tapped = TappedEncoder(build_encoder('resnet18', {'num_classes': 10}), 'avgpool')
    layers = {layer.path: layer.shape for layer in tapped.layers((2, 64, 64, 3))}
    top = [path for path in layers if '/' not in path]
    stages = ['stage1', 'stage2', 'stage3', 'stage4']
    assert top == ['conv1', 'bn1', 'maxpool', *stages, 'avgpool', 'head', 'output']
    assert layers['conv1'] == (2, 32, 32, 64)
    assert layers['maxpool'] == (2, 16, 16, 64)
    assert [layers[stage] for stage in stages] == [
        (2, 16, 16, 64),
        (2, 8, 8, 128),
        (2, 4, 4, 256),
        (2, 2, 2, 512),
    ]
    assert layers['stage4/block2'] == (2, 2, 2, 512)
    assert {'stage2/block1/shortcut_conv', 'stage2/block1/conv1', 'stage2/block1/bn2'} <= set(
        layers
    )
    assert layers['head'] == (2, 10)


def test_small_images_stem_keeps_the_resolution():
    """With small_images, the stem is one 3x3 convolution: stage 1 has 32 of 32 pixels."""
    tapped = TappedEncoder(build_encoder('resnet18', {'small_images': True}), 'avgpool')
    layers = {layer.path: layer for layer in tapped.layers((1, 32, 32, 3))}
    assert 'maxpool' not in layers
    assert layers['conv1'].parameters == 3 * 3 * 3 * 64
    assert layers['conv1'].shape == layers['stage1'].shape == (1, 32, 32, 64)
    assert layers['stage4'].shape == (1, 4, 4, 512)


def conv(x, kernel, stride, pad):
    """A convolution of float64 [B, H, W, I] with [K, K, I, O], without bias."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum('bhwiyx,yxio->bhwo', windows[:, ::stride, ::stride], kernel)


def norm(variables, path, x):
    params, stats = variables['params'], variables['batch_stats']
    for name in path.split('/'):
        params, stats = params[name], stats[name]
    x = (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
    return x * params['scale'] + params['bias']


def reference_block(variables, stage, block, x, stride, bottleneck):
    path = f'{stage}/{block}'
    kernels = {
        name: part['kernel']
        for name, part in variables['params'][stage][block].items()
        if 'conv' in name
    }
    if bottleneck:
        out = norm(variables, f'{path}/bn1', conv(x, kernels['conv1'], 1, 0))
        out = conv(np.maximum(out, 0), kernels['conv2'], stride, 1)
        out = norm(variables, f'{path}/bn2', out)
        out = norm(variables, f'{path}/bn3', conv(np.maximum(out, 0), kernels['conv3'], 1, 0))
    else:
        out = norm(variables, f'{path}/bn1', conv(x, kernels['conv1'], stride, 1))
        out = norm(variables, f'{path}/bn2', conv(np.maximum(out, 0), kernels['conv2'], 1, 1))
    if 'shortcut_conv' in kernels:
        shortcut = conv(x, kernels['shortcut_conv'], stride, 0)
        x = norm(variables, f'{path}/shortcut_bn', shortcut)
    return np.maximum(out + x, 0)


def reference_resnet(variables, images, bottleneck):
    """A ResNet with two stages, of two blocks and one, by the formulae of He et al. 2015."""
    x = conv(images, variables['params']['conv1']['kernel'], 2, 3)
    x = np.maximum(norm(variables, 'bn1', x), 0)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-2, -1))
    x = reference_block(variables, 'stage1', 'block1', x, 1, bottleneck)
    x = reference_block(variables, 'stage1', 'block2', x, 1, bottleneck)
    x = reference_block(variables, 'stage2', 'block1', x, 2, bottleneck)
    return x.mean(axis=(1, 2))


@pytest.mark.parametrize('bottleneck', [False, True])
@pytest.mark.parametrize('size', [32, 33])
def test_forward_matches_numpy(bottleneck, size):
    """With frozen statistics, a ResNet computes its formulae, at even and odd sizes."""
    module = ResNet((2, 1), bottleneck, channels=(4, 6), strides=(1, 2), stem_channels=4)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, size, size, 3))

    def draw(path, leaf):
        if path[-1].key in ('scale', 'var'):
            return rng.uniform(0.5, 1.5, leaf.shape)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return rng.normal(size=leaf.shape) / np.sqrt(fan_in)

    variables = jax.tree_util.tree_map_with_path(draw, shapes(module, size)[1])
    actual = jax.jit(module.apply)(*jax.tree.map(jnp.float32, (variables, images)))
    expected = reference_resnet(variables, images, bottleneck)
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('bottleneck', [False, True])
def test_blocks_start_as_the_identity(bottleneck):
    """With zero_init_residual, a block without projection initially passes its input on."""
    module = ResNet((2,), bottleneck, channels=(4,), stem_channels=4, small_images=True)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = jax.jit(module.init)(jax.random.key(0), images)
    apply = jax.jit(lambda v, x: module.apply(v, x, capture_intermediates=True))
    stage = apply(variables, images)[1]['intermediates']['stage1']
    first, second = (np.asarray(stage[name]['__call__'][0]) for name in ('block1', 'block2'))
    assert first.shape[-1] == (16 if bottleneck else 4)
    assert np.abs(first).max() > 0.1
    np.testing.assert_array_equal(first, second)
    scale = variables['params']['stage1']['block2']['bn3' if bottleneck else 'bn2']['scale']
    assert np.all(np.asarray(scale) == 0)


def test_blocks_without_zero_init_change_their_input():
    """Without zero_init_residual every norm scale starts at 1."""
    module = ResNet((2,), channels=(4,), stem_channels=4, zero_init_residual=False)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    scales = [
        np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(variables['params'])
        if path[-1].key == 'scale'
    ]
    assert scales
    assert all(np.all(scale == 1) for scale in scales)


def test_mlp_of_the_paper():
    """The projector is Linear 4096 with bias, BatchNorm, ReLU, Linear 256 without bias."""
    variables = jax.eval_shape(
        lambda rng, x: MLP().init(rng, x, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, 2048), jnp.float32),
    )
    assert jax.tree.map(lambda leaf: leaf.shape, variables['params']) == {
        'linear1': {'kernel': (2048, 4096), 'bias': (4096,)},
        'bn': {'scale': (4096,), 'bias': (4096,)},
        'linear2': {'kernel': (4096, 256)},
    }


def test_mlp_with_frozen_statistics():
    """With train=False, the head uses its running statistics and does not change them."""
    module = MLP(3, 2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5))
    variables = module.init(jax.random.key(0), jnp.float32(x), train=False)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape), variables)
    params = variables['params']
    hidden = x @ params['linear1']['kernel'] + params['linear1']['bias']
    hidden = np.maximum(norm(variables, 'bn', hidden), 0)
    actual = module.apply(*jax.tree.map(jnp.float32, (variables, x)), train=False)
    np.testing.assert_allclose(actual, hidden @ params['linear2']['kernel'], rtol=1e-5)


def test_encoders_know_every_name():
    """Each registered name builds a network, given the required arguments."""
    for name in ENCODERS:
        kwargs = {'stage_sizes': (1, 1)} if name == 'resnet' else {}
        assert isinstance(build_encoder(name, kwargs), nn.Module)


def test_axis_name_is_passed_on():
    """The encoder synchronises its norms over the axis it is built for."""
    assert build_encoder('resnet18', {}, 'devices').axis_name == 'devices'
    assert build_encoder('resnet18', {}).axis_name is None


def test_lists_become_tuples():
    """Arguments read from JSON build an equal, hashable network."""
    module = build_encoder('resnet', {'stage_sizes': [1, 1], 'channels': [8, 16]})
    assert module == build_encoder('resnet', {'stage_sizes': (1, 1), 'channels': (8, 16)})
    hash(module)


OWN = """
import flax.linen as nn

class Net(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(x.mean(axis=(1, 2)))

def build(**kwargs):
    return Net(**kwargs)

def number():
    return 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's own module, importable as 'own_encoders'."""
    (tmp_path / 'own_encoders.py').write_text(OWN)
    (tmp_path / 'own_broken.py').write_text('import no_such_dependency\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ('own_encoders', 'own_broken'):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures('own')
def test_own_encoder():
    """'module:Class' builds the user's own network."""
    module = build_encoder('own_encoders:Net', {'features': 7}, 'devices')
    assert shapes(module)[0].shape == (1, 7)


@pytest.mark.usefixtures('own')
@pytest.mark.parametrize(
    ('name', 'kwargs', 'says'),
    [
        (
            'resnet51',
            {},
            ["encoder.name='resnet51'", "mean 'resnet50'?", 'package.module:a'],
        ),
        ('xyz', {}, ["encoder.name='xyz'", 'Known: resnet, resnet18, resnet34']),
        ('resnet18', {'widht': 2}, ["no argument 'widht'", "mean 'width'?", 'num_classes']),
        ('resnet', {}, ["do not fit 'resnet'", 'stage_sizes']),
        ('own_encoders:Net', {'size': 3}, ["no argument 'size'", 'It takes: features.']),
        (':Net', {}, ["encoder.name=':Net'"]),
        ('no_such_module:Net', {}, ["module 'no_such_module'", 'PYTHONPATH']),
        ('own_broken:Net', {}, ["module 'no_such_dependency'", 'Install it']),
        ('own_encoders:Nett', {}, ["has no 'Nett'", "mean 'Net'?"]),
        ('own_encoders:number', {}, ['not a class derived from flax.linen.Module']),
        ('own_encoders:build', {}, ['not a class derived from flax.linen.Module']),
        ('os:system', {'command': 'exit 1'}, ['not a class derived from flax.linen.Module']),
    ],
)
def test_registry_errors(name, kwargs, says):
    """A network that cannot be built is refused; the message has what was given and what exists."""
    with pytest.raises(UserError) as caught:
        build_encoder(name, kwargs)
    for words in says:
        assert words in str(caught.value)
