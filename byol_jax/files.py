"""Writing files so that they are whole or absent, and telling files from folders and devices."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byol_jax.errors import UserError


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
