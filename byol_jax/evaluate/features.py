"""Pictures of a source -> feature vectors, under one protocol for every encoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from byol_jax.data.augment import center_view
from byol_jax.data.bad_files import BadFile, bad_file, name_some
from byol_jax.data.sources.base import Source
from byol_jax.errors import BadPicture, UserError

Encode = Callable[[np.ndarray], np.ndarray]


class Encoded(NamedTuple):
    """Features of the pictures of a source that could be read.

    Attributes:
      features: float32 [M, D].
      indices: int [M], ascending: which examples they are of.
      bad: what could not be read, one entry a file.
    """

    features: np.ndarray
    indices: np.ndarray
    bad: list[BadFile]


def encode_source(
    encode: Encode,
    source: Source,
    key: str,
    *,
    image_size: int,
    crop_fraction: float,
    batch_size: int,
) -> Encoded:
    """Features of all pictures of a source that can be read, in order.

    Args:
      encode: uint8 [B, S, S, 3] -> float32 [B, D]; always called with B = batch_size.
      source: the pictures. key: which of an example's pictures.
      image_size: S. crop_fraction: see `augment.center_view`.
      batch_size: pictures a call; a batch of fewer is filled up with zeros.

    Raises:
      UserError: none can be read.
    """
    features, indices, bad = [], [], {}
    views = _views(source, key, image_size, crop_fraction, batch_size)
    for start, made in zip(range(0, len(source), batch_size), views, strict=True):
        images = [view for view in made if isinstance(view, np.ndarray)]
        for index, view in enumerate(made, start):
            if isinstance(view, BadFile):
                bad[view.file] = view
            else:
                indices.append(index)
        if images:
            full = np.zeros((batch_size, *images[0].shape), np.uint8)
            full[: len(images)] = images
            features.append(np.asarray(encode(full), np.float32)[: len(images)])
    if not features:
        raise UserError(
            f'None of {len(source):,} pictures can be read: {name_some([*bad.values()], 3)}.'
        )
    return Encoded(np.concatenate(features), np.array(indices, np.int64), [*bad.values()])


def _views(
    source: Source, key: str, image_size: int, crop_fraction: float, batch_size: int
) -> Iterator[list[np.ndarray | BadFile]]:
    """Batches of at most `batch_size` of all examples: uint8 [S, S, 3], or what is bad."""

    def load(index: int) -> np.ndarray | BadFile:
        try:
            picture = source.load(index, key)
        except BadPicture as error:
            return bad_file(error)
        return center_view(picture, image_size, crop_fraction)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), batch_size):
            yield list(pool.map(load, range(start, min(start + batch_size, len(source)))))
