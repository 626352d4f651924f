"""Fast linear probes of frozen features: logistic regression and ridge regression.

BYOL's protocol for transfer to small data sets (arXiv:2006.07733, Appendix D.2), without
augmentation: L-BFGS with an L2 penalty that is chosen on held-out training images, then a fit to
all training images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from byol_jax.evaluation.features import Labelled, checked_labelled
from byol_jax.evaluation.neighbours import top_k

# One per decade of the range of Appendix D.2, which has 45: np.logspace(-6, 5, 45).
PENALTIES = tuple(np.logspace(-6, 5, 12).tolist())
# L-BFGS stops when no component of the gradient of the mean loss exceeds _TOLERANCE, or after
# _MAX_ITERATIONS. With scikit-learn's default of 1e-4, accuracies are off by a point
# (benchmarks/RESULTS.md).
_TOLERANCE, _MAX_ITERATIONS = 1e-6, 1000
# Products of features and weights with fewer multiplications use one thread, which takes 50 ms.
_ONE_THREAD_PRODUCTS = 1e9
# The score of a class without examples: lower than any other, but finite, because -inf would make
# the row count as diverged.
_LOWEST_SCORE = -1e30


class LinearModel(NamedTuple):
    """A linear classifier of features.

    Attributes:
      weights: float [D, C].
      bias: float [C], of the same type.
    """

    weights: np.ndarray
    bias: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """float [N, D] -> [N, C] in the type of the weights; the highest is the predicted class."""
        # The scores of a diverged model become NaN, without a warning.
        with np.errstate(invalid='ignore', over='ignore'):
            return np.asarray(features, self.weights.dtype) @ self.weights + self.bias


class ProbeResult(NamedTuple):
    """The result of a linear probe.

    Attributes:
      top1: top-1 accuracy on the test set, in [0, 1].
      top5: top-5 accuracy on the test set; 1 with five classes or fewer.
      chosen: the learning rate or penalty with the highest accuracy in `held_out`.
      held_out: top-1 accuracy on held-out training images, by learning rate or penalty.
      model: the classifier that was tested.
    """

    top1: float
    top5: float
    chosen: float
    held_out: dict[float, float]
    model: LinearModel


# A function of (features [N, D], labels [N], penalties) that yields for each penalty (weights
# [K, D], bias [K], the label of each of the K rows).
_Fit = Callable[
    [np.ndarray, np.ndarray, Sequence[float]],
    Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
]


def logistic_probe(
    train: Labelled,
    test: Labelled,
    *,
    classes: int | None = None,
    penalties: Sequence[float] = PENALTIES,
    held_out: np.ndarray | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Accuracy of logistic regression on frozen features.

    Each fit is scikit-learn's LogisticRegression(C=1 / penalty) in float64. Channels are scaled to
    mean 0 and std 1 over the fitted images (the paper does not say whether it does that). Every
    penalty is fitted to the training images without the held-out ones. The penalty with the highest
    held-out accuracy (the strongest of equal ones) is then fitted to all training images. The test
    set is not used for the choice.

    Args:
      train: features and labels to fit, with at least two different labels.
      test: features and labels to measure the accuracy on.
      classes: C; labels are in [0, C). None for the highest label of both sets + 1.
      penalties: L2 penalties to try, each above 0.
      held_out: bool [N], True for the training images that choose the penalty; None for
        `held_out_rows`. Give it if images belong together, like tiles of a picture.
      seed: seed of `held_out_rows`.

    Returns:
      The result. Its model takes features that are not standardised.

    Raises:
      ValueError: features, labels or penalties cannot be used, or no image is held out or none is
        left to fit.
    """
    return _probe(_logistic, train, test, classes, penalties, held_out, seed)


def ridge_probe(
    train: Labelled,
    test: Labelled,
    *,
    classes: int | None = None,
    penalties: Sequence[float] = PENALTIES,
    held_out: np.ndarray | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Accuracy of ridge regression to one-hot labels, which is faster than `logistic_probe`.

    Each fit is scikit-learn's Ridge(alpha=penalty); everything else is as in `logistic_probe`.

    Args:
      train: features and labels to fit.
      test: features and labels to measure the accuracy on.
      classes: C; labels are in [0, C). None for the highest label of both sets + 1.
      penalties: L2 penalties to try, each above 0.
      held_out: bool [N], True for the training images that choose the penalty; None for
        `held_out_rows`.
      seed: seed of `held_out_rows`.

    Raises:
      ValueError: as for `logistic_probe`.
    """
    return _probe(_ridge, train, test, classes, penalties, held_out, seed)


def _logistic(
    x: np.ndarray, y: np.ndarray, penalties: Sequence[float]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    # Imported late, like all of scikit-learn here: it takes a second, and most runs do not need it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(tol=_TOLERANCE, max_iter=_MAX_ITERATIONS, warm_start=True)
    # On busy cores the threads of a small product wait for each other: that took 10 times as long.
    threads = 1 if x.size * (y.max() + 1) < _ONE_THREAD_PRODUCTS else None
    for penalty in penalties:
        with warnings.catch_warnings(), threadpool_limits(threads, 'blas'):
            # The weakest penalties may not converge; their held-out accuracy decides about them.
            warnings.simplefilter('ignore', ConvergenceWarning)
            model.set_params(C=1 / penalty).fit(x, y)
        weights, bias = model.coef_, model.intercept_
        if len(weights) == 1:
            # With two classes scikit-learn has one row: the score of the second against the first.
            weights, bias = np.concatenate([-weights, weights]), np.concatenate([-bias, bias])
        # Copies, because the next fit starts from these arrays and overwrites them.
        yield weights.copy(), bias.copy(), model.classes_


def _ridge(
    x: np.ndarray, y: np.ndarray, penalties: Sequence[float]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    from sklearn.linear_model import Ridge

    labels, column = np.unique(y, return_inverse=True)
    targets = np.eye(len(labels))[column]
    for penalty in penalties:
        model = Ridge(alpha=penalty).fit(x, targets)
        yield model.coef_, model.intercept_, labels


def _probe(
    fit: _Fit,
    train: Labelled,
    test: Labelled,
    classes: int | None,
    penalties: Sequence[float],
    held_out: np.ndarray | None,
    seed: int,
) -> ProbeResult:
    if classes is None:
        classes = int(max(np.max(train.labels), np.max(test.labels))) + 1
    train = checked_labelled(train, classes, 'training')
    test = checked_labelled(test, classes, 'test', train.features.shape[1])
    held = held_out_rows(train.labels, seed=seed) if held_out is None else np.asarray(held_out)
    if held.dtype != bool or held.shape != train.labels.shape or held.all() or not held.any():
        raise ValueError(
            'held_out must be True or False for every training image, and both must occur'
        )
    if not len(penalties) or min(penalties) <= 0:
        raise ValueError(
            f'at least one penalty is needed and all must be above 0, got {list(penalties)}'
        )
    # Strongest first, because `best` takes the first of equals and each fit starts from the last.
    penalties = sorted(penalties, reverse=True)
    models = _models(fit, train, ~held, penalties, classes)
    accuracies = {
        penalty: top_k(model.scores(train.features[held]), train.labels[held], 1)
        for penalty, model in zip(penalties, models, strict=True)
    }
    chosen = best(accuracies)
    (model,) = _models(fit, train, np.ones(len(held), bool), [chosen], classes)
    return result_on(test, model, chosen, accuracies)


def _models(
    fit: _Fit, train: Labelled, rows: np.ndarray, penalties: Sequence[float], classes: int
) -> Iterator[LinearModel]:
    """Fits a model for each penalty to standardised rows; the models take features as they are."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    x = scaler.fit_transform(train.features[rows].astype(np.float64))
    for fitted, fitted_bias, labels in fit(x, train.labels[rows], penalties):
        weights, bias = np.zeros((x.shape[1], classes)), np.full(classes, _LOWEST_SCORE)
        weights[:, labels] = fitted.T / scaler.scale_[:, None]
        bias[labels] = fitted_bias - scaler.mean_ @ weights[:, labels]
        yield LinearModel(weights, bias)


def result_on(
    test: Labelled, model: LinearModel, chosen: float, held_out: Mapping[float, float]
) -> ProbeResult:
    """Measures a chosen classifier on the test set.

    Args:
      test: features and labels of the test set.
      model: the classifier.
      chosen: its learning rate or penalty.
      held_out: held-out accuracies by learning rate or penalty.
    """
    scores = model.scores(test.features)
    return ProbeResult(
        top_k(scores, test.labels, 1),
        top_k(scores, test.labels, 5),
        chosen,
        dict(held_out),
        model,
    )


def best(held_out: Mapping[float, float]) -> float:
    """The learning rate or penalty with the highest held-out accuracy; the first of equal ones."""
    return max(held_out, key=held_out.__getitem__)


def held_out_rows(labels: np.ndarray, fraction: float = 0.1, seed: int = 0) -> np.ndarray:
    """Chooses training images to hold out, to choose a learning rate or penalty with.

    They are drawn at random, the same share of every class. Every class keeps at least one image.

    Args:
      labels: int [N].
      fraction: share to hold out, above 0 and below 1. The paper holds out 0.1 of CIFAR-10 and
        Food-101 (arXiv:2006.07733, Table 10).
      seed: seed of the draw.

    Returns:
      bool [N], True for held-out images.

    Raises:
      ValueError: the fraction is out of range, or no class has two images.
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
