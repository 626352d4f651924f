"""Source -> batches of the views of the stream (`stream`), with tf.data."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from byol_jax.errors import UserError
from byol_jax.input.stream import NoPictureError, Stream
from byol_jax.sources.bad_files import BadFile, BadFiles
from byol_jax.sources.base import Source
from byol_jax.sources.quiet_tensorflow import tf
from byol_jax.views.view import Box, Steps, View

Batch = dict[str, Any]

# Bytes; Eigen's with AVX-512.
_ALIGNMENT = 64


def view_batches(
    source: Source,
    views: Mapping[str, View],
    *,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
    prefetch: int = 2,
    crops_only: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    bad_files: BadFiles | None = None,
) -> Generator[Batch]:
    """Yields batches of views, made on the CPU: batch k is a function of (seed, k).

    Close it if it is not read to its end: work that is under way keeps a process from ending.

    Args:
      source: the pictures.
      views: by name, such as `paper_views()`.
      batch_size: examples in a batch, of all processes together.
      seed: of the order and of every random choice.
      start_step: the first batch; starting late costs nothing.
      stop_step: the first batch that is not made; None: there is no end.
      workers: examples prepared in parallel; 0: one per CPU core.
      prefetch: batches prepared ahead.
      crops_only: leave what follows the crop to the device (`View.finish_jax`).
      process_index: this process's place among those that share each batch; it makes rows
        [index B / count, (index + 1) B / count).
      process_count: how many processes share each batch.
      bad_files: where what cannot be read is counted, in the order of the stream: when a batch is
        yielded, that of all batches up to it. By default one for this call, which allows 1 %.

    Yields:
      A dict, with B = batch_size / process_count and S the size of the view:
        '<view>': uint8 [B, S, S, 3].
        '<view>/box': float32 [B, 4], (top, left, height, width) of what the view shows, as
          fractions of its picture; absent where an operation moves pixels in ways a box cannot say.
        '<view>/mirrored': bool [B], whether it is mirrored left to right.
        'example': int32 [B], the examples shown.
        '<view>/drawn': with crops_only, a tree for `View.finish_jax`.

    Raises:
      UserError: more is bad than `bad_files` allows. Of several processes none knows what the
        others found: there only a limit of 0 is checked, and the caller checks others.
      NoPictureError: nothing can be read in place of a bad picture.
    """
    stream = Stream(source, views, seed)
    share = batch_size // process_count
    workers = workers or os.cpu_count() or 1
    kinds = list(views.values())

    if bad_files is None:
        bad_files = BadFiles(source, kinds[0].picture, max_fraction=0.01)

    def positions(step: int) -> range:
        first = step * batch_size + process_index * share
        return range(first, first + share)

    found: dict[int, Sequence[BadFile]] = {}
    shown: dict[int, int] = {}
    failures: dict[int, UserError] = {}
    beside: dict[int, Batch] = {}

    def fill(
        position: int,
        row: int,
        steps: Sequence[Sequence[Steps]],
        made: Sequence[np.ndarray],
        boxes: Sequence[list[Box]],
    ) -> None:
        """Makes the views at a position into row `row`.

        What is bad is kept for the batch it belongs to: batches are made ahead, and what a run says
        and counts must not depend on how far. Errors too; TensorFlow would print a traceback.
        """
        if closed:
            return
        try:
            loaded = stream.load(position)
            shown[position] = loaded.example
            if loaded.bad:
                found[position] = loaded.bad
            for view, picture, own, images, box in zip(
                kinds, loaded.pictures, steps, made, boxes, strict=True
            ):
                mine = own[row]
                image, box[row] = view.cut(picture, mine)
                images[row] = image if crops_only else view.finish(image, mine)
        except UserError as error:
            if isinstance(error, NoPictureError):
                found[position] = error.bad
            failures[position] = error

    def batch_of(step: np.int64) -> list[np.ndarray]:
        mine = positions(int(step))
        drawn = stream.draw(mine)
        steps = [view.steps(drawn[name]) for name, view in stream.views.items()]
        made = [_aligned((share, view.size, view.size, 3)) for view in kinds]
        boxes: list[list[Box]] = [[(0, 0, 0, 0)] * share for _ in kinds]

        rows = iter(range(share))

        # A job for each worker, not for each row, which would wake this thread each time.
        def work() -> None:
            for row in rows:
                fill(mine[row], row, steps, made, boxes)

        for job in [pool.submit(work) for _ in range(min(workers, share))]:
            job.result()
        more: Batch = {}
        for (name, view), box in zip(stream.views.items(), boxes, strict=True):
            if view.has_box:
                more[f'{name}/box'] = np.array(box, np.float32)
            more[f'{name}/mirrored'] = view.mirrored(drawn[name])
            if crops_only:
                more[f'{name}/drawn'] = view.for_device(drawn[name])
        beside[int(step)] = more
        return made

    # Plain TensorFlow: to look for Python's own loops in it takes a third of a second.
    @tf.autograph.experimental.do_not_convert
    def mapped(step: tf.Tensor) -> tuple[tf.Tensor, ...]:
        # A tuple: of a list tf.data would make one array.
        return tuple(tf.numpy_function(batch_of, [step], [tf.uint8] * len(kinds), stateful=False))

    ahead = max(prefetch, 1)
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = ahead
    last = np.iinfo(np.int64).max if stop_step is None else stop_step
    data = (
        tf.data.Dataset.range(start_step, last)
        .map(mapped, num_parallel_calls=ahead)
        .with_options(options)
    )
    closed = False
    with ThreadPoolExecutor(workers) as pool:
        try:
            for step, made in enumerate(data.as_numpy_iterator(), start_step):
                mine = positions(step)
                for position in mine:
                    bad_files.add(found.pop(position, ()))
                if process_count == 1 or bad_files.none_allowed:
                    bad_files.check()
                for position in mine:
                    if position in failures:
                        raise failures[position]
                examples = np.array([shown.pop(position) for position in mine], np.int32)
                yield dict(zip(views, made, strict=True)) | beside.pop(step) | {'example': examples}
        finally:
            closed = True


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """uint8, not filled, where TensorFlow takes it as it is; what begins elsewhere it copies."""
    size = math.prod(shape)
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].reshape(shape)
