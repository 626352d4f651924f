"""Refusals of a user's own network, and their messages."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.monitoring
import pytest
from apis import LINEN, NNX, both, of_both
from network_steps import SHAPE, make_method, small_config

from byol_jax.errors import UserError
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder

# The layers of a `ConvNet` of width 5 on two images of 8x8.
LISTINGS = {
    LINEN: [
        ('conv1', '[2, 4, 4, 5]'),
        ('norm1', '[2, 4, 4, 5]'),
        ('conv2', '[2, 2, 2, 10]'),
        ('norm2', '[2, 2, 2, 10]'),
        ('drop', '[2, 2, 2, 10]'),
        ('head', '[2, 3]'),
        ('output', '[2, 3]'),
    ],
    NNX: [
        ('stages/0/layers/0', '[2, 4, 4, 5]'),
        ('stages/0/layers/1', '[2, 4, 4, 5]'),
        ('stages/0', '[2, 4, 4, 5]'),
        ('stages/1/layers/0', '[2, 2, 2, 10]'),
        ('stages/1/layers/1', '[2, 2, 2, 10]'),
        ('stages/1', '[2, 2, 2, 10]'),
        ('drop', '[2, 2, 2, 10]'),
        ('head', '[2, 3]'),
        ('output', '[2, 3]'),
    ],
}


@of_both('layer', linen=['conv3', 'head.0'], nnx=['stage/0/layers/0', 'drop.0'])
def test_an_unknown_layer(api, layer):
    """The message has the nearest name and all layers with shapes; nothing is compiled."""
    compiled = []

    def listen(event, *_, **__):
        if event == '/jax/core/compile/backend_compile_duration':
            compiled.append(event)

    jax.random.key(0)  # Keys have been made before.
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with pytest.raises(UserError) as caught:
            make_method(small_config(api.path('ConvNet'), layer, encoder__kwargs={'width': 5}))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    message = str(caught.value)
    assert f"encoder.hidden_layer='{layer}'" in message
    assert 'Did you mean' in message
    rows = message.split('Its layers are:\n')[1]
    assert re.findall(r'^ +(\S+) +(\[.*?\])', rows, re.MULTILINE) == LISTINGS[api]


@both
@pytest.mark.parametrize('pool', ['cls', 'flatten'])
def test_a_pool_for_tokens_on_a_feature_map(api, pool):
    """A pool for tokens is refused on a map and on a vector; the message has the shape."""
    for layer, shape in (('drop', r'\[4, 2, 2, 8\]'), ('head', r'\[4, 3\]')):
        with pytest.raises(UserError, match=f"encoder.pool='{pool}' is for .*{shape}"):
            TappedEncoder(api.network('ConvNet'), layer, pool).check(SHAPE)


@of_both(
    'error',
    linen=['shape', 'parameter', 'axis', 'other'],
    nnx=['shape', 'axis', 'other'],
)
def test_failing_in_training_only(api, error):
    """A network that fails only in training mode is refused at the start, in one sentence."""
    network = api.network('FailsInTraining', error=error)
    with pytest.raises(UserError, match='FailsInTraining fails in training mode on images of 8x8'):
        TappedEncoder(network, 'fc', axis_name='devices').check(SHAPE)


class ForeignAxis(nn.Module):
    """Averages its norm over another training program's axis, like Flax's ImageNet example."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        return nn.BatchNorm(use_running_average=not train, axis_name='batch', name='bn')(x)


def test_a_norm_with_an_axis_of_its_own():
    """A norm with an unknown axis is refused; the message names the axis."""
    with pytest.raises(UserError, match='batch'):
        TappedEncoder(ForeignAxis(), 'bn', axis_name='devices').check(SHAPE)


@both
@pytest.mark.parametrize('network', ['Windows', 'Backwards'])
def test_an_output_without_a_row_for_each_image(api, network):
    """A layer whose first axis is not the images is refused: its rows are not representations."""
    with pytest.raises(UserError, match='tapped'):
        TappedEncoder(api.network(network), 'tapped').check(SHAPE)


@of_both(
    'wrong',
    linen=[('conv3', 'conv'), ('norm', 'norm'), ('output', None)],
    nnx=[('stages/0/layers/9', 'stages/0/layers/'), ('heads', 'head'), ('output', None)],
)
def test_a_layer_to_freeze_that_is_none(api, wrong):
    """For a name in encoder.frozen without parameters, the nearest layer is suggested."""
    name, near = wrong
    config = small_config(api.path('ConvNet'), 'drop', encoder__frozen=(name,))
    with pytest.raises(UserError, match=f"encoder.frozen: '{name}' is not a layer") as caught:
        make_method(config)
    if near is not None:
        assert f"Did you mean '{near}" in str(caught.value)


def test_an_argument_that_is_none():
    """For a wrong argument, the nearest is suggested, also for a functools.partial."""
    for api in (LINEN, NNX):
        with pytest.raises(UserError, match=r"no argument 'widht'\. Did you mean 'width'\?"):
            build_encoder(api.path('PartialConvNet'), {'widht': 2})
