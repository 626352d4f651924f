"""K-means clusters of features, and how well they agree with the labels."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from byol_jax.evaluation.features import checked_features, checked_labels, unit_rows


class Clusters(NamedTuple):
    """The best of several runs of k-means.

    Attributes:
      assignments: int64 [N], the cluster of each row, in [0, k).
      inertia: sum over rows of the squared distance to the centre of their cluster.
    """

    assignments: np.ndarray
    inertia: float


def k_means(features: np.ndarray, k: int, *, seed: int, restarts: int = 10) -> Clusters:
    """Lloyd's k-means of unit-length rows from k-means++ centres (Arthur and Vassilvitskii 2007).

    The same seed gives the same clusters on the same machine.

    Args:
      features: float [N, D]; rows are scaled to unit length. If fewer than k rows differ, as after
        a collapse, some clusters are empty.
      k: number of clusters, 1 to N.
      seed: seed of the first centres.
      restarts: number of runs, at least 1; the one of lowest inertia is returned.

    Raises:
      ValueError: k is out of range, the features are not [N, D], or contain NaN or infinity.
    """
    # Imported late: the import takes a second, and most runs do not need it.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    features = checked_features(features)
    if not 1 <= k <= len(features):
        raise ValueError(f'{k} clusters of {len(features)} rows: k must be 1 to {len(features)}')
    means = KMeans(k, init='k-means++', n_init=restarts, random_state=seed)
    with warnings.catch_warnings():
        # Raised if fewer than k rows differ, which is allowed here.
        warnings.simplefilter('ignore', ConvergenceWarning)
        means.fit(unit_rows(features.astype(np.float64)).astype(np.float32))
    return Clusters(means.labels_.astype(np.int64), float(means.inertia_))


def mutual_information(labels1: np.ndarray, labels2: np.ndarray) -> float:
    """Normalised mutual information of two labellings: 0 (independent) to 1 (the same groups).

    I(A; B) over the arithmetic mean of the entropies H(A) and H(B), as in scikit-learn. It does not
    depend on the names of the groups. It is not corrected for chance, so many small groups always
    score above 0. If both labellings are constant it is 1; if only one is, it is 0.

    Args:
      labels1: int [N].
      labels2: int [N].

    Raises:
      ValueError: the labels are not integers, differ in number, or there are none.
    """
    from sklearn.metrics import normalized_mutual_info_score

    labels1 = checked_labels(labels1, len(labels1))
    labels2 = checked_labels(labels2, len(labels1))
    if not len(labels1):
        raise ValueError('mutual information needs labels, got none')
    return float(normalized_mutual_info_score(labels1, labels2))


def clustering_score(
    features: np.ndarray, labels: np.ndarray, *, seed: int, k: int | None = None, restarts: int = 10
) -> float:
    """Normalised mutual information of k-means clusters with the labels, in [0, 1].

    Args:
      features: float [N, D].
      labels: int [N].
      seed: see `k_means`.
      k: number of clusters; None for the number of different labels.
      restarts: see `k_means`.

    Raises:
      ValueError: as for `k_means` and `mutual_information`.
    """
    features = checked_features(features)
    labels = checked_labels(labels, len(features))
    k = len(np.unique(labels)) if k is None else k
    return mutual_information(
        k_means(features, k, seed=seed, restarts=restarts).assignments, labels
    )
