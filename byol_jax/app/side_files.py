"""Files that a run can do without: that one cannot be written is said once, and ends nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byol_jax.app.hosts import say
from byol_jax.files import write_whole


class SideFile:
    """A file that shows something of a run, such as its metrics or its report.

    Attributes:
      path: the file.
    """

    def __init__(self, path: Path):
        """Writes nothing yet.

        Args:
          path: the file; its folder must exist when it is written.
        """
        self.path = path
        self._waiting = b''
        self._failed = False

    def append(self, data: bytes) -> None:
        """Adds bytes at the end of the file, with those that could not be added before.

        They are there whole or not at all, unless the process is killed.

        Args:
          data: a record, or several; nothing: only what could not be added before.
        """
        self._waiting += data
        if self._waiting:
            self._tried(self._append)

    def replace(self, write: Callable[[Path], Any]) -> bool:
        """Writes the file anew (`files.write_whole`); returns whether it could be."""
        return self._tried(lambda: write_whole(self.path, write))

    def rewrite(self, data: bytes) -> None:
        """Makes bytes all that is in the file.

        Args:
          data: if the file begins with it, the rest is cut off, which needs no room on a disk.
        """

        def write() -> None:
            if self.path.exists() and self.path.read_bytes().startswith(data):
                os.truncate(self.path, len(data))
            else:
                write_whole(self.path, lambda partial: partial.write_bytes(data))

        self._tried(write)

    def remove(self) -> None:
        """Removes the file, if there is one."""
        self._tried(lambda: self.path.unlink(missing_ok=True))

    def _append(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        # Without a buffer: what could not be written would stay in it, and raise again.
        with self.path.open('ab', buffering=0) as file:
            size = file.seek(0, 2)
            left = memoryview(self._waiting)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(size)
                raise
        self._waiting = b''

    def _tried(self, call: Callable[[], Any]) -> bool:
        try:
            call()
        except OSError as error:
            if not self._failed:
                why = error.strerror or error
                say(f'{self.path} cannot be written, the run goes on without it: {why}')
            self._failed = True
        else:
            if self._failed:
                say(f'{self.path} is written again')
            self._failed = False
        return not self._failed
