"""What a run can do without is left out with one line."""

from __future__ import annotations

import pytest

from byol_jax.app.left_out import tried
from byol_jax.errors import UserError


def fails(error):
    raise error


@pytest.mark.parametrize(
    ('error', 'words'),
    [
        (ValueError('of two\nlines'), 'ValueError: of two lines (test_left_out.py:'),
        (ZeroDivisionError(), 'ZeroDivisionError (test_left_out.py:'),
        (UserError('no API key. Unset it.'), 'no API key. Unset it.\n'),
    ],
)
def test_a_failure_is_one_line(capsys, error, words):
    """What failed, why, and where; what a user is meant to read needs no place."""
    assert not tried('W&B', lambda: fails(error))
    said = capsys.readouterr().out
    assert said.startswith(f'W&B failed and is left out from now on: {words}')
    assert said.count('\n') == 1


def test_the_place_is_not_one_of_the_callers(capsys):
    """The line of the caller itself would say nothing."""
    assert not tried('it', lambda: fails(ValueError('x')), __file__)
    assert capsys.readouterr().out == 'it failed and is left out from now on: ValueError: x\n'


def test_what_works_is_silent(capsys):
    assert tried('it', lambda: None)
    assert capsys.readouterr().out == ''


def test_ctrl_c_is_no_failure():
    """A signal ends the run, whatever it comes into."""
    with pytest.raises(KeyboardInterrupt):
        tried('it', lambda: fails(KeyboardInterrupt()))
