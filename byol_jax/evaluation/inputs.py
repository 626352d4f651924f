"""What every measure asks of its features and labels, and says when it does not get it."""

from __future__ import annotations

import numpy as np


def checked_features(features: np.ndarray, name: str = 'features', ndim: int = 2) -> np.ndarray:
    """The features as they are, once they are known to be usable.

    Args:
      features: real numbers of any type, [N, D] or with more axes.
      name: of the features, for the message. ndim: the number of axes they must have.

    Raises:
      ValueError: another number of axes, nothing in them, or a NaN or an infinity.
    """
    features = np.asarray(features)
    if features.ndim != ndim or not features.size:
        raise ValueError(
            f'{name}: {ndim} axes with something in each are needed, got shape {features.shape}'
        )
    finite = np.isfinite(features).reshape(len(features), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f'{name}: {np.sum(~finite):,} of {len(features):,} hold NaN or infinity, the first at '
            f'index {int(np.argmin(finite))}'
        )
    return features


def checked_views(view1: np.ndarray, view2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of two views of the same pictures, float [N, D] each, row by row the same picture.

    Raises:
      ValueError: as `checked_features`, or the shapes differ.
    """
    view1, view2 = checked_features(view1, 'view 1'), checked_features(view2, 'view 2')
    if view1.shape != view2.shape:
        raise ValueError(f'the views have different shapes: {view1.shape} and {view2.shape}')
    return view1, view2


def checked_labels(
    labels: np.ndarray, count: int, classes: int | None = None, name: str = 'labels'
) -> np.ndarray:
    """Labels as int64 [count], in [0, classes) where `classes` is given.

    Raises:
      ValueError: not whole numbers, not as many as the features, or outside the range.
    """
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f'{name}: {count:,} whole numbers are needed, got {labels.dtype} {labels.shape}'
        )
    if classes is not None and count and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f'{name}: in 0 to {classes - 1}, got {labels.min()} to {labels.max()}')
    return labels.astype(np.int64)
