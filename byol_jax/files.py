"""Files that are there whole or not at all, and what is no file."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byol_jax.errors import UserError


def not_a_file(status: os.stat_result) -> str:
    """What something is instead of a file, such as 'a folder', by its `stat`; '' for a file."""
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
    """Lets `write` fill a file beside `path` and moves it there when it is complete.

    Args:
      path: the file.
      write: is given the path of the file to fill.
      writer: names this process, where several may write `path` at once.

    Raises:
      OSError: it could not be written (a full disk, say), naming `path`; what was there still is.
    """
    partial = path.with_name(f'{path.name}.{writer}.partial' if writer else f'{path.name}.partial')
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        # It can fill what is left of a disk, and nothing will read it.
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_place(path: Path) -> None:
    """Checks, before the work is done, that a file can come to lie at `path`.

    Raises:
      UserError: a folder, or a file where a folder should be, is in the way.
    """
    if path.is_dir():
        raise UserError(f'{path} is a folder, and a file is to be written there.')
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f'{path} cannot be written: {parent} is no folder.')
