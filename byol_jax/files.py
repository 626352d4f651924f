"""Writing files so that they are whole or absent, and reading small ones that may hold anything."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byol_jax.errors import UserError, shown

# No JSON file of this package is larger, bytes, or has more brackets within brackets.
_LARGEST_JSON = 2**26
_DEEPEST_JSON = 64


def read_json(path: Path) -> Any:
    """Reads a JSON file that may be damaged or made by somebody else.

    Raises:
      UserError: the file is not there, is too large, or is not JSON as `parse_json` takes it.
    """
    try:
        status = path.stat()
        # Opening a pipe would wait for ever.
        what = not_a_file(status)
        if what:
            raise UserError(f'{path} is {what}, not a file.')
        if status.st_size > _LARGEST_JSON:
            raise UserError(
                f'{path} is damaged: it has {status.st_size / 1e6:,.0f} MB, and a sound one has at '
                f'most {_LARGEST_JSON / 1e6:,.0f}.'
            )
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error
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
        value = json.loads(data)
    except RecursionError:
        raise UserError(_too_deep(where)) from None
    except ValueError as error:
        raise UserError(f'{where} is damaged: it is not JSON ({shown(str(error))}).') from error
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
    raise UserError(_too_deep(where))


def _too_deep(where: str) -> str:
    return f'{where} is damaged: it has brackets within brackets, more than {_DEEPEST_JSON} deep.'


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
