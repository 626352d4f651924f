"""The lock of a workdir: who holds it, and what is done where there are no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from byol_jax.app import lock
from byol_jax.app.lock import holder, release_lock, take_lock
from byol_jax.errors import UserError

HOLD = """
    import sys
    from pathlib import Path
    from byol_jax.app.lock import take_lock
    take_lock(Path(sys.argv[1]))
    print('locked', flush=True)
    sys.stdin.read()
"""


def test_the_holder_is_known(tmp_path):
    """While it is held it says by whom; given back, or never taken, by nobody."""
    assert holder(tmp_path) is None
    take_lock(tmp_path)
    found = holder(tmp_path)
    assert (found.host, found.process, found.alive) == (os.uname().nodename, os.getpid(), True)
    release_lock(tmp_path)
    assert holder(tmp_path) is None
    take_lock(tmp_path)
    release_lock(tmp_path)


def test_looking_does_not_lock(tmp_path, monkeypatch):
    """Who looks takes no lock for an instant, so a run that starts then is not refused."""
    take_lock(tmp_path)
    release_lock(tmp_path)
    monkeypatch.setattr(fcntl, 'flock', lambda *a: pytest.fail('it was locked'))
    assert holder(tmp_path) is None


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'{"host"',
        b'\xff\x00',
        b'[]',
        b'{"host": 5, "process": 1}',
        b'{"host": "elsewhere", "process": -1}',
        json.dumps({'host': os.uname().nodename, 'process': 2**22 + 7}).encode(),
        # This process's number, of a process that began at another time.
        json.dumps({'host': os.uname().nodename, 'process': os.getpid(), 'began': '1'}).encode(),
    ],
    ids=['empty', 'cut', 'bytes', 'list', 'types', 'elsewhere', 'no-process', 'younger-process'],
)
def test_nobody_holds_it(tmp_path, content):
    """A file without sense, or of a process that has ended, is held by nobody."""
    (tmp_path / '.lock').write_bytes(content)
    assert holder(tmp_path) is None
    take_lock(tmp_path)
    release_lock(tmp_path)


def test_another_host_is_not_known(tmp_path):
    """Whether a process of another host lives is not known here."""
    (tmp_path / '.lock').write_text(json.dumps({'host': 'elsewhere', 'process': 12}))
    assert holder(tmp_path).alive is None


@pytest.mark.parametrize('code', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, code):
    """It is a warning, not an end; a living process on this host is noticed all the same."""

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, 'flock', flock)
    take_lock(tmp_path)
    assert 'file system without locks' in capsys.readouterr().out
    with pytest.raises(UserError, match=f'Another process is training in .*{os.getpid()} on'):
        take_lock(tmp_path)
    release_lock(tmp_path)
    take_lock(tmp_path)
    release_lock(tmp_path)


def test_another_fault_is_one_line(tmp_path, monkeypatch):
    """A lock that fails for another reason ends the start with its reason."""

    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, 'flock', flock)
    with pytest.raises(UserError, match=r'\.lock cannot be locked: Input/output error'):
        take_lock(tmp_path)
    assert tmp_path not in lock._locks


@pytest.mark.parametrize('odd', ['folder', 'pipe', 'link'])
def test_something_else_in_its_place(tmp_path, capsys, odd):
    """A folder, a pipe or a broken link called .lock is kept aside."""
    path = tmp_path / '.lock'
    {'folder': path.mkdir, 'pipe': lambda: os.mkfifo(path)}.get(
        odd, lambda: path.symlink_to('nowhere')
    )()
    take_lock(tmp_path)
    release_lock(tmp_path)
    assert path.is_file()
    assert '.lock.damaged' in capsys.readouterr().out


def test_a_killed_process_holds_nothing(tmp_path):
    """A second process is refused and told which one trains; after a kill the workdir is free."""
    command = [sys.executable, '-c', textwrap.dedent(HOLD), str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout.readline() == 'locked\n'
            assert holder(tmp_path).alive
            with pytest.raises(UserError, match=f'process {process.pid} on'):
                take_lock(tmp_path)
            # Being refused has not changed who holds it.
            assert holder(tmp_path).process == process.pid
        finally:
            process.kill()
    assert holder(tmp_path) is None
    take_lock(tmp_path)
    release_lock(tmp_path)
