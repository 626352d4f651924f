"""Standard output and error that end no run: closed, full, or of another encoding."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class LastingStream:
    """A text stream that loses what cannot be written, and says so once, on another stream."""

    def __init__(self, stream: TextIO, name: str):
        """Writes nothing yet.

        Args:
          stream: where it writes.
          name: of the stream, for people.
        """
        self._stream, self._name = stream, name
        self._said = False
        self.other: LastingStream | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes text; characters that the encoding lacks are escaped, as '\\xe9'."""

        def write() -> int:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or 'ascii'
                escaped = text.encode(encoding, 'backslashreplace').decode(encoding)
                return self._stream.write(escaped)

        self._tried(write)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, call: Callable[[], Any]) -> None:
        try:
            call()
        # ValueError: it is closed. The error may pass (a full disk), so the next call tries again.
        except (OSError, ValueError) as error:
            said, self._said = self._said, True
            if self.other is not None and not said:
                why = getattr(error, 'strerror', None) or error
                self.other.write(f'{self._name} cannot be written, it goes on without it: {why}\n')
                self.other.flush()


@contextmanager
def lasting_output() -> Iterator[None]:
    """Makes `sys.stdout` and `sys.stderr` streams whose failures end nothing, until it ends."""
    before = sys.stdout, sys.stderr
    keep_output()
    ours = sys.stdout, sys.stderr
    try:
        yield
    finally:
        # Somebody else may have put a stream of their own there meanwhile.
        if (sys.stdout, sys.stderr) == ours:
            sys.stdout, sys.stderr = before


def keep_output() -> None:
    """Does the same for good.

    The interpreter flushes both streams when it ends, with another status if that fails.
    """
    if isinstance(sys.stdout, LastingStream):
        return
    out, err = _lasting(sys.stdout, 'standard output'), _lasting(sys.stderr, 'standard error')
    out.other, err.other = err, out
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)


def open_standard_files() -> None:
    """Puts the null device in the place of a standard file that the process began without.

    The next file that is opened would get its number, and what a library prints would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _lasting(stream: Any, name: str) -> LastingStream:
    # Python has None for a stream that was closed when it began.
    return LastingStream(open(os.devnull, 'w') if stream is None else stream, name)


def write_now(text: str) -> None:
    """Writes to standard output from a signal's handler, which may interrupt a `print`."""
    with suppress(OSError):
        os.write(1, text.encode())
