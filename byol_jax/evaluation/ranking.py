"""How often the right one is among the first k, where equal scores stand in random order."""

from __future__ import annotations

import numpy as np


def chance_in_first(k: int, greater: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """The probability that an item is among the first k, equal ones being in random order.

    Args:
      k: at least 1.
      greater: int [N], others with a greater score. equal: int [N], others with the same score.

    Returns:
      float64 [N], in [0, 1]: of its equal + 1 possible places, the share that lies in the first k.
    """
    return np.clip((k - greater) / (equal + 1), 0, 1)


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the k classes of highest score, in [0, 1].

    Of equal scores every order counts in proportion, so that a constant scores k / C whatever the
    labels are. A row with a NaN or an infinity counts as wrong.

    Args:
      scores: float [N, C], N above 0. labels: int [N], in [0, C).
      k: at least 1; from C on the share of rows that are finite.
    """
    finite = np.isfinite(scores).all(axis=1)
    own = np.where(finite, scores[np.arange(len(scores)), labels], np.nan)[:, None]
    greater = np.sum(scores > own, axis=1)
    equal = np.maximum(np.sum(scores == own, axis=1) - 1, 0)
    return float(np.mean(np.where(finite, chance_in_first(k, greater, equal), 0)))
