"""The before/after table of a run: nearest-neighbour accuracy on held-out or test pictures."""

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

# Number of queries to show if nothing is held out, and of pictures to search if no accuracy is
# measured.
_SHOWN, _SHOWN_GALLERY = 8, 2000
# Number of pictures whose features are kept for the report. Decomposing as many with 2,048 channels
# takes seconds.
_SAMPLE = 2000


class Evaluation(NamedTuple):
    """The result of `evaluate`.

    Attributes:
      accuracy: share of the queries that are classified correctly, in [0, 1]; None without labels,
        or without a held-out part and a test set.
      feature_std: std of the gallery's unit-length features, mean over channels.
      neighbours: the nearest gallery pictures of each query.
      gallery: the pictures that were searched.
      queries: the pictures whose neighbours were searched.
      queries_are: kind of the queries: 'held-out' or 'test'.
      features: float32 [M, D], features of the gallery's pictures `sampled(len(gallery))`.
      bad: files that could not be read; their examples are in neither set.
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
    antialias: bool = True,
    progress: Progress = no_progress,
) -> Evaluation:
    """Classifies the held-out pictures or the test set by a vote of their nearest neighbours.

    The number of neighbours is the first value of `options.knn_k`.

    Args:
      encode: maps uint8 [B, S, S, 3] to float32 [B, D].
      data: the data; `compared` says what is the gallery and what are the queries. If there are no
        queries, a few training pictures are used as queries and no accuracy is measured.
      options: the section `evaluate` of the settings.
      key: key of the picture to take of each example.
      image_size: S, pixels.
      antialias: see `encode_source`.
      progress: called with (task, done, total) as pictures are encoded.

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
        # Only a few neighbours are shown, which is not worth encoding all pictures.
        gallery = at_most(gallery, min(options.max_gallery, _SHOWN_GALLERY))
    parts = encode_parts(
        encode,
        gallery,
        queries,
        options,
        key=key,
        image_size=image_size,
        antialias=antialias,
        progress=progress,
    )
    gallery, queries = parts.gallery, parts.queries
    neighbours = nearest(parts.gallery_features, parts.query_features, options.knn_k[0])
    accuracy = None
    if measured and gallery.labels is not None and queries.labels is not None:
        accuracy = vote_accuracy(
            neighbours, gallery.labels, queries.labels, options.knn_temperature
        )
    return Evaluation(
        accuracy,
        unit_std(parts.gallery_features),
        neighbours,
        gallery,
        queries,
        queries_are(data),
        parts.gallery_features[sampled(len(gallery))],
        tuple(parts.bad),
    )


def sampled(count: int) -> np.ndarray:
    """Indices of the pictures that the report uses: at most 2,000 of `count`, evenly spaced."""
    return np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)


def describe(evaluation: Evaluation, options: Evaluate) -> str:
    """A sentence on how the accuracy was measured, or on why it was not.

    Args:
      evaluation: the result of `evaluate`.
      options: the section `evaluate` of the settings that it was measured with.
    """
    left_out = ''
    if evaluation.bad:
        left_out = f' {len(evaluation.bad):,} file(s) could not be read and are left out.'
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
        + (' So few pictures give only a rough figure.' if len(evaluation.queries) < 100 else '')
        + left_out
    )
