"""A config as typed sections: its checks, and old configs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
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
    """The default config; `changes` are dotted keys with '__' for the dot."""
    config = default.get_config()
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def changed(key, value):
    """The default config as plain values, with one value of any type."""
    flat = settings.flatten(settings.plain(default.get_config()))
    return settings.unflatten({**flat, key: value})


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('[!_]*.py')), ids=lambda p: p.stem)
def test_every_recipe_is_right(path: Path):
    """Every recipe passes its check, and is unchanged when read from config.json."""
    found = Settings.of(load_recipe(str(path)))
    assert Settings.of(found.plain) == found
    assert Settings.of(found) is found


def test_values_are_what_the_config_has():
    """Sections are read like the config; names have their arguments."""
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
        ('views.std', (58.0, 57.0, 57.0), 'must not exceed 1'),
        ('name', ' ', 'must not be empty'),
        ('total_steps', 2**31, 'must not exceed 2147483647'),
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
    """A wrong type, a NaN, or a value out of range is one line with the key."""
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
    """Integers are accepted as numbers, NumPy's numbers too, and lists as tuples."""
    found = Settings.of(changed('optimizer.base_learning_rate', 1))
    assert type(found.optimizer.base_learning_rate) is float
    found = Settings.of(changed('optimizer.base_learning_rate', np.float32(0.5)))
    assert found.optimizer.base_learning_rate == 0.5
    assert Settings.of(changed('batch_size', np.int64(8))).batch_size == 8
    assert Settings.of(changed('evaluate.knn_k', [5])).evaluate.knn_k == (5,)
    assert Settings.of(changed('encoder.hidden_layer', -2)).encoder.hidden_layer == -2


@dataclasses.dataclass
class Scale:
    """An argument that no file can store."""

    factor: float = 2.0


@pytest.mark.parametrize(
    'value',
    [nn.gelu, np.tanh, functools.partial(nn.gelu, approximate=False), Scale(), {1, 2}, b'gelu', 1j],
    ids=['flax', 'numpy', 'partial', 'object', 'set', 'bytes', 'complex'],
)
@pytest.mark.parametrize('key', ['encoder.kwargs', 'optimizer.kwargs', 'method.kwargs'])
def test_what_no_file_can_keep(key, value):
    """What config.json or encoder.json cannot store is refused with its key, at any depth."""
    for given, where in (({'act': value}, 'act'), ({'net': {'acts': [value]}}, 'net.acts')):
        with pytest.raises(UserError, match=r'cannot keep') as caught:
            Settings.of(changed(key, given))
        assert str(caught.value).startswith(f'{key}.{where}=')
        assert '\n' not in str(caught.value)


def test_arguments_are_kept_as_plain_values():
    """NumPy's values become Python's, and dtypes their names, as if read from config.json."""
    given = {
        'sizes': np.array([1, 2]),
        'width': np.float32(0.5),
        'heads': jnp.int32(3),
        'bias': np.bool_(True),
        'types': [jnp.bfloat16, np.float32, np.dtype('int8')],
        'none': None,
    }
    found = Settings.of(changed('encoder.kwargs', given))
    kept = {
        'sizes': (1, 2),
        'width': 0.5,
        'heads': 3,
        'bias': True,
        'types': ('bfloat16', 'float32', 'int8'),
        'none': None,
    }
    assert found.encoder.kwargs == kept
    assert {type(value) for value in found.encoder.kwargs['sizes']} == {int}
    assert Settings.of(json.loads(json.dumps(found.plain))) == found
    # Flax accepts a name in place of the dtype.
    layer = nn.Dense(3, dtype=found.encoder.kwargs['types'][0], use_bias=False)
    assert (
        layer.apply({'params': {'kernel': jnp.ones((2, 3))}}, jnp.ones((1, 2))).dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 1e39, np.float32('nan')])
def test_no_number_is_infinite(value):
    """NaN, infinity and values infinite in float32 are refused in every number of a config."""
    plain = settings.plain(default.get_config())
    flat = settings.flatten(plain)
    numbers = [key for key, each in flat.items() if type(each) is float]
    assert len(numbers) > 30
    arguments = ('encoder.kwargs', 'method.kwargs', 'optimizer.kwargs', 'data.kwargs')
    given = [(key, value) for key in numbers]
    given += [(key, {'x': [0, value]}) for key in arguments]
    given += [(key, (('a:b', {'x': value}),)) for key in ('hooks', 'evaluate.protocols')]
    given += [
        ('views.mean', (0.5, value, 0.5)),
        ('views.view2.operations', (('crop', {'x': value}),)),
    ]
    for key, each in given:
        with pytest.raises(UserError, match='must be a finite number') as caught:
            Settings.of(settings.unflatten({**flat, key: each}))
        assert str(caught.value).startswith(key)


@pytest.mark.parametrize(
    ('key', 'name', 'arguments', 'says'),
    [
        (
            'views.view1.operations',
            'solarize',
            {'threshold': 7},
            r'threshold=7.0 must be in \[0, 1\]',
        ),
        ('views.view1.operations', 'crop', {'area': (0.5, 2)}, 'area=.* must not exceed 1'),
        ('views.view2.operations', 'blur', {'sigma': 3}, 'sigma=3 must be several values'),
        ('views.view2.operations', 'flip', {'probability': -1}, 'must lie in'),
        ('evaluate.protocols', 'knn', {'k': (0,)}, 'must be different numbers above 0'),
        ('evaluate.protocols', 'linear', {'batch_size': 0}, 'must be at least 1'),
        ('evaluate.protocols', 'retrieval', {'pool': 2.5}, 'must be a whole number'),
    ],
)
def test_arguments_beside_a_name_have_the_ranges_of_their_keys(key, name, arguments, says):
    """('solarize', {'threshold': 7}) is refused like views.view1.solarize_threshold=7."""
    with pytest.raises(UserError, match=says) as caught:
        Settings.of(changed(key, (name, (name, arguments))))
    assert str(caught.value).startswith(f'{key}: {name}.')


@pytest.mark.parametrize('keys', [settings.OPERATION_KEYS, settings.PROTOCOL_KEYS])
def test_every_argument_with_a_key_is_one(keys):
    """The tables of arguments name existing keys and accepted arguments."""
    from byol_jax.evaluation.protocols import PROTOCOLS
    from byol_jax.views.recipes import OPERATIONS

    section, registry = (
        (settings.View, OPERATIONS)
        if keys is settings.OPERATION_KEYS
        else (settings.Evaluate, PROTOCOLS)
    )
    for name, arguments in keys.items():
        assert set(arguments.values()) <= {field.name for field in dataclasses.fields(section)}
        registry.check_kwargs(name, registry.find(name), dict.fromkeys(arguments))


@pytest.mark.parametrize(
    ('name', 'value', 'says'),
    [
        ('momentum', 1, r'must be in \[0, 1\)'),
        ('b2', 1.0, r'must be in \[0, 1\)'),
        ('momentum', '0.9', 'must be a number'),
        ('b1', True, 'must be a number'),
        ('trust_coefficient', 0.0, 'must be above 0'),
        ('epsilon', -1e-8, 'must be above 0'),
    ],
)
def test_hyperparameters_that_cannot_be(name, value, says):
    """A momentum of 1 never forgets a gradient; an own optimizer's arguments are not checked."""
    with pytest.raises(UserError, match=rf'^optimizer\.kwargs\.{name}=.*{says}'):
        Settings.of(changed('optimizer.kwargs', {name: value}))
    known = {'momentum': None, 'b1': 0.0, 'nesterov': True, 'norm': 5.0}
    assert Settings.of(changed('optimizer.kwargs', known)).optimizer.kwargs == known


def test_old_keys():
    """Old keys are taken for the new ones, with a message."""
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
    # As an old config file does with what default.get_config() returns.
    config.target.base_ema = 0.5
    assert Settings.of(config).target.tau_base == 0.5


def test_flat_and_nested():
    tree = {'a': {'b': 1, 'c': {}}, 'd': 2}
    assert settings.flatten(tree) == {'a.b': 1, 'a.c': {}, 'd': 2}
    assert settings.unflatten(settings.flatten(tree)) == tree
    assert settings.unflatten({'a.b': {}, 'a.b.c': 1}) == {'a': {'b': {'c': 1}}}


def test_a_section_of_arguments_as_the_command_line_has_it():
    """--config.encoder.kwargs={..} gives a ConfigDict, which is taken as a dict."""
    given = ml_collections.ConfigDict({'stage_sizes': (1, 2), 'norm': {'momentum': 0.9}})
    found = Settings.of(changed('encoder.kwargs', given))
    assert found.encoder.kwargs == {'stage_sizes': (1, 2), 'norm': {'momentum': 0.9}}
