"""Signals that ask a run to stop: it saves a checkpoint before it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from byol_jax.app.output import write_now

# A scheduler's end, Ctrl-C, a terminal that is gone, and what SLURM's --signal is mostly used with.
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# Schedulers send a signal twice. A person who sends it once more does not want to wait.
_LAST = 3


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. No `except Exception` on the way stops it.

    Attributes:
      signal_number: number of the signal.
    """

    def __init__(self, signal_number: int, *, saved: bool):
        """Says what is kept.

        Args:
          signal_number: number of the signal.
          saved: whether the state was saved because of it.
        """
        kept = 'and the state is saved' if saved else 'and the last checkpoint is kept'
        super().__init__(f'{signal.Signals(signal_number).name}, {kept}.')
        self.signal_number = signal_number


class StopSignals:
    """What has been received; the first signal ends the run, the third of a kind the process.

    Attributes:
      received: numbers of the signals, in their order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals only are noted in here, and the run is to save its state and leave.

        Raises:
          Interrupted: there was a signal; at the end, if nothing else was raised. Not with several
            processes: the others have not heard it, and would wait.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.received and jax.process_count() == 1:
            raise Interrupted(self.received[0], saved=True)

    def note(self, number: int, frame: Any) -> None:
        """Handles a signal.

        Raises:
          Interrupted: it is the first, and not held.
        """
        self.received.append(number)
        name, count = signal.Signals(number).name, self.received.count(number)
        if count >= _LAST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif len(self.received) > 1:
            write_now(f'\n{name}: stopping already; a third {name} ends it at once\n')
        elif not self._held:
            raise Interrupted(number, saved=False)
        else:
            write_now(f'\n{name}: saving after this step ...\n')
            if jax.process_count() > 1:
                # JAX catches this one, and has all processes stop at the same step.
                os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handles the signals that ask a run to stop, until it ends.

    One that is ignored (`nohup`) or has a handler of the user's stays as it is. In a thread, where
    Python allows no handlers, nothing is received. In a run of several processes JAX catches
    SIGTERM itself (`hosts.stop_together`).
    """
    signals, old = StopSignals(), {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.getsignal(number) for number in _STOPPING if _ours(number)}
    for number in old:
        signal.signal(number, signals.note)
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _ours(number: int) -> bool:
    """Whether this package handles a signal."""
    if number == signal.SIGTERM:
        return jax.process_count() == 1
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
