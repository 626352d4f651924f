"""Nearest neighbours: what does an encoder find alike?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from byol_jax.evaluation.spectrum import unit_rows


class Neighbours(NamedTuple):
    """The gallery pictures most alike each query.

    Attributes:
      indices: int [Q, k] into the gallery, the nearest first.
      cosines: float32 [Q, k], in [-1, 1].
    """

    indices: np.ndarray
    cosines: np.ndarray


def nearest(gallery: np.ndarray, queries: np.ndarray, k: int, block: int = 1024) -> Neighbours:
    """The k gallery rows of largest cosine with each query row.

    Args:
      gallery: float [N, D]. queries: float [Q, D].
      k: at most N; of equal cosines the lower index comes first.
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
