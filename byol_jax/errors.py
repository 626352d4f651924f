"""The exceptions a user is meant to read, and the nearest-name helper their messages use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave cannot be used.

    The message says what was given, what exists and what to do. `main.py` prints it as one block
    without a traceback and exits with status 1.
    """


class BadPicture(UserError):
    """One picture cannot be read, or must not be; the others may be sound.

    Attributes:
      file: the file, or whatever else holds the picture, as `Source.file` names it.
      reason: what is wrong with it: a phrase that follows the name, without a full stop.
    """

    def __init__(self, file: str, reason: str, advice: str = ''):
        """Says what is wrong.

        Args:
          file: as above.
          reason: as above.
          advice: what to do, a sentence for the message.
        """
        super().__init__(f'{file} {reason}.' + (f' {advice}' if advice else ''))
        self.file = file
        self.reason = reason


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the known name nearest to `name`, or '' if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ''
