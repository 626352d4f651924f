"""Pictures of a source -> feature vectors, under one protocol for every encoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from byol_jax.data.augment import center_view
from byol_jax.data.sources.base import Source

Encode = Callable[[np.ndarray], np.ndarray]


def encode_source(
    encode: Encode,
    source: Source,
    key: str,
    *,
    image_size: int,
    crop_fraction: float,
    batch_size: int,
) -> np.ndarray:
    """Features of all pictures of a source, in order: float32 [N, D].

    Args:
      encode: uint8 [B, S, S, 3] -> float32 [B, D]; always called with B = batch_size.
      source: the pictures. key: which of an example's pictures.
      image_size: S. crop_fraction: see `augment.center_view`.
      batch_size: pictures a call; the last batch is filled up with zeros.
    """
    features = []
    for images in _image_batches(source, key, image_size, crop_fraction, batch_size):
        full = np.zeros((batch_size, *images.shape[1:]), np.uint8)
        full[: len(images)] = images
        features.append(np.asarray(encode(full), np.float32)[: len(images)])
    return np.concatenate(features)


def _image_batches(
    source: Source, key: str, image_size: int, crop_fraction: float, batch_size: int
) -> Iterator[np.ndarray]:
    def load(index: int) -> np.ndarray:
        return center_view(source.load(index, key), image_size, crop_fraction)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), batch_size):
            yield np.stack(list(pool.map(load, range(start, min(start + batch_size, len(source))))))
