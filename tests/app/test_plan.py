"""The numbers that a run derives from its config, and the messages about wrong ones."""

from __future__ import annotations

import dataclasses
import re

import pytest

from byol_jax.app.plan import make_plan
from byol_jax.errors import UserError, did_you_mean
from byol_jax.settings import Settings
from configs import default


def plan_of(config, *arguments, **more):
    return make_plan(Settings.of(config), *arguments, **more)


# Of 100 examples in batches of 8: 25 steps.
TWO_EPOCHS = {'total_epochs': 2.0, 'warmup_epochs': 0.0}


def config_with(**changes):
    """The default config with dotted keys changed; '__' stands for the dot."""
    config = default.get_config()
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def test_numbers_of_the_paper():
    """Batch 4096 for 300 epochs of ImageNet on 8 devices of 2 hosts gives the paper's numbers."""
    plan = plan_of(config_with(), examples=1_281_167, device_count=8, process_count=2)
    assert dataclasses.asdict(plan) == {
        'examples': 1_281_167,
        'batch_size': 4096,
        'device_count': 8,
        'process_count': 2,
        'process_batch_size': 2048,
        'device_batch_size': 512,
        'accumulate_steps': 1,
        'total_steps': 93_835,
        'warmup_steps': 3127,
        'learning_rate': pytest.approx(4.8),
        'checkpoint_steps': 312,
        'log_steps': 50,
        'evaluate_steps': 3127,
        'freeze_steps': 0,
    }


def test_steps_are_taken_as_given():
    """Durations in steps need no data set size and are not rounded."""
    config = config_with(
        total_epochs=None,
        total_steps=160,
        warmup_epochs=None,
        warmup_steps=16,
        checkpoint__every_epochs=None,
        checkpoint__every_steps=40,
        batch_size=128,
        log__every_steps=10,
        optimizer__base_learning_rate=2.0,
    )
    plan = plan_of(config, examples=77, device_count=1)
    assert (plan.total_steps, plan.warmup_steps, plan.checkpoint_steps) == (160, 16, 40)
    assert plan.learning_rate == pytest.approx(1.0)
    assert plan.log_steps == 10


def test_fractions_of_epochs():
    """Epochs are lengths of an endless stream: 2.5 epochs of 100 in batches of 8 are 31 steps."""
    config = config_with(total_epochs=2.5, warmup_epochs=0.5, batch_size=8)
    plan = plan_of(config, examples=100, device_count=1)
    assert (plan.total_steps, plan.warmup_steps) == (31, 6)


def test_epoch_of_a_step():
    """The epoch of a step is the part of the data set seen so far, and may exceed 1."""
    config = config_with(total_epochs=3.0, warmup_epochs=0.0, batch_size=8)
    plan = plan_of(config, examples=100, device_count=1)
    assert plan.epoch(0) == 0
    assert plan.epoch(25) == pytest.approx(2.0)


def test_a_data_set_smaller_than_a_batch():
    """A batch may span several epochs."""
    config = config_with(total_epochs=10.0, warmup_epochs=0.0, batch_size=32)
    assert plan_of(config, examples=5, device_count=1).total_steps == 1


def test_checkpoint_interval_is_at_least_a_step():
    """An interval of less than a step becomes one step."""
    config = config_with(batch_size=8, checkpoint__every_epochs=0.001)
    assert plan_of(config, examples=100, device_count=1).checkpoint_steps == 1


@pytest.mark.parametrize('key', ['checkpoint__every_epochs', 'checkpoint__every_steps'])
def test_no_checkpoint_interval_means_never(key):
    """0 means never, as elsewhere: only the last step is saved."""
    changes = {'checkpoint__every_epochs': None, 'checkpoint__every_steps': None, key: 0}
    plan = plan_of(config_with(batch_size=8, **TWO_EPOCHS, **changes), 100, 1)
    assert plan.checkpoint_steps == 0
    assert [step for step in range(1, plan.total_steps + 1) if plan.saves(step)] == [25]
    assert plan.checkpoints == 1


def test_checkpoints_are_counted():
    """Every 10 of 25 steps: steps 10 and 20, and the last."""
    changes = {'checkpoint__every_epochs': None, 'checkpoint__every_steps': 10}
    plan = plan_of(config_with(batch_size=8, **TWO_EPOCHS, **changes), 100, 1)
    assert [step for step in range(1, plan.total_steps + 1) if plan.saves(step)] == [10, 20, 25]
    assert plan.checkpoints == 3


def test_accumulation_keeps_batch_and_steps():
    """Accumulation splits the batch; steps and learning rate do not change."""
    config = config_with(batch_size=64, accumulate_steps=4)
    plan = plan_of(config, examples=1000, device_count=2)
    assert plan.device_batch_size == 32
    assert plan.total_steps == plan_of(config_with(batch_size=64), 1000, 2).total_steps
    assert plan.learning_rate == pytest.approx(0.3 * 64 / 256)


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'batch_size': 0}, ['batch_size=0', 'at least 1']),
        ({'accumulate_steps': 0}, ['accumulate_steps=0', 'at least 1']),
        ({'precision': 'bfloat'}, ["precision='bfloat'", 'float32, bfloat16', "'bfloat16'?"]),
        ({'target__tau_base': 1.5}, ['target.tau_base=1.5', '[0, 1]']),
        ({'target__tau_base': -0.1}, ['target.tau_base=-0.1', '[0, 1]']),
        ({'data__held_out_fraction': 1.0}, ['data.held_out_fraction=1.0', '[0, 0.9]']),
        ({'log__every_steps': 0}, ['log.every_steps=0', 'at least 1']),
        ({'checkpoint__keep': 0}, ['checkpoint.keep=0', 'at least 1']),
        ({'views__view1__flip': 1.5}, ['views.view1.flip=1.5', 'probability']),
        ({'views__view1__jitter': -1.0}, ['views.view1.jitter=-1.0', 'probability']),
        ({'views__view2__gray': 2.0}, ['views.view2.gray=2.0', 'probability']),
        ({'views__view2__blur': 2.0}, ['views.view2.blur=2.0', 'probability']),
        ({'views__view2__solarize': 2.0}, ['views.view2.solarize=2.0', 'probability']),
        ({'views__view1__crop_area': (0.0, 1.0)}, ['views.view1.crop_area=(0.0, 1.0)', 'range']),
        ({'views__view1__crop_area': (0.5, 1.5)}, ['views.view1.crop_area', 'not exceed 1']),
        ({'views__view1__crop_ratio': (2.0, 1.0)}, ['views.view1.crop_ratio=(2.0, 1.0)', 'range']),
        ({'views__view1__blur_sigma': (0.0, 2.0)}, ['views.view1.blur_sigma', 'above 0']),
        ({'views__view1__hue': 0.6}, ['views.view1.hue=0.6', '[0, 0.5]']),
        ({'views__view2__brightness': 1.1}, ['views.view2.brightness=1.1', '[0, 1]']),
        ({'views__view2__contrast': -0.1}, ['views.view2.contrast=-0.1', '[0, 1]']),
        ({'views__view2__saturation': 1.1}, ['views.view2.saturation=1.1', '[0, 1]']),
        ({'total_epochs': -1.0}, ['total_epochs=-1.0', 'at least 0']),
        ({'total_epochs': None, 'total_steps': -5}, ['total_steps=-5', 'at least 0']),
        ({'warmup_epochs': None, 'warmup_steps': -5}, ['warmup_steps=-5', 'at least 0']),
        (
            {'total_steps': 9},
            [
                'total_epochs and total_steps',
                'both are (300.0 and 9)',
            ],
        ),
        ({'total_epochs': None}, ['total_epochs and total_steps', 'neither is']),
        (
            {'warmup_steps': 9},
            ['warmup_epochs and warmup_steps', 'both'],
        ),
        (
            {'checkpoint__every_steps': 9},
            [
                'checkpoint.every_epochs and checkpoint.every_steps',
            ],
        ),
        (
            {'total_epochs': None, 'total_steps': 10, 'warmup_epochs': None, 'warmup_steps': 10},
            ['warm-up (10 steps)', '(10 steps)', 'warmup_epochs/warmup_steps'],
        ),
        ({'batch_size': 3}, ['batch_size=3', '2 device(s)', 'Use 2 or 4']),
        ({'batch_size': 1}, ['batch_size=1', '2 device(s)', 'Use 2,']),
        ({'batch_size': 12, 'accumulate_steps': 4}, ['accumulate_steps=4', 'Use 8 or 16']),
        ({'total_epochs': 0.001}, ['total_epochs=0.001', '1000 examples', 'more epochs']),
        ({'total_epochs': None, 'total_steps': 0}, ['total_steps=0']),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else '',
)
def test_errors_name_the_key_and_the_way_out(changes, says):
    """The message has the key, the value and what is allowed."""
    with pytest.raises(UserError) as caught:
        plan_of(config_with(**changes), examples=1000, device_count=2)
    for words in says:
        assert words in str(caught.value)


def test_one_image_a_pass_is_refused():
    """Batch normalisation over a single image would be degenerate, so it is refused."""
    config = config_with(batch_size=4, accumulate_steps=4)
    with pytest.raises(UserError, match=r'batch_size=4 with accumulate_steps=4.*at least 2'):
        plan_of(config, examples=1000, device_count=1)


def test_suggested_batch_sizes_work():
    """The batch sizes an error suggests are accepted."""
    with pytest.raises(UserError) as caught:
        plan_of(config_with(batch_size=30, accumulate_steps=2), 1000, device_count=4)
    suggestion = re.search(r'Use (\d+) or (\d+)', str(caught.value))
    assert suggestion
    for size in map(int, suggestion.groups()):
        config = config_with(batch_size=size, accumulate_steps=2)
        assert plan_of(config, 1000, device_count=4).batch_size == size


def test_did_you_mean():
    """The nearest known name is suggested, and nothing when none is near."""
    assert did_you_mean('resnet55', ['resnet50', 'vit']) == " Did you mean 'resnet50'?"
    assert did_you_mean('qqqq', ['resnet50', 'vit']) == ''
