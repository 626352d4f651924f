"""A config's views, stream and batches, for tests that begin with a config."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from byol_jax.input.pipeline import view_batches
from byol_jax.input.stream import Stream
from byol_jax.sources.bad_files import BadFiles
from byol_jax.sources.base import Source
from byol_jax.views.recipes import config_views
from byol_jax.views.view import View


def views_of(config: Any) -> dict[str, View]:
    return config_views(config.views, tuple(config.data.pair_keys))


def stream_of(source: Source, config: Any) -> Stream:
    return Stream(source, views_of(config), config.seed)


def batches(source: Source, config: Any, **given: Any) -> Generator[dict[str, Any]]:
    """`view_batches` as a run of this config has them; `given` goes before."""
    bad_files = BadFiles(source, config.data.pair_keys[0], config.data.max_bad_fraction)
    own = {
        'batch_size': config.batch_size,
        'seed': config.seed,
        'workers': config.data.workers,
        'prefetch': config.data.prefetch,
        'crops_only': config.views.on == 'accelerator',
        'bad_files': bad_files,
    }
    return view_batches(source, views_of(config), **(own | given))


def views_at(stream: Stream, position: int) -> list[np.ndarray]:
    """The views at a position, made one at a time: uint8 [S, S, 3] each."""
    drawn = stream.draw([position])
    return [
        view.make(picture, view.steps(drawn[name])[0])
        for (name, view), picture in zip(
            stream.views.items(), stream.load(position).pictures, strict=True
        )
    ]


def view_of(
    view: View, picture: np.ndarray, *, seed: int, epoch: int, example: int, number: int
) -> np.ndarray:
    """The view of a picture that is drawn for these integers: uint8 [S, S, 3]."""
    (steps,) = view.steps(view.draw(seed, number, np.array([epoch]), np.array([example])))
    return view.make(picture, steps)
