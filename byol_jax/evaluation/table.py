"""The before/after table of a run: nearest neighbours of held-out or test pictures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from byol_jax.evaluation.features import Encode
from byol_jax.evaluation.monitors import unit_std
from byol_jax.evaluation.neighbours import Neighbours, nearest, vote_accuracy
from byol_jax.evaluation.subject import at_most, compared, encode_parts, queries_are
from byol_jax.settings import Evaluate
from byol_jax.sources.bad_files import BadFile
from byol_jax.sources.base import Progress, Source, Subset, no_progress
from byol_jax.sources.data import Data

# Query pictures shown when nothing is held out, and pictures searched when nothing is measured.
_SHOWN, _SHOWN_GALLERY = 8, 2000
# Pictures whose features are kept: a decomposition of as many of 2,048 values takes seconds.
_SAMPLE = 2000


class Evaluation(NamedTuple):
    """What was found.

    Attributes:
      accuracy: share of the queries classified rightly, or None without labels, held-out part or
        test set.
      feature_std: of the unit-length features of the gallery, mean over channels.
      neighbours: of each query.
      gallery: the pictures searched.
      queries: the pictures whose neighbours were sought.
      queries_are: what the queries are called: 'held-out' or 'test' pictures.
      features: float32 [M, D], of the gallery's pictures `sampled(len(gallery))`.
      bad: files that could not be read; their examples are in neither.
    """

    accuracy: float | None
    feature_std: float
    neighbours: Neighbours
    gallery: Source
    queries: Source
    queries_are: str
    features: np.ndarray
    bad: tuple[BadFile, ...]


def evaluate(
    encode: Encode,
    data: Data,
    options: Evaluate,
    *,
    key: str = 'image',
    image_size: int = 224,
    progress: Progress = no_progress,
) -> Evaluation:
    """Weighted nearest-neighbour classification of the held-out pictures or the test set.

    The first of `options.knn_k` neighbours vote.

    Args:
      encode: uint8 [B, S, S, 3] -> float32 [B, D].
      data: of which `compared` gives the gallery and the queries. Where there are no queries, a few
        training pictures take their place, and there is no accuracy.
      options: the section `evaluate` of the settings.
      key: which of an example's pictures.
      image_size: S, pixels.
      progress: called with (what, done, total) as pictures are encoded.

    Raises:
      UserError: no picture of the gallery, or none of the queries, can be read.
    """
    gallery, queries = compared(data)
    measured = len(queries) > 0
    if not measured:
        spaced = np.unique(np.linspace(0, len(gallery) - 1, _SHOWN).astype(int))
        queries = Subset(gallery, spaced)
        gallery = Subset(gallery, np.setdiff1d(np.arange(len(gallery)), spaced))
        if not len(gallery):
            gallery = queries
    if not (measured and gallery.label_names):
        # Nothing is measured, a few neighbours are shown: not worth a pass over all pictures.
        gallery = at_most(gallery, min(options.max_gallery, _SHOWN_GALLERY))
    parts = encode_parts(
        encode, gallery, queries, options, key=key, image_size=image_size, progress=progress
    )
    gallery, queries = parts.gallery, parts.queries
    neighbours = nearest(parts.searched, parts.asked, options.knn_k[0])
    accuracy = None
    if measured and gallery.labels is not None and queries.labels is not None:
        accuracy = vote_accuracy(
            neighbours, gallery.labels, queries.labels, options.knn_temperature
        )
    return Evaluation(
        accuracy,
        unit_std(parts.searched),
        neighbours,
        gallery,
        queries,
        queries_are(data),
        parts.searched[sampled(len(gallery))],
        tuple(parts.bad),
    )


def sampled(count: int) -> np.ndarray:
    """Which of `count` pictures are looked at one by one: at most 2,000, evenly spaced; int [M]."""
    return np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)


def describe(evaluation: Evaluation, options: Evaluate) -> str:
    """One sentence on how the accuracy was measured.

    Args:
      evaluation: what was found.
      options: the section `evaluate` of the settings it was found with.
    """
    left_out = ''
    if evaluation.bad:
        left_out = f' Left out: {len(evaluation.bad):,} file(s) that cannot be read.'
    if evaluation.accuracy is None:
        return (
            'No accuracy: it needs labels (class folders, TFDS labels, or tiles) and held-out '
            'pictures (data.held_out_fraction must hold out at least one of a label) or a test set '
            'with the same labels (evaluate.data_path, evaluate.data_split).' + left_out
        )
    k, voters = options.knn_k[0], evaluation.neighbours.indices.shape[1]
    voting = f'{k} nearest among' if voters == k else f'neighbours, all (fewer than {k}) of'
    return (
        f'Each of {len(evaluation.queries):,} {evaluation.queries_are} pictures is classified by a '
        f'vote of its {voting} {len(evaluation.gallery):,} training pictures (cosine of '
        f'the features, temperature {options.knn_temperature:g}; '
        f'{len(evaluation.gallery.label_names)} labels), batch normalisation frozen.'
        + (' So few pictures give a rough figure only.' if len(evaluation.queries) < 100 else '')
        + left_out
    )
