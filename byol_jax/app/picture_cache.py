"""Builds the cache of decoded pictures before training, and says how far it is."""

from __future__ import annotations

import os
import time
from typing import Any

from byol_jax.app.hosts import say
from byol_jax.app.progress import cache_line
from byol_jax.sources.data import Data

_SECONDS = 5.0


def fill_cache(data: Data, config: Any) -> None:
    """Decodes what is not in data.cache yet; does nothing without one.

    Every process of a run does so, each for its own disk; on a common one they take turns.

    Raises:
      UserError: there is no room for it, or it cannot be written.
    """
    if data.cache is None:
        return
    workers = config.data.workers or os.cpu_count() or 1
    started = said = time.monotonic()
    filled, waited = None, False
    for filled in data.cache.fill(tuple(config.data.pair_keys), workers):
        now = time.monotonic()
        if filled.waiting:
            if not waited:
                say(f'waiting for another process that writes to {data.cache.folder} ...')
            waited, started = True, now
        elif filled.done == filled.total or now - said >= _SECONDS:
            if filled.total:
                say(cache_line(filled, now - started))
            said = now
    bad = f'; {filled.bad:,} cannot be read and are not in it' if filled and filled.bad else ''
    say(f'decoded pictures are read from {data.cache.folder}{bad}')
