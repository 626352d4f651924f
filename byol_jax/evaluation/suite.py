"""Everything that --mode=evaluate measures of an encoder, from features that are computed once."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from byol_jax.errors import UserError
from byol_jax.evaluation.features import Encode
from byol_jax.evaluation.measures import MEASURES
from byol_jax.evaluation.protocol import compared, encode_parts
from byol_jax.evaluation.subject import Say, Subject, Unmeasured
from byol_jax.sources.bad_files import BadFile
from byol_jax.sources.base import Source
from byol_jax.sources.data import Data


class Measured(NamedTuple):
    """All that was measured.

    Attributes:
      metrics, unmeasured: of all protocols (`Found`).
      protocols: what is behind the metrics, by protocol; `seconds` is the time each took.
      subject: the pictures.
      seconds: the features of all pictures took.
      bad: files that could not be read.
    """

    metrics: dict[str, float]
    unmeasured: dict[str, str]
    protocols: dict[str, dict[str, Any]]
    subject: Subject
    seconds: float
    bad: list[BadFile]


def measure_encoder(encode: Encode, data: Data, config: Any, say: Say) -> Measured:
    """Measures an encoder by all of `evaluate.protocols` that the data allow.

    Args:
      encode: uint8 [B, S, S, 3] -> float32 [B, D].
      data: see `protocol.compared`.
      config: its seed, views, data.pair_keys and `evaluate` are used.
      say: takes a line when a part is done.

    Raises:
      UserError: no picture can be read, the features are not finite, or the data allow none of the
        protocols.
    """
    start = time.perf_counter()
    parts = encode_parts(encode, *compared(data), config)
    for source, features in ((parts.gallery, parts.searched), (parts.queries, parts.asked)):
        _check_finite(source, features)
    seconds = time.perf_counter() - start
    subject = Subject(encode, data, config, parts, say)
    asked = f' and {len(parts.queries):,} {subject.queries_are}' if len(parts.queries) else ''
    say(
        f'features of {len(parts.gallery):,} training{asked} pictures, '
        f'{parts.searched.shape[1]:,} values each: {seconds:.1f} s'
    )
    metrics: dict[str, float] = {}
    unmeasured: dict[str, str] = {}
    protocols: dict[str, dict[str, Any]] = {}
    bad = list(parts.bad)
    for name, (measure, of) in MEASURES.items():
        if name not in config.evaluate.protocols:
            continue
        start = time.perf_counter()
        try:
            found = measure(subject)
        except Unmeasured as why:
            unmeasured |= dict.fromkeys(of(config), str(why))
            continue
        took = time.perf_counter() - start
        details = dict(found.details)
        bad += details.pop('bad', [])
        metrics |= found.metrics
        unmeasured |= found.unmeasured
        protocols[name] = {**details, 'seconds': round(took, 3)}
        say(f'{name}: {took:.1f} s')
    if not metrics:
        some = '; '.join(f'{name}: {why}' for name, why in unmeasured.items())
        raise UserError(f'Nothing of evaluate.protocols can be measured. {some}.')
    return Measured(metrics, unmeasured, protocols, subject, seconds, list(dict.fromkeys(bad)))


def _check_finite(source: Source, features: np.ndarray) -> None:
    wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(wrong):
        raise UserError(
            f'The features of {len(wrong):,} of {len(source):,} pictures hold NaN or infinity, the '
            f'first of them {source.name(int(wrong[0]))}: there is nothing to measure. Was the '
            'encoder exported from a run that had diverged?'
        )
