"""Makes batches of views from a source, in the order of `stream.Stream`, with tf.data."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from byol_jax.cores import usable_cores
from byol_jax.errors import UserError
from byol_jax.input.stream import NoPictureError, Stream
from byol_jax.sources.bad_files import BadFile, BadFiles
from byol_jax.sources.base import Source
from byol_jax.sources.quiet_tensorflow import tf
from byol_jax.views.view import Box, Steps, View

Batch = dict[str, Any]

# The alignment that TensorFlow wants, bytes: that of Eigen with AVX-512.
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

    Close the generator unless it is read to its end: work under way keeps the process from ending.

    Args:
      source: the pictures.
      views: the views by name, such as `paper_views()`.
      batch_size: number of examples in a batch, over all processes.
      seed: seed of the order and of every random choice.
      start_step: the first batch; starting late costs nothing.
      stop_step: the batch after the last one; None for an endless stream.
      workers: how many examples are prepared in parallel; 0 for one per CPU core.
      prefetch: how many batches are prepared ahead.
      crops_only: whether to leave what follows the crop to the device (`View.finish_jax`).
      process_index: this process's place among those that share each batch, from 0; it makes rows
        [index B / count, (index + 1) B / count).
      process_count: how many processes share each batch.
      bad_files: counts the files that cannot be read. When a batch is yielded, it has counted those
        of all batches up to this one, and no later ones. None: a counter that allows 1 %.

    Yields:
      A dict, with B = batch_size / process_count and S the size of the view:
        '<view>': uint8 [B, S, S, 3].
        '<view>/box': float32 [B, 4], (top, left, height, width) of what the view shows, as
          fractions of its picture; absent if an operation moves pixels in ways that a box cannot
          describe.
        '<view>/mirrored': bool [B], whether the view is mirrored left to right.
        'example': int32 [B], the examples shown.
        '<view>/drawn': with crops_only, a tree for `View.finish_jax`.

    Raises:
      UserError: more files are bad than `bad_files` allows. A process does not know the bad files
        of the others, so with several processes only a limit of 0 is checked here; the caller
        checks other limits.
      NoPictureError: a picture cannot be read, nor any of those tried in its place.
    """
    stream = Stream(source, views, seed)
    share = batch_size // process_count
    workers = workers or usable_cores()
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
        """Makes the views at a position and writes them to row `row`.

        Bad files and errors are kept until their batch is yielded: batches are made ahead, and what
        a run reports must not depend on how far ahead. TensorFlow would also print a traceback for
        an error.
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

        # One job for each worker: one for each row would wake this thread for each row.
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

    # AutoGraph has nothing to convert here, and would take a third of a second to find that out.
    @tf.autograph.experimental.do_not_convert
    def mapped(step: tf.Tensor) -> tuple[tf.Tensor, ...]:
        # tf.data would stack a list into one array, but not a tuple.
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
    """An empty uint8 array, aligned so that TensorFlow uses it without copying it."""
    size = math.prod(shape)
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].reshape(shape)
