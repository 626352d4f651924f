"""A tiny config, pictures of many sizes, and the feed of a run on them."""

from __future__ import annotations

import numpy as np
from streams import views_of

from byol_jax.input.feed import open_feed
from byol_jax.sources.bad_files import BadFiles
from byol_jax.sources.base import Source
from configs import default

SIZE, COUNT, BATCH = 16, 10, 8


class Mixed(Source):
    """Pictures of noise of different sizes."""

    def __len__(self) -> int:
        return COUNT

    def load(self, index: int, key: str) -> np.ndarray:
        shape = (20 + 3 * index, 40 - 2 * index, 3)
        return np.random.default_rng(index).integers(0, 256, shape, np.uint8)

    def name(self, index: int) -> str:
        return str(index)


def make_config(on: str = 'accelerator', accumulate_steps: int = 1):
    config = default.get_config()
    config.views.on, config.views.image_size = on, SIZE
    config.batch_size, config.accumulate_steps = BATCH, accumulate_steps
    config.total_epochs, config.total_steps = None, 6
    config.warmup_epochs, config.warmup_steps = None, 0
    config.data.workers = 2
    config.views.view1.solarize = 0.3
    return config


def quick(config):
    """Removes from the views the operations that take long to compile."""
    for view in (config.views.view1, config.views.view2):
        view.jitter = view.blur = 0.0
    return config


def feed_of(source: Source, config, start: int = 0, bad_files=None, **given):
    """The feed of a run with this config, over its six steps."""
    return open_feed(
        source,
        views_of(config),
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        stop_step=config.total_steps,
        on=config.views.on,
        workers=config.data.workers,
        bad_files=BadFiles(source, 'image', 0) if bad_files is None else bad_files,
        **given,
    )


# Makes TensorFlow look as if it were not installed.
WITHOUT_TENSORFLOW = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('tensorflow', 'tensorflow_datasets'):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
