"""The ways out of main.py: what ends it with one line, and what is a bug."""

from __future__ import annotations

import errno
import os

import pytest

from byol_jax.app.main import _disk_named
from byol_jax.errors import UserError


@pytest.mark.parametrize(
    'name', ['ENOSPC', 'EDQUOT', 'EFBIG', 'EACCES', 'EPERM', 'EROFS', 'EIO', 'ESTALE']
)
@pytest.mark.parametrize('file', ['encoder.safetensors', None])
def test_a_fault_of_the_disk_is_one_line(name, file):
    """The line names the file, where the system does, and what is wrong with it."""
    number = getattr(errno, name)
    with pytest.raises(UserError) as caught, _disk_named():
        raise OSError(number, os.strerror(number), file)
    assert str(caught.value) == f'{file or "the workdir"}: {os.strerror(number)}'


@pytest.mark.parametrize('error', [FileNotFoundError(2, 'No such file'), ValueError('x')])
def test_a_bug_stays_one(error):
    """Its traceback is what a report of it needs."""
    with pytest.raises(type(error)) as caught, _disk_named():
        raise error
    assert caught.value is error
