"""One rule for every name: short names, 'package.module:attribute', arguments, suggestions."""

from __future__ import annotations

import dataclasses

import pytest

from byol_jax.errors import UserError
from byol_jax.names import Named, Registry, named


def pair(first, second=2):
    return first, second


def whatever(**kwargs):
    return kwargs


KINDS = Registry('kind', 'part.name', {'pair': pair, 'lazy': f'{__name__}:pair'}, 'part.kwargs')


def test_short_and_full_names():
    """A short name, a name that is imported when asked for, and any importable attribute."""
    assert KINDS.find('pair') is KINDS.find('lazy') is KINDS.find(f'{__name__}:pair') is pair
    assert list(KINDS) == ['pair', 'lazy']


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('pear', ["part.name='pear'", 'known kind', "Did you mean 'pair'?", 'Known: pair, lazy']),
        ('no_such_module:pair', ["module 'no_such_module'", 'PYTHONPATH']),
        (f'{__name__}:pear', ["has no 'pear'", "Did you mean 'pair'?"]),
        (':pair', ['package.module:attribute']),
        (f'{__name__}:', ['package.module:attribute']),
        (f'{__name__}:a.b', ['package.module:attribute']),
        ('.names:pair', ['part.name']),
        (3, ['must be the name of a kind']),
    ],
)
def test_wrong_names(name, words):
    """One line says what exists, what is nearest, and what to do."""
    with pytest.raises(UserError) as caught:
        KINDS.find(name)
    for word in words:
        assert word in str(caught.value)
    assert '\n' not in str(caught.value)


def test_arguments():
    """The user's arguments are checked against the signature; the caller's cannot be given."""
    assert KINDS.build('pair', {'second': 3}, 1) == (1, 3)
    assert KINDS.build('pair', {}, first=1) == (1, 2)
    assert KINDS.build(f'{__name__}:whatever', {'anything': 1}) == {'anything': 1}
    with pytest.raises(UserError) as caught:
        KINDS.build('pair', {'secnd': 3}, 1)
    for word in ("part.kwargs: 'pair' takes no argument 'secnd'", "Did you mean 'second'?"):
        assert word in str(caught.value)
    with pytest.raises(UserError, match=r"takes no argument 'first'\..*It takes: second"):
        KINDS.build('pair', {'first': 3}, first=1)
    with pytest.raises(UserError, match=r"part\.kwargs do not fit 'pair'"):
        KINDS.build('pair', {'second': 3})


def test_a_field_of_a_class_that_is_no_dataclass():
    """Without the decorator the fields make no constructor; the message says so."""

    @dataclasses.dataclass(frozen=True)
    class Base:
        size: int = 1

    class Plain(Base):
        delta: float = 1.0

    kinds = Registry('kind', 'part', {'plain': Plain})
    with pytest.raises(UserError, match=r"argument 'delta', .*write @dataclasses\.dataclass"):
        kinds.build('plain', {'delta': 2.0})
    with pytest.raises(UserError, match=r"argument 'dleta'\."):
        kinds.build('plain', {'dleta': 2.0})


def test_what_cannot_be_called():
    with pytest.raises(UserError, match='cannot be called: it is a Registry'):
        KINDS.build(f'{__name__}:KINDS', {})


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        ('crop', Named('crop')),
        (('a:b', {'x': 1}), Named('a:b', {'x': 1})),
        (['a:b', {'x': 1}], Named('a:b', {'x': 1})),
    ],
)
def test_a_name_with_arguments(value, expected):
    """A config has either form; JSON has lists instead of tuples."""
    assert named(value, 'views.view1.operations') == expected


@pytest.mark.parametrize('value', [3, ('crop',), ('crop', 3), (3, {}), {'crop': {}}, None])
def test_what_is_no_name(value):
    with pytest.raises(UserError, match=r'evaluate\.protocols: .* neither a name nor'):
        named(value, 'evaluate.protocols')
