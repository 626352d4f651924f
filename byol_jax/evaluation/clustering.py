"""Do the features fall into groups by themselves, and are these the labels'?"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from byol_jax.evaluation.features import checked_features, checked_labels, unit_rows


class Clusters(NamedTuple):
    """The best of several k-means.

    Attributes:
      assignments: int64 [N], in [0, k): which cluster a row is in.
      inertia: sum over rows of the squared distance to their cluster's centre, on the unit sphere.
    """

    assignments: np.ndarray
    inertia: float


def k_means(features: np.ndarray, k: int, *, seed: int, restarts: int = 10) -> Clusters:
    """Lloyd's k-means of unit-length rows from k-means++ centres (Arthur and Vassilvitskii 2007).

    The same seed gives the same clusters on the same machine.

    Args:
      features: float [N, D], of any length. Where fewer than k rows differ, as after a collapse,
        some clusters stay empty.
      k: clusters, 1 to N.
      seed: of the first centres.
      restarts: of which the one of lowest inertia is taken; at least 1.

    Raises:
      ValueError: k out of range, not [N, D], or NaN or infinity in the features.
    """
    # Imported late: it takes a second, for nothing in most runs.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    features = checked_features(features)
    if not 1 <= k <= len(features):
        raise ValueError(f'{k} clusters of {len(features)} rows: k must be 1 to {len(features)}')
    means = KMeans(k, init='k-means++', n_init=restarts, random_state=seed)
    with warnings.catch_warnings():
        # It warns of fewer different rows than clusters, which the caller is told above.
        warnings.simplefilter('ignore', ConvergenceWarning)
        means.fit(unit_rows(features.astype(np.float64)).astype(np.float32))
    return Clusters(means.labels_.astype(np.int64), float(means.inertia_))


def mutual_information(labels1: np.ndarray, labels2: np.ndarray) -> float:
    """Normalised mutual information of two labellings: 0 (independent) to 1 (the same groups).

    I(A; B) over the arithmetic mean of the entropies H(A) and H(B), as scikit-learn has it. What
    the groups are called does not matter. Not corrected for chance: many small groups score above
    0 whatever they are.

    Args:
      labels1: int [N]. Where both are constant the result is 1, where one is, 0.
      labels2: int [N].

    Raises:
      ValueError: not whole numbers, not as many of each, or none.
    """
    from sklearn.metrics import normalized_mutual_info_score

    labels1 = checked_labels(labels1, len(labels1))
    labels2 = checked_labels(labels2, len(labels1))
    if not len(labels1):
        raise ValueError('mutual information of no labels')
    return float(normalized_mutual_info_score(labels1, labels2))


def clustering_score(
    features: np.ndarray, labels: np.ndarray, *, seed: int, k: int | None = None, restarts: int = 10
) -> float:
    """Normalised mutual information of k-means clusters with the labels, in [0, 1].

    Args:
      features: float [N, D].
      labels: int [N].
      seed: see `k_means`.
      k: clusters; None for as many as there are different labels.
      restarts: see `k_means`.

    Raises:
      ValueError: as `k_means` and `mutual_information`.
    """
    features = checked_features(features)
    labels = checked_labels(labels, len(features))
    k = len(np.unique(labels)) if k is None else k
    return mutual_information(
        k_means(features, k, seed=seed, restarts=restarts).assignments, labels
    )
