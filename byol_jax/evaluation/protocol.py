"""The protocol of the before/after table: held-out or test pictures against training ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from byol_jax.evaluation.features import Encode, Encoded, encode_source
from byol_jax.evaluation.monitors import unit_std
from byol_jax.evaluation.neighbours import Neighbours, classify, nearest
from byol_jax.sources.bad_files import BadFile
from byol_jax.sources.base import Source, Subset
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
    """Weighted nearest-neighbour classification of the held-out pictures or the test set.

    The first of `evaluate.knn_k` neighbours vote.

    Args:
      encode: uint8 [B, S, S, 3] -> float32 [B, D].
      data: of which `compared` gives the gallery and the queries. Where there are no queries, a few
        training pictures take their place, and there is no accuracy.
      config: its `evaluate`, `views.image_size` and the first of `data.pair_keys` are used.

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
    most = config.evaluate.max_gallery
    if not (measured and gallery.label_names):
        # Nothing is measured, a few neighbours are shown: not worth a pass over all pictures.
        most = min(most, _SHOWN_GALLERY)
    parts = encode_parts(encode, _at_most(gallery, most), queries, config)
    gallery, queries = parts.gallery, parts.queries
    neighbours = nearest(parts.searched, parts.asked, config.evaluate.knn_k[0])
    accuracy = None
    if measured and gallery.labels is not None and queries.labels is not None:
        accuracy = knn_accuracy(neighbours, gallery, queries, config)
    kept = parts.searched[sampled(len(gallery))]
    std = unit_std(parts.searched)
    return Evaluation(accuracy, std, neighbours, gallery, queries, kept, tuple(parts.bad))


def compared(data: Data) -> tuple[Source, Source]:
    """(gallery, queries): the training part and the held-out part, which may be empty.

    Where there is a separate test set, all of the data and all of the test set.
    """
    if data.test is not None:
        return data.everything, data.test.train
    return data.train, data.held_out


class Parts(NamedTuple):
    """Pictures that could be read, and their features.

    Attributes:
      gallery, queries: the pictures; of queries there may be none.
      searched: float32 [len(gallery), D]. asked: float32 [len(queries), D].
      bad: files that could not be read; their examples are in neither.
    """

    gallery: Source
    queries: Source
    searched: np.ndarray
    asked: np.ndarray
    bad: list[BadFile]


def encode_parts(encode: Encode, gallery: Source, queries: Source, config: Any) -> Parts:
    """Features of at most evaluate.max_gallery and max_queries pictures, evenly spaced.

    Args:
      encode, config: as for `evaluate`. gallery, queries: the pictures; queries may be empty.

    Raises:
      UserError: no picture of the gallery, or none of the queries, can be read.
    """
    options = config.evaluate
    gallery, queries = (
        _at_most(gallery, options.max_gallery),
        _at_most(queries, options.max_queries),
    )

    def encoded(source: Source) -> Encoded:
        return encode_source(
            encode,
            source,
            config.data.pair_keys[0],
            image_size=config.views.image_size,
            crop_fraction=options.crop_fraction,
            batch_size=options.batch_size,
        )

    searched = encoded(gallery)
    asked = Encoded(searched.features[:0], np.zeros(0, np.int64), [])
    if len(queries):
        asked = encoded(queries)
    return Parts(
        # Labels, names and thumbnails follow the features.
        _kept(gallery, searched.indices),
        _kept(queries, asked.indices),
        searched.features,
        asked.features,
        list(dict.fromkeys(searched.bad + asked.bad)),
    )


def knn_accuracy(neighbours: Neighbours, gallery: Source, queries: Source, config: Any) -> float:
    """Share of the queries, in [0, 1], whose label is the vote of their neighbours."""
    assert gallery.labels is not None
    temperature = config.evaluate.knn_temperature
    predicted = classify(neighbours, gallery.labels, temperature, len(gallery.label_names))
    return float(np.mean(predicted == queries.labels))


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
            'pictures (data.held_out_fraction must hold out at least one of a label) or a test set '
            'with the same labels (evaluate.data_path, evaluate.data_split).' + left_out
        )
    k, voters = options.knn_k[0], evaluation.neighbours.indices.shape[1]
    voting = f'{k} nearest among' if voters == k else f'neighbours, all (fewer than {k}) of'
    what = (
        'test pictures'
        if config.evaluate.data_path or config.evaluate.data_split
        else 'held-out pictures'
    )
    return (
        f'Each of {len(evaluation.queries):,} {what} is classified by a vote of its '
        f'{voting} {len(evaluation.gallery):,} training pictures (cosine of '
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
