"""The one protocol under which encoders are compared: held-out pictures against training ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from byol_jax.data.bad_files import BadFile
from byol_jax.data.sources.base import Source, Subset
from byol_jax.data.sources.build import Data
from byol_jax.evaluate.features import Encode, encode_source
from byol_jax.evaluate.knn import Neighbours, classify, nearest
from byol_jax.evaluate.spectrum import unit_std

# Query pictures shown when nothing is held out, and pictures searched when nothing is measured.
_SHOWN, _SHOWN_GALLERY = 8, 2000
# Pictures whose features are kept: a decomposition of as many of 2,048 values takes seconds.
_SAMPLE = 2000


class Evaluation(NamedTuple):
    """What was found.

    Attributes:
      accuracy: share of the queries classified rightly, or None without labels or held-out part.
      feature_std: of the unit-length features of the gallery, mean over channels.
      neighbours: of each query.
      gallery, queries: the pictures compared.
      features: float32 [M, D], of the gallery's pictures `sampled(len(gallery))`.
      bad: files that could not be read; their examples are in neither.
    """

    accuracy: float | None
    feature_std: float
    neighbours: Neighbours
    gallery: Source
    queries: Source
    features: np.ndarray
    bad: tuple[BadFile, ...]


def evaluate(encode: Encode, data: Data, config: Any) -> Evaluation:
    """Weighted nearest-neighbour classification of the held-out pictures.

    Args:
      encode: uint8 [B, S, S, 3] -> float32 [B, D].
      data: the gallery is its training part, the queries its held-out part. Where nothing is held
        out, a few training pictures become queries, and there is no accuracy.
      config: its `evaluate`, `views.image_size` and the first of `data.pair_keys` are used.

    Raises:
      UserError: no picture of the gallery, or none of the queries, can be read.
    """
    options = config.evaluate
    gallery, queries = data.train, data.held_out
    held_out = len(queries) > 0
    if not held_out:
        spaced = np.unique(np.linspace(0, len(gallery) - 1, _SHOWN).astype(int))
        queries = Subset(gallery, spaced)
        gallery = Subset(gallery, np.setdiff1d(np.arange(len(gallery)), spaced))
        if not len(gallery):
            gallery = queries
    most = options.max_gallery
    if not (held_out and gallery.label_names):
        # Nothing is measured, a few neighbours are shown: not worth a pass over all pictures.
        most = min(most, _SHOWN_GALLERY)
    gallery, queries = _at_most(gallery, most), _at_most(queries, options.max_queries)
    searched, asked = (
        encode_source(
            encode,
            source,
            config.data.pair_keys[0],
            image_size=config.views.image_size,
            crop_fraction=options.crop_fraction,
            batch_size=options.batch_size,
        )
        for source in (gallery, queries)
    )
    # Labels, names and thumbnails follow the features.
    gallery, queries = _kept(gallery, searched.indices), _kept(queries, asked.indices)
    neighbours = nearest(searched.features, asked.features, options.knn_k)
    accuracy = None
    if held_out and gallery.labels is not None:
        predicted = classify(
            neighbours, gallery.labels, options.knn_temperature, len(gallery.label_names)
        )
        accuracy = float(np.mean(predicted == queries.labels))
    bad = tuple(dict.fromkeys(searched.bad + asked.bad))
    kept = searched.features[sampled(len(gallery))]
    std = unit_std(searched.features)
    return Evaluation(accuracy, std, neighbours, gallery, queries, kept, bad)


def sampled(count: int) -> np.ndarray:
    """Which of `count` pictures are looked at one by one: at most 2,000, evenly spaced; int [M]."""
    return np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)


def describe(evaluation: Evaluation, config: Any) -> str:
    """One sentence on how the accuracy was measured."""
    options = config.evaluate
    left_out = ''
    if evaluation.bad:
        left_out = f' Left out: {len(evaluation.bad):,} file(s) that cannot be read.'
    if evaluation.accuracy is None:
        return (
            'No accuracy: it needs labels (class folders, TFDS labels, or tiles) and held-out '
            'pictures; data.held_out_fraction must hold out at least one of a label.' + left_out
        )
    return (
        f'Each of {len(evaluation.queries):,} held-out pictures is classified by a vote of its '
        f'{options.knn_k} nearest among {len(evaluation.gallery):,} training pictures (cosine of '
        f'the features, temperature {options.knn_temperature:g}; '
        f'{len(evaluation.gallery.label_names)} labels), batch normalisation frozen.'
        + (' So few pictures give a rough figure only.' if len(evaluation.queries) < 100 else '')
        + left_out
    )


def _kept(source: Source, indices: np.ndarray) -> Source:
    return source if len(indices) == len(source) else Subset(source, indices)


def _at_most(source: Source, count: int) -> Source:
    """At most `count` examples, evenly spaced."""
    if len(source) <= count:
        return source
    return Subset(source, np.linspace(0, len(source) - 1, count).astype(int))
