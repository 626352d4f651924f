"""The exceptions a user is meant to read, and the nearest-name helper their messages use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user gave cannot be used.

    The message says what was given, what exists and what to do. `main.py` prints it without a
    traceback and exits with status 1.
    """


class BadPicture(UserError):
    """One picture cannot be read, or must not be read; the others may be sound.

    Attributes:
      file: what holds the picture, usually a file, as `Source.file` names it.
      reason: what is wrong: a phrase that follows the file's name, without a full stop.
    """

    def __init__(self, file: str, reason: str, advice: str = ''):
        """Composes the message.

        Args:
          file: what holds the picture, as `Source.file` names it.
          reason: a phrase that follows the file's name, without a full stop.
          advice: a sentence that says what to do, or ''.
        """
        super().__init__(f'{file} {reason}.' + (f' {advice}' if advice else ''))
        self.file = file
        self.reason = reason


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` with the known name nearest to `name`, or '' if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ''
