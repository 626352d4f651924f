"""Brings pictures to the training step, and decides where they become views.

There are three ways, chosen by `on` (views.on) and the source:

  cpu          the CPU makes the views, and the step gets them
  accelerator  the CPU decodes, crops and resizes; the step does the rest
  accelerator, with an array as the source
               the pictures are kept on the device; the step gets indices and random numbers, a few
               for each example, and does everything. Needs no TensorFlow

All three use the same random numbers, so the views are the same except for rounding.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np

from byol_jax.errors import UserError
from byol_jax.input.stream import Stream
from byol_jax.sources.array import Array
from byol_jax.sources.bad_files import BadFiles
from byol_jax.sources.base import Source, Subset
from byol_jax.sources.data import Relabelled
from byol_jax.views.view import View

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches, and the function that makes views of them on the device.

    Attributes:
      batches: this process's share of each batch, in order; close it after use.
      views: a pure function `(batch, *shared) -> batch`; its result has the keys that
        `view_batches` yields, whichever way the views are made.
      shared: trees of NumPy arrays that `views` needs on every device (`training.step.everywhere`).
    """

    batches: Generator[Batch]
    views: Callable[..., Batch]
    shared: tuple[Any, ...] = ()


def open_feed(
    source: Source,
    views: Mapping[str, View],
    *,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    stop_step: int,
    on: str = 'cpu',
    labels: bool = False,
    workers: int = 0,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
    bad_files: BadFiles | None = None,
) -> Feed:
    """Opens the feed of a training run.

    Args:
      source: the pictures.
      views: the views by name.
      batch_size: number of examples in a batch, over all processes.
      seed: seed of the order and of every random choice.
      start_step: the first step.
      stop_step: the step after the last one.
      on: where views are made, 'cpu' or 'accelerator'.
      labels: whether each batch also has 'label', int32 [B], -1 for an example without one.
      workers: how many examples are prepared in parallel; see `view_batches`.
      prefetch: how many batches are prepared ahead.
      process_index: this process's place among those that share each batch, from 0.
      process_count: how many processes share each batch.
      bad_files: counts the files that cannot be read; see `view_batches`.

    Raises:
      UserError: the pictures do not fit on the device or are too large for the views, a view
        operation has no JAX version, or TensorFlow is needed but not installed.
    """
    if on == 'accelerator':
        pictures = pictures_in_memory(source)
        for view in views.values():
            view.check_jax(whole=pictures is not None)
        if pictures is not None:
            _check_memory(pictures)
            share = batch_size // process_count
            starts = range(
                start_step * batch_size + process_index * share,
                stop_step * batch_size,
                batch_size,
            )
            drawn = _drawn(Stream(source, views, seed), starts, share)
            made, shared = array_views(views, pictures.shape)
            return Feed(_labelled(source, drawn, labels), made, (pictures, *shared))
    if importlib.util.find_spec('tensorflow') is None:
        raise UserError(
            "TensorFlow is not installed. Only data.source='array' with views.on='accelerator', "
            'and without tiles, trains without it: pip install -r requirements.txt.'
        )
    # Imported here because it imports TensorFlow.
    from byol_jax.input.pipeline import view_batches

    batches = view_batches(
        source,
        views,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        stop_step=stop_step,
        workers=workers,
        prefetch=prefetch,
        crops_only=on == 'accelerator',
        process_index=process_index,
        process_count=process_count,
        bad_files=bad_files,
    )
    return Feed(
        _labelled(source, batches, labels), crop_views(views) if on == 'accelerator' else dict
    )


def shown_views(
    stream: Stream,
    positions: Sequence[int],
    pictures: Sequence[tuple[np.ndarray, ...]],
    on: str = 'cpu',
) -> list[tuple[np.ndarray, ...]]:
    """Makes the views of some positions as a run does, on the CPU or on the device.

    Args:
      stream: the run's stream.
      positions: positions of the stream.
      pictures: the pictures of each position's views, from `Stream.load`.
      on: where views are made, 'cpu' or 'accelerator'.

    Returns:
      The views of each position, uint8 [S, S, 3] each.
    """
    views, drawn = stream.views, stream.draw(positions)
    steps = zip(*(view.steps(drawn[name]) for name, view in views.items()), strict=True)
    own = [list(zip(views.values(), *at, strict=True)) for at in zip(pictures, steps, strict=True)]
    if on == 'cpu':
        return [tuple(view.make(picture, steps) for view, picture, steps in at) for at in own]
    if held_array(stream.source) is not None:
        shown = np.stack([first for first, *_ in pictures])
        batch: Batch = stream.drawn_whole(positions, *shown.shape[1:3])
        batch['example'] = np.arange(len(shown))
        make, shared = array_views(views, shown.shape)
        made = jax.jit(make)(batch, shown, *shared)
    else:
        crops = [[view.cut(picture, steps)[0] for view, picture, steps in at] for at in own]
        stacked = map(np.stack, zip(*crops, strict=True))
        batch = dict(zip(views, stacked, strict=True))
        batch |= {f'{name}/drawn': view.for_device(drawn[name]) for name, view in views.items()}
        made = jax.jit(crop_views(views))(batch)
    return list(zip(*(np.asarray(made[name]) for name in views), strict=True))


def held_array(source: Source) -> Array | None:
    """The array that a source is, or is a subset of; None for other sources."""
    held = source.source if isinstance(source, Subset) else source
    if isinstance(held, Relabelled):
        # All its pictures, in the same order.
        held = held.source
    return held if isinstance(held, Array) else None


def pictures_in_memory(source: Source) -> np.ndarray | None:
    """The pictures of a source that `held_array` knows, in its order: uint8 [N, H, W, 3]."""
    held = held_array(source)
    if held is None or not isinstance(source, Subset):
        return held.images if held else None
    indices = source.indices
    whole = len(indices) == len(held) and np.array_equal(indices, np.arange(len(held)))
    return held.images if whole else held.images[indices]


def crop_views(views: Mapping[str, View]) -> Callable[[Batch], Batch]:
    """A function that makes views, on the device, of `view_batches`' batches with crops_only."""

    def make(batch: Batch) -> Batch:
        made = {key: x for key, x in batch.items() if not key.endswith('/drawn')}
        for name, view in views.items():
            made[name] = view.finish_jax(batch[name], batch[f'{name}/drawn'])
        return made

    return make


def array_views(
    views: Mapping[str, View], shape: tuple[int, ...]
) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
    """A function that makes views, on the device, of what `Stream.drawn_whole` draws.

    Args:
      views: the views by name.
      shape: shape of the pictures on the device, [N, H, W, 3].

    Returns:
      The function `(drawn, pictures, *shared) -> batch`, and `shared`.
    """
    tables = {name: view.resizing.tables(max(shape[1:3])) for name, view in views.items()}
    # Views that resize alike have the same tables, which then go to the device once.
    shared = list({id(each): each for each in tables.values()}.values())
    places = {name: [*map(id, shared)].index(id(each)) for name, each in tables.items()}

    def make(drawn: Batch, pictures: jax.Array, *shared: Any) -> Batch:
        made = {key: x for key, x in drawn.items() if not key.endswith('/drawn')}
        shown = pictures[drawn['example']]
        for name, view in views.items():
            made[name], boxes = view.make_jax(shown, drawn[f'{name}/drawn'], shared[places[name]])
            if view.has_box:
                made[f'{name}/box'] = boxes
        return made

    return make, tuple(shared)


def _drawn(stream: Stream, starts: Sequence[int], share: int) -> Generator[Batch]:
    """Yields this process's share of `Stream.drawn_whole` for every step."""
    # All pictures of an array have the same size.
    height, width = stream.source.size(0, stream.source.keys[0])
    for first in starts:
        yield stream.drawn_whole(range(first, first + share), height, width)


def _labelled(source: Source, batches: Generator[Batch], labels: bool) -> Generator[Batch]:
    """Yields the batches, with the labels of their examples if `labels`."""
    # Closing this generator must close the one that it reads.
    with closing(batches):
        for batch in batches:
            if labels:
                batch['label'] = source.shown_labels(batch['example']).astype(np.int32)
            yield batch


def _check_memory(pictures: np.ndarray) -> None:
    """Raises UserError if the pictures alone exceed a device's memory."""
    stats = jax.local_devices()[0].memory_stats()
    limit = (stats or {}).get('bytes_limit')
    if limit is not None and pictures.nbytes > limit:
        raise UserError(
            f'The {len(pictures):,} training pictures take {pictures.nbytes / 2**30:.1f} GiB, but '
            f"the device has {limit / 2**30:.1f} GiB. With views.on='accelerator' it must hold "
            "the whole array. Use views.on='cpu', or store the pictures smaller."
        )
