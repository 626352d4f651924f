"""Small files: written whole or not at all, read with all that can be wrong with them.

Also: locks, what is a file, and what is a workdir.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from byol_jax.errors import UserError, shown

# No JSON of this package has more brackets within brackets.
_DEEPEST_JSON = 64


def read_json(path: Path) -> Any:
    """Reads a JSON file that may be damaged or made by somebody else.

    Raises:
      UserError: the file is not there, is too large, or is not JSON as `parse_json` takes it.
    """
    data = read_bytes(path)
    if data is None:
        raise UserError(f'{path} cannot be read: {os.strerror(errno.ENOENT)}.')
    return parse_json(data, str(path))


def parse_json(data: bytes | str, where: str) -> Any:
    """The value of JSON text that may be damaged or made by somebody else.

    Args:
      data: the text.
      where: it is from, for messages.

    Raises:
      UserError: it is not JSON, or nested so deeply that what walks through it would fail.
    """
    try:
        return _parsed(data)
    except _NotJson as error:
        raise UserError(f'{where} is damaged: {error}.') from error


class _NotJson(Exception):
    """What is wrong with a text, a phrase."""


def _parsed(data: bytes | str) -> Any:
    too_deep = f'it has brackets within brackets, more than {_DEEPEST_JSON} deep'
    try:
        value = json.loads(data)
    except RecursionError:
        raise _NotJson(too_deep) from None
    except ValueError as error:
        raise _NotJson(f'it is not JSON ({shown(str(error))})') from error
    level = [value]
    for _ in range(_DEEPEST_JSON):
        within: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                within += each.values()
            elif isinstance(each, list):
                within += each
        level = within
        if not level:
            return value
    raise _NotJson(too_deep)


def not_a_file(status: os.stat_result) -> str:
    """Names what a `stat` describes if it is not a file, such as 'a folder'; '' for a file."""
    for is_so, what in (
        (stat.S_ISREG, ''),
        (stat.S_ISDIR, 'a folder'),
        (stat.S_ISFIFO, 'a pipe'),
        (stat.S_ISSOCK, 'a socket'),
    ):
        if is_so(status.st_mode):
            return what
    return 'a device'


def write_whole(path: Path, write: Callable[[Path], Any], writer: str = '') -> None:
    """Writes a file beside `path`, and moves it to `path` when it is complete.

    Args:
      path: the file.
      write: writes the content to the path that it is given.
      writer: a name of this process, if several processes may write `path` at once.

    Raises:
      OSError: the file cannot be written (a full disk, say). The error names `path`, which keeps
        what it held.
    """
    partial = path.with_name(f'{path.name}.{writer}.partial' if writer else f'{path.name}.partial')
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        # Nothing will read the partial file, and it may fill the disk.
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_place(path: Path) -> None:
    """Checks, before a file's content is computed, that `path` can be a file.

    Raises:
      UserError: `path` is a folder, or one of its parents is a file.
    """
    if path.is_dir():
        raise UserError(f'{path} is a folder: give the path of a file.')
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f'{path} cannot be written: {parent} is not a folder.')


# A workdir that holds no run, such as that of --mode=views, is marked by this file.
WORKDIR_MARK = '.byol_jax'
# What the workdir of a run has besides its config.json; each version has one of them.
_BESIDE_CONFIG = ('checkpoints', 'metrics.jsonl', '.lock')


def is_workdir(folder: str | Path) -> bool:
    """Whether a folder is the workdir of a run, whose pictures are never data."""

    def holds(name: str) -> bool:
        return os.path.lexists(os.path.join(folder, name))

    return holds(WORKDIR_MARK) or (holds('config.json') and any(map(holds, _BESIDE_CONFIG)))


# No small file of ours comes near this, and what is longer is not read.
_MOST_BYTES = 2**26

# The key of a sealed object (`sealed`) that holds the digest of all others.
SEAL = 'sha256'


class Damaged(UserError):
    """A file does not hold what was written there.

    Attributes:
      path: the file.
      what: is wrong with it, a phrase that follows 'is damaged: '.
    """

    def __init__(self, path: Path, what: str, advice: str = ''):
        """Says so.

        Args:
          path: see above.
          what: see above.
          advice: what to do, a sentence.
        """
        super().__init__(f'{path} is damaged: {what}.' + (f' {advice}' if advice else ''))
        self.path, self.what = path, what


def read_bytes(path: Path) -> bytes | None:
    """The content of a small file of ours; None if there is none.

    Raises:
      Damaged: something else than a file is there, or far too much.
      UserError: it cannot be read.
    """
    try:
        # Asked first: opening a pipe would wait for ever.
        status = path.stat()
        other = not_a_file(status)
        if other:
            raise Damaged(path, f'it is {other}, not a file')
        if status.st_size > _MOST_BYTES:
            raise Damaged(
                path,
                f'it has {status.st_size / 1e6:,.0f} MB, and a sound one has at most '
                f'{_MOST_BYTES / 1e6:,.0f}',
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Damaged(path, 'it is a link that leads to itself') from error
        raise UserError(f'{path} cannot be read: {error.strerror}.') from error


def read_text(path: Path) -> str | None:
    """The content of a small UTF-8 file of ours; None if there is none.

    Raises:
      Damaged: something else is there.
      UserError: it cannot be read.
    """
    content = read_bytes(path)
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError as error:
        raise Damaged(path, f'it is not UTF-8 from byte {error.start} on') from error


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a small file of ours; None if there is none.

    Raises:
      Damaged: something else is there.
      UserError: it cannot be read.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        content = _parsed(text)
    except _NotJson as error:
        raise Damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise Damaged(path, 'it is not a JSON object')
    return content


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    text = json.dumps(content, indent=2, sort_keys=True) + '\n'
    write_whole(path, lambda partial: partial.write_text(text, encoding='utf-8'))


def set_aside(path: Path) -> Path:
    """Gives what is at `path` the name 'NAME.damaged', or 'NAME.damaged-2' ..; returns the path.

    Raises:
      OSError: it cannot be renamed.
    """
    target = unused_name(path.with_name(f'{path.name}.damaged'))
    path.rename(target)
    return target


def unused_name(path: Path) -> Path:
    """`path` or, if something has that name, the first of 'NAME-2', 'NAME-3' .. that is free."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f'{path.name}-{number}')
    return free


# What `flock` gives on a file system that has none: NFS without its lock service, some of FUSE.
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def lock_file(file: int) -> bool | None:
    """Locks an open file for this process, without waiting.

    Args:
      file: its descriptor.

    Returns:
      False if another process has the lock; None if the file system has no locks.

    Raises:
      OSError: it cannot be locked for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in _WITHOUT_LOCKS:
            return None
        raise
    return True


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object with a digest of its other keys and values, as JSON has them, under SEAL."""
    return {**content, SEAL: _digest(content)}


def seal_holds(content: Mapping[str, Any]) -> bool:
    """Whether an object is as it was sealed."""
    return content.get(SEAL) == _digest(content)


def _digest(content: Mapping[str, Any]) -> str:
    others = {key: value for key, value in content.items() if key != SEAL}
    text = json.dumps(others, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()
