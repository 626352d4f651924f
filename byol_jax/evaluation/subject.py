"""The subject of an evaluation: an encoder's features of a gallery and queries, with labels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from byol_jax.errors import UserError
from byol_jax.evaluation.features import Encode, Encoded, Labelled, encode_source
from byol_jax.evaluation.linear import Epoch
from byol_jax.evaluation.probes import held_out_rows
from byol_jax.evaluation.views import Pairs, augmented, encode_pairs
from byol_jax.input.stream import Stream
from byol_jax.settings import Evaluate
from byol_jax.sources.bad_files import BadFile
from byol_jax.sources.base import Progress, Source, Subset, no_progress
from byol_jax.sources.data import Data
from byol_jax.views.view import View

# A function that shows a line to the user.
Say = Callable[[str], None]


class Unmeasured(Exception):
    """The data do not allow a metric; the message says why and is printed after its name."""


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of some pictures, with labels and groups.

    Attributes:
      features: float [N, D].
      labels: int [N], in [0, C); None without labels.
      label_names: the name of each label; () if they have none.
      groups: int [N], the group of each picture if pictures belong together, like the frames of a
        clip; None otherwise.
    """

    features: np.ndarray
    labels: np.ndarray | None = None
    label_names: Sequence[str] = ()
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.features)


class Pictures(NamedTuple):
    """The pictures behind the features, for protocols that need other views of them.

    Attributes:
      gallery: the gallery's pictures, in the order of its features.
      queries: the queries' pictures, in the order of their features.
      pairs: function of a number of pictures that returns features of both training views of at
        most as many pictures: of the queries or, if there are none, of the gallery.
      crops: function of rows of the gallery, int [M], that returns their random crops and flips,
        new in every epoch.
      bad: files that could not be read; their pictures are in neither set.
    """

    gallery: Source
    queries: Source
    pairs: Callable[[int], Pairs]
    crops: Callable[[np.ndarray], Epoch]
    bad: Sequence[BadFile]


def _silent(line: str) -> None:
    del line


@dataclasses.dataclass(frozen=True)
class Subject:
    """An encoder's features, and everything that protocols share.

    It can be made from arrays alone. Then only protocols that need new views of the pictures cannot
    be used.

    Attributes:
      gallery: the training pictures: neighbours are searched among them, probes are fitted to them.
      queries: the test pictures; None if there are none.
      queries_are: kind of the queries: 'held-out' or 'test'.
      seed: seed of every random choice.
      say: function that shows a line to the user; by default nothing is shown.
      progress: called with (task, done, total) during slow work.
      encode: the encoder, uint8 [B, S, S, 3] -> float32 [B, D]; None if only features are given.
      pictures: the pictures behind the features; None if only features are given.
    """

    gallery: FeatureSet
    queries: FeatureSet | None = None
    queries_are: str = 'test'
    seed: int = 0
    say: Say = _silent
    progress: Progress = no_progress
    encode: Encode | None = None
    pictures: Pictures | None = None

    @property
    def shown(self) -> tuple[str, FeatureSet]:
        """The pictures for metrics that train nothing, with their kind: queries, else gallery."""
        if self.queries is None:
            return 'training', self.gallery
        return self.queries_are, self.queries

    @functools.cached_property
    def labelled(self) -> tuple[Labelled, Labelled]:
        """Gallery and queries with labels, for protocols that train on one and test on the other.

        Raises:
          Unmeasured: the data have no labels, only one label, or no queries.
        """
        if self.gallery.labels is None:
            raise Unmeasured('the data have no labels (class folders, TFDS labels, or tiles)')
        if self.queries is None:
            raise Unmeasured(
                'there is nothing to test on: hold out a part (data.held_out_fraction) or name a '
                'test set (evaluate.data_path, evaluate.data_split)'
            )
        if self.queries.labels is None:
            # The label of a tile is its picture, so tiles of two sets have no label in common.
            raise Unmeasured('the test set has no labels')
        check_several(self.gallery)
        return (
            Labelled(self.gallery.features, self.gallery.labels),
            Labelled(self.queries.features, self.queries.labels),
        )

    @functools.cached_property
    def choosing(self) -> np.ndarray:
        """Which of the gallery's pictures choose learning rates and penalties: bool [gallery].

        Pictures that belong together, like the frames of a clip, are all chosen or none.

        Raises:
          Unmeasured: as for `labelled`, or no label has two pictures.
        """
        labels = self.labelled[0].labels
        groups = self.gallery.groups
        groups = np.arange(len(labels)) if groups is None else groups
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        try:
            return held_out_rows(labels[first], seed=self.seed)[group]
        except ValueError as error:
            raise Unmeasured(f'among the training pictures {error}') from error

    @property
    def classes(self) -> int:
        """C, the number of labels; labels are in [0, C)."""
        if self.gallery.label_names:
            return len(self.gallery.label_names)
        return 1 + max(int(each.labels.max()) for each in self.labelled)

    @property
    def at_hand(self) -> Pictures:
        """The pictures behind the features.

        Raises:
          Unmeasured: only features are given.
        """
        if self.pictures is None:
            raise Unmeasured('it needs the pictures, and only their features are given')
        return self.pictures


def check_several(pictures: FeatureSet) -> None:
    """Raises Unmeasured if all pictures of a labelled set have the same label."""
    labels = pictures.labels
    assert labels is not None
    if labels.min() == labels.max():
        label = int(labels[0])
        name = pictures.label_names[label] if pictures.label_names else label
        raise Unmeasured(f"all pictures have the same label '{name}'")


def compared(data: Data) -> tuple[Source, Source]:
    """(gallery, queries): the training part and the held-out part, which may be empty.

    With a separate test set: all of the data, and all of the test set.
    """
    if data.test is not None:
        return data.everything, data.test.train
    return data.train, data.held_out


def queries_are(data: Data) -> str:
    """The kind of the queries: 'test' or 'held-out'."""
    return 'held-out' if data.test is None else 'test'


def subject_of(
    encode: Encode,
    data: Data,
    views: Mapping[str, View],
    options: Evaluate,
    *,
    image_size: int,
    seed: int = 0,
    say: Say = _silent,
    progress: Progress = no_progress,
) -> Subject:
    """Encodes the pictures once, for all protocols.

    Args:
      encode: maps uint8 [B, S, S, 3] to float32 [B, D].
      data: the data, see `compared`.
      views: the training views by name. The picture of the first one is encoded, and its crop and
        flip are used by the linear protocol; the first two are used for retrieval.
      options: the section `evaluate` of the settings.
      image_size: S, pixels.
      seed: seed of every random choice.
      say: function that shows a line to the user.
      progress: see `Subject`.

    Raises:
      UserError: no picture of the gallery, or none of the queries, can be read, or the features
        are not finite.
    """
    first = next(iter(views.values()))
    parts = encode_parts(
        encode,
        *compared(data),
        options,
        key=first.picture,
        image_size=image_size,
        antialias=first.antialias,
        progress=progress,
    )
    for source, features in (
        (parts.gallery, parts.gallery_features),
        (parts.queries, parts.query_features),
    ):
        _check_finite(source, features)
    # All pictures, not only the encoded ones, because retrieval may choose another frame of a clip.
    gallery, queries = compared(data)
    pool = queries if len(queries) else gallery
    stream = Stream(pool, views, seed)

    def crops(rows: np.ndarray) -> Epoch:
        labels = parts.gallery.labels
        assert labels is not None
        return augmented(
            encode,
            Subset(parts.gallery, rows),
            labels[rows],
            first,
            seed=seed,
            batch_size=options.batch_size,
        )

    return Subject(
        _features_of(parts.gallery, parts.gallery_features),
        _features_of(parts.queries, parts.query_features) if len(parts.queries) else None,
        queries_are(data),
        seed,
        say,
        progress,
        encode,
        Pictures(
            parts.gallery,
            parts.queries,
            lambda most: encode_pairs(encode, stream, most, options.batch_size),
            crops,
            parts.bad,
        ),
    )


def _features_of(source: Source, features: np.ndarray) -> FeatureSet:
    return FeatureSet(features, source.labels, source.label_names, source.groups)


class Parts(NamedTuple):
    """The readable pictures of gallery and queries, and their features.

    Attributes:
      gallery: the pictures that are searched.
      queries: the test pictures; may be empty.
      gallery_features: float32 [len(gallery), D], features of the gallery.
      query_features: float32 [len(queries), D], features of the queries.
      bad: files that could not be read; their examples are in neither set.
    """

    gallery: Source
    queries: Source
    gallery_features: np.ndarray
    query_features: np.ndarray
    bad: list[BadFile]


def encode_parts(
    encode: Encode,
    gallery: Source,
    queries: Source,
    options: Evaluate,
    *,
    key: str,
    image_size: int,
    antialias: bool = True,
    progress: Progress = no_progress,
) -> Parts:
    """Encodes at most options.max_gallery and options.max_queries pictures, evenly spaced.

    Args:
      encode: maps uint8 [B, S, S, 3] to float32 [B, D].
      gallery: the pictures to search.
      queries: the test pictures; may be empty.
      options: the section `evaluate` of the settings.
      key: key of the picture to take of each example.
      image_size: S, pixels.
      antialias: see `encode_source`.
      progress: see `Subject`.

    Raises:
      UserError: no picture of the gallery, or none of the queries, can be read.
    """
    gallery, queries = (
        at_most(gallery, options.max_gallery),
        at_most(queries, options.max_queries),
    )

    def encoded(source: Source) -> Encoded:
        return encode_source(
            encode,
            source,
            key,
            image_size=image_size,
            crop_fraction=options.crop_fraction,
            antialias=antialias,
            batch_size=options.batch_size,
            progress=progress,
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


def at_most(source: Source, count: int) -> Source:
    """Takes at most `count` examples of a source, evenly spaced."""
    if len(source) <= count:
        return source
    return Subset(source, np.linspace(0, len(source) - 1, count).astype(int))


def _kept(source: Source, indices: np.ndarray) -> Source:
    return source if len(indices) == len(source) else Subset(source, indices)


def _check_finite(source: Source, features: np.ndarray) -> None:
    wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(wrong):
        raise UserError(
            f'The features of {len(wrong):,} of {len(source):,} pictures hold NaN or infinity, the '
            f'first of them {source.name(int(wrong[0]))}: there is nothing to measure. Was the '
            'encoder exported from a run that had diverged?'
        )
