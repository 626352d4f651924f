"""Source -> batches of view pairs, with tf.data, as a pure function of integers.

The examples form one endless stream: position p of the stream is example p mod N of epoch
p div N, in the order that (seed, epoch) gives. Batch k holds positions k B to (k + 1) B - 1. So a
run can go on from any step at once, and nothing of the pipeline needs to be saved.

Where an example's picture cannot be read, another example's takes its place at that position. Which
one is a function of (seed, epoch, example) too, so no other position changes, whoever makes it.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from byol_jax.data.augment import draw_view, make_view
from byol_jax.data.bad_files import BadFile, BadFiles, bad_file, name_some
from byol_jax.data.quiet_tensorflow import tf
from byol_jax.data.sources.base import Source
from byol_jax.errors import BadPicture, UserError

Batch = dict[str, np.ndarray]
# (example, key) of the picture of each view.
Which = tuple[tuple[int, str], tuple[int, str]]

# Other examples tried, at most, in place of one that cannot be read. With half of all pictures bad
# one position in four billion would find none.
MOST_REPLACEMENTS = 32


class Loaded(NamedTuple):
    """What a position of the stream shows.

    Attributes:
      pictures: uint8 [H, W, 3], for each view.
      example: the one they are of; another than the position's own if that cannot be read.
      bad: what could not be read on the way to it.
    """

    pictures: tuple[np.ndarray, np.ndarray]
    example: int
    bad: Sequence[BadFile] = ()


class NoPictureError(UserError):
    """Neither an example nor any that was tried in its place can be read; `bad` says why."""

    def __init__(self, bad: Sequence[BadFile]):
        others = 'and there is no other to take its place'
        if len(bad) > 1:
            others = f'nor can {len(bad) - 1:,} others that were tried in its place'
        super().__init__(
            f'A picture cannot be read, {others}: {name_some(bad, 3)}. Is the disk still there? '
            'See to that, then give the same command again.'
        )
        self.bad = bad


class PairMaker:
    """Loads the pictures of any position of the stream and makes its two views."""

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

    def pictures(self, position: int) -> Which:
        """(example, key) of the picture that each view at a position is made from."""
        return self._which(*self.example(position))

    def load(self, position: int) -> Loaded:
        """The pictures at a position: its example's, or those of the first replacement there is.

        Raises:
          NoPictureError: none of the replacements can be read either.
        """
        epoch, index = self.example(position)
        others = replacements(self._seed, epoch, index, len(self._source))
        bad = []
        for candidate in itertools.chain([index], others):
            first, second = self._which(epoch, candidate)
            try:
                # In the source's order: a later frame of a clip is decoded on from an earlier one.
                loaded = {
                    which: self._source.load_in_epoch(epoch, *which)
                    for which in sorted({first, second})
                }
            except BadPicture as error:
                bad.append(bad_file(error))
            else:
                return Loaded((loaded[first], loaded[second]), candidate, bad)
        raise NoPictureError(bad)

    def views(
        self, position: int, pictures: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The views that a position makes of its pictures: two uint8 [S, S, 3].

        The random choices are the position's own, whichever example the pictures are of.
        """
        epoch, index = self.example(position)
        views = []
        for number, (view, picture) in enumerate(zip(self._views, pictures, strict=True), start=1):
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

    def pair(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The views at a position: two uint8 [S, S, 3]."""
        return self.views(position, self.load(position).pictures)

    def _which(self, epoch: int, example: int) -> Which:
        """What the two views of an example are made from: its own picture and a partner's."""
        second = example
        partners = self._source.partners(example)
        if len(partners):
            place = draw_place(len(partners), self._seed, epoch, example, number=2)
            second = int(partners[place])
        return (example, self._keys[0]), (second, self._keys[1])


@functools.lru_cache(maxsize=3)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(examples), int [examples]."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 2], counter=[0, 0, 0, epoch]))
    return rng.permutation(examples)


def replacements(seed: int, epoch: int, example: int, examples: int) -> Iterator[int]:
    """Up to MOST_REPLACEMENTS other examples, to be tried in this order in place of `example`.

    They are drawn without repetition from all others, alike, as a function of the arguments.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 3], counter=[0, 0, example, epoch]))
    tries = min(MOST_REPLACEMENTS, examples - 1)
    for other in rng.choice(examples - 1, tries, replace=False) if tries else ():
        yield int(other) + int(other >= example)


def draw_place(count: int, seed: int, epoch: int, example: int, number: int) -> int:
    """Which of `count` partners of an example feeds view `number`: uniform in range(count).

    A stream of its own, so that partners change nothing else that is drawn.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 4], counter=[0, number, example, epoch]))
    return int(rng.random() * count)


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
      {'view1', 'view2'}: uint8 [batch_size / process_count, S, S, 3].

    Raises:
      UserError: more is bad than data.max_bad_fraction allows. Of several processes none knows
        what the others found: there only a limit of 0 is checked, and the caller checks others.
      NoPictureError: nothing can be read in place of a bad picture.
    """
    maker = PairMaker(source, config)
    batch = config.batch_size
    share = batch // process_count
    size = config.views.image_size
    workers = config.data.workers or os.cpu_count() or 1

    if bad_files is None:
        bad_files = BadFiles(source, config.data.pair_keys[0], config.data.max_bad_fraction)
    found: dict[int, Sequence[BadFile]] = {}
    failures: dict[int, UserError] = {}

    def noted(position: int) -> tuple[np.ndarray, np.ndarray]:
        """The pair at a position.

        What is bad is kept for the batch it belongs to: batches are made ahead, and what a run says
        and counts must not depend on how far. Errors too; TensorFlow would print a traceback.
        """
        position = int(position)
        try:
            loaded = maker.load(position)
            if loaded.bad:
                found[position] = loaded.bad
            return maker.views(position, loaded.pictures)
        except UserError as error:
            if isinstance(error, NoPictureError):
                found[position] = error.bad
            failures[position] = error
            blank = np.zeros((size, size, 3), np.uint8)
            return blank, blank

    def positions(step: tf.Tensor) -> tf.data.Dataset:
        first = step * batch + process_index * share
        return tf.data.Dataset.range(first, first + share)

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
        yield prepared
