"""An encoder and the data it is measured on, with the features that all protocols share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from byol_jax.evaluation.features import Encode, Labelled
from byol_jax.evaluation.probes import held_out_rows
from byol_jax.evaluation.protocol import Parts
from byol_jax.sources.base import Source
from byol_jax.sources.data import Data

Say = Callable[[str], None]


class Unmeasured(Exception):
    """Why the data do not allow a measure, in words that follow its name."""


class Found(NamedTuple):
    """What a protocol found.

    Attributes:
      metrics: by name; accuracies, recalls and mutual information in [0, 1].
      details: the options and counts behind them, as JSON has them.
      unmeasured: why there is no number, by the name of the metric.
    """

    metrics: Mapping[str, float]
    details: Mapping[str, Any]
    unmeasured: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Subject:
    """What all protocols share.

    Attributes:
      encode: uint8 [B, S, S, 3] -> float32 [B, D].
      data, config: as given.
      parts: pictures and their features, of centre crops.
      say: takes a line for the user.
    """

    encode: Encode
    data: Data
    config: Any
    parts: Parts
    say: Say

    @property
    def queries_are(self) -> str:
        """What the queries are called: 'held-out' or 'test' pictures."""
        return (
            'test'
            if self.config.evaluate.data_path or self.config.evaluate.data_split
            else 'held-out'
        )

    @property
    def shown(self) -> tuple[str, Source, np.ndarray]:
        """What measures without training take: the queries, or else the training pictures."""
        if len(self.parts.queries):
            return self.queries_are, self.parts.queries, self.parts.asked
        return 'training', self.parts.gallery, self.parts.searched

    @functools.cached_property
    def labelled(self) -> tuple[Labelled, Labelled]:
        """(training, query) features with labels.

        Raises:
          Unmeasured: the data have no labels, one label only, or nothing to test on.
        """
        gallery, queries, searched, asked, _ = self.parts
        if gallery.labels is None:
            raise Unmeasured('the data have no labels (class folders, TFDS labels, or tiles)')
        if not len(queries):
            raise Unmeasured(
                'there is nothing to test on: hold out a part (data.held_out_fraction) or name a '
                'test set (evaluate.data_path, evaluate.data_split)'
            )
        if queries.labels is None:
            why = ''
            if self.config.data.tile_size:
                why = ": a tile's label is its picture, which is in one set only"
            raise Unmeasured(f'the test set has no labels{why}')
        check_several(gallery)
        return Labelled(searched, gallery.labels), Labelled(asked, queries.labels)

    @functools.cached_property
    def choosing(self) -> np.ndarray:
        """The training pictures that choose learning rates and penalties: bool [gallery].

        Of pictures that belong together, such as the frames of a clip, all or none.
        """
        labels = self.labelled[0].labels
        groups = self.parts.gallery.groups
        groups = np.arange(len(labels)) if groups is None else groups
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        try:
            return held_out_rows(labels[first], seed=self.config.seed)[group]
        except ValueError as error:
            raise Unmeasured(f'of the training pictures, {error}') from error

    @property
    def classes(self) -> int:
        return len(self.parts.gallery.label_names)


def check_several(source: Source) -> None:
    """Raises Unmeasured if all pictures of a labelled source have the same label."""
    labels = source.labels
    assert labels is not None
    if labels.min() == labels.max():
        name = source.label_names[int(labels[0])]
        raise Unmeasured(f"all pictures have the one label '{name}'")
