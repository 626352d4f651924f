"""Fills the cache of decoded pictures before training."""

from __future__ import annotations

from byol_jax.app.hosts import say
from byol_jax.app.progress_bars import progress_shown
from byol_jax.cores import usable_cores
from byol_jax.settings import Settings
from byol_jax.sources.data import Data


def fill_cache(data: Data, config: Settings) -> None:
    """Decodes the pictures that are not in data.cache yet, and shows progress.

    Every process of a run does this, because each may have its own disk; on a shared disk they take
    turns.

    Args:
      data: data of the run; without a cache nothing is done.
      config: the run's settings; data.workers and data.pair_keys are used.

    Raises:
      UserError: the disk has no room for the cache, or it cannot be written.
    """
    if data.cache is None:
        return
    workers = config.data.workers or usable_cores()
    filled, waited = None, False
    with progress_shown() as progress:
        for filled in data.cache.fill(tuple(config.data.pair_keys), workers):
            if not filled.waiting:
                progress('pictures decoded for data.cache', filled.done, filled.total)
            elif not waited:
                say(f'waiting for another process that writes to {data.cache.folder} ...')
                waited = True
    new = bad = ''
    if filled and filled.total:
        new = f'; new: {filled.done - filled.bad:,} ({filled.written / 1e6:,.0f} MB)'
    if filled and filled.bad:
        bad = f'; {filled.bad:,} cannot be read and are not in it'
    say(f'decoded pictures are read from {data.cache.folder}{new}{bad}')
