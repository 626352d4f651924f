"""The weights that a run started from (encoder.init_from): kept with it, so that it needs no other.

`workdir/start` is an exported encoder: the one that was loaded when the run began.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from byol_jax.app.build import First, find_encoder
from byol_jax.app.hosts import say
from byol_jax.app.workdir import Start, has_checkpoint, read_begun
from byol_jax.errors import UserError
from byol_jax.interop.encoder import Encoder
from byol_jax.interop.export import load_encoder, save_encoder


def first_weights(source: str, workdir: Path, allow: Collection[str] = ()) -> First | None:
    """The encoder that a run starts, or has started, from.

    Args:
      source: encoder.init_from.
      workdir: of the run, which may have begun.
      allow: as in `load_encoder`.

    Returns:
      None for random weights. Without an encoder if the run has a state of its own, and what it
      started from is nowhere any more.

    Raises:
      UserError: the encoder cannot be loaded and is needed; or `source` names other weights than
        those the run began with.
    """
    if not source:
        return None
    begun = read_begun(workdir)
    noted = None if begun is None or begun.about is None else begun.about.start
    kept = None if noted is None else _kept(workdir, noted, allow)
    try:
        there = find_encoder(source, allow)
    except UserError as error:
        if kept is None and not has_checkpoint(workdir):
            raise
        also = 'and starts from its own copy' if kept else 'but cannot compare with its start'
        say(f'{error} The run goes on without it, {also}.')
        return First(kept, source if noted is None else noted.source)
    if noted is None or there.weights_sha256 == noted.weights_sha256:
        return First(there, source)
    now = f'{source} holds weights {there.weights_sha256[:12]} now'
    if source != noted.source:
        raise UserError(
            f'encoder.init_from: this run started from {noted.source}, weights '
            f'{noted.weights_sha256[:12]}, and {now}. Give another --workdir, or the same weights.'
        )
    if kept is None and not has_checkpoint(workdir):
        raise UserError(
            f'encoder.init_from: this run began with weights {noted.weights_sha256[:12]}, and '
            f'{now}. It has saved no state yet: give another --workdir.'
        )
    say(
        f'encoder.init_from={now}; the run goes on as it began, from weights '
        f'{noted.weights_sha256[:12]}'
    )
    return First(kept, source)


def keep_first(first: First | None, workdir: Path, allow: Collection[str] = ()) -> None:
    """Keeps the encoder that a run starts from, if the run does not have it yet.

    A copy that cannot be written is said: the run then needs encoder.init_from until it has a
    state of its own.

    Args:
      first: from `first_weights`.
      workdir: of the run.
      allow: as in `load_encoder`.
    """
    if first is None or first.encoder is None:
        return
    if _kept(workdir, Start(first.source, first.encoder.weights_sha256), allow) is None:
        try:
            save_encoder(first.encoder, workdir / 'start')
        except OSError as error:
            say(f'{workdir / "start"} cannot be written: {error.strerror or error}')


def _kept(workdir: Path, noted: Start, allow: Collection[str]) -> Encoder | None:
    """The run's own copy of what it started from, if it is there and sound."""
    try:
        encoder = load_encoder(workdir / 'start', allow)
    except UserError:
        return None
    return encoder if encoder.weights_sha256 == noted.weights_sha256 else None
