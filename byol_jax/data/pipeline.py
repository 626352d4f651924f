"""Source -> batches of view pairs, with tf.data, as a pure function of integers.

The examples form one endless stream: position p of the stream is example p mod N of epoch
p div N, in the order that (seed, epoch) gives. Batch k holds positions k B to (k + 1) B - 1. So a
run can go on from any step at once, and nothing of the pipeline needs to be saved.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from byol_jax.data.augment import draw_view, make_view
from byol_jax.data.quiet_tensorflow import tf
from byol_jax.data.sources.base import Source
from byol_jax.errors import UserError

Batch = dict[str, np.ndarray]


class PairMaker:
    """Makes the two views of any position of the stream."""

    def __init__(self, source: Source, config: Any):
        """Args:
        source: the training pictures.
        config: whose seed, views and data.pair_keys are used.
        """
        self._source = source
        self._seed = config.seed
        self._size = config.views.image_size
        self._views = (config.views.view1, config.views.view2)
        self._keys = tuple(config.data.pair_keys)

    def example(self, position: int) -> tuple[int, int]:
        """(epoch, index of the example) at a position of the stream."""
        epoch, place = divmod(position, len(self._source))
        return epoch, int(epoch_order(self._seed, epoch, len(self._source))[place])

    def pictures(self, position: int) -> tuple[tuple[int, str], tuple[int, str]]:
        """(example, key) of the picture that each view at a position is made from."""
        epoch, index = self.example(position)
        second = index
        partners = self._source.partners(index)
        if len(partners):
            place = draw_place(len(partners), self._seed, epoch, index, number=2)
            second = int(partners[place])
        return (index, self._keys[0]), (second, self._keys[1])

    def pair(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The views at a position: two uint8 [S, S, 3]."""
        epoch, index = self.example(position)
        pictures = self.pictures(position)
        # In the order of the source: the later frame of a clip is decoded on from the earlier one.
        loaded = {which: self._source.load(*which) for which in sorted(set(pictures))}
        views = []
        for number, (view, which) in enumerate(zip(self._views, pictures, strict=True), start=1):
            picture = loaded[which]
            params = draw_view(
                view,
                *picture.shape[:2],
                seed=self._seed,
                epoch=epoch,
                example=index,
                number=number,
            )
            views.append(make_view(picture, params, self._size))
        return views[0], views[1]


@functools.lru_cache(maxsize=3)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(examples), int [examples]."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 2], counter=[0, 0, 0, epoch]))
    return rng.permutation(examples)


def draw_place(count: int, seed: int, epoch: int, example: int, number: int) -> int:
    """Which of `count` partners of an example feeds view `number`: uniform in range(count).

    A stream of its own, so that partners change nothing else that is drawn.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 3], counter=[0, number, example, epoch]))
    return int(rng.random() * count)


def batches(
    source: Source,
    config: Any,
    *,
    start_step: int,
    stop_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields this process's share of batches start_step .. stop_step - 1.

    Args:
      source: the training pictures.
      config: a run's config.
      start_step, stop_step: optimizer steps; starting late costs nothing.
      process_index, process_count: this host's place among the hosts; each makes every batch's
        rows [index B / count, (index + 1) B / count).

    Yields:
      {'view1', 'view2'}: uint8 [batch_size / process_count, S, S, 3].

    Raises:
      UserError: a picture cannot be read; the error names it.
    """
    maker = PairMaker(source, config)
    batch = config.batch_size
    share = batch // process_count
    size = config.views.image_size
    workers = config.data.workers or os.cpu_count() or 1

    failures: dict[int, UserError] = {}

    def noted(position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`maker.pair` and whether it was made.

        An error is kept for the batch it belongs to; TensorFlow would print it as a traceback.
        """
        try:
            return *maker.pair(int(position)), np.array(True)
        except UserError as error:
            failures[int(position)] = error
            blank = np.zeros((size, size, 3), np.uint8)
            return blank, blank, np.array(False)

    def positions(step: tf.Tensor) -> tf.data.Dataset:
        first = step * batch + process_index * share
        return tf.data.Dataset.range(first, first + share)

    def pair(position: tf.Tensor) -> dict[str, tf.Tensor]:
        view1, view2, made = tf.numpy_function(
            noted, [position], (tf.uint8, tf.uint8, tf.bool), stateful=False
        )
        made.set_shape(())
        view1.set_shape((size, size, 3))
        view2.set_shape((size, size, 3))
        return {'view1': view1, 'view2': view2, 'made': made}

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
    for prepared in data.as_numpy_iterator():
        if not prepared.pop('made').all():
            raise failures[min(failures)]
        yield prepared
