"""A config as typed sections: what is checked, and what stays readable of old."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from byol_jax import settings
from byol_jax.app.recipes import load_recipe
from byol_jax.errors import UserError
from byol_jax.names import Named
from byol_jax.settings import Settings
from configs import default


def config_with(**changes):
    """The default config; `changes` by the dotted key, with '__' for the dot."""
    config = default.get_config()
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def changed(key, value):
    """The default config as plain values, with a value of any type."""
    flat = settings.flatten(settings.plain(default.get_config()))
    return settings.unflatten({**flat, key: value})


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('[!_]*.py')), ids=lambda p: p.stem)
def test_every_recipe_is_right(path: Path):
    """Every recipe passes its check, and comes back from config.json as it was."""
    found = Settings.of(load_recipe(str(path)))
    assert Settings.of(found.plain) == found
    assert Settings.of(found) is found


def test_values_are_what_the_config_has():
    """Sections read as the config did, names with their arguments."""
    config = config_with(batch_size=32, views__view1__blur=0.5)
    found = Settings.of(config)
    assert found.batch_size == 32
    assert found.views.view1.blur == found.views.named['view1'].blur == 0.5
    assert found.evaluate.protocols[:2] == (Named('spectrum'), Named('knn'))
    assert found.data.pair_keys == ('image', 'image')
    assert found.plain['views']['view1']['crop_area'] == [0.08, 1.0]


def test_sections_cannot_be_changed():
    found = Settings.of(default.get_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.batch_size = 3
    with pytest.raises(TypeError):
        found.encoder.kwargs['width'] = 3


@pytest.mark.parametrize(
    ('key', 'value', 'words'),
    [
        ('batch_size', 'many', 'must be a whole number'),
        ('batch_size', 2.5, 'must be a whole number'),
        ('batch_size', True, 'must be a whole number'),
        ('batch_size', 0, 'must be at least 1'),
        ('name', 3, 'must be a text'),
        ('views.antialias', 1, 'must be True or False'),
        ('views.mean', 0.5, 'must be several values'),
        ('views.mean', (0.5, 0.5), 'must be 3 values'),
        ('views.mean', (123.7, 0.5, 0.5), r'must be in \[0, 1\]'),
        ('views.std', (0.2, 0.0, 0.2), 'must be above 0'),
        ('views.std', (0.2, math.nan, 0.2), 'must be a finite number'),
        ('optimizer.base_learning_rate', math.inf, 'must be a finite number'),
        ('optimizer.base_learning_rate', None, 'must be a number'),
        ('evaluate.crop_fraction', 2.0, r'must be in \[0.01, 1\]'),
        ('evaluate.batch_size', -1, 'must be at least 1'),
        ('evaluate.knn_k', (20, 20), 'must be different numbers above 0'),
        ('evaluate.knn_k', (2.5,), 'must be a whole number'),
        ('evaluate.protocols', (), 'measures nothing'),
        ('views.view1.solarize_threshold', 7.0, r'must be in \[0, 1\]'),
        ('views.view2.operations', (3,), 'neither a name nor'),
        ('precision', 'bfloat', "Did you mean 'bfloat16'?"),
        ('encoder.kwargs', 3, 'must be a section of arguments'),
        ('data', 3, 'must be a section of keys'),
    ],
)
def test_what_is_refused(key, value, words):
    """A wrong type, a number that is none, a value out of range: one line with the key."""
    with pytest.raises(UserError, match=words) as caught:
        Settings.of(changed(key, value))
    assert str(caught.value).startswith(key)


def test_unknown_and_missing_keys():
    with pytest.raises(UserError, match=r"no config key 'batchsize'.*Did you mean 'batch_size'"):
        Settings.of(changed('batchsize', 3))
    with pytest.raises(UserError, match=r"'views.view1.blurr'.*Did you mean 'blur'"):
        Settings.of(changed('views.view1.blurr', 3))
    config = settings.plain(default.get_config())
    del config['views']['on']
    with pytest.raises(UserError, match=r"has no key 'views\.on'"):
        Settings.of(config)


def test_numbers_of_any_kind():
    """A whole number is a number, NumPy's are numbers, lists are tuples."""
    found = Settings.of(changed('optimizer.base_learning_rate', 1))
    assert type(found.optimizer.base_learning_rate) is float
    found = Settings.of(changed('optimizer.base_learning_rate', np.float32(0.5)))
    assert found.optimizer.base_learning_rate == 0.5
    assert Settings.of(changed('batch_size', np.int64(8))).batch_size == 8
    assert Settings.of(changed('evaluate.knn_k', [5])).evaluate.knn_k == (5,)
    assert Settings.of(changed('encoder.hidden_layer', -2)).encoder.hidden_layer == -2


def test_what_json_cannot_hold():
    """What config.json could not hold is refused where the config is written down."""
    with pytest.raises(UserError, match=r'cannot be written to config\.json'):
        _ = Settings.of(changed('encoder.kwargs', {'act': np.tanh})).plain


def test_old_keys():
    """Keys of old mean what they are called now, which is said."""
    said: list[str] = []
    found = settings.modern(
        {'target': {'base_ema': 0.9}, 'optimizer': {'momentum': 0.8, 'kwargs': {}}}, said
    )
    assert found == {'target': {'tau_base': 0.9}, 'optimizer': {'kwargs': {'momentum': 0.8}}}
    assert said == [
        'config key target.base_ema is called target.tau_base now',
        'config key optimizer.momentum is called optimizer.kwargs.momentum now',
    ]
    config = config_with()
    # As a config file of old does, on what default.get_config() gives.
    config.target.base_ema = 0.5
    assert Settings.of(config).target.tau_base == 0.5


def test_flat_and_nested():
    tree = {'a': {'b': 1, 'c': {}}, 'd': 2}
    assert settings.flatten(tree) == {'a.b': 1, 'a.c': {}, 'd': 2}
    assert settings.unflatten(settings.flatten(tree)) == tree
    assert settings.unflatten({'a.b': {}, 'a.b.c': 1}) == {'a': {'b': {'c': 1}}}
