"""Files that are not a torchvision ResNet or not safe, and encoders that cannot become one."""

from __future__ import annotations

import os
import pickle
import sys

import flax.linen as nn
import numpy as np
import pytest
from torchvision_reference import our_encoder, random_weights, torchvision_shapes, write

from byol_jax import UserError
from byol_jax.interop.encoder import Encoder
from byol_jax.interop.torchvision import load_torchvision, save_torchvision


@pytest.fixture(scope='module')
def weights():
    return random_weights(torchvision_shapes('resnet18', 1 / 16))


@pytest.fixture(scope='module')
def bottleneck_weights():
    return random_weights(torchvision_shapes('resnet50', 1 / 16))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('how', ['torch.save', 'pickle'])
def test_a_malicious_pth_is_refused(how, weights, tmp_path):
    """A file that would run code runs none, and the message names what it would call."""
    torch = pytest.importorskip('torch')
    trap, path = str(tmp_path / 'trap'), tmp_path / 'weights.pth'
    content = {'conv1.weight': Malicious(trap)}
    if how == 'torch.save':
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r'is refused: .*could run code \(.*mkdir'):
        load_torchvision(path)
    assert not os.path.exists(trap)


@pytest.mark.parametrize('kind', ['cut', 'empty', 'text', 'list', 'number', 'sparse', 'module'])
def test_a_wrong_pth_is_refused(kind, weights, tmp_path):
    """A damaged file, or one that contains other things than tensors, is refused by its name."""
    torch = pytest.importorskip('torch')
    path = tmp_path / 'weights.pth'
    content = {n: torch.from_numpy(np.array(a)) for n, a in weights.items()}
    if kind == 'list':
        content = list(content.values())
    elif kind == 'number':
        content['epoch'] = 3
    elif kind == 'sparse':
        content['conv1.weight'] = torch.eye(3).to_sparse()
    elif kind == 'module':
        content = torch.nn.Linear(2, 2)
    torch.save(content, path)
    data = path.read_bytes()
    path.write_bytes(
        {'cut': data[: len(data) // 2], 'empty': b'', 'text': b'hello'}.get(kind, data)
    )
    says = {'list': 'holds a list', 'number': "'epoch' is a int", 'sparse': "'conv1.weight' is no"}
    with pytest.raises(UserError, match=rf'weights\.pth.*{says.get(kind, "is refused")}'):
        load_torchvision(path)


@pytest.mark.parametrize('version', ['2.5.1', '2.9.1+cu128'])
def test_an_unsafe_torch_is_refused(version, tmp_path, monkeypatch):
    """Versions of PyTorch with an unsafe weights-only loader are not used."""
    fake = type(sys)('torch')
    fake.__version__ = version
    monkeypatch.setitem(sys.modules, 'torch', fake)
    (tmp_path / 'weights.pth').write_bytes(b'')
    with pytest.raises(UserError, match=r'torch 2\.[59].*Install torch 2\.10 or later'):
        load_torchvision(tmp_path / 'weights.pth')


def test_a_pth_without_torch(tmp_path, monkeypatch):
    """Without PyTorch, the message says to install it or how to convert the file."""
    monkeypatch.setitem(sys.modules, 'torch', None)
    (tmp_path / 'net.pth').write_bytes(b'')
    with pytest.raises(UserError, match=r"Install torch .*convert .*save_file.*'net.safetensors'"):
        load_torchvision(tmp_path / 'net.pth')


def edited(weights, edits):
    """Weights with some replaced, added (an array) or removed (None)."""
    result = {**weights, **edits}
    return {name: array for name, array in result.items() if array is not None}


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ('edits', 'says'),
    [
        ({'layer2.1.bn2.running_var': None}, r"'layer2\.1\.bn2\.running_var' is missing"),
        ({'conv1.weight': None}, r"'conv1\.weight' is missing"),
        ({'layer3.0.conv1.weight': None}, r"'layer3\.0\.conv1\.weight' is missing"),
        ({'layer4.0.downsample.0.weight': None}, r"'layer4\.0\.downsample\.0\.weight' is missing"),
        ({'layer3.7.conv1.weight': zeros(16, 16, 3, 3)}, r"'layer3\.2\.conv1\.weight' is missing"),
        ({'conv1.weight': zeros(3, 3, 7, 7)}, r"'conv1\.weight' has the shape \[3, 3, 7, 7\]"),
        ({'conv1.weight': zeros(4, 1, 7, 7)}, r"'conv1\.weight' has the shape \[4, 1, 7, 7\].*"),
        ({'conv1.weight': zeros(4, 3, 5, 5)}, r"'conv1\.weight' .*it has \[4, 3, 7, 7\]"),
        ({'conv1.weight': zeros(4)}, r"'conv1\.weight' has the shape \[4\]"),
        ({'conv1.weight': zeros(0, 3, 7, 7)}, r"'conv1\.weight' has the shape \[0"),
        ({'layer4.1.bn2.bias': zeros(31)}, r"'layer4\.1\.bn2\.bias' has the shape \[31\].*\[32\]"),
        ({'layer2.0.conv1.weight': zeros(9, 4, 3, 3)}, r"'layer2\.0\.conv1\.weight' has the sh"),
        ({'layer1.0.conv2.weight': zeros(4, 4, 3, 3, dtype=np.int8)}, 'holds int8, not floats'),
        ({'layer1.0.se.fc1.weight': zeros(4)}, r"'layer1\.0\.se\.fc1\.weight' is no weight"),
        ({'conv1.0.weight': zeros(4)}, r"'conv1\.0\.weight' is no weight of a torchvision ResNet"),
        ({'module.bn1.weight': zeros(4)}, r"'module\.bn1\.weight' is no weight"),
        ({'layer1.0.downsample.0.weight': zeros(4, 4, 1, 1)}, r"0\.weight' has no place in a re"),
        ({'layer1.0.conv3.weight': zeros(4, 4, 1, 1)}, r"'layer1\.0\.conv3\.weight' has no place"),
        ({'layer5.0.conv1.weight': zeros(4, 4, 1, 1)}, r"'layer5\.0\.conv1\.weight' is no weight"),
    ],
)
def test_a_wrong_weight_is_named(edits, says, weights, tmp_path):
    """The first weight that is unknown, missing or of a wrong shape is named, with the file."""
    path = write(tmp_path / 'weights.safetensors', edited(weights, edits))
    with pytest.raises(UserError, match=rf'weights\.safetensors: .*{says}'):
        load_torchvision(path)


@pytest.mark.parametrize('missing', ['layer1.0.conv3.weight', 'layer4.2.bn3.weight'])
def test_a_missing_bottleneck_weight_is_named(missing, bottleneck_weights, tmp_path):
    """A bottleneck without its third convolution or norm is not mistaken for another block."""
    path = write(tmp_path / 'weights.safetensors', edited(bottleneck_weights, {missing: None}))
    with pytest.raises(UserError, match=f"'{missing}' is missing"):
        load_torchvision(path)


def test_a_stage_must_not_be_missing(weights, tmp_path):
    """A ResNet of three stages is refused, naming the first weight of the fourth."""
    three = {n: a for n, a in weights.items() if not n.startswith('layer4')}
    with pytest.raises(UserError, match=r"'layer4\.0\.conv1\.weight' is missing"):
        load_torchvision(write(tmp_path / 'weights.safetensors', three))


@pytest.mark.parametrize(
    ('inner', 'group', 'says'),
    [
        # resnext50_32x4d has 32 groups of 4; wide_resnet50_2 is twice as wide inside its blocks.
        (128, 4, 'in 32 groups: this is a ResNeXt'),
        (128, 128, 'this is a wide ResNet'),
    ],
)
def test_relatives_are_refused(inner, group, says, tmp_path):
    """ResNeXt and wide ResNets have a ResNet's names; the message says what they are."""
    shapes = torchvision_shapes('resnet50')
    for stage in range(4):
        width, out = inner * 2**stage, 256 * 2**stage
        for i in range((3, 4, 6, 3)[stage]):
            block = f'layer{stage + 1}.{i}'
            into = out if i else max(64, out // 2 if stage else 64)
            shapes[f'{block}.conv1.weight'] = (width, into, 1, 1)
            shapes[f'{block}.conv2.weight'] = (width, group * 2**stage, 3, 3)
            shapes[f'{block}.conv3.weight'] = (out, width, 1, 1)
    zero = {n: np.zeros(s, np.float16) for n, s in shapes.items()}
    with pytest.raises(UserError, match=says):
        load_torchvision(write(tmp_path / 'weights.safetensors', zero))


def test_wrong_files_are_refused(weights, tmp_path):
    """A missing file, another kind, a damaged or empty one each have a message."""
    with pytest.raises(UserError, match=r'nowhere\.pth: there is no such file'):
        load_torchvision(tmp_path / 'nowhere.pth')
    other = tmp_path / 'weights.onnx'
    other.write_bytes(b'')
    with pytest.raises(UserError, match=r'read from files named \.safetensors, .* or \.ckpt'):
        load_torchvision(other)
    path = write(tmp_path / 'weights.safetensors', weights)
    whole = path.read_bytes()
    for data in (b'', whole[:4], whole[: len(whole) // 2], b'\xff' * 8 + whole[8:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r'weights\.safetensors is damaged'):
            load_torchvision(path)
    for content in ({}, {'fc.weight': zeros(2, 2)}, {'module.fc.bias': zeros(2)}):
        with pytest.raises(UserError, match='holds no weights of a ResNet'):
            load_torchvision(write(path, content))


@pytest.mark.parametrize(
    'kept',
    [
        'nonsense',
        '[]',
        '{}',
        '{"image_size": 0, "mean": [0, 0, 0], "std": [1, 1, 1], "step": 1}',
        '{"image_size": 8, "mean": [0, 0], "std": [1, 1, 1], "step": 1}',
        '{"image_size": 8, "mean": [0, 0, 0], "std": [1, 0, 1], "step": 1}',
    ],
)
def test_damaged_metadata_is_refused(kept, weights, tmp_path):
    """Image size and normalisation written by this package are read completely or refused."""
    path = write(tmp_path / 'weights.safetensors', weights, {'byol_jax': kept})
    with pytest.raises(UserError, match="metadata 'byol_jax' is damaged"):
        load_torchvision(path)


@pytest.mark.parametrize(
    ('kwargs', 'says'),
    [
        ({'channels': [8, 16, 24, 32]}, r'no channels=\(8, 16, 24, 32\)'),
        ({'strides': [1, 2, 2, 1]}, r'no strides='),
        ({'stem_channels': 8}, r'no stem_channels=8, only stem_channels=64'),
        ({'same_padding': True}, r'no same_padding=True'),
        ({'project_every_stage': True}, r'no project_every_stage=True'),
        ({'stage_sizes': [1, 1]}, '4 stages; this one has 2'),
        ({'hidden_layer': 'stage3'}, "tapped at 'stage3'"),
        ({'hidden_layer': 'head', 'num_classes': 5}, "tapped at 'head'"),
    ],
)
def test_what_torchvision_cannot_express_stays(kwargs, says, tmp_path):
    """An encoder that torchvision's ResNet would compute differently is not written."""
    given = {'stage_sizes': [1, 1, 1, 1], 'width': 0.125, **kwargs}
    with pytest.raises(UserError, match=says):
        save_torchvision(our_encoder('resnet', **given), tmp_path / 'weights.safetensors')
    assert list(tmp_path.iterdir()) == []


def test_another_network_stays(tmp_path):
    """Only this package's ResNets have torchvision names."""
    encoder = our_encoder('resnet18', width=0.0625)
    other = Encoder(nn.Dense(3), {}, encoder.description)
    with pytest.raises(UserError, match="'resnet18' is no ResNet of byol_jax"):
        save_torchvision(other, tmp_path / 'weights.safetensors')
    with pytest.raises(UserError, match=r'named \*\.safetensors'):
        save_torchvision(encoder, tmp_path / 'weights.pth')
