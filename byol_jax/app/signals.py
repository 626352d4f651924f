"""SIGTERM and Ctrl-C: the run saves a checkpoint before it ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


class Interrupted(Exception):
    """A signal ended the run, after a checkpoint.

    Attributes:
      signal_number: number of the signal.
    """

    def __init__(self, signal_number: int):
        super().__init__(f'{signal.Signals(signal_number).name}, and the state is saved.')
        self.signal_number = signal_number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects the first SIGTERM or SIGINT in the list it yields; a second one kills as usual.

    With several processes the list stays empty, because JAX catches SIGTERM itself
    (`hosts.stop_together`).
    """
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    old = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        received.append(number)
        restore()
        # Not `print`, which the signal may have interrupted.
        os.write(1, f'\n{signal.Signals(number).name}: saving after this step ...\n'.encode())

    for number in numbers:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
