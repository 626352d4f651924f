"""A separate test set: pictures of their own that encoders are measured on, and their labels."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_jax.errors import UserError, did_you_mean
from byol_jax.sources.base import Source, Subset

# Unknown labels that a message names.
_SHOWN = 5


def has_test_set(config: Any) -> bool:
    """Whether the config names a separate test set."""
    return bool(config.evaluate.data_path or config.evaluate.data_split)


def test_config(config: Any) -> Any:
    """The config whose `data` is the whole test set: as the run's, but from where `evaluate` says.

    Raises:
      UserError: the source has no other set, or the set named is the one trained on.
    """
    path, split = config.evaluate.data_path, config.evaluate.data_split
    source = config.data.source
    if source == 'sample':
        raise UserError(
            "evaluate.data_path and evaluate.data_split name a test set; data.source='sample' is "
            'ten photographs and has no other. Leave them out: its held-out tiles are used.'
        )
    if split and source != 'tfds':
        raise UserError(
            f"evaluate.data_split={split} names a split of a TFDS data set, and data.source='"
            f"{source}' has none: name the test set with --config.evaluate.data_path=PATH."
        )
    test = config.copy_and_resolve_references().unlock()
    data = test.data
    data.path, data.split = path or data.path, split or data.split
    # A cache or an index file of the training pictures is not for others.
    data.held_out_fraction, data.tile_shift, data.cache = 0.0, False, ''
    data.index = data.index if data.index == 'auto' else ''
    _check_other(config.data, data)
    return test.lock()


def _check_other(train: Any, test: Any) -> None:
    """Raises UserError if the test set is the training set, or one lies inside the other."""
    if not (train.path and test.path):
        same = train.path == test.path
    else:
        one, other = (Path(os.path.realpath(os.path.expanduser(x.path))) for x in (train, test))
        same = one == other
        within = train.source in ('folder', 'video')
        if within and not same and (one.is_relative_to(other) or other.is_relative_to(one)):
            raise UserError(
                f'evaluate.data_path={test.path} and data.path={train.path} lie one inside the '
                'other: the same pictures would be in both. Give two folders side by side.'
            )
    if same and (train.source != 'tfds' or train.split == test.split):
        what = f'data.split={train.split}' if train.source == 'tfds' else f'data.path={train.path}'
        raise UserError(
            f'The test set is the training set, {what}: every picture would find itself. Name '
            'another set, or leave evaluate.data_path and evaluate.data_split out and hold out a '
            'part with data.held_out_fraction.'
        )


def of_test_set(error: UserError) -> UserError:
    """An error about `data.path` or `data.split` as one about the keys that the user gave."""
    return UserError(re.sub(r'\bdata\.(path|split)\b', r'evaluate.data_\1', str(error)))


def matched(test: Source, train: Source, *, tiles: bool) -> Source:
    """The test set with its labels numbered as the training set's, by their names.

    Args:
      test, train: the whole sets.
      tiles: a tile's label is its picture, which is in one set only: the test set then has none.

    Raises:
      UserError: there is no picture in the test set, or one has a label that the training set does
        not know.
    """
    if not len(test):
        raise UserError('The test set holds no picture: evaluate.data_split or evaluate.data_path.')
    if tiles or not test.label_names or not train.label_names:
        return Relabelled(test, (), None)
    numbers = {name: number for number, name in enumerate(train.label_names)}
    known = np.array([numbers.get(name, -1) for name in test.label_names], np.int64)
    if (known < 0).any():
        # Not `labels`, which stops at the first record that cannot be read.
        labels = test.shown_labels(np.arange(len(test)))
        counts = np.bincount(labels[labels >= 0], minlength=len(known))
        unknown = np.flatnonzero((known < 0) & (counts > 0)).tolist()
        if unknown:
            raise _unknown([(test.label_names[i], int(counts[i])) for i in unknown], numbers)
    return Relabelled(test, train.label_names, known)


def _unknown(unknown: list[tuple[str, int]], known: dict[str, int]) -> UserError:
    shown = [
        f"'{name}' ({count:,} picture(s)){did_you_mean(name, known)}"
        for name, count in unknown[:_SHOWN]
    ]
    more = f', and {len(unknown) - _SHOWN:,} more' if len(unknown) > _SHOWN else ''
    there = ', '.join(sorted(known)[:20]) + (', ...' if len(known) > 20 else '')
    return UserError(
        f'{len(unknown):,} label(s) of the test set are not in the training set, so no answer '
        f'could be right: {"; ".join(shown)}{more}. Labels are matched by name; the training set '
        f'has {len(known):,}: {there}. Rename them, or take these pictures out of the test set.'
    )


class Relabelled(Subset):
    """All examples of another source, with other numbers and names for their labels."""

    def __init__(self, source: Source, names: Sequence[str], numbers: np.ndarray | None):
        """Args:
        source: the examples. names: of the new labels.
        numbers: the new label for each of the source's, int [its number]; None for no labels.
        """
        super().__init__(source, np.arange(len(source)))
        self._names, self._numbers = names, numbers

    @property
    def label_names(self) -> Sequence[str]:  # type: ignore[override]
        return self._names

    @functools.cached_property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        return self.labels_of(np.arange(len(self)))

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        labels = None if self._numbers is None else super().labels_of(indices)
        return None if labels is None or self._numbers is None else self._numbers[labels]
