"""What a config is made into, and what is refused before anything is opened or compiled."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import pytest
from network_steps import make_method, small_config

from byol_jax.app import build
from byol_jax.app.build import Training, build_run, memory_named
from byol_jax.errors import UserError
from byol_jax.methods.byol import Byol
from byol_jax.settings import Settings
from byol_jax.training.step import AXIS
from configs import default, div2k


@dataclasses.dataclass(frozen=True)
class ThreeViews(Byol):
    """Wants a view that no config has."""

    weight: float = 1.0

    views = ('view1', 'view2', 'view3')


def test_a_method_of_ones_own_from_a_config():
    """method.name and method.kwargs name it; sizes, precision and colours are the config's."""
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
    """encoder.hidden_layer=-2 is the layer before the last; what is exported has its path."""
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
        ({'method.name': 'bylo'}, r"method.name='bylo' .* Did you mean 'byol'\?"),
        (
            {'method.name': 'test_build:ThreeViews'},
            r"'test_build:ThreeViews' takes a view 'view3'. There are: view1, view2.",
        ),
    ],
)
def test_what_a_run_refuses(changes, says):
    """A line names the key, what was given and what there is."""
    config = div2k.get_config('sample')
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=says):
        build_run(config)


def test_too_little_memory_is_the_users_error():
    """What a device says when a step does not fit names what to lower; other errors stay theirs."""
    config = Settings.of(default.get_config())
    said = 'RESOURCE_EXHAUSTED: Out of memory allocating 43850700160 bytes.'
    lowered = pytest.raises(UserError, match=r'batch_size=4096 .*43850700160.*accumulate_steps')
    with lowered, memory_named(config):
        raise jax.errors.JaxRuntimeError(said)
    untouched = pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL')
    with untouched, memory_named(config):
        raise jax.errors.JaxRuntimeError('INTERNAL: a bug')


def test_the_online_probe_may_be_turned_off(monkeypatch):
    """evaluate.online_probe=False: none is trained, though the pictures have labels."""
    begun = Training(None, None, '', '', SimpleNamespace(online_probe=None))
    monkeypatch.setattr(build, 'method_of', lambda config: SimpleNamespace(views=('view1',)))
    monkeypatch.setattr(build, 'build_training', lambda *given: begun)
    config = div2k.get_config('sample')
    with config.unlocked():
        config.update_from_flattened_dict({'evaluate.online_probe': False})
    run = build_run(config)
    assert run.data.train.label_names
    assert run.training is begun
