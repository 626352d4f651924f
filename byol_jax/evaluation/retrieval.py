"""Does one view of a picture find the other among the views of many pictures?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from byol_jax.evaluation.inputs import checked_views
from byol_jax.evaluation.ranking import chance_in_first
from byol_jax.evaluation.spectrum import unit_rows

# Cosines nearer than this are equal: above the rounding of float64, below that of float32 features.
_TIE = 1e-12


def recall(
    view1: np.ndarray, view2: np.ndarray, ks: Sequence[int] = (1, 5), block: int = 1024
) -> dict[int, float]:
    """How often the same picture's view 2 is among the k of largest cosine with its view 1.

    Every row of view 1 is a query, all rows of view 2 are the pool. Equal cosines stand in random
    order and the expected share is given, so that collapsed features score chance, k / N.

    Args:
      view1, view2: float [N, D], of any length; row by row the same picture.
      ks: each at least 1.
      block: queries compared at a time; bounds the memory to about 24 bytes x block x N.

    Returns:
      For each k the recall at k, in [0, 1]; 1 from k = N on.

    Raises:
      ValueError: a k below 1, shapes that differ or are not [N, D], or NaN or infinity.
    """
    if min(ks) < 1:
        raise ValueError(f'recall at k needs k of at least 1, got {min(ks)}')
    queries, pool = (unit_rows(z.astype(np.float64)) for z in checked_views(view1, view2))
    hits = dict.fromkeys(ks, 0.0)
    for start in range(0, len(queries), block):
        cosines = queries[start : start + block] @ pool.T
        rows = np.arange(len(cosines))
        own = cosines[rows, start + rows][:, None]
        greater = np.sum(cosines > own + _TIE, axis=1)
        equal = np.sum(cosines >= own - _TIE, axis=1) - greater - 1
        for k in hits:
            hits[k] += float(chance_in_first(k, greater, equal).sum())
    return {k: count / len(queries) for k, count in hits.items()}
