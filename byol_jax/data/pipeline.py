"""Source -> batches of view pairs of the stream (`stream`), with tf.data."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from byol_jax.data.bad_files import BadFile, BadFiles
from byol_jax.data.quiet_tensorflow import tf
from byol_jax.data.sources.base import Source
from byol_jax.data.stream import (
    MOST_REPLACEMENTS,
    NoPictureError,
    PairMaker,
    draw_place,
    epoch_order,
    replacements,
)
from byol_jax.errors import UserError

__all__ = [
    'MOST_REPLACEMENTS',
    'Batch',
    'NoPictureError',
    'PairMaker',
    'batches',
    'draw_place',
    'epoch_order',
    'replacements',
]

Batch = dict[str, Any]


def batches(
    source: Source,
    config: Any,
    *,
    start_step: int,
    stop_step: int,
    process_index: int = 0,
    process_count: int = 1,
    bad_files: BadFiles | None = None,
) -> Generator[Batch]:
    """Yields this process's share of batches start_step .. stop_step - 1.

    Close it if it is not read to its end: work that is under way keeps a process from ending.

    Args:
      source: the training pictures.
      config: a run's config.
      start_step, stop_step: optimizer steps; starting late costs nothing.
      process_index, process_count: this host's place among the hosts; each makes every batch's
        rows [index B / count, (index + 1) B / count).
      bad_files: where what cannot be read is counted, in the order of the stream: when a batch is
        yielded, that of all batches up to it. By default one for this call.

    Yields:
      {'view1', 'view2'}: uint8 [batch_size / process_count, S, S, 3], and 'example', int32
      [batch_size / process_count]: those that are shown. With views.on='accelerator' the views are
      cropped and resized only, and there are 'colors1' and 'colors2' too, `Photometric` for
      `device_views`.

    Raises:
      UserError: more is bad than data.max_bad_fraction allows. Of several processes none knows
        what the others found: there only a limit of 0 is checked, and the caller checks others.
      NoPictureError: nothing can be read in place of a bad picture.
    """
    maker = PairMaker(source, config)
    on_device = config.views.on == 'accelerator'
    make = maker.crops if on_device else maker.views
    batch = config.batch_size
    share = batch // process_count
    size = config.views.image_size
    workers = config.data.workers or os.cpu_count() or 1

    if bad_files is None:
        bad_files = BadFiles(source, config.data.pair_keys[0], config.data.max_bad_fraction)
    found: dict[int, Sequence[BadFile]] = {}
    shown: dict[int, int] = {}
    failures: dict[int, UserError] = {}

    def noted(position: int) -> tuple[np.ndarray, np.ndarray]:
        """The pair at a position.

        What is bad is kept for the batch it belongs to: batches are made ahead, and what a run says
        and counts must not depend on how far. Errors too; TensorFlow would print a traceback.
        """
        position = int(position)
        try:
            loaded = maker.load(position)
            shown[position] = loaded.example
            if loaded.bad:
                found[position] = loaded.bad
            return make(position, loaded.pictures)
        except UserError as error:
            if isinstance(error, NoPictureError):
                found[position] = error.bad
            failures[position] = error
            blank = np.zeros((size, size, 3), np.uint8)
            return blank, blank

    # Plain TensorFlow: to look for Python's own loops in them takes a third of a second.
    @tf.autograph.experimental.do_not_convert
    def positions(step: tf.Tensor) -> tf.data.Dataset:
        first = step * batch + process_index * share
        return tf.data.Dataset.range(first, first + share)

    @tf.autograph.experimental.do_not_convert
    def pair(position: tf.Tensor) -> dict[str, tf.Tensor]:
        view1, view2 = tf.numpy_function(noted, [position], (tf.uint8, tf.uint8), stateful=False)
        view1.set_shape((size, size, 3))
        view2.set_shape((size, size, 3))
        return {'view1': view1, 'view2': view2}

    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = workers
    data = (
        tf.data.Dataset.range(start_step, stop_step)
        .flat_map(positions)
        .map(pair, num_parallel_calls=workers)
        .batch(share, drop_remainder=True)
        .prefetch(config.data.prefetch)
        .with_options(options)
    )
    for step, prepared in enumerate(data.as_numpy_iterator(), start_step):
        first = step * batch + process_index * share
        for position in range(first, first + share):
            bad_files.add(found.pop(position, ()))
        if process_count == 1 or bad_files.none_allowed:
            bad_files.check()
        for position in range(first, first + share):
            if position in failures:
                raise failures[position]
        examples = [shown.pop(position) for position in range(first, first + share)]
        prepared['example'] = np.array(examples, np.int32)
        yield prepared | (maker.photometric(range(first, first + share)) if on_device else {})
