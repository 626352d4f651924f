"""What a run can do without: if it fails, that is said, and the run goes on without it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byol_jax.app.hosts import say
from byol_jax.errors import UserError


def tried(what: str, call: Callable[[], Any], *callers: str) -> bool:
    """Returns whether a call succeeded; if not, one line says that it is left out, and why.

    Args:
      what: is left out, for people.
      call: may be somebody else's program.
      callers: files that are not the place of an error, as `__file__`.
    """
    try:
        call()
    # Somebody else's program may raise anything.
    except Exception as error:  # noqa: BLE001
        say(f'{what} failed and is left out from now on: {_described(error, __file__, *callers)}')
        return False
    return True


def _described(error: Exception, *callers: str) -> str:
    """An error in one line, with the first place that led to it in another file."""
    words = ' '.join(str(error).split())
    if isinstance(error, UserError):
        return words
    text = f'{type(error).__name__}: {words}' if words else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in callers]
    return f'{text} ({Path(frames[0].filename).name}:{frames[0].lineno})' if frames else text
