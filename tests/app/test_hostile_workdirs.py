"""Workdirs made by anyone: their config.json runs no code and keeps nobody waiting."""

from __future__ import annotations

import json
import sys
import time

import jax
import numpy as np
import pytest
from network_steps import SIZE, make_method, small_config

from byol_jax.app.build import encoder_of_run, find_encoder, optimizer_of
from byol_jax.app.checkpoints import Checkpoints
from byol_jax.errors import UserError
from byol_jax.settings import Settings
from byol_jax.training.optimizers import decay_mask
from byol_jax.training.state import init_state

pytestmark = pytest.mark.timeout(120, method='thread')

KWARGS = {'stage_sizes': [1], 'width': 0.125, 'small_images': True}
# Far above what a refusal takes.
SECONDS = 40


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """Of a run that has saved a checkpoint and exported nothing."""
    folder = tmp_path_factory.mktemp('run')
    config = small_config('own_networks:ConvNet', 'avgpool')
    config.encoder.name, config.encoder.kwargs = 'resnet', KWARGS
    config = Settings.of(config)
    method = make_method(config)

    def state():
        params, stats = method.init(jax.random.key(0), SIZE)
        mask = decay_mask(params, method.untrained())
        return init_state(method, optimizer_of(config, mask, lambda step: 0.0), params, stats)

    checkpoints = Checkpoints(folder, keep=1)
    shapes = jax.eval_shape(state)
    checkpoints.save(3, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes))
    checkpoints.close()
    (folder / 'config.json').write_text(json.dumps(config.plain))
    return folder


@pytest.fixture
def changed(workdir, tmp_path):
    """Another workdir with the same checkpoint and other values in its config.json."""

    def change(**values):
        config = json.loads((workdir / 'config.json').read_text())
        for key, value in values.items():
            section, name = key.split('__')
            config[section][name] = value
        (tmp_path / 'config.json').write_text(json.dumps(config))
        (tmp_path / 'checkpoints').symlink_to(workdir / 'checkpoints')
        return tmp_path

    return change


def refusal(load, *given):
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load(*given)
    assert time.perf_counter() - began < SECONDS
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_sound_one_loads(changed):
    assert encoder_of_run(changed()).description['step'] == 1


@pytest.mark.parametrize('key', ['encoder__name', 'method__name', 'optimizer__name'])
def test_no_module_is_imported_by_a_config(changed, monkeypatch, tmp_path_factory, key):
    """Whichever of its names is of a module: not imported, neither alone nor as init_from."""
    modules = tmp_path_factory.mktemp('modules')
    (modules / 'hostile_config.py').write_text('Thing = None\n')
    monkeypatch.syspath_prepend(modules)
    folder = changed(**{key: 'hostile_config:Thing'})
    for load, given in ((encoder_of_run, folder), (find_encoder, str(folder))):
        message = refusal(load, given)
        assert key.replace('__', '.') in message
        assert 'import hostile_config first' in message
        assert 'hostile_config' not in sys.modules


@pytest.mark.parametrize(
    'kwargs', [{'stage_sizes': [10_000_000]}, {'stage_sizes': [1], 'width': 1e12}]
)
def test_a_network_larger_than_its_checkpoint(changed, kwargs):
    assert 'does not fit' in refusal(encoder_of_run, changed(encoder__kwargs=kwargs))
