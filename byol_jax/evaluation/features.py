"""Pictures of a source -> feature vectors, under one protocol for every encoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.bad_files import BadFile, bad_file, name_some
from byol_jax.sources.base import Source
from byol_jax.views.augment import center_view

Encode = Callable[[np.ndarray], np.ndarray]
Made = TypeVar('Made')


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

    def load(index: int) -> np.ndarray | BadFile:
        try:
            picture = source.load(index, key)
        except BadPicture as error:
            return bad_file(error)
        return center_view(picture, image_size, crop_fraction)

    features, indices, bad = [], [], {}
    for numbers, made in in_batches(load, range(len(source)), batch_size):
        images = [view for view in made if isinstance(view, np.ndarray)]
        for index, view in zip(numbers, made, strict=True):
            if isinstance(view, BadFile):
                bad[view.file] = view
            else:
                indices.append(index)
        if images:
            features.append(encode_some(encode, images, batch_size))
    if not features:
        raise UserError(
            f'None of {len(source):,} pictures can be read: {name_some([*bad.values()], 3)}.'
        )
    return Encoded(np.concatenate(features), np.array(indices, np.int64), [*bad.values()])


def encode_some(encode: Encode, images: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    """Features of at most batch_size pictures, in a batch filled up with zeros: float32 [B, D].

    Args:
      encode: as for `encode_source`. images: uint8 [S, S, 3] each, at least one.
    """
    full = np.zeros((batch_size, *images[0].shape), np.uint8)
    full[: len(images)] = images
    return np.asarray(encode(full), np.float32)[: len(images)]


def in_batches(
    make: Callable[[int], Made], numbers: Sequence[int], batch_size: int
) -> Iterator[tuple[Sequence[int], list[Made]]]:
    """Makes something of every number, many at a time, in order: (numbers, what was made of them).

    The next batch is made while one is used.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: tuple[Sequence[int], list[Future[Made]]] | None = None
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            following = part, [pool.submit(make, int(number)) for number in part]
            if waiting is not None:
                yield waiting[0], [future.result() for future in waiting[1]]
            waiting = following
        if waiting is not None:
            yield waiting[0], [future.result() for future in waiting[1]]
