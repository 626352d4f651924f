"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a file beside `path` and moves it there when it is complete."""
    partial = path.with_name(path.name + '.partial')
    write(partial)
    partial.replace(path)
