"""What is made from a config, and what is refused before anything is opened or compiled."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from network_steps import make_method, small_config
from torchvision_reference import our_encoder

from byol_jax import settings
from byol_jax.app import build
from byol_jax.app.build import Training, build_run, check_rate
from byol_jax.app.export import export_from
from byol_jax.app.memory import check_batches, encoding_memory, host_memory, training_memory
from byol_jax.app.plan import make_plan
from byol_jax.errors import UserError
from byol_jax.interop.export import save_encoder
from byol_jax.interop.torchvision import save_torchvision
from byol_jax.methods.byol import Byol
from byol_jax.settings import Settings
from byol_jax.training.optimizers import build_optimizer, steps_by_rate
from byol_jax.training.step import AXIS
from configs import default, div2k


@dataclasses.dataclass(frozen=True)
class ThreeViews(Byol):
    """Needs a view that no config has."""

    weight: float = 1.0

    views = ('view1', 'view2', 'view3')


def test_a_method_of_ones_own_from_a_config():
    """method.name and method.kwargs choose it; sizes, precision and colours are the config's."""
    config = small_config(
        'ConvNet', '-2', method__name='test_build:ThreeViews', precision='bfloat16'
    )
    config.method.kwargs = {'weight': 2.0}
    method = make_method(config)
    assert isinstance(method, ThreeViews)
    assert method.weight == 2
    assert method.dtype == 'bfloat16'
    assert method.mean == config.views.mean
    assert (method.projector.hidden_size, method.predictor.output_size) == (8, 4)
    assert method.projector.axis_name == method.encoder.axis_name == AXIS


def test_an_index_taps_a_layer():
    """encoder.hidden_layer=-2 is the second-last layer; the export has its path."""
    layers = make_method(small_config('ConvNet', 'output')).encoder.layers((2, 8, 8, 3))
    method = make_method(small_config('ConvNet', '-2'))
    assert method.encoder.hidden_layer == layers[-2].path


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        (
            {'optimizer.name': 'optax:adamm'},
            r"optimizer.name='optax:adamm': .* Did you mean 'adam",
        ),
        (
            {'optimizer.name': 'optax:sgd'},
            r"optimizer.weight_decay=.*'optax:sgd' has no argument 'weight_decay'",
        ),
        # Before training, which the evaluation may follow by days.
        (
            {'evaluate.protocols': (('knnn', {}),)},
            r"evaluate.protocols='knnn' .* Did you mean 'knn'\?",
        ),
        ({'method.name': 'bylo'}, r"method.name='bylo' .* Did you mean 'byol'\?"),
        (
            {'method.name': 'test_build:ThreeViews'},
            r"'test_build:ThreeViews' needs a view 'view3'. The config has: view1, view2.",
        ),
    ],
)
def test_what_a_run_refuses(changes, says):
    """One line names the key, what was given and what exists."""
    config = div2k.get_config('sample')
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=says):
        build_run(config)


@pytest.mark.parametrize(
    ('changes', 'held', 'says'),
    [
        ({'batch_size': 10**9}, 1, r'batch_size=1000000000 .* takes 280,380 GiB .* 16 GiB'),
        ({'evaluate.batch_size': 10**9}, 1, r'evaluate\.batch_size=1000000000'),
        # The pictures of a batch take a gigabyte, and three batches are in memory.
        ({'batch_size': 24576}, 3, r'^batch_size=24576 .* 21 GiB'),
        ({'batch_size': 24576}, 1, ''),
        ({}, 3, ''),
    ],
)
def test_batches_that_no_memory_holds(changes, held, says):
    """On a host of 16 GiB; several processes share a training batch."""
    config = Settings.of(settings.changed(settings.plain(default.get_config()), changes))
    refused = pytest.raises(UserError, match=says) if says else contextlib.nullcontext()
    with refused:
        check_batches(config, held=held, memory=2**34)
    if 'evaluate.batch_size' not in changes:
        check_batches(config, 2**20, held=held, memory=2**34)


def test_this_host_has_memory():
    assert 2**28 < host_memory() < 2**50


@pytest.mark.parametrize(
    ('name', 'by_rate'),
    [
        ('adamw', True),
        ('optax:lion', True),
        ('optax:sgd', False),
        ('optax:lamb', False),
        ('lars', False),
        ('examples.own.optimizer:clipped_sgd', False),
    ],
)
def test_which_optimizers_step_by_their_rate(name, by_rate):
    """Found by a step, not by the name: a user's own optimizer may be like Adam too."""
    rng = np.random.default_rng(0)
    params = {'encoder': {'kernel': rng.normal(0, 0.05, (64, 64)).astype(np.float32)}}
    mask = {'encoder': {'kernel': True}}
    made = build_optimizer(
        name, {}, learning_rate=lambda step: 1.0, weight_decay=0.0, decay_mask=mask
    )
    assert steps_by_rate(made, params) == by_rate


@pytest.mark.parametrize(('base', 'refused'), [(2.0, True), (4e-3, False)])
def test_adam_at_the_rate_of_lars(base, refused):
    """Refused by its value, from a config file, a flag file or Python."""
    changes = {'optimizer.name': 'adamw', 'optimizer.base_learning_rate': base}
    config = Settings.of(settings.changed(settings.plain(div2k.get_config('sample')), changes))
    plan = make_plan(config, 3000, 1)
    params = {'encoder': {'kernel': np.ones((8, 8), np.float32), 'bias': np.ones(8, np.float32)}}
    mask = {'encoder': {'kernel': True, 'bias': False}}
    says = r'optimizer.name=adamw .* 0.5 at its peak .*base_learning_rate=2 x batch_size=64 / 256'
    with pytest.raises(UserError, match=says) if refused else contextlib.nullcontext():
        check_rate(config, plan, params, mask)


def test_too_little_memory_is_the_users_error():
    """If a step does not fit into memory, the error says what to lower; other errors pass."""
    config = Settings.of(default.get_config())
    said = 'RESOURCE_EXHAUSTED: Out of memory allocating 43850700160 bytes.'
    lowered = pytest.raises(UserError, match=r'batch_size=4096 .*43850700160.*accumulate_steps')
    with lowered, training_memory(config):
        raise jax.errors.JaxRuntimeError(said)
    halved = pytest.raises(UserError, match=r'evaluate\.batch_size=64 .*43850700160.* Halve')
    with halved, encoding_memory(config):
        raise jax.errors.JaxRuntimeError(said)
    untouched = pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL')
    with untouched, training_memory(config):
        raise jax.errors.JaxRuntimeError('INTERNAL: a bug')


def test_the_online_probe_may_be_turned_off(monkeypatch):
    """With evaluate.online_probe=False no probe is trained, although the pictures have labels."""
    begun = Training(None, None, '', '', SimpleNamespace(online_probe=None))
    monkeypatch.setattr(build, 'method_of', lambda config: SimpleNamespace(views=('view1',)))
    monkeypatch.setattr(build, 'build_training', lambda *given: begun)
    config = div2k.get_config('sample')
    with config.unlocked():
        config.update_from_flattened_dict({'evaluate.online_probe': False})
    run = build_run(config)
    assert run.data.train.label_names
    assert run.training is begun


def test_home_folders(tmp_path, monkeypatch):
    """A ~ that a shell has left in a path is the home folder, for what is read and written."""
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    encoder = our_encoder('resnet18', width=1 / 16, small_images=True)
    save_torchvision(encoder, '~/weights.safetensors')
    export_from('torchvision:~/weights.safetensors', 'export', '~/out')
    save_encoder(encoder, '~/again')
    for source in ('~/out/encoder', '~/again', 'torchvision:~/weights.safetensors'):
        assert build.open_encoder(source).weights_sha256 == encoder.weights_sha256
        assert build.find_encoder(source).weights_sha256 == encoder.weights_sha256
    assert not (tmp_path / '~').exists()
