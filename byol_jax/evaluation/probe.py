"""What all linear probes share: the linear model, its score and the choice by held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from byol_jax.evaluation.inputs import checked_features, checked_labels
from byol_jax.evaluation.ranking import top_k


class Labelled(NamedTuple):
    """Frozen features and what is in the pictures.

    Attributes:
      features: float [N, D].
      labels: int [N], in [0, C).
    """

    features: np.ndarray
    labels: np.ndarray


class LinearModel(NamedTuple):
    """A linear classifier of features.

    Attributes:
      weights: float [D, C]. bias: float [C], of the same type.
    """

    weights: np.ndarray
    bias: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """float [N, D] -> [N, C] in the type of the weights; the highest is the predicted class."""
        # A diverged model has no scores: they become NaN without a word.
        with np.errstate(invalid='ignore', over='ignore'):
            return np.asarray(features, self.weights.dtype) @ self.weights + self.bias


class ProbeResult(NamedTuple):
    """What a linear probe found.

    Attributes:
      top1, top5: accuracy on the test set, in [0, 1]; top5 is 1 with five classes or fewer.
      chosen: the learning rate or penalty, the one of `held_out` with the highest accuracy.
      held_out: top-1 accuracy on the held-out training images, by the value tried.
      model: the classifier that was tested.
    """

    top1: float
    top5: float
    chosen: float
    held_out: dict[float, float]
    model: LinearModel


def checked_labelled(
    data: Labelled, classes: int, name: str, feature_size: int | None = None
) -> Labelled:
    """The data with labels as int64, once features and labels are known to be usable.

    Raises:
      ValueError: features not [N, D], of another D than feature_size, or with NaN or infinity; or
        labels that do not belong to them or are not in [0, classes).
    """
    features = checked_features(data.features, f'{name} features')
    if feature_size not in (None, features.shape[1]):
        raise ValueError(
            f'{name} features: {feature_size} channels are needed, got {features.shape}'
        )
    return Labelled(features, checked_labels(data.labels, len(features), classes, f'{name} labels'))


def result_on(
    test: Labelled, model: LinearModel, chosen: float, held_out: Mapping[float, float]
) -> ProbeResult:
    """The only use of the test set: the final classifier's accuracy on it."""
    scores = model.scores(test.features)
    return ProbeResult(
        top_k(scores, test.labels, 1),
        top_k(scores, test.labels, 5),
        chosen,
        dict(held_out),
        model,
    )


def best(held_out: Mapping[float, float]) -> float:
    """The value with the highest held-out accuracy, of equal ones the first."""
    return max(held_out, key=held_out.__getitem__)


def held_out_rows(labels: np.ndarray, fraction: float = 0.1, seed: int = 0) -> np.ndarray:
    """Which training images to hold out for the choice of a learning rate or penalty.

    The same share of every class, at random; a class keeps at least one image for training.

    Args:
      labels: int [N].
      fraction: above 0 and below 1. 0.1 is what the paper held out of CIFAR-10 and Food-101
        (arXiv:2006.07733, Table 10).
      seed: of the draw.

    Returns:
      bool [N], True where held out.

    Raises:
      ValueError: fraction out of range, or no class has images enough to spare one.
    """
    if not 0 < fraction < 1:
        raise ValueError(f'the held-out fraction must lie between 0 and 1, got {fraction}')
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held[rows[: min(max(round(fraction * len(rows)), 1), len(rows) - 1)]] = True
    if not held.any():
        raise ValueError('no class has two images, so none can be held out')
    return held
