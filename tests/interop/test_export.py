"""The exported encoder is the trained one, and needs few packages to load."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT
from encoders import save_random_encoder

from byol_jax import UserError, load_encoder
from byol_jax.interop.encoder import make_encoder
from byol_jax.interop.export import _read_description, save_encoder
from byol_jax.methods.byol import Byol
from byol_jax.models.heads import MLP
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder
from byol_jax.training.step import AXIS

KWARGS = {'stage_sizes': [1, 1], 'channels': [4, 6], 'strides': [1, 2], 'stem_channels': 4}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 16


@pytest.fixture(scope='module')
def byol():
    encoder = TappedEncoder(build_encoder('resnet', KWARGS, AXIS), 'avgpool')
    return Byol(encoder, MLP(8, 4, AXIS), MLP(8, 4, AXIS), MEAN, STD)


@pytest.fixture(scope='module')
def trained(byol):
    """Parameters and statistics as after some training: none has its initial value."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
    shapes = jax.eval_shape(byol.encoder.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(0.2, 1, x.shape).astype(np.float32), shapes)
    params = {'encoder': variables.pop('params')}
    return params, {'encoder': variables}


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope='module')
def exported(trained):
    params, stats = trained
    return make_encoder(
        name='resnet',
        kwargs=KWARGS,
        hidden_layer='avgpool',
        variables={'params': params['encoder'], **stats['encoder']},
        image_size=SIZE,
        mean=MEAN,
        std=STD,
        step=123,
    )


@pytest.fixture
def folder(exported, tmp_path):
    save_encoder(exported, tmp_path / 'encoder')
    return tmp_path / 'encoder'


@pytest.fixture(scope='module')
def expected(byol, trained, images):
    """Features computed as in training, with frozen statistics."""
    represent = jax.jit(lambda params, stats, x: byol.represent(params, stats, x, False)[0])
    return np.asarray(represent(*trained, images))


@pytest.mark.parametrize(
    ('key', 'value', 'says'),
    [
        ('mean', [0.5], 'must be 3 values'),
        ('mean', [123.7, 116.3, 103.5], r'must be in \[0, 1\]'),
        ('mean', [math.nan, 0.5, 0.5], 'must be a finite number'),
        ('std', [0.0, 0.0, 0.0], 'must be above 0'),
        ('std', [0.2, True, 0.2], 'must be a number'),
        ('image_size', 0, r'must be in \[2, 8192\]'),
        ('kwargs', {**KWARGS, 'width': math.inf}, 'must be a finite number'),
    ],
)
def test_a_value_that_is_refused_on_reading_is_refused_on_writing(
    exported, folder, key, value, says
):
    """Writing encoder.json refuses every value that reading would call damaged."""
    given = {**exported.description, key: value}
    names = ('name', 'kwargs', 'hidden_layer', 'image_size', 'step', 'mean', 'std')
    with pytest.raises(UserError, match=says) as writing:
        make_encoder(variables=exported.variables, **{name: given[name] for name in names})
    assert key in str(writing.value)
    described = json.loads((folder / 'encoder.json').read_text())
    (folder / 'encoder.json').write_text(json.dumps({**described, key: value}))
    with pytest.raises(UserError, match=f'encoder.json is damaged: .*{key}.*{says}'):
        load_encoder(folder)


def test_loaded_features_are_the_trained_ones(folder, images, expected):
    """A loaded encoder gives the features of the trained network bit for bit."""
    encoder = load_encoder(folder)
    features = encoder(images)
    assert features.dtype == np.float32
    assert features.shape == (3, encoder.description['feature_size'])
    assert features.std() > 0
    np.testing.assert_array_equal(features, expected)


def test_loaded_variables_are_the_saved_ones(folder, exported):
    """Variables come back with their names, shapes, types and bits."""
    loaded = load_encoder(folder).variables
    assert jax.tree.structure(loaded) == jax.tree.structure(exported.variables)
    for a, e in zip(jax.tree.leaves(loaded), jax.tree.leaves(exported.variables), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def test_loaded_network_can_be_fine_tuned(folder, images, expected):
    """The Flax network and its variables can be used without the wrapper."""
    encoder = load_encoder(folder)
    x = (images / 255 - np.array(MEAN)) / np.array(STD)
    features = jax.jit(encoder.module.apply)(encoder.variables, x.astype(np.float32))
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_the_folder_holds_json_and_safetensors_only(folder, exported):
    """An export is two plain files: no pickle, no code, and nothing else."""
    assert sorted(p.name for p in folder.iterdir()) == ['encoder.json', 'encoder.safetensors']
    description = json.loads((folder / 'encoder.json').read_text())
    assert description == {
        'format': 'byol_jax encoder 2',
        'name': 'resnet',
        'kwargs': KWARGS,
        'hidden_layer': 'avgpool',
        'pool': 'mean',
        'image_size': SIZE,
        'antialias': True,
        'mean': list(MEAN),
        'std': list(STD),
        'feature_size': 6,
        'step': 123,
        'versions': description['versions'],
        'weights_sha256': exported.weights_sha256,
        'sha256': description['sha256'],
    }
    assert set(description['versions']) == {'jax', 'flax'}
    names = safetensors.numpy.load_file(folder / 'encoder.safetensors')
    assert 'params/stage2/block1/conv1/kernel' in names
    assert 'batch_stats/bn1/mean' in names


LOAD_WITHOUT_TRAINING_LIBRARIES = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'tensorflow', 'orbax', 'ml_collections', 'cv2', 'PIL'}:
            raise ModuleNotFoundError(f'{name} is not installed', name=name)

sys.meta_path.insert(0, Blocker())
import numpy as np
from byol_jax import load_encoder

folder, images, features = sys.argv[1:]
np.save(features, load_encoder(folder)(np.load(images)))
"""


def test_loading_needs_no_training_libraries(folder, images, expected, tmp_path):
    """Without TensorFlow, orbax, ml_collections, OpenCV and Pillow, the features are the same."""
    np.save(tmp_path / 'images.npy', images)
    paths = [folder, tmp_path / 'images.npy', tmp_path / 'features.npy']
    done = subprocess.run(
        [sys.executable, '-c', LOAD_WITHOUT_TRAINING_LIBRARIES, *map(str, paths)],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(paths[2]), expected)


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r'float32 \[2, 8, 8, 3\]'),
        (np.zeros((8, 8, 3), np.uint8), r'uint8 \[8, 8, 3\]'),
        (np.zeros((2, 8, 8, 4), np.uint8), r'uint8 \[2, 8, 8, 4\]'),
        (np.zeros((2, 3, 8, 8), np.uint8), r'uint8 \[2, 3, 8, 8\]'),
        ([[1, 2]], r'list \[1, 2\]'),
    ],
)
def test_wrong_images_are_refused(exported, given, says):
    """Images of another type or layout are refused; the message says what was given and wanted."""
    with pytest.raises(UserError, match=rf'uint8 images \[B, H, W, 3\].*given: {says}'):
        exported(given)


def test_other_sizes_are_taken(exported):
    """A network that pools takes pictures of any size."""
    assert exported(np.zeros((2, 24, 20, 3), np.uint8)).shape == (2, 6)


@pytest.mark.parametrize('name', ['encoder.json', 'encoder.safetensors'])
def test_a_missing_file_is_named(folder, name):
    """A folder without one of the files is refused; the message names it and how to make it."""
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf'{name} is missing.*--mode=export'):
        load_encoder(folder)


def test_a_workdir_leads_to_its_encoder(tmp_path):
    """For the workdir of a run, the message says where its encoder is."""
    save_random_encoder(tmp_path / 'run' / 'encoder')
    with pytest.raises(UserError, match=r'workdir of a run: its encoder is .*run/encoder\.'):
        load_encoder(tmp_path / 'run')


def test_a_missing_folder_is_named(tmp_path):
    """A folder that does not exist is refused by its name."""
    with pytest.raises(UserError, match='nowhere: there is no such folder'):
        load_encoder(tmp_path / 'nowhere')


def without(key):
    def damage(data):
        description = json.loads(data)
        del description[key]
        return json.dumps(description).encode()

    return damage


@pytest.mark.parametrize(
    ('name', 'damage'),
    [
        ('encoder.json', lambda data: data[: len(data) // 2]),
        ('encoder.json', lambda data: b'\xff\xfe' + data),
        ('encoder.json', lambda data: b''),
        ('encoder.json', lambda data: b'[]'),
        ('encoder.json', without('name')),
        ('encoder.json', without('kwargs')),
        ('encoder.json', without('hidden_layer')),
        ('encoder.safetensors', lambda data: data[: len(data) // 2]),
        ('encoder.safetensors', lambda data: data[:4]),
        ('encoder.safetensors', lambda data: b''),
        ('encoder.safetensors', lambda data: b'\xff' * 8 + data[8:]),
    ],
    ids=[
        'json-half',
        'json-not-utf8',
        'json-empty',
        'json-list',
        'json-without-name',
        'json-without-kwargs',
        'json-without-layer',
        'weights-half',
        'weights-header',
        'weights-empty',
        'weights-length',
    ],
)
def test_a_damaged_file_is_refused(folder, name, damage):
    """A file that was cut off or changed is refused as damaged."""
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match='encoder'):
        load_encoder(folder)


def without_seal(folder):
    """encoder.json as older versions wrote it: without a digest of itself."""
    path = folder / 'encoder.json'
    description = json.loads(path.read_text())
    del description['sha256']
    path.write_text(json.dumps(description, indent=2, sort_keys=True) + '\n')
    return description


@pytest.mark.parametrize('every', [9, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_the_description_is_noticed(folder, images, expected, every):
    """Whatever bit of encoder.json flips, the file is refused or means what it meant."""
    path = folder / 'encoder.json'
    right = load_encoder(folder).description
    data = path.read_bytes()
    harmless = []
    for bit in range(0, 8 * len(data), every):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = _read_description(path)
        except UserError:
            continue
        harmless.append(bit)
        assert found == right
    # Such as a space that becomes none of JSON's own characters.
    assert len(harmless) < len(data) / every
    path.write_bytes(data)
    np.testing.assert_array_equal(load_encoder(folder)(images), expected)


@pytest.mark.parametrize('sealed', [True, False], ids=['', 'of an older version'])
@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('std', [0, 0, 0]),
        ('std', [0.2, 0.2, -0.2]),
        ('mean', [float('nan')] * 3),
        ('mean', [0.5]),
        ('mean', [123.7, 116.3, 103.5]),
        ('hidden_layer', 'stage1'),
        ('image_size', 0),
        ('feature_size', 5),
        ('weights_sha256', 'ab'),
    ],
)
def test_a_changed_value_is_refused(folder, key, value, sealed):
    """Features are never silently those of other colours or another layer."""
    if not sealed:
        without_seal(folder)
    path = folder / 'encoder.json'
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {key: value}))
    with pytest.raises(UserError, match='encoder'):
        load_encoder(folder)


def test_another_colour_is_refused(folder):
    """A digit of the mean, which no other check could notice, is under the digest."""
    path = folder / 'encoder.json'
    path.write_text(path.read_text().replace('0.485', '0.495'))
    with pytest.raises(UserError, match='the digest in it is not that of the rest'):
        load_encoder(folder)


def test_encoders_of_older_versions_load(folder, images, expected):
    """encoder.json without a digest of itself is read, if it has the keys it had then."""
    description = without_seal(folder)
    np.testing.assert_array_equal(load_encoder(folder)(images), expected)
    (folder / 'encoder.json').write_text(json.dumps(description | {'sha257': 'ab'}))
    with pytest.raises(UserError, match="no digest, and a key 'sha257'"):
        load_encoder(folder)


def test_weights_of_another_network_are_refused(folder):
    """Weights that do not fit the described network are refused."""
    path = folder / 'encoder.json'
    description = json.loads(path.read_text())
    description['kwargs']['channels'] = [4, 8]
    path.write_text(json.dumps(description))
    with pytest.raises(UserError):
        load_encoder(folder)


def test_another_format_is_refused(folder):
    """A file of a later format is refused, naming both formats."""
    path = folder / 'encoder.json'
    path.write_text(path.read_text().replace('encoder 2', 'encoder 3'))
    with pytest.raises(UserError, match=r"'byol_jax encoder 3', not 'byol_jax encoder 2'"):
        load_encoder(folder)


def test_transposed_arrays_are_saved_rightly(exported, tmp_path):
    """An array with another order in memory is saved by its values."""
    other_order = jax.tree.map(np.asfortranarray, exported.variables)
    save_encoder(type(exported)(exported.module, other_order, exported.description), tmp_path)
    for a, e in zip(
        jax.tree.leaves(load_encoder(tmp_path).variables),
        jax.tree.leaves(exported.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(a, e)


def test_saving_again_replaces_the_export(exported, folder):
    """A second export to the same folder replaces the first."""
    params = {
        **exported.variables,
        'params': jax.tree.map(np.negative, exported.variables['params']),
    }
    save_encoder(type(exported)(exported.module, params, exported.description), folder)
    kernel = load_encoder(folder).variables['params']['conv1']['kernel']
    np.testing.assert_array_equal(kernel, -exported.variables['params']['conv1']['kernel'])
    assert len(list(folder.iterdir())) == 2


OWN = """
import flax.linen as nn

class Net(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, name='out')(x.mean(axis=(1, 2)))
"""


def test_an_own_class(tmp_path, monkeypatch, images):
    """A network of the user's own is exported and loaded by its 'module:Class'."""
    source = tmp_path / 'source'
    source.mkdir()
    (source / 'own_exported.py').write_text(OWN)
    name, kwargs = 'own_exported:Net', {'features': 2}
    with monkeypatch.context() as patch:
        patch.syspath_prepend(source)
        kernel = np.arange(6, dtype=np.float32).reshape(3, 2)
        encoder = make_encoder(
            name=name,
            kwargs=kwargs,
            hidden_layer='out',
            variables={'params': {'out': {'kernel': kernel, 'bias': np.ones(2, np.float32)}}},
            image_size=SIZE,
            mean=MEAN,
            std=STD,
            step=1,
        )
        save_encoder(encoder, tmp_path / 'encoder')
        colours = ((images / 255 - np.array(MEAN)) / np.array(STD)).mean(axis=(1, 2))
        actual = load_encoder(tmp_path / 'encoder')(images)
        np.testing.assert_allclose(actual, colours @ kernel + 1, rtol=1e-4, atol=1e-5)
    del sys.modules['own_exported']
    with pytest.raises(UserError, match=r"module 'own_exported' cannot be imported.*exported with"):
        load_encoder(tmp_path / 'encoder', allow=('own_exported',))
