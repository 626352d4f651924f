"""Progress of slow work on the data: a bar if stderr is a terminal, otherwise a line at times."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from byol_jax.app.hosts import is_main
from byol_jax.app.progress import duration
from byol_jax.errors import printable

# Shorter work shows no bar.
_BAR_AFTER_SECONDS = 0.5
# Time between two lines.
_LINE_SECONDS = 10.0


class ProgressBars:
    """Shows the progress of one task at a time; a `sources.base.Progress`."""

    def __init__(self, *, quiet: bool = False):
        """Shows nothing yet.

        Args:
          quiet: if True, nothing is ever shown.
        """
        self._quiet = quiet
        self._bars = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._what = ''
        self._began = self._told = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows the progress of a task.

        Args:
          what: name of the task, such as 'sizes read'. Another name begins a new bar.
          done: items done.
          total: items in all; 0 if not known.
        """
        if self._quiet:
            return
        now = time.monotonic()
        if what != self._what:
            self.close()
            self._what, self._began, self._told = what, now, now
        if self._bars:
            self._show_bar(done, total)
        elif now - self._told >= _LINE_SECONDS:
            self._told = now
            print(self._line(done, total, now - self._began), file=sys.stderr, flush=True)

    def _show_bar(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(
                desc=self._what,
                total=total or None,
                unit='',
                delay=_BAR_AFTER_SECONDS,
                leave=False,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        self._bar.update(done - self._bar.n)

    def _line(self, done: int, total: int, seconds: float) -> str:
        if not total:
            return f'{self._what}: {done:,}'
        left = f', {duration(seconds / done * (total - done))} left' if done else ''
        return f'{self._what}: {done:,} of {total:,}{left}'

    def close(self) -> None:
        """Removes the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._what = None, ''


@contextlib.contextmanager
def progress_shown() -> Iterator[ProgressBars]:
    """Yields the progress display; messages that the package logs meanwhile are shown too."""
    with _log_on_stderr(), contextlib.closing(ProgressBars(quiet=not is_main())) as progress:
        yield progress


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # Not `print`, which would break a bar.
        tqdm.write(printable(record.getMessage(), keep='\n'), file=sys.stderr)


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Shows the package's log messages as plain lines on stderr."""
    logger, handler = logging.getLogger('byol_jax'), _Lines()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
