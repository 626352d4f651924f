"""Views, stream and batches of a config, and invented photographs, for tests."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import numpy as np

from byol_jax.input.pipeline import view_batches
from byol_jax.input.stream import Stream
from byol_jax.settings import Settings
from byol_jax.sources.bad_files import BadFiles
from byol_jax.sources.base import Source
from byol_jax.views.recipes import config_views
from byol_jax.views.view import View
from configs import default


def views_of(config: Any) -> dict[str, View]:
    config = Settings.of(config)
    return config_views(config.views, config.data.pair_keys)


def stream_of(source: Source, config: Any) -> Stream:
    return Stream(source, views_of(config), config.seed)


def batches(source: Source, config: Any, **given: Any) -> Generator[dict[str, Any]]:
    """`view_batches` as in a run with this config; `given` overrides arguments."""
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
    """The view of a picture that these integers draw: uint8 [S, S, 3]."""
    (steps,) = view.steps(view.draw(seed, number, np.array([epoch]), np.array([example])))
    return view.make(picture, steps)


SIZE = 16


class Photographs(Source):
    """Noise of 20x24 pixels, different for each example and key; loading takes uneven time."""

    def __init__(self, count: int, keys: tuple[str, ...] = ('image',), delay: float = 0.0):
        self.count = count
        self.keys = keys
        self.delay = delay

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, key: str) -> np.ndarray:
        time.sleep(self.delay * (index % 3))
        rng = np.random.default_rng([index, self.keys.index(key)])
        return rng.integers(0, 256, (20, 24, 3), np.uint8)

    def name(self, index: int) -> str:
        return f'photograph{index}.jpg'


class Plain(Photographs):
    """Example i has one colour: (i, 255 - i, 100 x the number of the key)."""

    def load(self, index: int, key: str) -> np.ndarray:
        color = (index, 255 - index, 100 * self.keys.index(key))
        return np.full((20, 24, 3), color, np.uint8)


def make_config(batch_size: int = 4, neutral: bool = False, **data):
    """A tiny config; `neutral` leaves only the crop and the flip of the views."""
    config = default.get_config()
    config.batch_size = batch_size
    config.views.image_size = SIZE
    config.data.workers = 2
    if neutral:
        for view in (config.views.view1, config.views.view2):
            view.jitter = view.gray = view.blur = view.solarize = 0.0
    config.data.update(data)
    return config.lock()


def collect(source: Source, config, start: int, stop: int, **where) -> dict[str, np.ndarray]:
    """All batches of a span: {'view1', 'view2'} of uint8 [steps, rows, S, S, 3]."""
    made = list(batches(source, config, start_step=start, stop_step=stop, **where))
    return {key: np.stack([batch[key] for batch in made]) for key in ('view1', 'view2')}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    for key in ('view1', 'view2'):
        np.testing.assert_array_equal(a[key], b[key])
