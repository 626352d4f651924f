"""How pictures get to the training step, and where they become views.

`on` and the source decide between three ways:

  cpu          views are made on the CPU, and the step gets them
  accelerator  the CPU decodes, crops and resizes; the step does the rest
  accelerator, and the source is an array
               the pictures lie on the device; the step gets indices and what was drawn, a few
               numbers an example, and does everything. Needs no TensorFlow

All draw the same, so all train on the same views, but for rounding.
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
from byol_jax.views.view import View

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches, and what makes views of them on the device.

    Attributes:
      batches: this process's share of each, in order; close it after use.
      views: pure, `(batch, *shared) -> batch`: what `view_batches` yields, whatever the way.
      shared: NumPy trees that `views` needs on every device (`training.step.everywhere`).
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
    """The feed of a training run. Arguments it does not explain are those of `view_batches`.

    Args:
      source: the pictures.
      views: by name.
      batch_size: of all processes together.
      seed: of the order and of every random choice.
      start_step: the first step.
      stop_step: the step after the last one.
      on: where views are made, 'cpu' or 'accelerator'.
      labels: each batch has 'label' too, int32 [B], -1 where there is none.
      workers: examples prepared in parallel.
      prefetch: batches prepared ahead.
      process_index: this process's place.
      process_count: how many share each batch.
      bad_files: where what cannot be read is counted.

    Raises:
      UserError: the pictures do not fit on the device, or are too large for the views, a view
        operation has no JAX version, or TensorFlow is needed and not there.
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
    # Only here, since it imports TensorFlow.
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
    """The views a run makes at some positions, made where it makes them: uint8 [S, S, 3] each.

    Args:
      stream: of the run.
      positions: to show.
      pictures: that are shown there (`Stream.load`).
      on: where views are made, 'cpu' or 'accelerator'.
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
    """The array that a source is (part of), if it is."""
    held = source.source if isinstance(source, Subset) else source
    return held if isinstance(held, Array) else None


def pictures_in_memory(source: Source) -> np.ndarray | None:
    """The pictures of a source in its order, if it is (part of) an array: uint8 [N, H, W, 3]."""
    held = held_array(source)
    if held is None or not isinstance(source, Subset):
        return held.images if held else None
    indices = source.indices
    whole = len(indices) == len(held) and np.array_equal(indices, np.arange(len(held)))
    return held.images if whole else held.images[indices]


def crop_views(views: Mapping[str, View]) -> Callable[[Batch], Batch]:
    """Makes views, on the device, of what `view_batches` yields with crops_only."""

    def make(batch: Batch) -> Batch:
        made = {key: x for key, x in batch.items() if not key.endswith('/drawn')}
        for name, view in views.items():
            made[name] = view.finish_jax(batch[name], batch[f'{name}/drawn'])
        return made

    return make


def array_views(
    views: Mapping[str, View], shape: tuple[int, ...]
) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
    """Makes views, on the device, of what `Stream.drawn_whole` draws.

    Args:
      views: by name.
      shape: of the pictures there, [N, H, W, 3].

    Returns:
      `(drawn, pictures, *shared) -> batch`, and `shared`.
    """
    tables = {name: view.resizing.tables(max(shape[1:3])) for name, view in views.items()}
    # Views of one kind share them.
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
    """For every step this process's share of what is drawn."""
    # All pictures of an array have one size, whichever of them a view is made from.
    height, width = stream.source.size(0, stream.source.keys[0])
    for first in starts:
        yield stream.drawn_whole(range(first, first + share), height, width)


def _labelled(source: Source, batches: Generator[Batch], labels: bool) -> Generator[Batch]:
    """Adds the labels of what is shown, if they are asked for."""
    # Closed, it closes what it reads from.
    with closing(batches):
        for batch in batches:
            if labels:
                batch['label'] = source.shown_labels(batch['example']).astype(np.int32)
            yield batch


def _check_memory(pictures: np.ndarray) -> None:
    """Raises UserError if the pictures alone are more than a device holds."""
    stats = jax.local_devices()[0].memory_stats()
    limit = (stats or {}).get('bytes_limit')
    if limit is not None and pictures.nbytes > limit:
        raise UserError(
            f'The {len(pictures):,} training pictures take {pictures.nbytes / 2**30:.1f} GiB, and '
            f"the device has {limit / 2**30:.1f} GiB. With views.on='accelerator' an array lies "
            "there as a whole. Use views.on='cpu', or store the pictures smaller."
        )
