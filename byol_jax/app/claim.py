"""A workdir made a run's own while it trains, by all that identifies the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

from byol_jax.app.build import First, Run
from byol_jax.app.computed import computed
from byol_jax.app.fingerprint import Excuses, fingerprint
from byol_jax.app.hosts import check_same_everywhere, check_shared, is_main, wait_for_all
from byol_jax.app.start import keep_first
from byol_jax.app.workdir import About, Start, claim_workdir, release_workdir


@contextmanager
def claimed(run: Run, first: First | None, command: str) -> Iterator[None]:
    """Locks the workdir for this run until it ends, and checks that all processes see one data set.

    Args:
      run: with its workdir.
      first: the weights it starts from, from `first_weights`.
      command: the command line.

    Raises:
      UserError: the workdir belongs to another run, or the processes see different data.
    """
    keys = run.config.data.pair_keys
    data = fingerprint(run.data, keys)
    # Texts by their digests: the message shows what differs.
    short = {
        key: hashlib.sha256(value.encode()).hexdigest()[:16] if isinstance(value, str) else value
        for key, value in data.items()
    }
    check_same_everywhere(json.dumps(short), 'The data')
    if is_main():
        excuses = Excuses(run.data, keys, run.workdir / 'bad_files.txt')
        about = _about(run, first)
        claim_workdir(run.workdir, run.config, data, command, about=about, excused=excuses)
    try:
        if is_main():
            keep_first(first, run.workdir, run.config.modules)
        wait_for_all('workdir claimed')
        check_shared(run.workdir / 'config.json')
        yield
    finally:
        release_workdir(run.workdir)


def _about(run: Run, first: First | None) -> About:
    start = None
    if first is not None and first.encoder is not None:
        start = Start(first.source, first.encoder.weights_sha256)
    numbers = computed(run.config, run.method, run.views)
    return About(run.method.encoder.hidden_layer, numbers, start)
