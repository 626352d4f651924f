"""Nearest neighbours by cosine: k-nearest-neighbour accuracy, and recall of the other view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from byol_jax.evaluation.features import checked_labels, checked_views, unit_rows

# Cosines closer than this count as equal: above the rounding of float64, below that of float32.
_TIE = 1e-12
# Number of queries whose cosines are sorted at a time: each takes 12 bytes of every gallery row.
_SORTED = 64


class Neighbours(NamedTuple):
    """The nearest gallery pictures of each query.

    Attributes:
      indices: int [Q, k], indices into the gallery, the nearest first.
      cosines: float32 [Q, k], in [-1, 1].
    """

    indices: np.ndarray
    cosines: np.ndarray

    def first(self, k: int) -> Neighbours:
        """The k nearest of these."""
        return Neighbours(self.indices[:, :k], self.cosines[:, :k])


def nearest(gallery: np.ndarray, queries: np.ndarray, k: int, block: int = 1024) -> Neighbours:
    """Finds the k gallery rows of largest cosine with each query row.

    Args:
      gallery: float [N, D].
      queries: float [Q, D].
      k: number of neighbours; at most N are found. Of equal cosines the lower index comes first.
      block: number of queries compared at a time; limits the memory to about 5 bytes x block x N.
    """
    gallery, queries = (unit_rows(np.asarray(x, np.float32)) for x in (gallery, queries))
    k = min(k, len(gallery))
    indices = np.empty((len(queries), k), np.int64)
    cosines = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), block):
        cosine = queries[start : start + block] @ gallery.T
        for row in range(0, len(cosine), _SORTED):
            some = cosine[row : row + _SORTED]
            # Copied into the result: a view of it would keep the order of the whole gallery.
            order = np.argsort(-some, axis=1, kind='stable')[:, :k]
            place = slice(start + row, start + row + len(some))
            indices[place] = order
            cosines[place] = np.take_along_axis(some, order, axis=1)
    return Neighbours(indices, cosines)


def classify(
    neighbours: Neighbours, gallery_labels: np.ndarray, temperature: float, classes: int
) -> np.ndarray:
    """Predicts labels by a weighted vote; the weight of a neighbour is exp(cosine / temperature).

    The protocol of Wu et al. 2018 (arXiv:1805.01978, Section 3.4), whose temperature is 0.07.

    Args:
      neighbours: the neighbours of Q queries.
      gallery_labels: int [N], in [0, classes).
      temperature: above 0.
      classes: C, the number of labels.

    Returns:
      int [Q], the predicted labels; of labels with equal votes the lowest.
    """
    # Subtracting the largest cosine keeps the exponentials from overflowing and the ratios as
    # they are.
    weights = np.exp((neighbours.cosines - neighbours.cosines[:, :1]) / temperature)
    labels = gallery_labels[neighbours.indices]
    votes = np.zeros((len(labels), classes))
    for column in range(labels.shape[1]):
        np.add.at(votes, (np.arange(len(labels)), labels[:, column]), weights[:, column])
    return votes.argmax(axis=1)


def knn_accuracy(
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of the weighted vote of the k nearest neighbours, in [0, 1].

    Args:
      gallery: float [N, D], features of the pictures that vote.
      gallery_labels: int [N], at least 0.
      queries: float [Q, D], features of the pictures to classify.
      query_labels: int [Q]; a label that no gallery picture has always counts as wrong.
      k: number of neighbours that vote; all N if N is smaller.
      temperature: above 0; see `classify`.

    Raises:
      ValueError: labels are not integers, their number is not that of the features, or a gallery
        label is below 0.
    """
    gallery_labels = checked_labels(gallery_labels, len(gallery), name='gallery labels')
    query_labels = checked_labels(query_labels, len(queries), name='query labels')
    if gallery_labels.min() < 0:
        raise ValueError(f'gallery labels must be 0 or more, got {gallery_labels.min()}')
    return vote_accuracy(nearest(gallery, queries, k), gallery_labels, query_labels, temperature)


def vote_accuracy(
    neighbours: Neighbours,
    gallery_labels: np.ndarray,
    query_labels: np.ndarray,
    temperature: float,
) -> float:
    """`knn_accuracy` from neighbours that are already known.

    Args:
      neighbours: the neighbours of Q queries.
      gallery_labels: int [N], at least 0.
      query_labels: int [Q].
      temperature: above 0; see `classify`.
    """
    classes = int(gallery_labels.max()) + 1
    predicted = classify(neighbours, gallery_labels, temperature, classes)
    return float(np.mean(predicted == query_labels))


def recall(
    view1: np.ndarray, view2: np.ndarray, ks: Sequence[int] = (1, 5), block: int = 1024
) -> dict[int, float]:
    """Recall at k: how often view 2 of a picture is among the k nearest to its view 1.

    Every row of view 1 is a query and all rows of view 2 are the pool. Equal cosines count as if in
    random order (the expected value is returned), so that collapsed features score chance, k / N.

    Args:
      view1: float [N, D].
      view2: float [N, D]; row i belongs to the same picture as row i of view1.
      ks: the values of k, each at least 1.
      block: number of queries compared at a time; limits the memory to about 24 bytes x block x N.

    Returns:
      The recall at each k, in [0, 1]; 1 for k at least N.

    Raises:
      ValueError: a k is below 1, the shapes differ or are not [N, D], or there is NaN or infinity.
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


def chance_in_first(k: int, greater: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """The probability that an item is among the first k if equal items are in random order.

    Args:
      k: at least 1.
      greater: int [N], number of other items with a greater score.
      equal: int [N], number of other items with the same score.

    Returns:
      float64 [N], in [0, 1]: the share of an item's `equal + 1` possible ranks that are within k.
    """
    return np.clip((k - greater) / (equal + 1), 0, 1)


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Top-k accuracy: share of rows whose label is among the k highest scores, in [0, 1].

    Equal scores count as if in random order, so that constant scores give k / C whatever the labels
    are. A row with NaN or infinity counts as wrong.

    Args:
      scores: float [N, C], N above 0.
      labels: int [N], in [0, C).
      k: at least 1. For k >= C the result is the share of rows that are finite.
    """
    finite = np.isfinite(scores).all(axis=1)
    own = np.where(finite, scores[np.arange(len(scores)), labels], np.nan)[:, None]
    greater = np.sum(scores > own, axis=1)
    equal = np.maximum(np.sum(scores == own, axis=1) - 1, 0)
    return float(np.mean(np.where(finite, chance_in_first(k, greater, equal), 0)))
