"""ConvNeXt: published size, arithmetic against float64 NumPy, layers, initial values, config."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_reference import (
    as_type,
    count,
    dense,
    gelu,
    layer_norm,
    patches,
    random_variables,
    run,
    shapes,
)

from byol_jax.app.plan import make_plan
from byol_jax.errors import UserError
from byol_jax.models.convnext import ConvNeXt
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder
from configs import imagenet_convnext

TINY = {'depths': (1, 2), 'channels': (4, 6)}


def images(batch, height=16, width=24):
    return jax.random.normal(jax.random.key(1), (batch, height, width, 3))


def test_parameter_count():
    """ConvNeXt-T with a head has as many parameters as torchvision's (28M or 29M in the paper)."""
    output, variables = shapes(build_encoder('convnext_t', {'num_classes': 1000}), 224, 224)
    assert output.shape == (1, 1000)
    assert count(variables) == 28_589_128
    assert shapes(build_encoder('convnext_t', {}), 224, 224)[0].shape == (1, 768)


def test_layer_names():
    """Every layer has its own name to tap; all stages but the first halve the resolution."""
    module = ConvNeXt((1, 1, 2, 1), (4, 6, 8, 10), num_classes=5)
    variables = as_type(random_variables(module, 64, 64), 'float32')
    output, found = run(module, variables, images(2, 64, 64))
    assert {path: value.shape for path, value in found.items() if '/' not in path} == {
        'stem': (2, 16, 16, 4),
        'stem_norm': (2, 16, 16, 4),
        'stage1': (2, 16, 16, 4),
        'stage2': (2, 8, 8, 6),
        'stage3': (2, 4, 4, 8),
        'stage4': (2, 2, 2, 10),
        'avgpool': (2, 10),
        'norm': (2, 10),
        'head': (2, 5),
    }
    assert {path for path in found if path.startswith('stage1/') and path.count('/') == 1} == {
        'stage1/block1'
    }
    assert {path for path in found if path.startswith('stage3/') and path.count('/') == 1} == {
        f'stage3/{name}' for name in ('downsample_norm', 'downsample_conv', 'block1', 'block2')
    }
    inside = {path for path in found if path.startswith('stage3/block2/')}
    assert inside == {f'stage3/block2/{name}' for name in ('dwconv', 'norm', 'pwconv1', 'pwconv2')}
    np.testing.assert_array_equal(output, found['head'])


def depthwise(params, x):
    """The weighted 7x7 neighbourhood of each channel, with zeros beyond the border."""
    kernel = params['kernel'][:, :, 0]
    x = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    out = np.zeros_like(x[:, 6:, 6:])
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            window = x[:, row : row + 7, column : column + 7]
            out[:, row, column] = (window * kernel).sum((1, 2))
    return out + params['bias']


def reference_convnext(module, variables, x):
    params = variables['params']
    x = layer_norm(params['stem_norm'], patches(params['stem'], x))
    for i, depth in enumerate(module.depths):
        stage = params[f'stage{i + 1}']
        if i:
            normed = layer_norm(stage['downsample_norm'], x)
            x = patches(stage['downsample_conv'], normed)
        for j in range(depth):
            block = stage[f'block{j + 1}']
            branch = layer_norm(block['norm'], depthwise(block['dwconv'], x))
            branch = dense(block['pwconv2'], gelu(dense(block['pwconv1'], branch)))
            x = x + block.get('gamma', 1) * branch
    return dense(params['head'], layer_norm(params['norm'], x.mean((1, 2))))


@pytest.mark.parametrize(
    ('kwargs', 'size'),
    [
        ({}, (16, 24)),
        ({}, (19, 25)),
        ({'layer_scale': 0.0}, (16, 24)),
        ({'small_images': True}, (12, 10)),
    ],
)
def test_forward_matches_numpy(kwargs, size):
    """A ConvNeXt computes its formulae; incomplete patches are ignored."""
    module = ConvNeXt(**TINY, **kwargs, num_classes=3)
    variables = random_variables(module, *size)
    x = np.random.default_rng(1).normal(size=(2, *size, 3))
    expected = reference_convnext(module, variables, x)
    assert expected.std() > 0.1
    actual, _ = run(module, *as_type((variables, x), 'float32'))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('small_images', 'side'), [(False, 1), (True, 2)])
def test_small_images_keep_twice_the_resolution(small_images, side):
    """With 32 pixels, the last of four stages has one place, and 2x2 with small_images."""
    tapped = TappedEncoder(build_encoder('convnext_t', {'small_images': small_images}), 'avgpool')
    layers = {layer.path: layer.shape for layer in tapped.layers((1, 32, 32, 3))}
    assert layers['stem'] == (1, 8 * side, 8 * side, 96)
    assert layers['stage4'] == (1, side, side, 768)


def test_too_small_an_image():
    """An image that shrinks to nothing is refused; the message says what to do."""
    tapped = TappedEncoder(ConvNeXt((1, 1, 1), (4, 4, 4)), 'norm')
    with pytest.raises(UserError, match=r'too small for the encoder: .*small_images=True'):
        tapped.layers((2, 8, 8, 3))


def test_one_depth_for_each_width():
    """Depths and widths of different numbers are refused; the message has both."""
    with pytest.raises(ValueError, match=r'depths=\(1, 2\) and channels=\(4,\)'):
        shapes(ConvNeXt((1, 2), (4,)), 32, 32)


def test_initial_values():
    """Kernels start normal with standard deviation 0.02, biases 0, norms 1, gamma 1e-6."""
    module = ConvNeXt((1, 1), (64, 96), num_classes=100)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    leaves = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, variables['params']))
    kernels = [leaf.ravel() for path, leaf in leaves.items() if path[-1] == 'kernel']
    assert len(kernels) == 9
    for kernel in kernels:
        assert kernel.std() == pytest.approx(0.02, rel=0.05)
    # If they were cut off at two deviations, as in Flax's truncated normal, none would be larger.
    assert np.mean(np.abs(np.concatenate(kernels)) > 0.04) == pytest.approx(0.0455, rel=0.05)
    first = {'bias': 0, 'scale': 1, 'gamma': np.float32(1e-6)}
    for path, leaf in leaves.items():
        if path[-1] != 'kernel':
            assert np.all(leaf == first[path[-1]]), path
    assert sum(path[-1] == 'gamma' for path in leaves) == 2


def test_config():
    """The config has the numbers of configs/imagenet_vit.py, and its network the tapped layer."""
    config = imagenet_convnext.get_config()
    assert config.name == 'imagenet_convnext'
    assert (config.data.source, config.data.name) == ('tfds', 'imagenet2012')
    assert (config.total_epochs, config.warmup_epochs, config.batch_size) == (300, 40, 4096)
    assert (config.optimizer.name, config.optimizer.weight_decay) == ('adamw', 0.1)
    assert make_plan(config, 1_281_167, 8).learning_rate == pytest.approx(2.4e-3)
    assert config.target.tau_base == 0.99
    assert config.views.image_size == 224
    assert tuple(config.encoder.frozen) == ()
    module = build_encoder(config.encoder.name, config.encoder.kwargs)
    tap = TappedEncoder(module, config.encoder.hidden_layer).check((2, 224, 224, 3))
    assert tap.shape == (2, 768)
