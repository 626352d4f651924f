"""Source -> batches of view pairs of the stream (`stream`), with tf.data."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from byol_jax.errors import UserError
from byol_jax.input.stream import NoPictureError, PairMaker
from byol_jax.sources.bad_files import BadFile, BadFiles
from byol_jax.sources.base import Source
from byol_jax.sources.quiet_tensorflow import tf
from byol_jax.views.draws import Photometric

Batch = dict[str, Any]

# Bytes; Eigen's with AVX-512.
_ALIGNMENT = 64


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

    def positions(step: int) -> range:
        first = step * batch + process_index * share
        return range(first, first + share)

    found: dict[int, Sequence[BadFile]] = {}
    shown: dict[int, int] = {}
    failures: dict[int, UserError] = {}
    colors: dict[int, dict[str, Photometric]] = {}

    def pair(position: int, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The pair at a position, or None.

        What is bad is kept for the batch it belongs to: batches are made ahead, and what a run says
        and counts must not depend on how far. Errors too; TensorFlow would print a traceback.
        """
        if closed:
            return None
        try:
            loaded = maker.load(position)
            shown[position] = loaded.example
            if loaded.bad:
                found[position] = loaded.bad
            return make(loaded.pictures, drawn)
        except UserError as error:
            if isinstance(error, NoPictureError):
                found[position] = error.bad
            failures[position] = error
            return None

    def batch_of(step: np.int64) -> tuple[np.ndarray, np.ndarray]:
        mine = positions(int(step))
        drawn = maker.variates(mine)
        if on_device:
            colors[int(step)] = maker.photometric(drawn)
        view1, view2 = (_aligned((share, size, size, 3)) for _ in range(2))

        rows = iter(range(share))

        # A job for each worker, not for each row, which would wake this thread each time.
        def work() -> None:
            for row in rows:
                made = pair(mine[row], drawn[:, row])
                if made is not None:
                    view1[row], view2[row] = made

        for job in [pool.submit(work) for _ in range(min(workers, share))]:
            job.result()
        return view1, view2

    # Plain TensorFlow: to look for Python's own loops in it takes a third of a second.
    @tf.autograph.experimental.do_not_convert
    def mapped(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.numpy_function(batch_of, [step], (tf.uint8, tf.uint8), stateful=False)

    ahead = max(config.data.prefetch, 1)
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = ahead
    data = (
        tf.data.Dataset.range(start_step, stop_step)
        .map(mapped, num_parallel_calls=ahead)
        .with_options(options)
    )
    closed = False
    with ThreadPoolExecutor(workers) as pool:
        try:
            for step, (view1, view2) in enumerate(data.as_numpy_iterator(), start_step):
                mine = positions(step)
                for position in mine:
                    bad_files.add(found.pop(position, ()))
                if process_count == 1 or bad_files.none_allowed:
                    bad_files.check()
                for position in mine:
                    if position in failures:
                        raise failures[position]
                examples = np.array([shown.pop(position) for position in mine], np.int32)
                made = {'view1': view1, 'view2': view2, 'example': examples}
                yield made | colors.pop(step, {})
        finally:
            closed = True


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """uint8, not filled, where TensorFlow takes it as it is; what begins elsewhere it copies."""
    size = math.prod(shape)
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].reshape(shape)
