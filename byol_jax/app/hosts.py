"""One run of several processes: joining them, printing once, waiting for each other, leaving."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from byol_jax.errors import UserError

# Launchers from which jax.distributed gets address, count and index by itself, each with the
# environment variable that holds the number of processes.
_LAUNCHERS = {'SLURM': 'SLURM_STEP_NUM_TASKS', 'Open MPI': 'OMPI_COMM_WORLD_SIZE'}
# How long process 0 waits for the others to end after an error that all share.
_LEAVING_SECONDS = 10


def join_hosts(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the processes of a run; does nothing for a run of one process.

    Must be called before anything else uses JAX's devices.

    Args:
      coordinator: 'host:port' of process 0, reachable from all processes.
      count: number of processes.
      index: number of this process, from 0.

    Raises:
      UserError: only some of the three are given, or the processes cannot connect.
    """
    given = [value for value in (coordinator, count, index) if value is not None]
    if given and len(given) < 3:
        raise UserError(
            'A run of several processes needs all of --coordinator=HOST:PORT, --process_count=N '
            'and --process_index=I (0 to N - 1); under SLURM or Open MPI it needs none of them.'
        )
    launched = any(int(os.environ.get(name, '1')) > 1 for name in _LAUNCHERS.values())
    if not given and not launched:
        return
    sys.excepthook = _abort
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f'The processes of this run could not join at {coordinator}: {error}'
        ) from error


def _abort(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Shows an unexpected error and ends the process at once.

    A normal exit would hang in JAX's barrier, which waits for the other processes.
    """
    sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


def is_main() -> bool:
    """Whether this is process 0, the only one that prints and writes."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line in process 0 only."""
    if is_main():
        print(text, flush=True)


def wait_for_all(what: str) -> None:
    """Blocks until every process has called this with the same `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gather_texts(text: str) -> list[str]:
    """Collects a text from every process. All processes must call it at the same point.

    Args:
      text: the text of this process; ASCII, not empty.

    Returns:
      The texts, ordered by process index.
    """
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode('ascii'), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array(len(data), np.int32)))
    # Padded to a power of two, because JAX compiles the exchange anew for every length.
    padded = np.zeros(1 << (int(lengths.max()) - 1).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:n]).decode('ascii') for row, n in zip(rows, lengths, strict=True)]


def told_by_main(text: str) -> str:
    """Returns the text of process 0 in every process. All must call it at the same point.

    Args:
      text: the text of this process; only that of process 0 is used.
    """
    return str(json.loads(gather_texts(json.dumps(text))[0]))


def check_same_everywhere(text: str, what: str) -> None:
    """Checks that a text is the same in all processes. All must call it at the same point.

    Args:
      text: the text of this process; ASCII, not empty.
      what: what the text describes, for the message; begins the sentence.

    Raises:
      UserError: the texts differ; raised in every process.
    """
    texts = gather_texts(text)
    others = [i for i, other in enumerate(texts) if other != texts[0]]
    if others:
        raise UserError(
            f'{what} is not the same everywhere: {texts[0]} for process 0, but '
            f'{texts[others[0]]} for process {others[0]} (of {len(texts)}). All must see the same '
            'files.'
        )


def stop_together(step: int, asked: bool) -> bool:
    """Whether all processes stop after this step because one of them got a signal.

    Args:
      step: number of steps made. Every process must call this after each step.
      asked: whether this process got a signal. Used in a run of one process; in a run of several
        processes JAX catches SIGTERM and reports it to all of them at the same step.
    """
    if jax.process_count() == 1:
        return asked
    return multihost_utils.reached_preemption_sync_point(step)


def part() -> None:
    """Disconnects the processes once all have made the last step.

    After that only process 0 works (evaluation, report), which may take longer than the time JAX
    lets the other processes wait for it.
    """
    if jax.process_count() > 1:
        wait_for_all('last step')
        jax.distributed.shutdown()


def leave(status: Any) -> None:
    """Exits this process. After an error in a run of several processes it does not wait for them.

    A failed process would otherwise hang in JAX's barrier at exit. The other processes notice that
    it is gone.

    Args:
      status: an exit status, or a message for stderr, as for `sys.exit`.
    """
    if jax.process_count() > 1 and status:
        if isinstance(status, str):
            print(status, file=sys.stderr, flush=True)
        sys.stdout.flush()
        _let_others_leave()
        os._exit(status if isinstance(status, int) else 1)
    sys.exit(status)


def _let_others_leave() -> None:
    """Reports that this process leaves; process 0 waits until all others have reported it.

    The processes communicate through a service in process 0, and JAX aborts processes that are
    still running when the service ends.
    """
    client = distributed.global_state.client
    if client is None:
        return
    end = time.monotonic() + _LEAVING_SECONDS
    try:
        if not is_main():
            client.key_value_set(f'byol_jax/left/{jax.process_index()}', 'left')
            return
        for index in range(1, jax.process_count()):
            left_ms = max(1, int(1000 * (end - time.monotonic())))
            client.blocking_key_value_get(f'byol_jax/left/{index}', left_ms)
    except jax.errors.JaxRuntimeError:
        # One of them is gone already, or did not report in time.
        return
