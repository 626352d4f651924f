"""Reading JSON that anyone may have written."""

from __future__ import annotations

import os

import pytest

from byol_jax.errors import UserError
from byol_jax.files import parse_json, read_json

pytestmark = pytest.mark.timeout(60, method='thread')


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('[' * 200_000, 'more than 64 deep'),
        ('{"a":' * 200_000, 'more than 64 deep'),
        ('[' * 65 + ']' * 65, 'more than 64 deep'),
        ('{"a": \x1b}', 'not JSON'),
        ('1' * 10**6, 'not JSON'),
        ('', 'not JSON'),
        (b'\xff\xfe\x00', 'not JSON'),
    ],
    ids=range(7),
)
def test_odd_json(text, says):
    with pytest.raises(UserError, match=rf'^it is damaged: .*{says}') as caught:
        parse_json(text, 'it')
    assert str(caught.value).isprintable()


def test_sound_json():
    assert parse_json('{"a": [1, {"b": null}]}', 'it') == {'a': [1, {'b': None}]}
    assert parse_json('[' * 64 + ']' * 64, 'it')


def test_what_is_no_small_file(tmp_path):
    """A pipe is not waited for, and a huge file is not read."""
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(UserError, match='is a pipe, not a file'):
        read_json(tmp_path / 'pipe')
    with (tmp_path / 'huge').open('wb') as file:
        file.truncate(12 * 10**9)
    with pytest.raises(UserError, match='12,000 MB'):
        read_json(tmp_path / 'huge')
    with pytest.raises(UserError, match='cannot be read: No such file'):
        read_json(tmp_path / 'none')
