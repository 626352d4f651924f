"""DeepMind's checkpoints give the same features as Haiku's own modules."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, process_environment
from pickles import raw

from byol_jax import UserError, load_encoder
from byol_jax.interop.deepmind import load_deepmind
from byol_jax.interop.imports import load_from
from byol_jax.models.registry import build_encoder
from byol_jax.models.resnet import ResNet

hk = pytest.importorskip('haiku', reason='dm-haiku is not installed: no independent reference')

BOTTLENECKS = (256, 512, 1024, 2048)
BASIC = (64, 128, 256, 512)
# Blocks in each group, channels of each group at width 1, bottleneck, width.
NETWORKS = {
    'res_net18': ((2, 2, 2, 2), BASIC, False, 1),
    'res_net18_2x': ((2, 2, 2, 2), BASIC, False, 2),
    'res_net50': ((3, 4, 6, 3), BOTTLENECKS, True, 1),
    'tiny_res_net': ((1, 1, 1, 1), (8, 8, 8, 8), False, 1),
}
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


class _ByolExperimentState(NamedTuple):
    """As in DeepMind's byol_experiment.py."""

    online_params: Any
    target_params: Any
    online_state: Any
    target_state: Any
    opt_state: Any


_ByolExperimentState.__module__ = 'byol.byol_experiment'


class Torso(hk.Module):
    """A ResNet made of Haiku's modules, like DeepMind's."""

    def __init__(self, blocks, channels, bottleneck, width, name):
        super().__init__(name=name)
        norm = {'decay_rate': 0.9, 'eps': 1e-5, 'create_scale': True, 'create_offset': True}
        self.conv = hk.Conv2D(
            64 * width, 7, stride=2, with_bias=False, padding='SAME', name='initial_conv'
        )
        self.norm = hk.BatchNorm(name='initial_batchnorm', **norm)
        self.groups = [
            hk.nets.ResNet.BlockGroup(
                channels=width * channels[i],
                num_blocks=blocks[i],
                stride=(1, 2, 2, 2)[i],
                bn_config=norm,
                resnet_v2=False,
                bottleneck=bottleneck,
                use_projection=True,
                name=f'block_group_{i}',
            )
            for i in range(4)
        ]

    def __call__(self, x, train):
        x = jax.nn.relu(self.norm(self.conv(x), train))
        x = hk.max_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), 'SAME')
        for group in self.groups:
            x = group(x, train, False)
        return x.mean(axis=(1, 2))


def haiku_network(name):
    """A ResNet with a projector beside it, as in a checkpoint; returns the ResNet's output."""

    def forward(images, train=False):
        features = Torso(*NETWORKS[name], name=name)(images, train)
        hidden = hk.Linear(4, name='projector')(features)
        hk.BatchNorm(True, True, 0.9, name='projector_norm')(hidden, train)
        return features

    return hk.without_apply_rng(hk.transform_with_state(forward))


def random_trees(name):
    """Random parameters and state of a network, with no initial values."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda x: haiku_network(name).init(jax.random.key(0), x, True), images)
    rng = np.random.default_rng(0)

    def draw(path, shape):
        kind = path[-1].key
        if kind == 'counter':
            return np.array(7, np.int32)
        if kind in ('w', 'b', 'offset') or (kind == 'average' and 'mean_ema' in path[-2].key):
            fan_in = np.prod(shape.shape[:-1]) if kind == 'w' else 100
            value = rng.normal(0, np.sqrt(2 / fan_in), shape.shape)
        else:
            value = rng.uniform(0.5, 1.5, shape.shape)
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def haiku_features(name, params, state, images):
    x = (images / np.float32(255) - MEAN) / STD
    features, _ = jax.jit(haiku_network(name).apply)(params, state, x.astype(np.float32))
    return np.asarray(features)


def checkpoint(params, state, step=123):
    """What DeepMind's Checkpointer writes; the target differs from the online network."""
    other = jax.tree.map(lambda x: x + 1, params)
    flat = hk.data_structures.to_immutable_dict
    inner = _ByolExperimentState(flat(params), flat(other), flat(state), flat(state), [other])
    return {'experiment_state': inner, 'step': step, 'rng': np.zeros(2, np.uint32)}


@pytest.fixture
def byol_module(monkeypatch):
    """Makes DeepMind's module importable while a file is written."""
    module: Any = types.ModuleType('byol.byol_experiment')
    module._ByolExperimentState = _ByolExperimentState
    monkeypatch.setitem(sys.modules, 'byol', types.ModuleType('byol'))
    monkeypatch.setitem(sys.modules, 'byol.byol_experiment', module)


def write(path, data, protocol=2):
    """Writes a pickle of protocol 2, as DeepMind does."""
    path.write_bytes(pickle.dumps(data, protocol))
    return path


@pytest.fixture(scope='module')
def tiny():
    return random_trees('tiny_res_net')


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), np.uint8)


@pytest.fixture(scope='module')
def tiny_features(tiny, images):
    return haiku_features('tiny_res_net', *tiny, images)


def relative_error(actual, expected):
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ('network', 'name', 'kwargs', 'sizes'),
    [
        ('res_net18', 'resnet18', {'project_every_stage': True}, [(64, 64), (75, 61)]),
        pytest.param(
            'res_net18_2x',
            'resnet18',
            {'project_every_stage': True, 'width': 2},
            [(33, 47)],
            marks=pytest.mark.slow,
        ),
        ('res_net50', 'resnet50', {}, [(64, 64)]),
    ],
)
def test_features_are_haikus(tmp_path, network, name, kwargs, sizes):
    """Converted networks of several depths and widths give the features of Haiku's modules."""
    trees = random_trees(network)
    # Whole checkpoints are tested with the tiny network, since these would take half a gigabyte.
    encoder = load_deepmind(write(tmp_path / 'pair.pkl', trees, protocol=5))
    assert encoder.description['name'] == name
    assert encoder.description['kwargs'] == {'same_padding': True, **kwargs}
    rng = np.random.default_rng(2)
    for height, width in sizes:
        pictures = rng.integers(0, 256, (2, height, width, 3), np.uint8)
        expected = haiku_features(network, *trees, pictures)
        assert expected.std() > 0.01
        error = relative_error(encoder(pictures), expected)
        print(f'{network} {height}x{width}: {error:.1e}')
        # Measured on a CPU: 4e-7 to 1e-6.
        assert error < 1e-5


def test_evaluation_uses_the_debiased_average(tmp_path, tiny, images):
    """After training steps in Haiku, the converted running averages are the debiased ones."""
    params, state = tiny
    network = haiku_network('tiny_res_net')
    x = jnp.asarray((images / np.float32(255) - MEAN) / STD)
    state = jax.tree.map(np.zeros_like, state)
    step = jax.jit(lambda state: network.apply(params, state, x, True)[1])
    for _ in range(3):
        state = step(state)
    path = write(tmp_path / 'pair.pkl', (params, jax.device_get(state)))
    encoder = load_deepmind(path)
    norm = {k: v for k, v in state.items() if 'initial_batchnorm' in k and 'var_ema' in k}
    (statistics,) = norm.values()
    assert statistics['counter'] == 3
    assert relative_error(statistics['hidden'], statistics['average']) > 0.1
    converted = encoder.variables['batch_stats']['bn1']['var']
    np.testing.assert_array_equal(converted, np.ravel(statistics['average']))
    expected = haiku_features('tiny_res_net', params, state, images)
    assert relative_error(encoder(images), expected) < 1e-5


LAYOUTS = {
    'dict': lambda p, s: {'experiment_state': {'online_params': p, 'online_state': s}, 'step': 5},
    'state-alone': lambda p, s: _ByolExperimentState(p, p, s, s, ()),
    'state-as-dict': lambda p, s: {'online_params': p, 'online_state': s},
    'pair': lambda p, s: (p, s),
    'list': lambda p, s: [p, s],
    'linear-evaluation': lambda p, s: {'backbone_params': p, 'backbone_state': s},
    'ordered': lambda p, s: (OrderedDict(p), OrderedDict(s)),
    'jax-arrays': lambda p, s: jax.tree.map(jnp.asarray, checkpoint(p, s, np.int64(5))),
    'fortran-order': lambda p, s: jax.tree.map(np.asfortranarray, (p, s)),
    'big-endian': lambda p, s: (jax.tree.map(lambda x: x.astype(x.dtype.newbyteorder('>')), p), s),
}


@pytest.mark.usefixtures('byol_module')
@pytest.mark.parametrize('protocol', [2, 4, 5])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(tmp_path, tiny, layout, protocol):
    """Whole checkpoints and parts of them, of NumPy or JAX arrays, give the same encoder."""
    path = write(tmp_path / 'c.pkl', LAYOUTS[layout](*tiny), protocol)
    encoder = load_deepmind(path)
    assert encoder.description['step'] == (5 if layout in ('dict', 'jax-arrays') else 0)
    reference = load_deepmind(write(tmp_path / 'r.pkl', tiny))
    for a, e in zip(
        jax.tree.leaves(encoder.variables), jax.tree.leaves(reference.variables), strict=True
    ):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, e)


def test_dills_spelling(tmp_path, tiny, images, tiny_features):
    """dill writes NamedTuple classes by their fields, and arrays through its own calls."""
    path = tmp_path / 'dill.pkl'
    path.write_bytes(raw(checkpoint(*tiny), _ByolExperimentState))
    encoder = load_deepmind(path)
    assert encoder.description['step'] == 123
    assert relative_error(encoder(images), tiny_features) < 1e-5


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (lambda data: data[: len(data) // 2], 'cut off'),
        (lambda data: data[:-1], 'cut off'),
        (lambda data: b'', 'cut off'),
        (lambda data: b'PK\x03\x04' + data, 'no pickle'),
        (lambda data: b'<html>not found</html>', 'no pickle'),
    ],
    ids=['half', 'last-byte', 'empty', 'zip', 'html'],
)
def test_damaged_files(tmp_path, tiny, content, words):
    """A file that is cut off anywhere or empty is refused by its name."""
    path = write(tmp_path / 'damaged.pkl', tiny)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match=words) as error:
        load_deepmind(path)
    assert 'damaged.pkl' in str(error.value)


def test_missing_file(tmp_path):
    """A missing file is named."""
    with pytest.raises(UserError, match=r'no file .*nowhere\.pkl'):
        load_deepmind(tmp_path / 'nowhere.pkl')


def without(tree, *words):
    return {key: value for key, value in tree.items() if not all(w in key for w in words)}


def changed(tree, word, **leaves):
    (key,) = (key for key in tree if key.endswith(word))
    return {**tree, key: {**tree[key], **leaves}}


ROOT_NAME = 'tiny_res_net/~'
ODD = {
    'no-resnet': (lambda p, s: (without(p, 'initial_conv'), s), '0 modules .*initial_conv'),
    'two-resnets': (
        lambda p, s: ({**p, 'b/~/initial_conv': p[f'{ROOT_NAME}/initial_conv']}, s),
        '2 modules',
    ),
    'three-groups': (
        lambda p, s: (without(p, 'block_group_3'), s),
        'found: block_group_0, block_group_1, block_group_2',
    ),
    'five-groups': (
        lambda p, s: (
            {**p, f'{ROOT_NAME}/block_group_4/~/block_0/~/conv_0': {'w': np.zeros(1)}},
            s,
        ),
        'block_group_4',
    ),
    'a-convolution-less': (
        lambda p, s: (without(p, 'block_group_2', 'conv_1'), s),
        'has block_group_2/block_0/conv_1/w; it is not',
    ),
    'a-convolution-more': (
        lambda p, s: (
            {**p, f'{ROOT_NAME}/block_group_1/~/block_0/~/conv_7': {'w': np.zeros(1, np.float32)}},
            s,
        ),
        'holds block_group_1/block_0/conv_7/w',
    ),
    'no-statistics': (lambda p, s: (p, {}), r'mean_ema/average; it is not|var_ema/average; it is'),
    'wrong-shape': (
        lambda p, s: (changed(p, 'block_group_2/~/block_0/~/conv_1', w=np.zeros((3, 3, 8, 9))), s),
        r'conv_1/w is float64 \[3, 3, 8, 9\]',
    ),
    'integers': (
        lambda p, s: (changed(p, 'initial_batchnorm', scale=np.zeros((1, 1, 1, 64), int)), s),
        'initial_batchnorm/scale is int64',
    ),
    'version-2': (
        lambda p, s: ({**p, f'{ROOT_NAME}/final_batchnorm': {'scale': np.zeros(8)}}, s),
        'ResNet v2',
    ),
    'stem-of-one-axis': (
        lambda p, s: (changed(p, 'initial_conv', w=np.zeros(3, np.float32)), s),
        'no initial_conv/w',
    ),
    'an-array': (lambda p, s: np.zeros(3), 'it is an array'),
    'a-list-of-three': (lambda p, s: [p, s, s], 'a list of 3'),
    'only-params': (lambda p, s: p, 'a dict of 28 keys: projector, projector_norm'),
    'another-experiment': (
        lambda p, s: {'experiment_state': {'weights': p}},
        'its experiment_state is a dict of 1 keys: weights',
    ),
    'no-array': (
        lambda p, s: (changed(p, 'initial_conv', w='text'), s),
        'initial_conv/w is a str of 4, not an array',
    ),
    'no-module': (lambda p, s: ({**p, f'{ROOT_NAME}/x': 3}, s), 'x is a int, not a dict'),
    'step-of-text': (
        lambda p, s: {'experiment_state': (p, s), 'step': 'three'},
        "'step' is no integer",
    ),
}


@pytest.mark.parametrize('name', ODD)
def test_other_contents_are_refused(tmp_path, tiny, name):
    """Another layout or network is refused; the message says what does not fit."""
    make, words = ODD[name]
    with pytest.raises(UserError, match=words):
        load_deepmind(write(tmp_path / 'odd.pkl', make(*tiny)))


def test_defaults_of_the_resnet_are_unchanged():
    """DeepMind's options are off by default, and change only the shapes of their weights."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)

    def count(**kwargs):
        module = build_encoder('resnet18', kwargs)
        assert isinstance(module, ResNet)
        params = jax.eval_shape(module.init, jax.random.key(0), images)['params']
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    # torchvision.models.resnet18 without `fc`.
    assert count() == count(same_padding=True) == 11_176_512
    # A 1x1 convolution of 64 to 64 channels and its norm.
    assert count(project_every_stage=True) == 11_176_512 + 64 * 64 + 2 * 64


@pytest.mark.usefixtures('byol_module')
def test_command_line(main_py, tmp_path, tiny, images, tiny_features):
    """--mode=export --from=deepmind:FILE writes an encoder that loads, without a config."""
    path = write(tmp_path / 'pretrain.pkl', checkpoint(*tiny))
    workdir = tmp_path / 'w'
    result = main_py('--mode=export', f'--from=deepmind:{path}', f'--workdir={workdir}')
    assert result.returncode == 0, result.stderr
    assert 'step 123' in result.stdout
    description = json.loads((workdir / 'encoder' / 'encoder.json').read_text())
    assert description['image_size'] == 224
    encoder = load_encoder(workdir / 'encoder')
    assert relative_error(encoder(images), tiny_features) < 1e-5


def test_command_line_errors(main_py, tmp_path):
    """A wrong use of --from is one readable line, and nothing is written."""
    workdir = tmp_path / 'w'
    result = main_py('--mode=export', '--from=deepmind:/nowhere.pkl', f'--workdir={workdir}')
    assert result.returncode == 1
    assert result.stderr == 'error: There is no file /nowhere.pkl.\n'
    assert not workdir.exists()


@pytest.mark.parametrize(
    ('source', 'words'),
    [
        ('deepmimd:x.pkl', "Did you mean 'deepmind'"),
        ('x.pkl', 'Known are: .*deepmind:FILE'),
        ('deepmind:', 'deepmind:FILE'),
    ],
)
def test_unknown_prefix(source, words):
    """An unknown prefix is refused; the message lists the known ones."""
    with pytest.raises(UserError, match=words):
        load_from(source)


def test_from_is_for_export(tmp_path):
    """--from with another mode or without a workdir is refused."""
    from byol_jax.app.export import export_from

    with pytest.raises(UserError, match='--mode=export, not with --mode=train'):
        export_from('deepmind:x', 'train', str(tmp_path))
    with pytest.raises(UserError, match='needs --workdir'):
        export_from('deepmind:x', 'export', None)


def test_no_haiku_and_no_dill_at_run_time():
    """Loading needs neither Haiku nor dill nor TensorFlow."""
    code = (
        'import sys, byol_jax.interop.imports\n'
        'print([m for m in ("haiku", "dill", "tensorflow") if m in sys.modules])'
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT,
        env=process_environment(1),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout == '[]\n'
