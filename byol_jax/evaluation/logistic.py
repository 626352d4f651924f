"""Fast linear probes of fixed features: logistic regression by L-BFGS, and ridge regression.

BYOL's protocol for transfer to small data sets (arXiv:2006.07733, Appendix D.2): L-BFGS with an L2
penalty, chosen on held-out training images, then a fit to all training images. No augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from byol_jax.evaluation.probe import (
    Labelled,
    LinearModel,
    ProbeResult,
    best,
    checked_labelled,
    held_out_rows,
    result_on,
)
from byol_jax.evaluation.ranking import top_k

# One a decade of the range of Appendix D.2, which has 45: np.logspace(-6, 5, 45).
PENALTIES = tuple(np.logspace(-6, 5, 12).tolist())
# L-BFGS ends where no component of the gradient of the mean loss exceeds this, or after so many
# iterations. Weights then agree with scikit-learn's to 1e-3 at a penalty of 1.
_GRADIENT, _ITERATIONS = 1e-7, 1000

# (features [N, D], labels [N], rows to fit bool [N], penalties) -> a model for each.
_Path = Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[float]], list[LinearModel]]


def fit_logistic(data: Labelled, classes: int, penalty: float) -> LinearModel:
    """Multinomial logistic regression, in float64.

    Minimises sum_i cross-entropy(x_i W + b, y_i) + penalty / 2 ||W||^2, which is scikit-learn's
    LogisticRegression(C=1 / penalty); b is not penalised. W is the solution whose rows sum to 0.

    Args:
      data: features of any scale; L-BFGS is quickest where channels have mean 0 and std 1.
      classes: C. A class without an example gets a low bias.
      penalty: above 0.

    Raises:
      ValueError: unusable features or labels, or a penalty not above 0.
    """
    data = checked_labelled(data, classes, 'training')
    rows = np.ones(len(data.labels), bool)
    (model,) = _logistic_path(
        classes, data.features.astype(np.float64), data.labels, rows, [penalty]
    )
    return model


def fit_ridge(data: Labelled, classes: int, penalty: float) -> LinearModel:
    """Ridge regression on one-hot labels in closed form, in float64.

    Minimises sum_i ||x_i W + b - onehot(y_i)||^2 + penalty ||W||^2, which is scikit-learn's
    Ridge(alpha=penalty); b is not penalised.

    Args:
      data: features of any scale. classes: C.
      penalty: above 0.

    Raises:
      ValueError: unusable features or labels, or a penalty not above 0.
    """
    data = checked_labelled(data, classes, 'training')
    rows = np.ones(len(data.labels), bool)
    (model,) = _ridge_path(classes, data.features.astype(np.float64), data.labels, rows, [penalty])
    return model


def logistic_probe(
    train: Labelled,
    test: Labelled,
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    held_out: np.ndarray | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Accuracy of logistic regression on frozen features, its penalty chosen without the test set.

    Channels are brought to mean 0 and std 1 by the images that are fitted (the paper does not say
    whether it does). Every penalty is fitted to the training images but the held-out ones; that of
    the highest held-out accuracy, of equal ones the strongest, is fitted again to all of them.

    Args:
      train, test: features and labels, the labels in [0, classes).
      classes: C.
      penalties: see `fit_logistic`; each above 0.
      held_out: bool [N], True for training images to choose by; None for `held_out_rows`. Give it
        where images belong together, as tiles of a picture do.
      seed: of `held_out_rows`.

    Returns:
      The result; its model takes features as they are, not standardised.

    Raises:
      ValueError: unusable features, labels or penalties, or nothing held out or left to train on.
    """
    return _probe(partial(_logistic_path, classes), train, test, classes, penalties, held_out, seed)


def ridge_probe(
    train: Labelled,
    test: Labelled,
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    held_out: np.ndarray | None = None,
    seed: int = 0,
) -> ProbeResult:
    """As `logistic_probe` with ridge regression, in one pass over the features: the fastest."""
    return _probe(partial(_ridge_path, classes), train, test, classes, penalties, held_out, seed)


def _probe(
    path: _Path,
    train: Labelled,
    test: Labelled,
    classes: int,
    penalties: Sequence[float],
    held_out: np.ndarray | None,
    seed: int,
) -> ProbeResult:
    train = checked_labelled(train, classes, 'training')
    test = checked_labelled(test, classes, 'test', train.features.shape[1])
    held = held_out_rows(train.labels, seed=seed) if held_out is None else np.asarray(held_out)
    if held.dtype != bool or held.shape != train.labels.shape or held.all() or not held.any():
        raise ValueError(
            'held_out must say of every training image True or False, and both of some'
        )
    # From the strongest on: `best` takes the first of equals, and each fit starts from the last.
    penalties = sorted(penalties, reverse=True)
    x, _, _ = _standardised(train.features, ~held)
    models = path(x, train.labels, ~held, penalties)
    accuracies = {
        penalty: top_k(model.scores(x[held]), train.labels[held], 1)
        for penalty, model in zip(penalties, models, strict=True)
    }
    chosen = best(accuracies)
    everything = np.ones(len(held), bool)
    x, mean, scale = _standardised(train.features, everything)
    (model,) = path(x, train.labels, everything, [chosen])
    weights = model.weights / scale[:, None]
    model = LinearModel(weights, model.bias - mean @ weights)
    return result_on(test, model, chosen, accuracies)


def _standardised(
    features: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All features with mean 0 and std 1 over the rows; float64 [N, D], and mean and std [D]."""
    x = features.astype(np.float64)
    mean, std = x[rows].mean(axis=0), x[rows].std(axis=0)
    # A constant channel, but for its rounding, says nothing: it is left near 0, not blown up.
    scale = np.where(std > 1e-7 * np.abs(mean), std, 1.0)
    return (x - mean) / scale, mean, scale


def _ridge_path(
    classes: int, x: np.ndarray, y: np.ndarray, rows: np.ndarray, penalties: Sequence[float]
) -> list[LinearModel]:
    _check_penalties(penalties)
    x, targets = x[rows], np.eye(classes)[y[rows]]
    mean, share = x.mean(axis=0), targets.mean(axis=0)
    centred = x - mean
    # The Gram matrix in its own axes: one decomposition serves every penalty.
    values, axes = np.linalg.eigh(centred.T @ centred)
    projected = axes.T @ (centred.T @ (targets - share))
    models = []
    for penalty in penalties:
        weights = axes @ (projected / (np.maximum(values, 0) + penalty)[:, None])
        models.append(LinearModel(weights, share - mean @ weights))
    return models


def _logistic_path(
    classes: int, x: np.ndarray, y: np.ndarray, rows: np.ndarray, penalties: Sequence[float]
) -> list[LinearModel]:
    _check_penalties(penalties)
    models = []
    # Rows are left out by a weight of 0, so that shapes, and what is compiled, stay the same.
    with jax.enable_x64(True):
        params = {'weights': jnp.zeros((x.shape[1], classes)), 'bias': jnp.zeros(classes)}
        data = (jnp.asarray(x), jnp.asarray(y), jnp.asarray(rows, jnp.float64))
        for penalty in penalties:
            params = _minimise(params, *data, jnp.asarray(penalty, jnp.float64))
            models.append(LinearModel(np.asarray(params['weights']), np.asarray(params['bias'])))
    return models


@jax.jit
def _minimise(params: Any, x: jax.Array, y: jax.Array, rows: jax.Array, penalty: jax.Array) -> Any:
    """L-BFGS from params on the mean of `fit_logistic`'s objective over rows of weight 1."""

    def objective(params: Any) -> jax.Array:
        scores = x @ params['weights'] + params['bias']
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, y)
        squares = jnp.sum(params['weights'] ** 2)
        return (jnp.sum(rows * losses) + penalty / 2 * squares) / jnp.sum(rows)

    # Ten past steps, as scikit-learn's (scipy.optimize.minimize's maxcor), and optax's line search.
    optimizer = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: Any) -> Any:
        params, state, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, optax.tree.norm(grad, ord=jnp.inf)

    def unfinished(carry: Any) -> jax.Array:
        _, state, gradient = carry
        return (optax.tree.get(state, 'count') < _ITERATIONS) & (gradient > _GRADIENT)

    start = (params, optimizer.init(params), jnp.asarray(jnp.inf, x.dtype))
    return jax.lax.while_loop(unfinished, step, start)[0]


def _check_penalties(penalties: Sequence[float]) -> None:
    if not len(penalties) or min(penalties) <= 0:
        raise ValueError(f'penalties must be above 0 and at least one, got {list(penalties)}')
