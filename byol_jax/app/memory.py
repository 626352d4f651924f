"""Memory: batches that must fit, what a device lacks, and the growth of long runs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from byol_jax.errors import UserError
from byol_jax.settings import Settings

# Files with the memory limit of a container, for cgroup versions 2 and 1. A very large number means
# no limit.
_LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')

# glibc's malloc.h, and bytes of a large block: more than a decoded photograph of 500 x 375 pixels.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGE = -1, -3, 2**20


def host_memory() -> int:
    """Bytes of memory that this process can use: those of the host, or the container's limit."""
    found = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    for path in map(Path, _LIMITS):
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):
            # The file belongs to the other version of cgroups, or says 'max'.
            continue
    return min(found)


def check_batches(
    config: Settings, processes: int = 1, *, held: int = 1, memory: int | None = None
) -> None:
    """Checks that batches of pictures fit into this host's memory, before anything is built.

    Args:
      config: the run's settings.
      processes: number of processes that share a training batch.
      held: number of training batches in memory at the same time.
      memory: memory of this host, bytes; None for `host_memory()`.

    Raises:
      UserError: they do not fit; the message names the key.
    """
    memory = host_memory() if memory is None else memory
    pixels = 3 * config.views.image_size**2
    views = len(config.views.named)
    for key, batch, size in (
        ('batch_size', config.batch_size, config.batch_size // processes * views * held),
        ('evaluate.batch_size', config.evaluate.batch_size, config.evaluate.batch_size),
    ):
        if size * pixels > memory:
            raise UserError(
                f'{key}={batch} at views.image_size={config.views.image_size} takes '
                f'{size * pixels / 2**30:,.0f} GiB for its pictures alone, and this host has '
                f'{memory / 2**30:,.0f} GiB of memory. Take a smaller {key}.'
            )


@contextmanager
def training_memory(config: Settings) -> Iterator[None]:
    """Turns an out-of-memory error of a device into a UserError that names the keys to change."""
    with _named(
        f'a step of batch_size={config.batch_size} pairs at views.image_size='
        f'{config.views.image_size} in accumulate_steps={config.accumulate_steps} parts',
        'Double accumulate_steps until it fits (the batch stays as it is), or take '
        'precision=bfloat16, smaller views or a smaller batch, in a new workdir.',
    ):
        yield


@contextmanager
def encoding_memory(config: Settings) -> Iterator[None]:
    """Like `training_memory`, for encoding pictures."""
    with _named(
        f'evaluate.batch_size={config.evaluate.batch_size} pictures at a time',
        'Halve evaluate.batch_size until it fits: the features stay as they are.',
    ):
        yield


@contextmanager
def _named(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        said = str(error).splitlines()[0]
        raise UserError(f'The device has too little memory for {what}: {said} {remedy}') from error


def keep_memory_steady() -> None:
    """Has glibc return every large block of memory to the system as soon as it is freed.

    Left alone, glibc serves blocks of a size from its arenas, of which each thread has its own,
    once a block of that size has been freed. Pictures and checkpoints then leave holes there that
    grow with every step (benchmarks/RESULTS.md, "Memory of a long run"). Does nothing under other
    C libraries, or where the environment sets MALLOC_MMAP_THRESHOLD_.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None and 'MALLOC_MMAP_THRESHOLD_' not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _LARGE)
