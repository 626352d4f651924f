"""Whole runs of a user's own networks, and what can be done with their results."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, process_environment
from flax import nnx
from network_steps import as_trained, by_path, make_method, quick_jit, small_config
from own_networks import NnxConvNet, NnxViT
from torchvision_reference import random_weights, torchvision_shapes, write

from byol_jax import UserError, load_encoder
from byol_jax.app.build import encoder_of_run, find_encoder, method_of, optimizer_of, start_from
from byol_jax.app.checkpoints import Checkpoints
from byol_jax.interop.torchvision import load_torchvision
from byol_jax.settings import Settings
from byol_jax.training.optimizers import decay_mask
from byol_jax.training.state import TrainState, init_state

TESTS = ROOT / 'tests'
SAMPLE = '--config=configs/div2k.py:sample'
STEPS = tuple(x for x in TINY if 'encoder.kwargs' not in x)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


class Own(NamedTuple):
    """A user's own network, and the flags that train it."""

    name: str
    flags: tuple[str, ...]

    @property
    def arguments(self):
        return (SAMPLE, *STEPS, f'--config.encoder.name=own_networks:{self.name}', *self.flags)


OWN = {
    # Linen; its norms do not know of devices, and it has dropout.
    'linen': Own(
        'ConvNet', ('--config.encoder.hidden_layer=drop', '--config.encoder.kwargs.rate=0.2')
    ),
    'nnx': Own('NnxConvNet', ('--config.encoder.hidden_layer=drop',)),
    'vit': Own(
        'NnxViT',
        (
            '--config.encoder.hidden_layer=norm',
            '--config.encoder.pool=cls',
            '--config.encoder.kwargs.image_size=32',
            '--config.encoder.kwargs.patch=8',
            '--config.optimizer.name=adamw',
            '--config.optimizer.base_learning_rate=0.03',
        ),
    ),
}


@pytest.fixture(scope='module')
def finished(main_py, tmp_path_factory):
    """Gives the workdir of an uninterrupted run of one of OWN; each run is made once.

    A run has as many devices as this process.
    """
    made = {}

    def get(kind):
        if kind not in made:
            workdir = tmp_path_factory.mktemp(kind) / 'w'
            where = {'devices': jax.device_count(), 'PYTHONPATH': str(TESTS)}
            done = main_py(*OWN[kind].arguments, f'--workdir={workdir}', **where)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ''
            made[kind] = workdir
        return made[kind]

    return get


@pytest.fixture(scope='module')
def linen(finished):
    """The workdir of the run that most tests use."""
    return finished('linen')


NNX = [pytest.param(kind, marks=pytest.mark.slow) for kind in ('nnx', 'vit')]


def config_of(workdir):
    """The config that a run has written."""
    return Settings.of(json.loads((workdir / 'config.json').read_text()))


def last_state(workdir):
    """(networks, state of the last checkpoint); the config describes the networks."""
    config = config_of(workdir)
    byol = method_of(config)

    def state():
        params, stats = byol.init(jax.random.key(0), config.views.image_size)
        mask = decay_mask(params, byol.untrained())
        optimizer = optimizer_of(config, mask, lambda step: 0.0)
        return init_state(byol, optimizer, params, stats)

    checkpoints = Checkpoints(workdir, config.checkpoint.keep, read_only=True)
    step, restored = checkpoints.restore(jax.eval_shape(state))
    checkpoints.close()
    assert step == 8
    return byol, TrainState(*restored)


def weights(workdir):
    return (workdir / 'encoder' / 'encoder.safetensors').read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize('kind', OWN)
def test_a_killed_run_goes_on_bit_for_bit(finished, main_py, tmp_path, kind):
    """A run killed with SIGKILL and started again ends with the weights of the whole run."""
    workdir = tmp_path / 'w'
    where = {'devices': jax.device_count(), 'PYTHONPATH': str(TESTS)}
    environment = process_environment(where['devices']) | {'PYTHONPATH': str(TESTS)}
    process = subprocess.Popen(
        [sys.executable, 'main.py', *OWN[kind].arguments, f'--workdir={workdir}'],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 200
    while not (workdir / 'checkpoints' / '4').exists():
        assert process.poll() is None, 'the run ended too soon'
        assert time.monotonic() < end, 'no checkpoint of step 4'
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    done = main_py(*OWN[kind].arguments, f'--workdir={workdir}', **where)
    assert done.returncode == 0, done.stderr
    assert 'going on from the checkpoint of step' in done.stdout
    assert weights(workdir) == weights(finished(kind))
    whole, resumed = (last_state(folder)[1] for folder in (finished(kind), workdir))
    for (path, a), e in zip(
        jax.tree.leaves_with_path(resumed), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_array_equal(a, e, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['linen', *NNX])
def test_the_export_gives_the_trained_features(finished, kind):
    """load_encoder gives, to the bit, the features of the last checkpoint's online network."""
    byol, state = last_state(finished(kind))
    represent = jax.jit(lambda params, stats, x: byol.represent(params, stats, x, False)[0])
    expected = np.asarray(represent(state.online_params, state.online_stats, IMAGES))
    encoder = load_encoder(finished(kind) / 'encoder')
    features = encoder(IMAGES)
    assert features.dtype == expected.dtype == np.float32
    assert features.std(axis=0).min() > 0
    assert encoder.description['step'] == 8
    np.testing.assert_array_equal(features, expected)
    np.testing.assert_array_equal(encoder_of_run(finished(kind))(IMAGES), expected)


def from_conv_net(model, x):
    for stage in model.stages:
        x = stage(x)
    return model.drop(x).mean(axis=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'kind_of_module', 'call'),
    [
        ('nnx', NnxConvNet, from_conv_net),
        ('vit', NnxViT, lambda model, x: model(x)[:, 0]),
    ],
)
def test_the_module_of_a_run_lives(finished, kind, kind_of_module, call):
    """encoder.module is the network as an nnx.Module; calling it gives the features."""
    encoder = load_encoder(finished(kind) / 'encoder')
    model = encoder.module
    assert type(model) is kind_of_module
    assert isinstance(model, nnx.Module)
    about = encoder.description
    x = np.float32((IMAGES / 255 - np.array(about['mean'])) / np.array(about['std']))
    np.testing.assert_allclose(quick_jit(call)(model, x), encoder(IMAGES), 1e-4, 1e-5)


def test_the_module_of_a_linen_run(linen):
    """encoder.module is the Linen module, for use with encoder.variables."""
    encoder = load_encoder(linen / 'encoder')
    about = encoder.description
    x = np.float32((IMAGES / 255 - np.array(about['mean'])) / np.array(about['std']))

    def call(variables, x):
        _, changed = encoder.module.apply(variables, x, capture_intermediates=True)
        return changed['intermediates']['drop']['__call__'][0].mean(axis=(1, 2))

    np.testing.assert_allclose(quick_jit(call)(encoder.variables, x), encoder(IMAGES), 1e-4, 1e-5)


def test_loading_without_the_class(linen, monkeypatch):
    """Without the user's own module, loading says which one is missing and what to do."""
    monkeypatch.delitem(sys.modules, 'own_networks')
    elsewhere = [p for p in sys.path if not (Path(p) / 'own_networks.py').exists()]
    monkeypatch.setattr(sys, 'path', elsewhere)
    with pytest.raises(UserError) as caught:
        load_encoder(linen / 'encoder', allow=('own_networks',))
    message = str(caught.value)
    assert "encoder.name='own_networks:ConvNet': module 'own_networks' cannot be imp" in message
    assert 'PYTHONPATH' in message
    with pytest.raises(UserError, match="module 'own_networks' cannot be imported"):
        encoder_of_run(linen, allow=('own_networks',))
    # The workdir's words import nothing either, unless they are allowed.
    for load, place in ((load_encoder, linen / 'encoder'), (encoder_of_run, linen)):
        with pytest.raises(UserError, match=r"allow=\('own_networks',\)"):
            load(place)
    with pytest.raises(UserError, match=r"allow=\('own_networks',\)"):
        find_encoder(str(linen))


# encoder.init_from


def networks(kwargs, **changes):
    """(networks of ConvNet, fresh parameters, fresh statistics) at the beginning of a run."""
    config = small_config('ConvNet', 'drop', encoder__kwargs=kwargs, views__image_size=32)
    config.update_from_flattened_dict(changes)
    byol = make_method(config)
    params, stats = jax.eval_shape(lambda: byol.init(jax.random.key(0), 32))
    return byol, as_trained({'params': params}, 1)['params'], as_trained(stats, 1)


@pytest.mark.parametrize('what', ['export', 'workdir', 'checkpoints'])
def test_starting_from_a_run(linen, tmp_path, what):
    """An export, a workdir, or a workdir of an unfinished run gives its weights up to the tap."""
    if what == 'checkpoints':
        shutil.copy(linen / 'config.json', tmp_path)
        shutil.copytree(linen / 'checkpoints', tmp_path / 'checkpoints')
    source = {'export': linen / 'encoder', 'workdir': linen, 'checkpoints': tmp_path}[what]
    before = {path: path.stat().st_mtime_ns for path in source.rglob('*')}
    byol, params, stats = networks({'classes': 7, 'rate': 0.5})
    new_params, new_stats, note = start_from(str(source), byol, params, stats)
    assert {path: path.stat().st_mtime_ns for path in source.rglob('*')} == before
    trained = load_encoder(linen / 'encoder')
    assert f'encoder starts from {source} (step 8, weights' in note
    assert trained.weights_sha256[:12] in note
    given, fresh = by_path(trained.variables), by_path({'params': params['encoder']})
    assert jax.tree.structure(new_params) == jax.tree.structure(params)
    assert jax.tree.structure(new_stats) == jax.tree.structure(stats)
    found = by_path({'params': new_params['encoder'], **new_stats['encoder']})
    for path, leaf in found.items():
        # A head of another size keeps its initial values.
        expected = fresh[path] if 'head' in path else given[path]
        np.testing.assert_array_equal(leaf, expected, err_msg=path)
    for part in ('projector', 'predictor'):
        assert new_params[part] is params[part]
        assert new_stats[part] is stats[part]


def test_a_started_encoder_gives_the_features_it_had(linen):
    """A run that starts from weights has, before its first step, the features of those weights."""
    byol, params, stats = networks({'classes': 7})
    params, stats, _ = start_from(str(linen), byol, params, stats)
    represent = jax.jit(lambda params, stats, x: byol.represent(params, stats, x, False)[0])
    expected = load_encoder(linen / 'encoder')(IMAGES)
    np.testing.assert_array_equal(represent(params, stats, IMAGES), expected)


def test_starting_without_a_head(linen):
    """Weights behind the source network's tap are not needed."""
    own = 'own_networks:Headless'
    byol, params, stats = networks({}, **{'encoder.name': own, 'encoder.hidden_layer': 'output'})
    new_params, _, _ = start_from(str(linen), byol, params, stats)
    kernel = load_encoder(linen / 'encoder').variables['params']['conv2']['kernel']
    np.testing.assert_array_equal(new_params['encoder']['conv2']['kernel'], kernel)


@pytest.mark.parametrize(
    ('kwargs', 'says'),
    [
        ({'width': 6}, r"'batch_stats/norm1/mean' is \[4\] there and \[6\] in this encoder"),
        ({'norm': 'none'}, r"'batch_stats/norm1/mean' is \[4\] there and absent in this encoder"),
        ({'norm': 'group', 'width': 6}, r"'batch_stats/norm1/mean' is \[4\] there and absent"),
    ],
    ids=['width', 'norm', 'both'],
)
def test_weights_of_another_network(linen, kwargs, says):
    """Other networks' weights are refused by the first that does not fit, naming their file."""
    with pytest.raises(UserError, match=says) as caught:
        start_from(str(linen), *networks(kwargs))
    assert "own_networks:ConvNet with {'rate': 0.2}" in str(caught.value)


@pytest.mark.parametrize('small', [pytest.param(False, marks=pytest.mark.slow), True])
def test_starting_from_torchvision(tmp_path, small):
    """torchvision:FILE gives the weights of a ResNet of torchvision's, to the bit."""
    kwargs = {'width': 0.0625, 'small_images': small}
    name, layer = 'encoder.name', 'encoder.hidden_layer'
    byol, params, stats = networks(kwargs, **{name: 'resnet18', layer: 'avgpool'})
    arrays = random_weights(torchvision_shapes('resnet18', 1 / 16, small))
    path = write(tmp_path / 'weights.safetensors', arrays)
    new_params, new_stats, note = start_from(f'torchvision:{path}', byol, params, stats)
    assert f'starts from torchvision:{path}' in note
    expected = by_path(load_torchvision(path).variables)
    found = by_path({'params': new_params['encoder'], **new_stats['encoder']})
    assert found.keys() == expected.keys()
    for leaf, array in expected.items():
        np.testing.assert_array_equal(found[leaf], array, err_msg=leaf)
    first = np.asarray(new_params['encoder']['conv1']['kernel'])
    np.testing.assert_array_equal(first, arrays['conv1.weight'].transpose(2, 3, 1, 0))
    with pytest.raises(UserError, match=r'is .* there and .* in this encoder.*resnet18'):
        start_from(f'torchvision:{path}', *networks({}))


def test_other_normalisation_is_said(linen):
    """A message says that the weights' run normalised its pictures differently."""
    byol, params, stats = networks({}, **{'views.mean': (0.5, 0.5, 0.5)})
    note = start_from(str(linen), byol, params, stats)[2]
    assert 'it was trained with views.mean=(0.485, 0.456, 0.406)' in note
    byol, params, stats = networks({})
    assert 'views.mean' not in start_from(str(linen), byol, params, stats)[2]


def test_weights_that_are_not_there(linen, tmp_path):
    """For a path that does not exist, the nearest is suggested; other mistakes are named."""
    for name in ('pretraining', 'other'):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"does not exist\. Did you mean 'pretraining'\?"):
        find_encoder(str(tmp_path / 'pretrainig'))
    with pytest.raises(UserError, match='neither an exported encoder'):
        find_encoder(str(tmp_path / 'other'))
    with pytest.raises(UserError, match=r'is a file: give its kind too, .*torchvision:'):
        find_encoder(str(linen / 'encoder' / 'encoder.safetensors'))
    with pytest.raises(UserError, match=r'missing\.safetensors'):
        find_encoder(f'torchvision:{tmp_path / "missing.safetensors"}')
    (tmp_path / 'other' / 'checkpoints').mkdir()
    shutil.copy(linen / 'config.json', tmp_path / 'other')
    with pytest.raises(UserError, match='has saved nothing yet'):
        find_encoder(str(tmp_path / 'other'))


@pytest.mark.slow
def test_a_run_that_starts_from_another_and_holds_its_encoder(linen, main_py, tmp_path):
    """With init_from and freeze_steps, a run keeps the weights for that time, then trains them."""
    arguments = (
        *OWN['linen'].arguments,
        f'--config.encoder.init_from={linen}',
        '--config.encoder.freeze_steps=6',
        '--config.optimizer.weight_decay=0.1',
        '--config.encoder.kwargs.classes=5',
    )
    done = main_py(*arguments, f'--workdir={tmp_path / "w"}', PYTHONPATH=str(TESTS))
    assert done.returncode == 0, done.stderr
    assert f'encoder starts from {linen} (step 8' in done.stdout
    given = by_path({'params': load_encoder(linen / 'encoder').variables['params']})
    _, state = last_state(tmp_path / 'w')
    for path in (tmp_path / 'w' / 'checkpoints').iterdir():
        if path.name == '8':
            shutil.rmtree(path)
    held = by_path({'params': encoder_of_run(tmp_path / 'w').variables['params']})
    moved = by_path({'params': state.online_params['encoder']})
    for path, leaf in given.items():
        if 'head' not in path:
            np.testing.assert_array_equal(held[path], leaf, err_msg=path)
            assert np.any(moved[path] != leaf) or path.endswith('conv1/bias'), path
