"""Nearest neighbours by cosine: their vote, and whether one view of a picture finds the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from byol_jax.evaluation.features import checked_labels, checked_views, unit_rows

# Cosines nearer than this are equal: above the rounding of float64, below that of float32 features.
_TIE = 1e-12


class Neighbours(NamedTuple):
    """The gallery pictures most alike each query.

    Attributes:
      indices: int [Q, k] into the gallery, the nearest first.
      cosines: float32 [Q, k], in [-1, 1].
    """

    indices: np.ndarray
    cosines: np.ndarray

    def first(self, k: int) -> Neighbours:
        """The k nearest of these."""
        return Neighbours(self.indices[:, :k], self.cosines[:, :k])


def nearest(gallery: np.ndarray, queries: np.ndarray, k: int, block: int = 1024) -> Neighbours:
    """The k gallery rows of largest cosine with each query row.

    Args:
      gallery: float [N, D].
      queries: float [Q, D].
      k: at most N are found; of equal cosines the lower index comes first.
      block: queries compared at a time; bounds the memory to about 16 bytes x block x N.
    """
    gallery, queries = (unit_rows(np.asarray(x, np.float32)) for x in (gallery, queries))
    k = min(k, len(gallery))
    indices, cosines = [], []
    for start in range(0, len(queries), block):
        cosine = queries[start : start + block] @ gallery.T
        order = np.argsort(-cosine, axis=1, kind='stable')[:, :k]
        indices.append(order)
        cosines.append(np.take_along_axis(cosine, order, axis=1))
    return Neighbours(np.concatenate(indices), np.concatenate(cosines))


def classify(
    neighbours: Neighbours, gallery_labels: np.ndarray, temperature: float, classes: int
) -> np.ndarray:
    """Labels by weighted vote: a neighbour's vote is exp(cosine / temperature).

    The protocol of Wu et al. 2018 (arXiv:1805.01978, Section 3.4), whose temperature is 0.07.

    Args:
      neighbours: of Q queries.
      gallery_labels: int [N], in [0, classes).
      temperature: above 0.
      classes: C.

    Returns:
      int [Q]; of equally voted labels the lowest.
    """
    # The largest cosine is taken off so that no exponential overflows; votes keep their ratios.
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
    """Share of the queries whose label is the weighted vote of their k nearest, in [0, 1].

    Args:
      gallery: float [N, D], features of the pictures that vote; of any length.
      gallery_labels: int [N], 0 or more.
      queries: float [Q, D], features of the pictures to classify.
      query_labels: int [Q]; one that no gallery picture has is never answered rightly.
      k: neighbours that vote; all of them where there are fewer.
      temperature: above 0; see `classify`.

    Raises:
      ValueError: labels that are not whole numbers or not as many as the features, or below 0.
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
    """`knn_accuracy` of neighbours that are already found.

    Args:
      neighbours: of Q queries.
      gallery_labels: int [N], 0 or more.
      query_labels: int [Q].
      temperature: above 0; see `classify`.
    """
    classes = int(gallery_labels.max()) + 1
    predicted = classify(neighbours, gallery_labels, temperature, classes)
    return float(np.mean(predicted == query_labels))


def recall(
    view1: np.ndarray, view2: np.ndarray, ks: Sequence[int] = (1, 5), block: int = 1024
) -> dict[int, float]:
    """How often the same picture's view 2 is among the k of largest cosine with its view 1.

    Every row of view 1 is a query, all rows of view 2 are the pool. Equal cosines stand in random
    order and the expected share is given, so that collapsed features score chance, k / N.

    Args:
      view1: float [N, D], of any length.
      view2: float [N, D], row by row of the same pictures.
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


def chance_in_first(k: int, greater: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """The probability that an item is among the first k, equal ones being in random order.

    Args:
      k: at least 1.
      greater: int [N], how many others have a greater score.
      equal: int [N], how many others have the same score.

    Returns:
      float64 [N], in [0, 1]: of its equal + 1 possible places, the share that lies in the first k.
    """
    return np.clip((k - greater) / (equal + 1), 0, 1)


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the k classes of highest score, in [0, 1].

    Of equal scores every order counts in proportion, so that a constant scores k / C whatever the
    labels are. A row with a NaN or an infinity counts as wrong.

    Args:
      scores: float [N, C], N above 0.
      labels: int [N], in [0, C).
      k: at least 1; from C on the share of rows that are finite.
    """
    finite = np.isfinite(scores).all(axis=1)
    own = np.where(finite, scores[np.arange(len(scores)), labels], np.nan)[:, None]
    greater = np.sum(scores > own, axis=1)
    equal = np.maximum(np.sum(scores == own, axis=1) - 1, 0)
    return float(np.mean(np.where(finite, chance_in_first(k, greater, equal), 0)))
