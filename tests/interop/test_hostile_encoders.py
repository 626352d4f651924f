"""Exported encoders made by anyone: nothing in them runs code, and none takes long to refuse."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import time

import jax
import numpy as np
import pytest

from byol_jax import UserError, load_encoder
from byol_jax.files import sealed
from byol_jax.interop.encoder import make_encoder
from byol_jax.interop.export import save_encoder
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder

# Killed if it hangs in a C function, which no exception would end.
pytestmark = pytest.mark.timeout(120, method='thread')

NETWORKS = {
    'resnet': ({'stage_sizes': [1], 'width': 0.125, 'small_images': True}, 'avgpool'),
    'vit': ({'width': 16, 'depth': 1, 'heads': 2, 'patch_size': 8}, 'norm'),
    'convnext': ({'depths': [1, 1], 'channels': [4, 8], 'small_images': True}, 'norm'),
}
SIZE = 16
# Far above what any of these takes, and far below what obeying would.
SECONDS = 30


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
    """A sound export of each network."""
    root = tmp_path_factory.mktemp('exports')
    for name, (kwargs, layer) in NETWORKS.items():
        tapped = TappedEncoder(build_encoder(name, kwargs), layer)
        images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
        shapes = jax.eval_shape(tapped.init, jax.random.key(0), images)
        encoder = make_encoder(
            name=name,
            kwargs=kwargs,
            hidden_layer=layer,
            variables=jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes),
            image_size=SIZE,
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
            step=1,
        )
        save_encoder(encoder, root / name)
    return root


@pytest.fixture
def changed(exports, tmp_path):
    """Copies an export, with other values in encoder.json."""

    def change(network, kwargs=None, **values):
        folder = tmp_path / 'encoder'
        shutil.copytree(exports / network, folder)
        path = folder / 'encoder.json'
        description = json.loads(path.read_text())
        description['kwargs'] |= kwargs or {}
        # Whoever makes a file makes its digest too.
        path.write_text(json.dumps(sealed(description | values)))
        return folder

    return change


def refusal(folder, allow=()):
    """The message of a folder that is refused soon, in one line that a terminal only shows."""
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_encoder(folder, allow)
    assert time.perf_counter() - began < SECONDS
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2000
    return message


@pytest.mark.parametrize('network', NETWORKS)
def test_sound_ones_load(exports, network):
    assert load_encoder(exports / network).description['name'] == network


@pytest.mark.parametrize(
    ('network', 'kwargs', 'says'),
    [
        ('resnet', {'stage_sizes': [10_000_000]}, 'stage1/block2/conv1/kernel'),
        ('resnet', {'stage_sizes': [10**30]}, 'stage1/block2/conv1/kernel'),
        ('resnet', {'width': 1e12}, 'conv1/kernel'),
        ('resnet', {'width': 1e38}, 'conv1/kernel'),
        ('resnet', {'width': 1e308}, 'finite'),
        ('resnet', {'stage_sizes': [[[1]]]}, 'TypeError'),
        ('vit', {'depth': 10**8}, 'block2/norm1/scale'),
        ('vit', {'depth': 10**8, 'drop_path': 0.5}, 'block2/norm1/scale'),
        ('vit', {'width': 10**9}, 'patch_embed/kernel'),
        ('vit', {'mlp_ratio': 1e30}, 'block1/mlp/linear1/kernel'),
        ('vit', {'num_classes': 10**12}, 'head/kernel'),
        ('vit', {'heads': 10**9}, 'not divisible'),
        ('convnext', {'depths': [10**8, 1]}, 'stage1/block2/dwconv/kernel'),
        ('convnext', {'channels': [10**9, 8]}, 'stem/kernel'),
    ],
)
def test_a_network_larger_than_its_weights(changed, network, kwargs, says):
    """What a few bytes declare is built only as far as there are weights for it."""
    assert says in refusal(changed(network, kwargs))


OWN = """
import flax.linen as nn
from flax import nnx

class Setup(nn.Module):
    depth: int = 1

    def setup(self):
        self.layers = [nn.Dense(4) for _ in range(self.depth)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean(axis=(1, 2))


class Made(nnx.Module):
    def __init__(self, depth=1, *, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(depth)])

    def __call__(self, x):
        return x


class Deep(nn.Module):
    depth: int = 1

    @nn.compact
    def __call__(self, x):
        return self.deeper(x, self.depth)

    def deeper(self, x, left):
        return self.deeper(x, left - 1) if left else nn.Dense(4)(x)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own, which is not imported yet."""
    (tmp_path / 'modules').mkdir()
    (tmp_path / 'modules' / 'hostile_own.py').write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path / 'modules')
    yield 'hostile_own'
    sys.modules.pop('hostile_own', None)


@pytest.mark.parametrize(
    ('kind', 'says'),
    [
        pytest.param('Setup', 'Building it was stopped', marks=pytest.mark.slow),
        pytest.param('Made', 'Building it was stopped', marks=pytest.mark.slow),
        ('Deep', 'RecursionError'),
    ],
)
def test_a_network_of_somebodys_own(changed, own, kind, says):
    """A class that may be loaded still cannot be given arguments that keep it building."""
    folder = changed('resnet', name=f'{own}:{kind}')
    path = folder / 'encoder.json'
    description = json.loads(path.read_text()) | {'kwargs': {'depth': 10**8}}
    path.write_text(json.dumps(sealed(description)))
    assert says in refusal(folder, allow=(own,))


def test_no_module_is_imported_by_a_file(changed, own):
    """A class of a module that is not imported is refused, and the message says how to allow it."""
    folder = changed('resnet', name=f'{own}:Setup')
    message = refusal(folder)
    assert own not in sys.modules
    for words in (f"allow=('{own}',)", f'import {own} first', '--config.encoder.name=hostile_own:'):
        assert words in message
    # Allowed, it is imported, and refused for its arguments.
    assert 'takes no argument' in refusal(folder, allow=(own,))
    assert own in sys.modules
    # Once it is imported nothing need be allowed.
    assert 'takes no argument' in refusal(folder)


@pytest.mark.parametrize(
    ('name', 'says'),
    [
        ('.x:y', 'package.module:attribute'),
        ('../evil:Net', "Did you mean 'evil:Net'"),
        ('evil.py:Net', "Did you mean 'evil:Net'"),
        ('a..b:Net', 'package.module:attribute'),
        (':', 'package.module:attribute'),
        ('\x1b[2J:Net', r'\x1b[2J'),
        ('x' * 10**6, 'not a known encoder'),
        ('flax.linen:Module', 'takes no arguments'),
        ('flax.linen:Sequential', "takes no argument 'small_images'"),
        ('os:system', 'not a class derived from'),
        ('json:JSONDecoder', 'not a class derived from'),
        # What a module would import when it is asked for it, it does not hold.
        ('byol_jax:view_batches', "holds no 'view_batches'"),
    ],
)
def test_names_that_are_none(changed, name, says):
    before = set(sys.modules)
    assert says in refusal(changed('resnet', name=name))
    assert not {module for module in set(sys.modules) - before if not module.startswith('flax')}


@pytest.mark.parametrize(
    'values',
    [
        {'hidden_layer': '\x1b[2Jevil\nstep 3'},
        {'pool': '\x9b2J'},
        {'name': 'no', 'versions': {'\x1b]0;x\x07': '\n\n\u202e'}},
        {'format': '\x1b[2J'},
        {'kwargs': {'\x1b[2J': 1}},
        {'feature_size': '\x1b[2J\n'},
    ],
    ids=lambda values: next(iter(values)),
)
def test_control_characters_are_shown(changed, values):
    """No word of a file moves the cursor, and none begins a line of its own."""
    message = refusal(changed('resnet', **values))
    assert any(escaped in message for escaped in (r'\x1b', r'\x9b'))


@pytest.mark.parametrize(
    'text', ['[' * 200_000, '{"a":' * 200_000, '[' * 900 + ']' * 900, '"' * 10**6, '1' * 10**6]
)
def test_odd_json(changed, text):
    folder = changed('resnet')
    (folder / 'encoder.json').write_text(text)
    assert 'is damaged' in refusal(folder)


def sparse(path, header, size):
    with path.open('wb') as file:
        file.write(struct.pack('<Q', len(header)) + header)
        file.truncate(size)


HUGE = 12 * 10**9


@pytest.mark.parametrize('kind', ['zeros', 'longer', 'declared', 'json', 'deep'])
def test_a_huge_file_is_not_read(changed, kind):
    """Files of 12 GB that are mostly holes are refused by their first bytes."""
    folder = changed('resnet')
    path = folder / 'encoder.safetensors'
    if kind == 'zeros':
        sparse(path, b'', HUGE)
    elif kind == 'longer':
        with path.open('r+b') as file:
            file.truncate(HUGE)
    elif kind == 'declared':
        entry = {'dtype': 'F32', 'shape': [HUGE // 4], 'data_offsets': [0, HUGE]}
        header = json.dumps({'params/conv1/kernel': entry}).encode()
        sparse(path, header, 8 + len(header) + HUGE)
    elif kind == 'deep':
        sparse(path, b'[' * 200_000, HUGE)
    else:
        with (folder / 'encoder.json').open('r+b') as file:
            file.truncate(HUGE)
    refusal(folder)
