"""Parts of the user's own are known by what they compute: another body is another run."""

from __future__ import annotations

import sys
import textwrap

import pytest

from byol_jax.app.build import method_of
from byol_jax.app.computed import check_same_computed, computed
from byol_jax.errors import UserError
from byol_jax.settings import Settings, changed, plain
from byol_jax.views.recipes import config_views
from configs import folder

NETWORK = """
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(4, (3, 3), strides=4, name='conv')(x)
            return nn.{word}(x).mean(axis=(1, 2))
"""
NNX = """
    import jax
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), strides=4, rngs=rngs)

        def __call__(self, x):
            return jax.nn.{word}(self.conv(x)).mean(axis=(1, 2))
"""
LOSS = """
    import jax.numpy as jnp
    from byol_jax.methods.byol import Byol

    class Loss(Byol):
        def distance(self, prediction, projection):
            return jnp.{word}(prediction - projection).sum(axis=-1)
"""
OPTIMIZER = """
    import optax

    def make(learning_rate, weight_decay=0.0, mask=None):
        return optax.chain(
            optax.{word}(), optax.scale_by_learning_rate(learning_rate)
        )
"""
OPERATION = """
    import dataclasses
    import numpy as np
    from byol_jax.views.operation import Operation

    @dataclasses.dataclass(frozen=True)
    class Op(Operation):
        def apply(self, image, params):
            return np.{word}(image)
"""
PARTS = {
    'linen': (NETWORK, 'encoder.name', 'Net', ('relu', 'tanh', 'gelu')),
    'nnx': (NNX, 'encoder.name', 'Net', ('relu', 'tanh', 'silu')),
    'loss': (LOSS, 'method.name', 'Loss', ('abs', 'square', 'sin')),
    'optimizer': (OPTIMIZER, 'optimizer.name', 'make', ('scale_by_adam', 'scale_by_rms', 'trace')),
    'operation': (OPERATION, 'views.view2.operations', 'Op', ('sqrt', 'square', 'negative')),
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the module of a part with a body, and gives what the config then computes."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(part, word):
        text, key, name, _ = PARTS[part]
        body = textwrap.dedent(text).replace('{word}', word)
        if word == 'trace':
            body = body.replace('trace()', 'trace(0.9)')
        (tmp_path / 'own_part.py').write_text(body)
        sys.modules.pop('own_part', None)
        value = f'own_part:{name}'
        changes = {key: ('crop', value) if part == 'operation' else value}
        if key == 'encoder.name':
            changes |= {'encoder.hidden_layer': 'output'}
        small = {'encoder.name': 'resnet', 'encoder.kwargs': {'stage_sizes': (1,), 'width': 0.125}}
        small |= {'views.image_size': 32, 'projector.hidden_size': 8, 'predictor.hidden_size': 8}
        if key == 'encoder.name':
            del small['encoder.kwargs']
        config = Settings.of(changed(plain(folder.get_config()), small | changes))
        views = config_views(config.views, config.data.pair_keys)
        # Only the network is looked at where it is tapped.
        method = method_of(config) if key == 'encoder.name' else None
        return config, computed(config, method, views)

    yield write
    sys.modules.pop('own_part', None)


@pytest.mark.parametrize('part', PARTS)
def test_another_body_is_refused(write, part, monkeypatch):
    """The same body gives the same numbers; another body is named, with how much differs."""
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    bodies = PARTS[part][3]
    config, first = write(part, bodies[0])
    assert len(first) == 1
    assert len(next(iter(first.values()))) > 0
    assert write(part, bodies[0])[1] == first
    check_same_computed(first, write(part, bodies[0])[1], config)
    for word in bodies[1:]:
        config, now = write(part, word)
        with pytest.raises(UserError, match=r"'own_part:\w+'.* is not what this run began with"):
            check_same_computed(first, now, config)


def test_parts_of_ours_are_not_computed():
    """They take no time, and a new version's rounding strands no run."""
    config = Settings.of(folder.get_config())
    views = config_views(config.views, config.data.pair_keys)
    assert computed(config, None, views) == {}


def test_rounding_is_no_difference():
    """What another machine rounds in another way is the same; a run without notes has none."""
    config = Settings.of(folder.get_config())
    check_same_computed({'encoder': [1.0, 2.0]}, {'encoder': [1.0005, 2.0]}, config)
    check_same_computed({}, {'encoder': [1.0, 2.0]}, config)
    with pytest.raises(UserError, match=r'differs by 0\.022'):
        check_same_computed({'encoder': [1.0, 2.0]}, {'encoder': [1.05, 2.0]}, config)
