"""ViT: published sizes, arithmetic against NumPy and PyTorch, positions, initial values."""

from __future__ import annotations

import cmath
import inspect
import itertools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder
from byol_jax.models.vit import TransformerBlock, ViT, sincos_position
from configs import imagenet_vit

# timm's deit_tiny_patch16_224, deit_small_patch16_224 and vit_base_patch16_224; the first two are
# 5M and 22M in DeiT (arXiv:2012.12877), Table 1.
PUBLISHED = {'vit_ti': 5_717_416, 'vit_s': 22_050_664, 'vit_b': 86_567_656}

TINY = {'width': 8, 'depth': 2, 'heads': 2, 'patch_size': 4}


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameter_count(name):
    """A named ViT with a head and learned positions has exactly the published parameters."""
    output, variables = shapes(
        build_encoder(name, {'num_classes': 1000, 'learned_position': True}), 224, 224
    )
    assert output.shape == (1, 1000)
    assert count(variables) == PUBLISHED[name]


def test_fixed_positions_are_no_parameters():
    """Without learned positions, a ViT has 197 x width fewer parameters at 224 pixels."""
    fixed = shapes(ViT(depth=0), 224, 224)[1]
    learned = shapes(ViT(depth=0, learned_position=True), 224, 224)[1]
    assert 'pos_embed' not in fixed['params']
    assert count(learned) - count(fixed) == 197 * 384


def test_layer_names():
    """Every layer has its own name to tap; `norm` has all tokens."""
    module = ViT(**TINY, num_classes=5)
    output, found = run(module, as_type(random_variables(module, 8, 12), 'float32'), images(2))
    assert {path: value.shape for path, value in found.items() if '/' not in path} == {
        'patch_embed': (2, 2, 3, 8),
        'block1': (2, 7, 8),
        'block2': (2, 7, 8),
        'norm': (2, 7, 8),
        'head': (2, 5),
    }
    inside = {path.removeprefix('block2/') for path in found if path.startswith('block2/')}
    assert {path for path in inside if '/' not in path} == {'norm1', 'attention', 'norm2', 'mlp'}
    assert inside >= {'attention/query', 'attention/out', 'mlp/linear1', 'mlp/linear2'}
    np.testing.assert_array_equal(output, found['head'])


def images(batch, height=8, width=12):
    return jax.random.normal(jax.random.key(1), (batch, height, width, 3))


def reference_attention(params, x, heads):
    """Weighted means of the values, for each head and example."""
    query, key, value = (dense(params[name], x) for name in ('query', 'key', 'value'))
    mixed = np.zeros_like(x)
    for example, part in itertools.product(range(len(x)), np.split(np.arange(x.shape[-1]), heads)):
        q, k, v = (y[example][:, part] for y in (query, key, value))
        weights = np.exp(q @ k.T / np.sqrt(len(part)))
        mixed[example][:, part] = weights / weights.sum(1, keepdims=True) @ v
    return dense(params['out'], mixed)


def reference_block(params, x, heads):
    x = x + reference_attention(params['attention'], layer_norm(params['norm1'], x), heads)
    hidden = gelu(dense(params['mlp']['linear1'], layer_norm(params['norm2'], x)))
    return x + dense(params['mlp']['linear2'], hidden)


def reference_position(rows, columns, width):
    """Row and column as angles of unit complex numbers: first imaginary parts, then real ones."""
    table = np.zeros((rows, columns, 2, 2, width // 4))
    for row, column, k in itertools.product(range(rows), range(columns), range(width // 4)):
        for axis, place in enumerate((row, column)):
            number = cmath.exp(1j * place / 10_000 ** (4 * k / width))
            table[row, column, axis, :, k] = number.imag, number.real
    return table.reshape(rows * columns, width)


def reference_vit(module, variables, x):
    params = variables['params']
    x = patches(params['patch_embed'], x)
    batch, rows, columns, width = x.shape
    x = x.reshape(batch, rows * columns, width)
    position = reference_position(rows, columns, width)
    if module.class_token:
        x = np.concatenate([np.repeat(params['cls_token'], batch, axis=0), x], axis=1)
        position = np.concatenate([np.zeros((1, width)), position])
    x = x + params.get('pos_embed', position)
    for i in range(module.depth):
        x = reference_block(params[f'block{i + 1}'], x, module.heads)
    x = layer_norm(params['norm'], x)
    return dense(params['head'], x[:, 0] if module.class_token else x.mean(1))


@pytest.mark.parametrize('learned_position', [False, True])
@pytest.mark.parametrize('class_token', [True, False])
def test_forward_matches_numpy(class_token, learned_position):
    """A ViT computes its formulae, on a picture that is not square."""
    module = ViT(**TINY, class_token=class_token, learned_position=learned_position, num_classes=3)
    variables = random_variables(module, 8, 12)
    x = np.random.default_rng(1).normal(size=(2, 8, 12, 3))
    expected = reference_vit(module, variables, x)
    assert expected.std() > 0.1
    actual, _ = run(module, *as_type((variables, x), 'float32'))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_block_matches_pytorch():
    """With the same weights, a block equals PyTorch's encoder layer with norm_first and GELU."""
    torch = pytest.importorskip('torch')
    module = TransformerBlock(heads=2, hidden_size=24)
    x = np.random.default_rng(1).normal(size=(3, 5, 8)).astype(np.float32)
    kinds = jax.eval_shape(lambda: module.init(jax.random.key(0), x, False))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), kinds)
    params = variables['params']
    attention, mlp = params['attention'], params['mlp']
    three = [attention[name] for name in ('query', 'key', 'value')]
    layer = torch.nn.TransformerEncoderLayer(
        8, 2, 24, 0.0, 'gelu', layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    state = {
        'self_attn.in_proj_weight': np.concatenate([part['kernel'].T for part in three]),
        'self_attn.in_proj_bias': np.concatenate([part['bias'] for part in three]),
        'self_attn.out_proj.weight': attention['out']['kernel'].T,
        'self_attn.out_proj.bias': attention['out']['bias'],
    }
    for name in ('linear1', 'linear2'):
        state |= {f'{name}.weight': mlp[name]['kernel'].T, f'{name}.bias': mlp[name]['bias']}
    for name in ('norm1', 'norm2'):
        state |= {f'{name}.weight': params[name]['scale'], f'{name}.bias': params[name]['bias']}
    layer.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    with torch.no_grad():
        expected = layer(torch.tensor(x)).numpy()
    np.testing.assert_allclose(run(module, variables, x, False)[0], expected, rtol=1e-4, atol=1e-4)


def test_positions_match_the_formula():
    """Fixed positions are sines and cosines of row and column at wavelengths up to 10000 x 2 pi."""
    actual = sincos_position(5, 3, 16)
    np.testing.assert_allclose(actual, reference_position(5, 3, 16), atol=1e-12)
    grid = actual.reshape(5, 3, 2, 8)
    assert np.all(grid[:, :1, 0] == grid[:, :, 0])  # the row alone decides the first half
    assert np.all(grid[:1, :, 1] == grid[:, :, 1])  # the column alone the second
    np.testing.assert_array_equal(actual[0], [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4)


def test_positions_see_only_the_way_between_two_patches():
    """The product of two positions depends only on their distance in rows and columns."""
    table = sincos_position(6, 7, 32).reshape(6, 7, 32)
    products = np.einsum('abd,ijd->abij', table, table)
    np.testing.assert_allclose(products[1:, 2:, 1:, 2:], products[:-1, :-2, :-1, :-2], atol=1e-12)
    np.testing.assert_allclose(np.einsum('abab->ab', products), 16)
    assert products[0, 0].argmax() == 0


@pytest.mark.parametrize(('height', 'width'), [(4, 4), (16, 8), (20, 28)])
def test_any_image_size(height, width):
    """With fixed positions, the same weights take any image that whole patches cover."""
    module = ViT(**TINY)
    variables = as_type(random_variables(module, 8, 12), 'float32')
    output, found = run(module, variables, images(2, height, width))
    assert found['norm'].shape == (2, height * width // 16 + 1, 8)
    np.testing.assert_array_equal(output, found['norm'][:, 0])


def test_mean_of_tokens():
    """Without a class token the output is the mean of all patches' tokens."""
    module = ViT(**TINY, class_token=False)
    output, found = run(module, as_type(random_variables(module, 8, 12), 'float32'), images(2))
    assert found['norm'].shape == (2, 6, 8)
    np.testing.assert_allclose(output, found['norm'].mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ('kwargs', 'size', 'says'),
    [
        ({'patch_size': 16}, (40, 32), 'image size 40x32 is not divisible by patch_size=16'),
        ({'width': 10, 'heads': 4, 'learned_position': True}, (8, 8), 'width=10 .* by heads=4'),
        ({'width': 10, 'heads': 2}, (8, 8), 'width=10 must be divisible by 4'),
        ({'drop_path': 1.0}, (8, 8), r'drop_path=1.0 must lie in \[0, 1\)'),
    ],
)
def test_errors(kwargs, size, says):
    """Sizes that do not fit are refused with both numbers, in a message for users."""
    module = ViT(**TINY | kwargs)
    with pytest.raises(ValueError, match=says):
        shapes(module, *size)
    with pytest.raises(UserError, match=says):
        TappedEncoder(module, 'norm').layers((2, *size, 3))


def test_learned_positions_have_one_size():
    """Learned positions refuse an image with another number of patches, naming both."""
    module = ViT(**TINY, learned_position=True)
    variables = as_type(random_variables(module, 8, 12), 'float32')
    with pytest.raises(ValueError, match='learned for 6 patches, not for 2x2'):
        module.apply(variables, images(1, 8, 8))


def test_initial_values():
    """Each linear layer starts Xavier-uniform; biases 0, norms 1, tokens small."""
    module = ViT(width=64, depth=1, heads=4, patch_size=8, num_classes=100, learned_position=True)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    leaves = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, variables['params']))
    kernels = {'/'.join(path[:-1]): leaf for path, leaf in leaves.items() if path[-1] == 'kernel'}
    fans = {f'block1/attention/{name}': 64 + 64 for name in ('query', 'key', 'value', 'out')}
    fans |= {f'block1/mlp/{name}': 64 + 256 for name in ('linear1', 'linear2')}
    fans |= {'patch_embed': 3 * 8 * 8 + 64, 'head': 64 + 100}
    assert kernels.keys() == fans.keys()
    for path, kernel in kernels.items():
        bound = np.sqrt(6 / fans[path])
        assert 0.99 * bound < np.abs(kernel).max() <= bound, path
        assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.03), path
    for path, leaf in leaves.items():
        if path[-1] in ('bias', 'scale'):
            assert np.all(leaf == (path[-1] == 'scale'))
    assert leaves['cls_token',].std() == pytest.approx(1e-6, rel=0.3)
    assert leaves['pos_embed',].std() == pytest.approx(0.02, rel=0.03)


def test_config():
    """The config has the numbers of MoCo v3's README.md and main_moco.py, for three sizes."""
    assert imagenet_vit.get_config().encoder.name == 'vit_s'
    assert imagenet_vit.ARGUMENTS == ('ti', 's', 'b')
    for size in imagenet_vit.ARGUMENTS:
        config = imagenet_vit.get_config(size)
        assert (config.encoder.name, config.name) == (f'vit_{size}', f'imagenet_vit_{size}')
        assert (config.data.source, config.data.name) == ('tfds', 'imagenet2012')
        assert (config.total_epochs, config.warmup_epochs, config.batch_size) == (300, 40, 4096)
        optimizer = config.optimizer
        # Betas and epsilon are PyTorch's, which are also optax's defaults.
        assert (optimizer.name, dict(optimizer.kwargs)) == ('adamw', {})
        defaults = {n: p.default for n, p in inspect.signature(optax.adamw).parameters.items()}
        assert (defaults['b1'], defaults['b2'], defaults['eps']) == (0.9, 0.999, 1e-8)
        assert (optimizer.base_learning_rate, optimizer.weight_decay) == (1.5e-4, 0.1)
        assert make_plan(config, 1_281_167, 8).learning_rate == pytest.approx(2.4e-3)
        assert config.target.tau_base == 0.99
        assert config.views.view1.crop_area == config.views.view2.crop_area == (0.08, 1.0)
        assert config.views.image_size == 224
    with pytest.raises(ValueError, match=r'imagenet_vit\.py:l: the size must be one of ti, s, b'):
        imagenet_vit.get_config('l')


@pytest.mark.parametrize('size', imagenet_vit.ARGUMENTS)
def test_config_builds(size):
    """The config's tap, pooling and frozen layer exist in its network, here a small one."""
    encoder = imagenet_vit.get_config(size).encoder
    module = build_encoder(encoder.name, TINY)
    assert TappedEncoder(module, encoder.hidden_layer).check((2, 8, 12, 3)).shape == (2, 7, 8)
    assert module.class_token
    assert encoder.pool == 'cls'
    assert set(encoder.frozen) <= set(shapes(module, 8, 12)[1]['params'])
