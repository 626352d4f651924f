"""Opens the data of a config: training part, held-out part and a separate test set."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2

from byol_jax import settings
from byol_jax.app.progress_bars import progress_shown
from byol_jax.errors import UserError
from byol_jax.settings import Settings
from byol_jax.sources.base import Progress, Source
from byol_jax.sources.data import Data, matched, open_data, open_source, split_source


@contextlib.contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """Keeps OpenCV from starting threads of its own while the body runs.

    Many examples are prepared at once already, and OpenCV's threads would compete with them for the
    cores. It is a setting of the whole process, so only the application makes it, and restores it.
    """
    before = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def build_data(config: Any, source: Source | None = None) -> Data:
    """Opens the training data of a config and, if the config names one, a separate test set.

    Shows progress and the messages of sources on stderr.

    Args:
      config: whatever `Settings.of` takes.
      source: used instead of the source that the config names.

    Raises:
      UserError: the data does not exist or does not fit the config. No other data is ever used
        instead.
    """
    with progress_shown() as progress:
        return _build(Settings.of(config), source, progress)


def _build(config: Settings, source: Source | None, progress: Progress) -> Data:
    source = source or open_source(config.data, progress)
    data = split_source(source, config.data, seed=config.seed, progress=progress)
    if not config.evaluate.has_test_set:
        return data
    other = settings_of_test_set(config.data, config.evaluate)
    try:
        test = open_data(other, seed=config.seed, progress=progress)
    except UserError as error:
        raise of_test_set(error) from error
    tiles = bool(config.data.tile_size)
    return data._replace(
        test=test._replace(train=matched(test.train, data.everything, tiles=tiles))
    )


def settings_of_test_set(data: settings.Data, evaluate: settings.Evaluate) -> settings.Data:
    """The settings that open the whole test set.

    Args:
      data: settings of the training data.
      evaluate: names the test set, by `data_path` or `data_split`.

    Returns:
      `data` with the path and split of the test set, and nothing held out.

    Raises:
      UserError: the source has no test set, or the test set is the training set.
    """
    path, split = evaluate.data_path, evaluate.data_split
    if data.source == 'sample':
        raise UserError(
            "evaluate.data_path and evaluate.data_split name a test set; data.source='sample' is "
            'ten photographs and has no other. Leave them out: its held-out tiles are used.'
        )
    if split and data.source != 'tfds':
        raise UserError(
            f"evaluate.data_split={split} names a split of a TFDS data set, and data.source='"
            f"{data.source}' has none: name the test set with --config.evaluate.data_path=PATH."
        )
    test = dataclasses.replace(
        data,
        path=path or data.path,
        split=split or data.split,
        held_out_fraction=0.0,
        tile_shift=False,
        # A cache or an index file belongs to the training pictures only.
        cache='',
        index=data.index if data.index == 'auto' else '',
    )
    _check_other(data, test)
    return test


def _check_other(train: settings.Data, test: settings.Data) -> None:
    """Raises UserError if the test set is the training set, or one lies inside the other."""
    if not (train.path and test.path):
        same = train.path == test.path
    else:
        one, other = (_real(each.path) for each in (train, test))
        same = one == other
        within = train.source in ('folder', 'video')
        if within and not same and (one.is_relative_to(other) or other.is_relative_to(one)):
            raise UserError(
                f'One of evaluate.data_path={test.path} and data.path={train.path} is inside the '
                'other, so the same pictures would be in both. Give two separate folders.'
            )
    if same and (train.source != 'tfds' or train.split == test.split):
        what = f'data.split={train.split}' if train.source == 'tfds' else f'data.path={train.path}'
        raise UserError(
            f'The test set is the training set, {what}: every picture would find itself. Name '
            'another set, or leave evaluate.data_path and evaluate.data_split out and hold out a '
            'part with data.held_out_fraction.'
        )


def _real(path: str | None) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path or '')))


def of_test_set(error: UserError) -> UserError:
    """Rewrites an error about `data.path` or `data.split` to name the keys in `evaluate`."""
    return UserError(re.sub(r'\bdata\.(path|split)\b', r'evaluate.data_\1', str(error)))
