"""How pictures get to the training step, and where they become views.

`views.on` and the source decide between three ways:

  cpu          views are made on the CPU, and the step gets them
  accelerator  the CPU decodes, crops and resizes; the step does the rest
  accelerator, data.source='array'
               the pictures lie on the device; the step gets indices and what was drawn, a few
               numbers an example, and does everything. Needs no TensorFlow

All draw the same, so all train on the same views, but for rounding.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np

from byol_jax.app.setup import Run
from byol_jax.errors import UserError
from byol_jax.input.stream import PairMaker
from byol_jax.sources.array import Array
from byol_jax.sources.bad_files import BadFiles
from byol_jax.sources.base import Source, Subset
from byol_jax.training.step import everywhere, pmap_step
from byol_jax.views.device_crop import Resize, crop_resize, resize_weights
from byol_jax.views.device_views import Possible, photometric

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches, and what makes views of them on the device.

    Attributes:
      batches: this process's share of each, in order; close it after use. With an online probe
        each has 'label' too, int32 [B], -1 where there is none.
      views: pure, `(batch, *shared) -> {'view1', 'view2'}`, uint8 [B, S, S, 3].
      shared: arrays that lie on every device.
    """

    batches: Generator[Batch]
    views: Callable[..., Batch]
    shared: tuple[Any, ...] = ()

    def compile(
        self, train_step: Callable[..., Any], monitored: bool = False
    ) -> Callable[[Any, Batch], Any]:
        """The mapped step of `make_train_step`'s pure one, which may be a monitored one."""

        def step(state: Any, batch: Batch, *shared: Any) -> Any:
            label = {'label': batch['label']} if 'label' in batch else {}
            return train_step(state, self.views(batch, *shared) | label)

        mapped = pmap_step(step, len(self.shared), monitored)
        return lambda state, batch: mapped(state, batch, *self.shared)


def open_feed(run: Run, start: int, bad_files: BadFiles) -> Feed:
    """The feed of a run from the step after `start` on.

    Args:
      bad_files: where what cannot be read is counted.

    Raises:
      UserError: the pictures do not fit on the device, or are too large for the views, or
        TensorFlow is needed and not there.
    """
    config, source = run.config, run.data.train
    if config.views.on == 'accelerator':
        pictures = pictures_in_memory(source)
        if pictures is not None:
            _check_memory(pictures)
            shared = everywhere((pictures, _weights(config, pictures.shape)))
            return Feed(_labelled(run, _indices(run, start)), array_views(config), shared)
    if importlib.util.find_spec('tensorflow') is None:
        raise UserError(
            "TensorFlow is not installed. Only data.source='array' with views.on='accelerator', "
            'and without tiles, trains without it: pip install -r requirements.txt.'
        )
    # Only here, since it imports TensorFlow.
    from byol_jax.input.pipeline import batches

    made = batches(
        source,
        config,
        start_step=start,
        stop_step=run.plan.total_steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        bad_files=bad_files,
    )
    views = crop_views(config) if config.views.on == 'accelerator' else made_views
    return Feed(_labelled(run, made), views)


def shown_views(
    run: Run, positions: Sequence[int], pictures: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The views a run makes at some positions, made where it makes them: uint8 [S, S, 3] each.

    Args:
      positions: of the stream. pictures: that are shown there (`PairMaker.load`).
    """
    config, source = run.config, run.data.train
    maker = PairMaker(source, config)
    variates = maker.variates(positions)
    own = zip(pictures, variates.swapaxes(0, 1), strict=True)
    if config.views.on == 'cpu':
        return [maker.views(*at) for at in own]
    if held_array(source) is not None:
        shown = np.stack([first for first, _ in pictures])
        height, width = shown.shape[1:3]
        drawn = maker.drawn(positions, height, width) | {'example': np.arange(len(shown))}
        views = jax.jit(array_views(config))(drawn, shown, _weights(config, shown.shape))
    else:
        crops = [maker.crops(*at) for at in own]
        first, second = map(np.stack, zip(*crops, strict=True))
        batch = {'view1': first, 'view2': second, **maker.photometric(variates)}
        views = jax.jit(crop_views(config))(batch)
    return list(zip(np.asarray(views['view1']), np.asarray(views['view2']), strict=True))


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


def _weights(config: Any, shape: tuple[int, ...]) -> Resize:
    """For pictures [N, H, W, 3]."""
    return resize_weights(max(shape[1:3]), config.views.image_size, config.views.antialias)


def made_views(batch: Batch) -> Batch:
    """The views of what `batches` yields with views.on='cpu'."""
    return {'view1': batch['view1'], 'view2': batch['view2']}


def crop_views(config: Any) -> Callable[[Batch], Batch]:
    """Makes views of what `batches` yields with views.on='accelerator'."""
    possible = {n: Possible.of(getattr(config.views, f'view{n}')) for n in (1, 2)}

    def views(batch: Batch) -> Batch:
        return {
            f'view{n}': photometric(batch[f'view{n}'], batch[f'colors{n}'], possible[n])
            for n in (1, 2)
        }

    return views


def array_views(config: Any) -> Callable[..., Batch]:
    """Makes views `(drawn, pictures, weights)` of what `PairMaker.drawn` has drawn.

    `pictures` are those on the device, uint8 [N, H, W, 3], and `weights` their `resize_weights`.
    """
    possible = {n: Possible.of(getattr(config.views, f'view{n}')) for n in (1, 2)}
    size = config.views.image_size

    def views(drawn: Batch, pictures: jax.Array, weights: Any) -> Batch:
        shown = pictures[drawn['example']]
        return {
            f'view{n}': photometric(
                crop_resize(shown, drawn[f'crop{n}'], weights, size),
                drawn[f'colors{n}'],
                possible[n],
            )
            for n in (1, 2)
        }

    return views


def _indices(run: Run, start: int) -> Generator[Batch]:
    """For every step this process's share of what `PairMaker.drawn` draws."""
    source, share = run.data.train, run.plan.process_batch_size
    maker = PairMaker(source, run.config)
    height, width = source.size(0, 'image')
    for step in range(start, run.plan.total_steps):
        first = step * run.plan.batch_size + jax.process_index() * share
        yield maker.drawn(range(first, first + share), height, width)


def _labelled(run: Run, batches: Generator[Batch]) -> Generator[Batch]:
    """Adds the labels of what is shown, if there is a probe to learn them."""
    # Closed, it closes what it reads from.
    with closing(batches):
        for batch in batches:
            if run.training.initial.online_probe is not None:
                labels = run.data.train.shown_labels(batch['example'])
                batch['label'] = labels.astype(np.int32)
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
