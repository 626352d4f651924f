"""The tap of a hidden layer: its result, its refusals, and the variables behind it."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from starts import make_start

from byol_jax.errors import UserError
from byol_jax.methods.byol import Byol
from byol_jax.models.heads import MLP
from byol_jax.models.resnet import ResNet
from byol_jax.models.tap import TappedEncoder, layer_at, tap
from byol_jax.training.step import AXIS, make_train_step, shard_batch

BATCH = 32
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


class Classifier(nn.Module):
    """A network to be tapped at 'pool'; its names do not show what lies behind the tap.

    A norm and layers behind it have names like those before it; 'trunk_aside' runs before the tap,
    but its output is used only behind it.
    """

    classes: int = 3
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name='conv')(x)
        aside = nn.Dense(2, name='trunk_aside')(x.mean(axis=(1, 2)))
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name, name='bn')(x)
        x = Pool(name='pool')(nn.relu(x))
        x = nn.Dense(5, name='conv2')(jnp.concatenate([x, aside], axis=1))
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name, name='bn2')(x)
        return nn.Dense(self.classes, name='trunk')(nn.relu(x))


class Pool(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.mean(axis=(1, 2))


BEHIND = {
    'params/trunk_aside/kernel',
    'params/trunk_aside/bias',
    'params/conv2/kernel',
    'params/conv2/bias',
    'params/bn2/scale',
    'params/bn2/bias',
    'batch_stats/bn2/mean',
    'batch_stats/bn2/var',
    'params/trunk/kernel',
    'params/trunk/bias',
}


PATHS = ['conv', 'trunk_aside', 'bn', 'pool', 'conv2', 'bn2', 'trunk', 'output']


@pytest.mark.parametrize(
    ('index', 'path'), [(-1, 'output'), (-2, 'trunk'), ('-2', 'trunk'), (-5, 'pool'), (3, 'pool')]
)
def test_an_index_counts_the_layers_as_they_finish(index, path):
    """-2 is the layer before the network's output, as in the original recipe; text works too."""
    tapped = tap(Classifier(), index, image_size=8)
    assert [layer.path for layer in tapped.layers((2, 8, 8, 3))] == PATHS
    assert tapped.hidden_layer == path
    assert tapped == tap(Classifier(), path, image_size=8)


def test_a_layer_called_like_an_index_is_that_layer():
    """A name takes precedence over an index, as in NNX's lists, whose layers have numbers."""
    assert layer_at('1', ['0', '1', '2', 'output']) == '1'
    assert layer_at('-1', ['0', '1', '2', 'output']) == 'output'
    assert layer_at('3', ['0', '1', '2', 'output']) == 'output'
    assert layer_at('pool2', ['0', 'output']) == 'pool2'


@pytest.mark.parametrize('index', [-9, 8, '8'])
def test_an_index_that_does_not_exist(index):
    """The message says how many layers there are and where they are listed."""
    says = rf'encoder.hidden_layer={index}: the encoder has 8 layers, 0 to 7 or -8 to -1. --mode=su'
    with pytest.raises(UserError, match=says):
        tap(Classifier(), index, image_size=8)


def test_tap_finds_what_is_not_trained():
    """One call gives all that a training run needs of an encoder."""
    tapped = tap(Classifier(), 'pool', image_size=8, axis_name=AXIS, frozen=('conv',))
    assert tapped.behind == BEHIND
    assert tapped.frozen == {'params/conv/kernel', 'params/conv/bias'}
    assert tapped.axis_name == AXIS
    with pytest.raises(UserError, match=r"'pol' is not a layer of .*\. Did you mean 'pool'"):
        tap(Classifier(), 'pol', image_size=8)


@pytest.fixture(scope='module')
def resnet():
    """A small ResNet, its variables, and the outputs of all its layers on IMAGES."""
    module = ResNet((1, 1), channels=(4, 6), strides=(1, 2), stem_channels=4, num_classes=3)
    variables = jax.jit(module.init)(jax.random.key(0), IMAGES)
    apply = jax.jit(lambda v, x: module.apply(v, x, capture_intermediates=True))
    return module, variables, apply(variables, IMAGES)[1]['intermediates']


@pytest.mark.parametrize(
    'layer', ['conv1', 'maxpool', 'stage1/block1', 'stage2', 'avgpool', 'head']
)
def test_a_tap_returns_the_pooled_output_of_its_layer(resnet, layer):
    """A tapped map is averaged over height and width; a tapped vector is returned unchanged."""
    module, variables, outputs = resnet
    for name in layer.split('/'):
        outputs = outputs[name]
    expected = np.asarray(outputs['__call__'][0], np.float64)
    if expected.ndim == 4:
        expected = expected.mean(axis=(1, 2))
    features, state = jax.jit(TappedEncoder(module, layer).apply, static_argnums=2)(
        variables, IMAGES, False
    )
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)
    for old, new in zip(
        jax.tree.leaves(variables['batch_stats']), jax.tree.leaves(state), strict=True
    ):
        np.testing.assert_array_equal(old, new)


class Tokens(nn.Module):
    """Returns a sequence [B, N, C], like a vision transformer, and one scalar for each image."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name='tokens')(x.reshape(len(x), -1, 3))
        return Total(name='total')(x)


class Total(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.sum(axis=(1, 2))


def test_a_tapped_sequence_is_averaged_over_tokens():
    """A [B, N, C] tap gives [B, C]."""
    tapped = TappedEncoder(Tokens(), 'tokens')
    variables = tapped.init(jax.random.key(0), IMAGES)
    dense = variables['params']['tokens']
    expected = (IMAGES.reshape(4, -1, 3) @ dense['kernel'] + dense['bias']).mean(axis=1)
    features, _ = tapped.apply(variables, IMAGES, False)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_a_tap_without_channels_is_refused():
    """A layer that returns one number for each image is not a representation."""
    with pytest.raises(UserError, match=r"'total' returns \[2\]; a tap needs"):
        TappedEncoder(Tokens(), 'total').check((2, 8, 8, 3))


def test_unknown_layer_lists_the_layers():
    """An unknown layer is refused with the nearest name and a list of layers with shapes."""
    with pytest.raises(UserError) as caught:
        TappedEncoder(Classifier(), 'pol').check((2, 8, 8, 3))
    message = str(caught.value)
    assert "encoder.hidden_layer='pol'" in message
    assert "Did you mean 'pool'?" in message
    listing = message.split('Its layers are:\n')[1].splitlines()
    assert [line.split()[0] for line in listing] == [
        'conv',
        'trunk_aside',
        'bn',
        'pool',
        'conv2',
        'bn2',
        'trunk',
        'output',
    ]
    assert listing[3].endswith('[2, 4]')


def test_check_returns_the_tapped_layer():
    """A layer that exists is returned with its kind, shape, parameters and operations."""
    layer = TappedEncoder(Classifier(), 'conv').check((2, 8, 8, 3))
    assert dataclasses.astuple(layer) == (
        'conv',
        'Conv',
        (2, 8, 8, 4),
        3 * 3 * 3 * 4 + 4,
        # Along each side, 6 inner outputs see 3 taps and 2 see 2; then the bias is added.
        2 * (2 * (6 * 3 + 2 * 2) ** 2 * 3 * 4) + 2 * 8 * 8 * 4,
    )


class Valid(nn.Module):
    """A network without padding that removes four pixels from its input."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (5, 5), padding='VALID', name='conv')(x)


@pytest.mark.parametrize(
    ('module', 'layer', 'size'),
    [(Valid(), 'conv', 4), (ResNet((1,) * 4, channels=(4,) * 4, stem_channels=4), 'avgpool', 16)],
)
def test_views_too_small_for_the_network_are_refused(module, layer, size):
    """Pictures below the network's stride, or shrunk to nothing, are refused by their key."""
    with pytest.raises(UserError, match=rf'views.image_size={size} is too small') as caught:
        TappedEncoder(module, layer).check((2, size, size, 3))
    assert 'small_images=True' in str(caught.value)


def test_views_as_small_as_the_stride_are_taken():
    """A ResNet of stride 32 takes 32 pixels, and with the small stem 8 pixels."""
    small = ResNet((1,) * 4, channels=(4,) * 4, stem_channels=4, small_images=True)
    TappedEncoder(small, 'avgpool').check((2, 8, 8, 3))
    large = ResNet((1,) * 4, channels=(4,) * 4, stem_channels=4)
    TappedEncoder(large, 'avgpool').check((2, 32, 32, 3))


class FixedSize(nn.Module):
    """A network for pictures of one size only."""

    @nn.compact
    def __call__(self, x):
        weights = self.param('weights', nn.initializers.ones, (8 * 8 * 3, 4))
        return Pool(name='pool')((x.reshape(len(x), -1) @ weights)[:, None, None])


def test_a_network_of_one_size():
    """A network for one size works at that size and is refused at others."""
    tapped = TappedEncoder(FixedSize(), 'pool')
    assert tapped.check((2, 8, 8, 3)).shape == (2, 4)
    with pytest.raises(UserError, match='FixedSize fails on images of 9x9 pixels'):
        tapped.check((2, 9, 9, 3))


def test_variables_behind_the_tap():
    """Exactly the variables on which the tapped output does not depend are behind the tap."""
    assert tap(Classifier(), 'pool', image_size=8).behind == BEHIND
    assert tap(Classifier(), 'trunk', image_size=8).behind == frozenset()


class Spelling(nn.Module):
    """Base of networks that are told in different ways whether they train."""

    def norm(self, x, frozen):
        return nn.BatchNorm(frozen, momentum=0.9, name='bn')(nn.Dense(4, name='fc')(x[:, 0, 0]))


class Train(Spelling):
    @nn.compact
    def __call__(self, x, train):
        return self.norm(x, not train)


class Training(Spelling):
    @nn.compact
    def __call__(self, x, *, training=False):
        return self.norm(x, not training)


class IsTraining(Spelling):
    @nn.compact
    def __call__(self, x, is_training):
        return self.norm(x, not is_training)


class Deterministic(Spelling):
    @nn.compact
    def __call__(self, x, deterministic):
        return self.norm(x, deterministic)


class UseRunningAverage(Spelling):
    @nn.compact
    def __call__(self, x, use_running_average=False):
        return self.norm(x, use_running_average)


@pytest.mark.parametrize('kind', [Train, Training, IsTraining, Deterministic, UseRunningAverage])
def test_every_spelling_of_training(kind):
    """A network is told that it trains in its own way, and only then do its statistics change."""
    tapped = TappedEncoder(kind(), 'bn')
    variables = tapped.init(jax.random.key(0), IMAGES)
    trained, moved = tapped.apply(variables, IMAGES, True)
    frozen, kept = tapped.apply(variables, IMAGES, False)
    hidden = IMAGES[:, 0, 0] @ np.asarray(variables['params']['fc']['kernel'], np.float64)
    np.testing.assert_allclose(
        moved['batch_stats']['bn']['mean'], 0.1 * hidden.mean(axis=0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(kept['batch_stats']['bn']['mean'], np.zeros(4))
    np.testing.assert_allclose(np.mean(trained, axis=0), np.zeros(4), atol=1e-5)
    np.testing.assert_allclose(frozen, hidden / np.sqrt(1 + 1e-5), rtol=1e-4, atol=1e-5)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name='fc')(x.mean(axis=(1, 2)))


def test_a_network_without_modes():
    """A network without training modes and statistics works in both modes."""
    tapped = TappedEncoder(Plain(), 'fc')
    variables = tapped.init(jax.random.key(0), IMAGES)
    (trained, state), (frozen, _) = (tapped.apply(variables, IMAGES, t) for t in (True, False))
    np.testing.assert_array_equal(trained, frozen)
    assert state == {}


class WithDropout(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Dense(4, name='fc')(x.mean(axis=(1, 2)))
        return nn.Dropout(0.5, name='dropout')(x, deterministic)


def test_a_network_with_dropout_draws_from_the_key_given():
    """Dropout drops in training only, and depends only on the key."""
    tapped = TappedEncoder(WithDropout(), 'dropout')
    tapped.check(IMAGES.shape)
    variables = tapped.init(jax.random.key(0), IMAGES)

    def features(train, seed=None):
        rng = None if seed is None else jax.random.key(seed)
        return np.asarray(tapped.apply(variables, IMAGES, train, rng)[0])

    kept, dropped = features(False), features(True, 1)
    assert np.all(kept != 0)
    hit = dropped == 0
    assert 0 < hit.sum() < hit.size
    np.testing.assert_allclose(dropped[~hit], 2 * kept[~hit], rtol=1e-6)
    np.testing.assert_array_equal(features(True, 1), dropped)
    assert np.any(features(True, 2) != dropped)


class Twice(nn.Module):
    """Runs the same layer twice."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3, name='dense')
        return dense(dense(x[:, 0, 0]))


def test_a_layer_called_twice_is_tapped_at_its_last_call():
    """The last of several calls of a layer is the tap."""
    tapped = TappedEncoder(Twice(), 'dense')
    variables = tapped.init(jax.random.key(0), IMAGES)
    kernel = variables['params']['dense']['kernel']
    features, _ = tapped.apply(variables, IMAGES, False)
    np.testing.assert_allclose(features, IMAGES[:, 0, 0] @ kernel @ kernel, rtol=1e-5, atol=1e-6)


def compiled_step(classes):
    """(initial state, batch, compiled step) of a run with strong weight decay, on one device."""
    byol = Byol(
        tap(Classifier(classes, AXIS), 'pool', image_size=8),
        MLP(6, 4, AXIS),
        MLP(6, 4, AXIS),
        (0.5,) * 3,
        (0.25,) * 3,
    )
    start = make_start(byol, 8, peak=10 * BATCH / 256, total_steps=10, weight_decay=0.1)
    step = make_train_step(byol, start.optimizer, total_steps=10, tau_base=0.9, seed=0)
    shape = (2, BATCH, 8, 8, 3)
    view1, view2 = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    batch = shard_batch({'view1': view1, 'view2': view2}, 1)
    mapped = jax.jit(jax.vmap(step, (None, 0), None, axis_name=AXIS))
    return start.initial, batch, mapped.lower(start.initial, batch).compile()


@pytest.fixture(scope='module')
def small_head():
    return compiled_step(classes=3)


def encoder_leaves(params, stats):
    """{'params/conv/kernel': array, ...} of the encoder."""
    tree = {'params': params['encoder'], **stats['encoder']}
    return {
        '/'.join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def test_a_step_leaves_everything_behind_the_tap_alone(small_head):
    """A training step changes every variable before the tap and, bit for bit, none behind it."""
    old, batch, step = small_head
    new, _ = step(old, batch)
    for before, after in (
        ((old.online_params, old.online_stats), (new.online_params, new.online_stats)),
        ((old.target_params, old.target_stats), (new.target_params, new.target_stats)),
    ):
        leaves, moved = encoder_leaves(*before), encoder_leaves(*after)
        assert set(leaves) > BEHIND
        # A bias before a norm has no gradient except rounding.
        for path in set(leaves) - {'params/conv/bias'}:
            assert np.array_equal(moved[path], leaves[path]) == (path in BEHIND), path


def test_parameters_behind_the_tap_have_no_gradient(small_head):
    """The momentum is exactly 0 for every parameter behind the tap, and only there."""
    state, batch, step = small_head
    new, _ = step(state, batch)
    leaves = encoder_leaves(optax.tree.get(new.optimizer, 'trace'), {'encoder': {}})
    still = {path for path, leaf in leaves.items() if not leaf.any()}
    assert still - {'params/conv/bias'} == {path for path in BEHIND if path.startswith('params/')}


def test_a_head_behind_the_tap_is_not_computed(small_head):
    """Classes behind the tap add a few optimizer operations for each parameter, and no pass."""
    flops = [
        step.cost_analysis()['flops'] for _, _, step in (small_head, compiled_step(classes=10_000))
    ]
    added_parameters = (5 + 1) * (10_000 - 3)
    one_forward_pass = 2 * BATCH * added_parameters
    assert flops[1] - flops[0] < one_forward_pass / 3
