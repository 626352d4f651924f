"""Unreadable pictures, and what a run records about them."""

from __future__ import annotations

from collections import Counter

import numpy as np
from streams import Photographs

from byol_jax.errors import BadPicture
from byol_jax.sources.bad_files import BadFiles
from byol_jax.sources.base import Source


class Damaged(Photographs):
    """Photographs, of which those with the given numbers are unreadable."""

    def __init__(self, count: int, bad: set[int], keys: tuple[str, ...] = ('image',), **more):
        super().__init__(count, keys, **more)
        self.bad = bad
        self.loads: Counter[int] = Counter()

    def load(self, index: int, key: str) -> np.ndarray:
        self.loads[index] += 1
        if index in self.bad and key == self.keys[-1]:
            raise BadPicture(self.name(index), 'cannot be decoded: broken data')
        return super().load(index, key)


def counted(source: Source, config) -> BadFiles:
    return BadFiles(source, config.data.pair_keys[0], config.data.max_bad_fraction)


def files(bad_files: BadFiles) -> set[str]:
    return {bad.file for bad in bad_files.since(0)}
