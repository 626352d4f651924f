"""Fast linear probes of fixed features: logistic regression and ridge regression.

BYOL's protocol for transfer to small data sets (arXiv:2006.07733, Appendix D.2): L-BFGS with an L2
penalty, chosen on held-out training images, then a fit to all training images. No augmentation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from byol_jax.evaluation.features import Labelled, checked_labelled
from byol_jax.evaluation.neighbours import top_k

# One a decade of the range of Appendix D.2, which has 45: np.logspace(-6, 5, 45).
PENALTIES = tuple(np.logspace(-6, 5, 12).tolist())
# L-BFGS ends where no component of the gradient of the mean loss exceeds this, or after so many
# iterations. At scikit-learn's own 1e-4 accuracies are off by a point (benchmarks/RESULTS.md).
_GRADIENT, _ITERATIONS = 1e-6, 1000
# Multiplications of a product of features and weights that one thread does in 50 ms.
_SMALL = 1e9
# A score that no class with examples can fall to; -inf would make a row count as diverged.
_NEVER = -1e30


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
        # A diverged model has no scores: they become NaN without a warning.
        with np.errstate(invalid='ignore', over='ignore'):
            return np.asarray(features, self.weights.dtype) @ self.weights + self.bias


class ProbeResult(NamedTuple):
    """What a linear probe found.

    Attributes:
      top1: accuracy on the test set, in [0, 1].
      top5: the same for the five highest scores; 1 with five classes or fewer.
      chosen: the learning rate or penalty, the one of `held_out` with the highest accuracy.
      held_out: top-1 accuracy on the held-out training images, by the value tried.
      model: the classifier that was tested.
    """

    top1: float
    top5: float
    chosen: float
    held_out: dict[float, float]
    model: LinearModel


# (features [N, D], labels [N], penalties) -> for each penalty (weights [K, D], bias [K], the label
# of each of the K rows).
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
    """Accuracy of logistic regression on frozen features, its penalty chosen without the test set.

    Each fit is scikit-learn's LogisticRegression(C=1 / penalty) in float64. Channels are brought
    to mean 0 and std 1 by the images that are fitted (the paper does not say whether it does).
    Every penalty is fitted to the training images except the held-out ones; that of the highest
    held-out accuracy, of equal ones the strongest, is fitted again to all of them.

    Args:
      train: features and labels to fit, at least two labels.
      test: features and labels to measure the accuracy on.
      classes: C; the labels are in [0, C). None: up to the highest label of the two.
      penalties: each above 0.
      held_out: bool [N], True for training images to choose by; None for `held_out_rows`. Give it
        where images belong together, as tiles of a picture do.
      seed: of `held_out_rows`.

    Returns:
      The result; its model takes features as they are, not standardised.

    Raises:
      ValueError: unusable features, labels or penalties, or nothing held out or left to train on.
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
    """As `logistic_probe` with scikit-learn's Ridge(alpha=penalty) on one-hot labels: the fastest.

    Args:
      train: features and labels to fit.
      test: features and labels to measure the accuracy on.
      classes: C; the labels are in [0, C). None: up to the highest label of the two.
      penalties: each above 0.
      held_out: bool [N], True for training images to choose by; None for `held_out_rows`.
      seed: of `held_out_rows`.

    Raises:
      ValueError: as `logistic_probe`.
    """
    return _probe(_ridge, train, test, classes, penalties, held_out, seed)


def _logistic(
    x: np.ndarray, y: np.ndarray, penalties: Sequence[float]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    # Imported late, as everywhere here: it takes a second, for nothing in most runs.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(tol=_GRADIENT, max_iter=_ITERATIONS, warm_start=True)
    # On busy cores the threads of a small product wait for each other: 10 times as long.
    threads = 1 if x.size * (y.max() + 1) < _SMALL else None
    for penalty in penalties:
        with warnings.catch_warnings(), threadpool_limits(threads, 'blas'):
            # The weakest penalties may not get there; the accuracy on held-out images judges them.
            warnings.simplefilter('ignore', ConvergenceWarning)
            model.set_params(C=1 / penalty).fit(x, y)
        weights, bias = model.coef_, model.intercept_
        if len(weights) == 1:
            # Of two classes there is one row of scores, for the second against the first.
            weights, bias = np.concatenate([-weights, weights]), np.concatenate([-bias, bias])
        # Copies: the next fit starts from these arrays.
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
            'held_out must say of every training image True or False, and both of some'
        )
    if not len(penalties) or min(penalties) <= 0:
        raise ValueError(f'penalties must be above 0 and at least one, got {list(penalties)}')
    # From the strongest on: `best` takes the first of equals, and each fit starts from the last.
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
    """A model for each penalty, fitted to standardised rows, of features as they are."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    x = scaler.fit_transform(train.features[rows].astype(np.float64))
    for fitted, fitted_bias, labels in fit(x, train.labels[rows], penalties):
        weights, bias = np.zeros((x.shape[1], classes)), np.full(classes, _NEVER)
        weights[:, labels] = fitted.T / scaler.scale_[:, None]
        bias[labels] = fitted_bias - scaler.mean_ @ weights[:, labels]
        yield LinearModel(weights, bias)


def result_on(
    test: Labelled, model: LinearModel, chosen: float, held_out: Mapping[float, float]
) -> ProbeResult:
    """The result of a classifier: the only use of the test set is its accuracy there.

    Args:
      test: features and labels.
      model: the classifier.
      chosen: the value it was made with.
      held_out: held-out accuracies by the value tried.
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
