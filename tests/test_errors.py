"""Text on its way to a terminal or a page."""

from __future__ import annotations

import pytest

from byol_jax.errors import BadPicture, UserError, printable, shown


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('photo 1.png', 'photo 1.png'),
        ('Grüße/画像.png', 'Grüße/画像.png'),
        ('\x1b[2J', r'\x1b[2J'),
        ('\x9b2J', r'\x9b2J'),
        ('a\rb\nc', r'a\rb\nc'),
        ('a\u202egnp.exe', r'a\u202egnp.exe'),
        (b'\xe9'.decode(errors='surrogateescape'), r'\udce9'),
        ('\x00\x7f', r'\x00\x7f'),
        ('\u2028', r'\u2028'),
    ],
)
def test_printable(text, expected):
    """What a terminal would obey is shown instead; what it can show stays as it is."""
    assert printable(text) == expected
    assert printable(expected) == expected
    printable(text).encode()


def test_what_is_kept():
    assert printable('a\n\x1bb', keep='\n') == 'a\n\\x1bb'


@pytest.mark.parametrize('kind', [UserError, lambda text: BadPicture(text, 'is bad')])
def test_errors_hold_no_control_characters(kind):
    """Whoever prints an error prints text: `str`, f-strings, and errors within errors."""
    error = kind('\x1b[2J')
    assert str(error).startswith(r'\x1b[2J')
    assert f'{UserError(f"{error}")}'.startswith(r'\x1b[2J')


def test_words_are_cut():
    """A word of a file does not fill the screen."""
    assert len(shown('x' * 10**6)) < 300
    assert shown({'a': '\n'}) == r"{'a': '\\n'}".replace('\\\\', '\\')
