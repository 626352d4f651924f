"""The exceptions a user is meant to read, and helpers for their messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

# Candidates for characters that are not printable; nearly all text has none.
_NOT_ASCII = re.compile('[^ -~]')
# Characters of a word that a message shows.
_LONGEST_WORD = 200


class UserError(Exception):
    """Something that the user gave cannot be used.

    The message says what was given, what exists and what to do. `main.py` prints it without a
    traceback and exits with status 1. As text it holds no control characters but line feeds.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep='\n')


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


def printable(text: str, keep: str = '') -> str:
    """Escapes every character that a terminal or a page might obey instead of showing.

    Text that may hold a file's words goes through this on its way out: control characters, marks
    that turn the direction of writing, and what is no valid UTF-8 become '\\x1b' and the like.

    Args:
      text: any text; a file's name may hold lone surrogates.
      keep: characters that are left as they are, such as line feeds.
    """

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character.isprintable() or character in keep:
            return character
        return character.encode('unicode_escape').decode()

    return _NOT_ASCII.sub(escaped, text)


def shown(word: Any) -> str:
    """A word of a file for a message: `printable`, on one line and not longer than fits there."""
    text = word if isinstance(word, str) else repr(word)
    cut = text if len(text) <= _LONGEST_WORD else f'{text[:_LONGEST_WORD]}...'
    return printable(cut)
