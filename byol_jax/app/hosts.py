"""One run of several processes: joining them, printing once, waiting for each other, leaving."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from byol_jax.app.launchers import count_gpus, find_place, find_share, own_devices
from byol_jax.app.peers import Peers
from byol_jax.errors import UserError, printable

# The connections to the other processes; None in a run of one process, and in one that a user's
# own program joined by `jax.distributed`.
_peers: Peers | None = None

# A collective may fail a little sooner than its reason is known.
_NEWS_SECONDS = 3

# Network file systems show a new file to another host only after a while.
_SHARED_SECONDS = 60


def join_hosts(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the processes of a run; does nothing for a run of one process.

    What is not given comes from SLURM or Open MPI, if one of them started this process. Must be
    called before anything else uses JAX's devices.

    Args:
      coordinator: 'host:port' of process 0, reachable from all processes.
      count: number of processes.
      index: number of this process, from 0.

    Raises:
      UserError: the place of this process in the run cannot be told, the processes do not all come,
        or there are more processes than GPUs on this host.
    """
    global _peers  # noqa: PLW0603
    place = find_place(coordinator, count, index)
    if place is None or place.count == 1:
        return
    # None: all devices, or those of JAX_LOCAL_DEVICE_IDS.
    devices = own_devices(find_share(), *count_gpus())
    _peers = Peers(place.coordinator, place.count, place.index)
    _peers.join()
    sys.excepthook = _abort
    if any(name.lower() in ('http_proxy', 'https_proxy', 'grpc_proxy') for name in os.environ):
        # JAX would ask the proxy for a port of this machine.
        os.environ.setdefault('no_grpc_proxy', '127.0.0.1')
    try:
        jax.distributed.initialize(
            _peers.service(),
            place.count,
            place.index,
            devices,
            # It would give each process of SLURM and Open MPI one device.
            cluster_detection_method='deactivate',
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f'JAX could not join the processes of this run, which all came: {error}'
        ) from error
    # Called before JAX's own, which waits for all processes.
    atexit.register(_leave_at_exit)


def refuse_several(mode: str) -> None:
    """Refuses to do in several processes what one does.

    Args:
      mode: of the command line.

    Raises:
      UserError: SLURM or Open MPI started several.
    """
    place = find_place(None, None, None)
    if place is not None:
        raise UserError(
            f'--mode={mode} runs in one process, and {place.count} were started: ask for one '
            '(srun --ntasks=1, mpirun -n 1). It uses all devices of its host.'
        )


def _abort(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Shows an unexpected error and ends the process at once.

    A normal exit would hang in JAX's barrier, which waits for the other processes. If another
    process has left, that is why a collective failed here, and only this is said.
    """
    reason = '' if _peers is None else _peers.explain(_NEWS_SECONDS)
    if reason:
        leave(reason)
    sys.__excepthook__(kind, error, trace)
    leave(1)


def _leave_at_exit() -> None:
    """Ends a process that exits before the last step, by whatever way."""
    if _peers is not None and _peers.watching:
        leave(1)


def is_main() -> bool:
    """Whether this is process 0, the only one that prints and writes."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, or several, in process 0 only; see `printable`."""
    if is_main():
        print(printable(text, keep='\n'), flush=True)


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
        agree_to_end()
        raise UserError(
            f'{what} is not the same everywhere: {texts[0]} for process 0, but '
            f'{texts[others[0]]} for process {others[0]} (of {len(texts)}). All must see the same '
            'files.'
        )


def check_same_values(values: Mapping[str, Any]) -> None:
    """Checks that all processes have the same config. All must call it at the same point.

    Args:
      values: the resolved config of this process by dotted key; values that JSON can hold.

    Raises:
      UserError: a value differs; raised in every process, and names the keys.
    """
    first, *others = (json.loads(text) for text in gather_texts(json.dumps(values, default=str)))
    for index, other in enumerate(others, start=1):
        keys = [key for key in first | other if first.get(key) != other.get(key)]
        if keys:
            different = '; '.join(
                f'{key}={first.get(key, "nothing")} for process 0, but '
                f'{other.get(key, "nothing")} for process {index}'
                for key in keys[:3]
            )
            more = f' (and {len(keys) - 3} more)' if len(keys) > 3 else ''
            agree_to_end()
            raise UserError(
                f'The processes of this run have different configs: {different}{more}. Start all '
                'of them with the same command, but for --process_index.'
            )


def check_shared(path: Path) -> None:
    """Checks that all processes see a file of process 0. All must call it at the same point.

    Args:
      path: the file, which exists for process 0.

    Raises:
      UserError: some process does not see it; raised in every process.
    """
    end = time.monotonic() + _SHARED_SECONDS
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    seen = gather_texts('seen' if path.exists() else 'absent')
    if 'absent' in seen:
        agree_to_end()
        raise UserError(
            f'Process {seen.index("absent")} of {len(seen)} does not see {path} of process 0. The '
            'workdir must lie on a file system that all hosts share, under the same path.'
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


def agree_to_end() -> None:
    """Called where all processes end alike, before the error that ends them: each in its time."""
    if _peers is not None:
        _peers.agree_to_end()


def part() -> None:
    """Disconnects the processes once all have made the last step.

    After that only process 0 works (evaluation, report), which may take longer than the time JAX
    lets the other processes wait for it.
    """
    if jax.process_count() > 1:
        wait_for_all('last step')
        jax.distributed.shutdown()
        if _peers is not None:
            _peers.part()


def leave(status: Any) -> None:
    """Exits this process. After an error in a run of several processes it does not wait for them.

    A failed process would otherwise hang in JAX's barrier at exit. The other processes are told
    that it leaves.

    Args:
      status: an exit status, or a message for stderr, as for `sys.exit`.
    """
    if _peers is None or not status:
        sys.exit(status)
    _peers.begin_to_end()
    if isinstance(status, str):
        print(status, file=sys.stderr, flush=True)
    sys.stdout.flush()
    _peers.leave()
    os._exit(status if isinstance(status, int) else 1)
