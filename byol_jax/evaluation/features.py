"""Encodes pictures to features, in the same way for every encoder, and checks features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from byol_jax.cores import usable_cores
from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.bad_files import BadFile, bad_file, name_some
from byol_jax.sources.base import Progress, Source, check_picture, no_progress
from byol_jax.views.crop import center_view

# uint8 [B, S, S, 3] -> float32 [B, D].
Encode = Callable[[np.ndarray], np.ndarray]
Made = TypeVar('Made')


class Encoded(NamedTuple):
    """Features of the readable pictures of a source.

    Attributes:
      features: float32 [M, D].
      indices: int [M], ascending, the examples that the features belong to.
      bad: files that could not be read, one entry per file.
    """

    features: np.ndarray
    indices: np.ndarray
    bad: list[BadFile]


class Labelled(NamedTuple):
    """Features with labels.

    Attributes:
      features: float [N, D].
      labels: int [N], in [0, C).
    """

    features: np.ndarray
    labels: np.ndarray


def encode_source(
    encode: Encode,
    source: Source,
    key: str,
    *,
    image_size: int,
    crop_fraction: float = 0.875,
    antialias: bool = True,
    batch_size: int = 64,
    progress: Progress = no_progress,
) -> Encoded:
    """Encodes the centre crops of all readable pictures of a source, in order.

    Args:
      encode: maps uint8 [B, S, S, 3] to float32 [B, D]; always called with B = batch_size.
      source: the pictures.
      key: key of the picture to take of each example.
      image_size: S, the side of the crop after resizing, in pixels.
      crop_fraction: the crop's share of the shorter side, in (0, 1]; see `crop.center_view`.
      antialias: whether to smooth what is shrunk; as in training (`View.antialias`).
      batch_size: pictures per call; the last batch is padded with zeros.
      progress: called after each batch with ('features', pictures done, pictures in all).

    Raises:
      UserError: no picture can be read.
    """

    def load(index: int) -> np.ndarray | BadFile:
        try:
            picture = source.load(index, key)
        except BadPicture as error:
            return bad_file(error)
        check_picture(source, index, picture)
        return center_view(picture, image_size, crop_fraction, antialias)

    features, indices, bad = [], [], {}
    done = 0
    for numbers, made in in_batches(load, range(len(source)), batch_size):
        images = [view for view in made if isinstance(view, np.ndarray)]
        for index, view in zip(numbers, made, strict=True):
            if isinstance(view, BadFile):
                bad[view.file] = view
            else:
                indices.append(index)
        if images:
            features.append(encode_some(encode, images, batch_size))
        done += len(numbers)
        progress('features', done, len(source))
    if not features:
        raise UserError(
            f'None of {len(source):,} pictures can be read: {name_some([*bad.values()], 3)}.'
        )
    return Encoded(np.concatenate(features), np.array(indices, np.int64), [*bad.values()])


def encode_some(encode: Encode, images: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    """Encodes a few pictures in one batch that is padded with zeros.

    Args:
      encode: as for `encode_source`.
      images: 1 to batch_size pictures, uint8 [S, S, 3] each.
      batch_size: size of the padded batch.

    Returns:
      float32 [len(images), D].
    """
    full = np.zeros((batch_size, *images[0].shape), np.uint8)
    full[: len(images)] = images
    return np.asarray(encode(full), np.float32)[: len(images)]


def in_batches(
    make: Callable[[int], Made], numbers: Sequence[int], batch_size: int
) -> Iterator[tuple[Sequence[int], list[Made]]]:
    """Calls a function for every number on several threads, and yields the results in batches.

    The next batch is computed while the caller uses the current one.

    Args:
      make: the function, called once with each number.
      numbers: the numbers.
      batch_size: numbers per batch; the last batch may have fewer.

    Yields:
      (numbers, results) of each batch, in order.
    """
    with ThreadPoolExecutor(usable_cores()) as pool:
        waiting: tuple[Sequence[int], list[Future[Made]]] | None = None
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            following = part, [pool.submit(make, int(number)) for number in part]
            if waiting is not None:
                yield waiting[0], [future.result() for future in waiting[1]]
            waiting = following
        if waiting is not None:
            yield waiting[0], [future.result() for future in waiting[1]]


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Scales the rows of float [N, D] to length 1, in the same dtype; rows of zeros stay zero."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def checked_features(features: np.ndarray, name: str = 'features', ndim: int = 2) -> np.ndarray:
    """Checks features and returns them unchanged.

    Args:
      features: real numbers of any dtype, [N, D] or with more axes.
      name: name of the features, for the message.
      ndim: the number of axes they must have.

    Raises:
      ValueError: the number of axes is wrong, an axis is empty, or there is NaN or infinity.
    """
    features = np.asarray(features)
    if features.ndim != ndim or not features.size:
        raise ValueError(
            f'{name}: {ndim} axes are needed, none of them empty; got shape {features.shape}'
        )
    finite = np.isfinite(features).reshape(len(features), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f'{name}: {np.sum(~finite):,} of {len(features):,} hold NaN or infinity, the first at '
            f'index {int(np.argmin(finite))}'
        )
    return features


def checked_views(view1: np.ndarray, view2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Checks the features of two views of the same pictures and returns them unchanged.

    Args:
      view1: float [N, D].
      view2: float [N, D]; row i belongs to the same picture as row i of view1.

    Raises:
      ValueError: as for `checked_features`, or the shapes differ.
    """
    view1, view2 = checked_features(view1, 'view 1'), checked_features(view2, 'view 2')
    if view1.shape != view2.shape:
        raise ValueError(f'the views have different shapes: {view1.shape} and {view2.shape}')
    return view1, view2


def checked_labels(
    labels: np.ndarray, count: int, classes: int | None = None, name: str = 'labels'
) -> np.ndarray:
    """Checks labels and returns them as int64 [count].

    Args:
      labels: integers of any dtype.
      count: how many there must be.
      classes: C; the labels must be in [0, C). None allows any integers.
      name: name of the labels, for the message.

    Raises:
      ValueError: the labels are not integers, their number is wrong, or one is out of range.
    """
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f'{name}: {count:,} integers are needed, got {labels.dtype} {labels.shape}'
        )
    if classes is not None and count and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f'{name} must be 0 to {classes - 1}, got {labels.min()} to {labels.max()}')
    return labels.astype(np.int64)


def checked_labelled(
    data: Labelled, classes: int, name: str, feature_size: int | None = None
) -> Labelled:
    """Checks features and labels, and returns them with the labels as int64.

    Args:
      data: the features and labels.
      classes: C; the labels must be in [0, C).
      name: name of the data, for the message.
      feature_size: D that the features must have; None allows any.

    Raises:
      ValueError: the features are not [N, D], have another D, or contain NaN or infinity; or the
        number of labels is wrong or one is not in [0, C).
    """
    features = checked_features(data.features, f'{name} features')
    if feature_size not in (None, features.shape[1]):
        raise ValueError(
            f'{name} features: {feature_size} channels are needed, got {features.shape}'
        )
    return Labelled(features, checked_labels(data.labels, len(features), classes, f'{name} labels'))
