"""Plain squares whose colours are their labels, and encoders that see them."""

from __future__ import annotations

import numpy as np

from byol_jax.evaluation.table import evaluate
from byol_jax.settings import Settings
from byol_jax.sources.base import Source
from configs import default

CLASSES = 5


class Colours(Source):
    """Plain squares: example i has the i-th given colour."""

    def __init__(self, colours, labels=None):
        self.colours = np.asarray(colours, np.uint8)
        self.labels = labels
        self.label_names = () if labels is None else [f'class {i}' for i in range(CLASSES)]

    def __len__(self):
        return len(self.colours)

    def load(self, index, key):
        assert key == 'image'
        return np.full((20, 30, 3), self.colours[index], np.uint8)

    def name(self, index):
        return f'colour {index}'


def options_with(**changes):
    config = default.get_config()
    config.evaluate.update({'batch_size': 4, **changes})
    return Settings.of(config).evaluate


def measured(encode, data, options):
    return evaluate(encode, data, options, image_size=8)


def one_hot_of_label(images):
    """A perfect encoder for `labelled`: the red of a picture is 50 times its label."""
    return np.eye(CLASSES, dtype=np.float32)[images[:, 4, 4, 0] // 50]


def labelled(count, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % CLASSES)
    colours = np.stack([50 * labels, *rng.integers(0, 256, (2, count))], axis=1)
    return Colours(colours, labels)
