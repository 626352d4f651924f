"""One run at a time trains in a workdir: its lock, and who holds it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from byol_jax.app.hosts import say
from byol_jax.errors import UserError
from byol_jax.files import lock_file, not_a_file, read_object, set_aside

# The locks this process holds, by workdir, as open files; they end with it, however it ends.
_locks: dict[Path, int] = {}


class Holder(NamedTuple):
    """The process that took a workdir's lock last and has not given it back.

    Attributes:
      host: its name.
      process: its number there.
      alive: whether it runs; None: it is on another host.
    """

    host: str
    process: int
    alive: bool | None


def take_lock(workdir: Path) -> None:
    """Locks a workdir for this process, until it ends or gives the lock back.

    Where the file system has no locks, that is said, and a process on this host is still noticed.

    Raises:
      UserError: another process has the lock, or the file cannot be opened.
    """
    path = workdir / '.lock'
    try:
        if os.path.lexists(path) and (not path.exists() or not_a_file(path.stat())):
            say(f'{path} is no file; it is kept as {set_aside(path).name}')
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f'{path} cannot be opened: {error.strerror}.') from error
    try:
        locked = lock_file(file)
        found = holder(workdir)
        if locked is False or (locked is None and found is not None and found.alive):
            raise _taken(workdir, found)
    except OSError as error:
        os.close(file)
        raise UserError(f'{path} cannot be locked: {error.strerror}.') from error
    except UserError:
        os.close(file)
        raise
    if locked is None:
        say(
            f'{workdir} is on a file system without locks: nothing keeps a process on another '
            'host from training there too'
        )
    try:
        os.ftruncate(file, 0)
        about = {'host': os.uname().nodename, 'process': os.getpid(), 'began': _began(os.getpid())}
        os.write(file, json.dumps(about).encode())
    except OSError as error:
        # The lock holds; who has it is only for people.
        say(f'{path} cannot be written: {error.strerror}')
    _locks[workdir.resolve()] = file


def release_lock(workdir: Path) -> None:
    """Lets other processes have a workdir that this one has locked, if it has."""
    file = _locks.pop(workdir.resolve(), None)
    if file is not None:
        try:
            os.ftruncate(file, 0)
        finally:
            os.close(file)


def holder(workdir: Path) -> Holder | None:
    """Who trains in a workdir, by what is written in its lock; the lock itself is not touched.

    Returns:
      None if nobody does; after a kill on another host that is not known.
    """
    try:
        about = read_object(workdir / '.lock')
    except UserError:
        return None
    host, process = (about or {}).get('host'), (about or {}).get('process')
    if not isinstance(host, str) or not isinstance(process, int) or process <= 0:
        return None
    if host != os.uname().nodename:
        return Holder(host, process, None)
    try:
        os.kill(process, 0)
    except PermissionError:
        pass
    except (ProcessLookupError, OverflowError):
        return None
    # Numbers of processes are used again.
    return Holder(host, process, True) if about and about.get('began') == _began(process) else None


def _began(process: int) -> str | None:
    """When a process began, in ticks of its host; None where that is not told."""
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]
    except (OSError, IndexError):
        return None


def _taken(workdir: Path, found: Holder | None) -> UserError:
    who = f' (process {found.process} on {found.host})' if found else ''
    return UserError(f'Another process is training in {workdir}{who}. Wait for it, or stop it.')
