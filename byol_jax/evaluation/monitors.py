"""What a run watches of its networks, from the features of a batch."""

from __future__ import annotations

import math

import numpy as np

from byol_jax.evaluation.spectrum import (
    alignment,
    mean_cosine,
    rank_me,
    uniformity,
    unit_std,
)

# Bounds the work on a batch, rows^2 x size: 256 rows of 2,048 values (50 ms on one core).
_MOST_WORK = 256**2 * 2048


def measure(
    representation: np.ndarray, projection: np.ndarray, prediction: np.ndarray, target: np.ndarray
) -> dict[str, float]:
    """The monitors of a batch; what each means: docs/monitors.md.

    Args:
      representation: y, float [2, N, D], of views 1 and 2 of N pictures.
      projection: z, float [2, N, P]. prediction: q(z). target: z', of the same views.

    Returns:
      representation_std: as `feature_std`, of the representation: 0 to about 1/sqrt(D).
      rankme_representation, rankme_projection: over both views, 1 to min(2 N, size). Of
        wide features fewer rows are taken, evenly spaced: 256 of 2,048 values.
      alignment: of the projections of the two views, 0 to 4.
      uniformity: of the projections, the mean of the two views', -8 to 0; not there if N is 1.
      online_target_cosine: of z and z' of the same view: how far the target lags behind.
      prediction_target_cosine: of q(z) and z' of the other view: 1 - loss / 4.
      prediction_projection_cosine: of q(z) and z: 1 where the predictor does nothing.

    Raises:
      ValueError: other shapes, or NaN or infinity.
    """
    y, other_view = _affordable(_rows(representation)), target[::-1]
    values = {
        'representation_std': unit_std(y),
        'rankme_representation': rank_me(y),
        'rankme_projection': rank_me(_affordable(_rows(projection))),
        'alignment': alignment(*projection),
        'online_target_cosine': mean_cosine(_rows(projection), _rows(target)),
        'prediction_target_cosine': mean_cosine(_rows(prediction), _rows(other_view)),
        'prediction_projection_cosine': mean_cosine(_rows(prediction), _rows(projection)),
    }
    if projection.shape[1] > 1:
        values['uniformity'] = float(np.mean([uniformity(view) for view in projection]))
    return values


def _rows(views: np.ndarray) -> np.ndarray:
    """[2, N, size] -> [2 N, size]."""
    return views.reshape(-1, views.shape[-1])


def _affordable(rows: np.ndarray) -> np.ndarray:
    """As many rows, evenly spaced, as a decomposition can take without holding a run up."""
    most = max(2, math.isqrt(_MOST_WORK // rows.shape[1]))
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]
