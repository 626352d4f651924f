"""What a run says before its first step of a batch that is larger than its data."""

from __future__ import annotations

import types

import pytest

from byol_jax.app.introduction import large_batch
from byol_jax.app.plan import make_plan
from byol_jax.settings import Settings
from configs import folder


def line_of(examples, **changes):
    config = folder.get_config().unlock()
    config.warmup_epochs = 0.0
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    config = Settings.of(config)
    plan = make_plan(config, examples, 1)
    return large_batch(types.SimpleNamespace(config=config, plan=plan)), plan


def test_a_batch_that_is_larger_than_the_data():
    """16 pictures in a batch of 256: 300 epochs are 18 steps, and each writes a checkpoint."""
    line, plan = line_of(16)
    assert (plan.total_steps, plan.checkpoints) == (18, 18)
    assert line == (
        'batch_size=256 is more than the 16 training examples: a step shows each of them 16.0 '
        'times, in other views, and an epoch is 0.062 of a step. total_epochs=300 are 18 steps; '
        '18 checkpoints are written, every step (the newest 3 are kept). A batch of at most 16 '
        'makes an epoch a step or more'
    )


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        (
            {'checkpoint__every_epochs': None, 'checkpoint__every_steps': 5},
            '4 checkpoints are written, every 5 steps',
        ),
        ({'checkpoint__every_epochs': 0.0}, 'one checkpoint is written, at the end'),
        ({'total_epochs': None, 'total_steps': 7}, 'of a step. 7 checkpoints are written'),
    ],
)
def test_how_many_checkpoints(changes, says):
    assert says in line_of(16, **changes)[0]


def test_a_batch_that_fits_says_nothing():
    assert line_of(256)[0] == ''
    assert line_of(5000)[0] == ''
