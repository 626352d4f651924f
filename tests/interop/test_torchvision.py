"""torchvision's ResNet weights, both ways: names, bits and features."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import ROOT
from torchvision_reference import (
    DEPTHS,
    MEAN,
    STD,
    normalised,
    numpy_features,
    our_encoder,
    pictures,
    random_weights,
    relative_error,
    torch_resnet,
    torchvision_shapes,
    write,
)

from byol_jax.errors import UserError
from byol_jax.interop.encoder import Encoder
from byol_jax.interop.torchvision import load_torchvision, save_torchvision

NETWORKS = [
    ('resnet18', {}),
    ('resnet50', {}),
    ('resnet18', {'width': 2}),
    ('resnet50', {'width': 0.25, 'small_images': True}),
    ('resnet18', {'small_images': True}),
    ('resnet34', {'width': 0.3}),
    ('resnet', {'stage_sizes': [1, 2, 1, 3], 'bottleneck': True, 'width': 0.125}),
]
IDS = [f'{name}-{"-".join(map(str, kwargs.values()))}' for name, kwargs in NETWORKS]


@pytest.mark.parametrize(('name', 'kwargs'), NETWORKS, ids=IDS)
def test_round_trip_bit_for_bit(name, kwargs, tmp_path):
    """Our encoder -> file -> our encoder: the same network, bits, image size and normalisation."""
    encoder = our_encoder(name, **kwargs)
    save_torchvision(encoder, tmp_path / 'made' / 'weights.safetensors')
    loaded = load_torchvision(str(tmp_path / 'made' / 'weights.safetensors'))
    assert loaded.description == {**encoder.description}
    assert loaded.module == encoder.module
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(encoder.variables)
    for a, e in zip(
        jax.tree.leaves(loaded.variables), jax.tree.leaves(encoder.variables), strict=True
    ):
        assert a.dtype == e.dtype == np.float32
        np.testing.assert_array_equal(a, e)
    assert [p.name for p in (tmp_path / 'made').iterdir()] == ['weights.safetensors']


# Numbers of parameters, with fc's 1000 classes, from torchvision's documentation.
@pytest.mark.parametrize(
    ('name', 'entries', 'parameters', 'features'),
    [('resnet18', 122, 11_689_512, 512), ('resnet50', 320, 25_557_032, 2048)],
)
def test_names_and_shapes_are_torchvisions(name, entries, parameters, features, tmp_path):
    """The file has exactly torchvision's names, shapes and types."""
    path = tmp_path / 'weights.safetensors'
    save_torchvision(our_encoder(name), path)
    weights = safetensors.numpy.load_file(path)
    expected = torchvision_shapes(name)
    assert {n: a.shape for n, a in weights.items()} == expected
    assert len(weights) == entries - 2
    learned = [a.size for n, a in weights.items() if n.endswith(('weight', 'bias'))]
    assert sum(learned) == parameters - 1000 * (features + 1)
    for weight_name, array in weights.items():
        counter = weight_name.endswith('num_batches_tracked')
        assert array.dtype == (np.int64 if counter else np.float32)
        assert not counter or array == 123
    with safetensors.safe_open(path, framework='numpy') as file:
        assert file.metadata()['format'] == 'pt'


@pytest.mark.parametrize(
    ('name', 'small'), [*((name, False) for name in DEPTHS), ('resnet18', True), ('resnet50', True)]
)
def test_the_architecture_is_found(name, small, tmp_path):
    """Depth, width and stem are found by names and shapes; the rest is ImageNet's."""
    # A sixteenth of the width; the names are those of the whole network.
    weights = random_weights(torchvision_shapes(name, 1 / 16, small))
    found = load_torchvision(write(tmp_path / 'weights.safetensors', weights)).description
    kwargs = {'width': 0.0625, **({'small_images': True} if small else {})}
    assert (found['name'], found['kwargs']) == (name, kwargs)
    assert (found['mean'], found['std']) == (list(MEAN), list(STD))
    assert found['image_size'] == (32 if small else 224)
    assert (found['hidden_layer'], found['step']) == ('avgpool', 0)
    assert found['feature_size'] == (128 if DEPTHS[name][1] else 32)


# Odd sizes show on which side a convolution pads.
@pytest.mark.parametrize(
    ('name', 'width', 'small', 'side'),
    [
        ('resnet18', 1, False, 67),
        ('resnet50', 0.5, False, 67),
        ('resnet18', 0.5, True, 32),
    ],
)
def test_features_agree_with_numpy(name, width, small, side, tmp_path):
    """Features of a torchvision file agree with a float64 forward pass on its arrays."""
    weights = random_weights(torchvision_shapes(name, width, small))
    encoder = load_torchvision(write(tmp_path / 'weights.safetensors', weights))
    images = pictures(side)
    expected = numpy_features(weights, normalised(images), small)
    assert expected.std() > 0.01 * expected.max()
    assert relative_error(encoder(images), expected) < 1e-5  # measured: at most 8.3e-7


@pytest.mark.parametrize(
    ('name', 'width', 'small', 'side'),
    [
        ('resnet18', 1, False, 67),
        ('resnet50', 1, False, 67),
        ('resnet18', 2, False, 33),
        ('resnet18', 1, True, 32),
    ],
)
def test_features_agree_with_torch(name, width, small, side, tmp_path):
    """torch -> .pth -> ours -> .safetensors -> torch: the same features in all three."""
    torch = pytest.importorskip('torch')
    weights = random_weights(torchvision_shapes(name, width, small))
    net = torch_resnet(torch, name, width, small).eval()
    state = {n: torch.from_numpy(np.array(a)) for n, a in weights.items()}
    result = net.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (['fc.weight', 'fc.bias'], [])
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    encoder = load_torchvision(tmp_path / 'net.pth')
    images = pictures(side)
    with torch.no_grad():
        expected = net(torch.from_numpy(normalised(images).astype(np.float32))).numpy()
    assert relative_error(encoder(images), expected) < 1e-5  # measured: at most 1.2e-6

    save_torchvision(encoder, tmp_path / 'ours.safetensors')
    again = torch_resnet(torch, name, width, small).eval()
    ours = safetensors.numpy.load_file(tmp_path / 'ours.safetensors')
    ours = {n: torch.from_numpy(a) for n, a in ours.items()}
    result = again.load_state_dict(ours, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (['fc.weight', 'fc.bias'], [])
    with torch.no_grad():
        back = again(torch.from_numpy(normalised(images).astype(np.float32))).numpy()
    np.testing.assert_array_equal(back, expected)


def test_ours_serves_numpy(tmp_path):
    """An encoder of ours, written to a file, gives its own features outside JAX."""
    encoder = our_encoder('resnet18', width=0.25)
    weights = random_weights(torchvision_shapes('resnet18', 0.25), seed=3)
    start = load_torchvision(write(tmp_path / 'start.safetensors', weights))
    encoder = Encoder(start.module, start.variables, encoder.description)
    save_torchvision(encoder, tmp_path / 'ours.safetensors')
    saved = safetensors.numpy.load_file(tmp_path / 'ours.safetensors')
    images = pictures(40)
    mean, std = encoder.description['mean'], encoder.description['std']
    expected = numpy_features(saved, normalised(images, mean, std), small=False)
    assert relative_error(encoder(images), expected) < 1e-5
    np.testing.assert_array_equal(
        load_torchvision(tmp_path / 'ours.safetensors')(images), encoder(images)
    )


# Other files that are accepted.


@pytest.fixture(scope='module')
def weights():
    return random_weights(torchvision_shapes('resnet18', 1 / 16))


def assert_loads(path, weights, *say):
    kernel = load_torchvision(path, *say).variables['params']['stage1']['block1']['conv1']['kernel']
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), weights['layer1.0.conv1.weight'])


FC = {'fc.weight': np.zeros((10, 32), np.float32), 'fc.bias': np.zeros(10, np.float32)}
# Heads of MoCo v2 and v3 in the place of the classifier.
MLP = {'fc.0.weight': np.zeros((32, 32), np.float32), 'fc.2.bias': np.zeros(9, np.float32)}
# Prefixes, and what else a checkpoint of that kind holds.
PREFIXES = {
    'module.': {},
    'model.': {},
    'encoder.': {},
    'module.encoder.': {},
    'module.encoder_q.': {'module.encoder_k.conv1.weight': 0, 'module.queue': 0},
    'module.base_encoder.': {'module.momentum_encoder.conv1.weight': 0, 'module.predictor.0': 0},
    'backbone.': {'projection_head.0.weight': 0},
    'model.backbone.': {'model.head.weight': 0, 'criterion.centre': 0},
}


@pytest.mark.parametrize('prefix', PREFIXES)
def test_prefixes_are_found_and_said(prefix, weights, tmp_path):
    """A ResNet under the prefix of a wrapper is loaded without its head; a line says from where,
    and how much is left out."""
    others = {name: np.zeros(3, np.float32) for name in PREFIXES[prefix]}
    for head in (FC, MLP):
        inside = {prefix + name: array for name, array in {**head, **weights}.items()}
        said = []
        assert_loads(write(tmp_path / 'a.safetensors', {**others, **inside}), weights, said.append)
        (line,) = said
        assert line.startswith(f"a.safetensors: the ResNet is under '{prefix}'")
        assert (f'{len(others)} other name(s) left out' in line) == bool(others)
    outside = {**FC, **{prefix + name: array for name, array in weights.items()}}
    assert_loads(write(tmp_path / 'b.safetensors', outside), weights)


def test_of_two_resnets_none_is_chosen(weights, tmp_path):
    """Where two prefixes have a whole ResNet each, both are named and neither is loaded."""
    two = {f'{part}.{name}': a for part in ('backbone', 'encoder_q') for name, a in weights.items()}
    with pytest.raises(UserError, match=r"2 ResNets, under 'backbone\.' and 'encoder_q\.'"):
        load_torchvision(write(tmp_path / 'a.safetensors', two))


def test_half_floats_and_missing_counters(weights, tmp_path):
    """bfloat16 and float16 arrays become float32; files without num_batches_tracked load."""
    floats = {n: a for n, a in weights.items() if not n.endswith('num_batches_tracked')}
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float64):
        narrow = {name: array.astype(dtype) for name, array in floats.items()}
        wide = {name: array.astype(np.float32) for name, array in narrow.items()}
        assert_loads(write(tmp_path / 'weights.safetensors', narrow), wide)


@pytest.mark.parametrize('key', [None, 'state_dict', 'model'])
@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.pth.tar', '.ckpt'])
def test_a_pth_loads(key, suffix, weights, tmp_path):
    """A state dict written by torch.save loads, alone or inside a training checkpoint."""
    torch = pytest.importorskip('torch')
    state = {
        n: torch.nn.Parameter(torch.from_numpy(np.array(a)), False) for n, a in weights.items()
    }
    content = state if key is None else {key: state, 'epoch': 3, 'arch': 'resnet18'}
    torch.save(content, tmp_path / f'weights{suffix}')
    assert_loads(tmp_path / f'weights{suffix}', weights)


def test_an_old_pth_loads(weights, tmp_path):
    """The format from before PyTorch 1.6, in which torchvision's first weights are, loads."""
    torch = pytest.importorskip('torch')
    state = {n: torch.from_numpy(np.array(a)).half().float() for n, a in weights.items()}
    half = {n: a.astype(np.float16).astype(np.float32) for n, a in weights.items()}
    torch.save(state, tmp_path / 'weights.pth', _use_new_zipfile_serialization=False)
    assert_loads(tmp_path / 'weights.pth', half)


def test_a_head_is_left_out(tmp_path):
    """A classification head behind the tap is not written; PyTorch adds its own fc."""
    kwargs = {'stage_sizes': [1, 1, 1, 1], 'width': 0.125, 'num_classes': 3}
    encoder = our_encoder('resnet', **kwargs)
    save_torchvision(encoder, tmp_path / 'weights.safetensors')
    loaded = load_torchvision(tmp_path / 'weights.safetensors')
    assert not [n for n in loaded.variables['params'] if n == 'head']
    np.testing.assert_array_equal(loaded(pictures(32)), encoder(pictures(32)))


def test_loading_needs_no_torch(weights, tmp_path):
    """Importing the module and reading a .safetensors imports neither PyTorch nor TensorFlow."""
    path = write(tmp_path / 'weights.safetensors', weights)
    code = (
        'import sys; from byol_jax.interop.torchvision import load_torchvision; '
        'load_torchvision(sys.argv[1]); '
        'assert not {"torch", "tensorflow"} & set(sys.modules)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(path)],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
