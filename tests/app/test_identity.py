"""What of a config makes another run, and what is only another spelling of the same."""

from __future__ import annotations

import json

import pytest

from byol_jax.app.identity import changed_keys
from byol_jax.settings import Settings, changed, plain
from configs import cifar10, folder, video

RECIPES = {
    'folder': folder.get_config,
    'video': video.get_config,
    'cifar10': cifar10.get_config,
}
# Steps an epoch, and examples.
STEPS = 5
EXAMPLES = STEPS * folder.get_config().batch_size


def config_with(recipe='folder', **changes):
    dotted = {key.replace('__', '.'): value for key, value in changes.items()}
    return Settings.of(changed(plain(RECIPES[recipe]()), dotted))


def differing(then, now, **more):
    kept = json.loads(json.dumps(then.plain))
    return set(changed_keys(kept, now, EXAMPLES, **more))


@pytest.mark.parametrize(
    ('recipe', 'then', 'now'),
    [
        ('folder', {'name': 'a'}, {'name': 'b'}),
        ('folder', {'data__path': '/photos'}, {'data__path': 'photos/'}),
        ('folder', {'encoder__init_from': 'a'}, {'encoder__init_from': './a'}),
        ('folder', {'log__every_steps': 5}, {'log__every_steps': 7, 'checkpoint__keep': 9}),
        ('folder', {}, {'data__max_frame_gap': 3}),
        ('folder', {}, {'data__name': 'mnist', 'data__split': 'test'}),
        ('folder', {}, {'data__tile_shift': True, 'data__tile_stride': 9}),
        ('folder', {'data__tile_size': 64}, {'data__tile_size': 64, 'data__tile_stride': 64}),
        (
            'folder',
            {'data__held_out_fraction': 0.0},
            {'data__held_out_fraction': 0.0, 'data__held_out_seed': 4},
        ),
        ('folder', {'total_epochs': 100.0}, {'total_steps': 100 * STEPS}),
        ('folder', {'warmup_epochs': 2.0}, {'warmup_steps': 2 * STEPS}),
        ('folder', {}, {'encoder__kwargs': {'width': 1.0}}),
        ('folder', {}, {'encoder__kwargs': {'width': 1}}),
        ('folder', {}, {'optimizer__kwargs': {'momentum': 0.9}}),
        (
            'folder',
            {'encoder__frozen': ('stage1', 'conv1')},
            {'encoder__frozen': ('conv1', 'stage1')},
        ),
        ('folder', {}, {'views__view1__solarize_threshold': 0.1}),
        ('cifar10', {}, {'views__view1__blur_sigma': (1.0, 2.0)}),
        (
            'folder',
            {'views__view1__operations': ('crop', 'flip')},
            {'views__view1__operations': ('crop', 'flip'), 'views__view1__hue': 0.2},
        ),
        (
            'folder',
            {'views__view1__flip': 0.25},
            {
                'views__view1__operations': (
                    'crop',
                    ('flip', {'probability': 0.25}),
                    'jitter',
                    'gray',
                    'blur',
                    'solarize',
                )
            },
        ),
    ],
    ids=str,
)
def test_the_same_run(recipe, then, now):
    """Spelling, defaults given, and keys without effect are no difference, in either direction."""
    one, other = config_with(recipe, **then), config_with(recipe, **now)
    assert differing(one, other) == set()
    assert differing(other, one) == set()


@pytest.mark.parametrize(
    ('recipe', 'now', 'keys'),
    [
        ('folder', {'seed': 1}, {'seed'}),
        ('folder', {'total_steps': 100 * STEPS - 1}, {'total_epochs', 'total_steps'}),
        ('folder', {'encoder__kwargs': {'width': 0.5}}, {'encoder.kwargs.width'}),
        ('folder', {'encoder__name': 'resnet18'}, {'encoder.name'}),
        ('folder', {'encoder__init_from': 'x'}, {'encoder.init_from'}),
        ('folder', {'optimizer__kwargs': {'momentum': 0.8}}, {'optimizer.kwargs.momentum'}),
        ('folder', {'views__view1__blur': 0.0}, {'views.view1.blur'}),
        ('folder', {'views__view2__solarize_threshold': 0.1}, {'views.view2.solarize_threshold'}),
        ('folder', {'views__antialias': False}, {'views.antialias'}),
        ('folder', {'data__tile_size': 64}, {'data.tile_size'}),
        ('video', {'data__max_frame_gap': 3}, {'data.max_frame_gap'}),
        ('cifar10', {'data__split': 'test'}, {'data.split'}),
        (
            'folder',
            {'views__view1__operations': ('crop', 'blur')},
            {'views.view1.operations'},
        ),
        ('folder', {'precision': 'bfloat16'}, {'precision'}),
        ('folder', {'target__tau_base': 0.5}, {'target.tau_base'}),
    ],
    # Not of the last argument: a set has no order.
    ids=lambda x: '' if isinstance(x, set) else str(x),
)
def test_another_run(recipe, now, keys):
    """What changes the weights is named by its keys, with the values then and now."""
    one = config_with(recipe, total_epochs=100.0)
    if 'total_steps' not in now:
        now = {'total_epochs': 100.0, **now}
    assert differing(one, config_with(recipe, **now)) == keys


def test_a_layer_has_several_names():
    """A layer by its index is the layer of that path."""
    then, now = config_with(), config_with(encoder__hidden_layer='-1')
    assert differing(then, now, layers=('avgpool', 'avgpool')) == set()
    assert differing(then, now, layers=('avgpool', 'fc')) == {'encoder.hidden_layer'}
    assert differing(then, now) == {'encoder.hidden_layer'}


def test_a_key_that_the_run_did_not_know():
    """A later key at its default is no difference; at another value it is one."""
    then = config_with().plain
    old = {key: value for key, value in then.items() if key not in ('precision', 'method')}
    assert changed_keys(old, config_with()) == {}
    found = changed_keys(old, config_with(precision='bfloat16'))
    assert found == {'precision': ('float32', 'bfloat16')}


def test_a_value_without_influence_need_not_be_valid():
    """A run whose config.json has a value that is refused today, where it does not matter."""
    old = json.loads(json.dumps(config_with().plain))
    old['evaluate']['crop_fraction'] = 7.0
    assert changed_keys(old, config_with()) == {}
