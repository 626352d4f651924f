"""BYOL's linear evaluation: a classifier of frozen features, trained by SGD.

The protocol of the paper (arXiv:2006.07733, Appendix C.1) and of DeepMind's code
(google-deepmind/deepmind-research, byol/ at f5de0ed): cross-entropy, SGD with Nesterov momentum
0.9 for 80 epochs of batches of 1024, no regularisation; five learning rates, of which held-out
training images choose one. Silent in the paper and taken from the code: a cosine from the base
learning rate x batch / 256 to 0 without warm-up, and how the classifier starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from byol_jax.evaluation.features import Labelled, checked_labelled
from byol_jax.evaluation.neighbours import top_k
from byol_jax.evaluation.probes import LinearModel, ProbeResult, best, result_on
from byol_jax.sources.base import Progress, no_progress

# Base learning rates, at batch 256 (Appendix C.1; byol/configs/eval.py, line 43, has 0.2 alone).
LEARNING_RATES = (0.4, 0.3, 0.2, 0.1, 0.05)

# The number of an epoch, from 0 -> its features and labels, in the order to train on, in parts of
# any size. Every epoch has the same number of them; the augmentation is the caller's.
Epoch = Callable[[int], Iterable[Labelled]]


def linear_evaluation(
    epoch: Epoch,
    examples: int,
    held_out: Labelled,
    test: Labelled,
    *,
    classes: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 80,
    batch_size: int = 1024,
    momentum: float = 0.9,
    seed: int = 0,
    progress: Progress = no_progress,
) -> ProbeResult:
    """Top-1 and top-5 accuracy under BYOL's linear protocol, the test set having chosen nothing.

    A classifier is trained with every learning rate, all on the same batches. That of the highest
    top-1 accuracy on the held-out training images, of equal ones the first, is the one tested. It
    is not trained again with them; neither is DeepMind's (byol/README.md, Linear evaluation).

    Args:
      epoch: see `Epoch`; random crops and flips of the training images in the paper, without the
        held-out ones.
      examples: N, of an epoch.
      held_out: training images that are not in `epoch`; 10,009 of ImageNet's in the paper. Encoded
        as the test images are.
      test: what the two accuracies are measured on; it has no other influence.
      classes: C. The labels are in [0, classes).
      learning_rates: at batch 256; scaled by batch_size / 256.
      epochs: passes over the examples.
      batch_size: examples a step.
      momentum: Nesterov's.
      seed: of the classifier's first weights.
      progress: called after each step with ('linear evaluation', steps done, steps in all).

    Raises:
      ValueError: unusable features or labels, or an epoch that is not of `examples` examples.
    """
    held_out = checked_labelled(held_out, classes, 'held-out')
    size = held_out.features.shape[1]
    test = checked_labelled(test, classes, 'test', size)
    models = train_linear(
        epoch,
        examples,
        feature_size=size,
        classes=classes,
        learning_rates=learning_rates,
        epochs=epochs,
        batch_size=batch_size,
        momentum=momentum,
        seed=seed,
        progress=progress,
    )
    accuracies = {
        rate: top_k(model.scores(held_out.features), held_out.labels, 1)
        for rate, model in models.items()
    }
    chosen = best(accuracies)
    return result_on(test, models[chosen], chosen, accuracies)


def train_linear(
    epoch: Epoch,
    examples: int,
    *,
    feature_size: int,
    classes: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 80,
    batch_size: int = 1024,
    momentum: float = 0.9,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[float, LinearModel]:
    """A linear classifier for each learning rate, trained side by side in one pass over the data.

    Weights start as Haiku's Linear does, truncated normal (at two std) x 1 / sqrt(D), and biases
    at 0, the same for every learning rate. Batches run over the ends of epochs, as in DeepMind's
    byol/utils/dataset.py, and there are epochs x examples // batch_size of them; what is left is
    not trained on. All is float32.

    Args:
      epoch: see `Epoch`.
      examples: N, of an epoch.
      feature_size: D.
      classes: C. The labels are in [0, classes).
      learning_rates: at batch 256, different from each other.
      epochs: passes over the examples.
      batch_size: examples a step.
      momentum: Nesterov's.
      seed: of the first weights.
      progress: called after each step with ('linear evaluation', steps done, steps in all).

    Returns:
      The float32 model of each learning rate. One whose training diverged holds NaN, and
      `neighbours.top_k` counts its answers as wrong.

    Raises:
      ValueError: unusable features or labels, no learning rates or the same twice, an epoch that
        is not of `examples` examples, or not enough of them for one batch.
    """
    steps = epochs * examples // batch_size
    if not learning_rates or len(set(learning_rates)) < len(learning_rates) or not steps:
        raise ValueError(
            f'different learning rates and a step of training are needed, got '
            f'{list(learning_rates)} and {steps} steps ({epochs} epochs of {examples:,} examples '
            f'in batches of {batch_size:,})'
        )
    count = len(learning_rates)
    weights = jax.random.truncated_normal(
        jax.random.key(seed), -2, 2, (feature_size, classes), jnp.float32
    ) / math.sqrt(feature_size)
    params = {
        'weights': jnp.broadcast_to(weights, (count, feature_size, classes)),
        'bias': jnp.zeros((count, classes), jnp.float32),
    }
    trace = optax.trace(momentum, nesterov=True).init(params)
    peak = np.asarray(learning_rates, np.float32) * (batch_size / 256)
    batches = _batches(epoch, examples, epochs, batch_size, feature_size, classes)
    for step, (x, y) in enumerate(batches):
        # byol/utils/schedules.py, _cosine_decay.
        rates = peak * np.float32(0.5 * (1 + math.cos(math.pi * step / steps)))
        params, trace = _sgd_step(params, trace, x, y, rates, momentum)
        progress('linear evaluation', step + 1, steps)
    host = jax.tree.map(np.asarray, params)
    return {
        rate: LinearModel(host['weights'][i], host['bias'][i])
        for i, rate in enumerate(learning_rates)
    }


def _batches(
    epoch: Epoch, examples: int, epochs: int, batch_size: int, feature_size: int, classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """float32 [batch_size, D] and int32 [batch_size], over the ends of parts and epochs."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for number in range(epochs):
        seen = 0
        for part in epoch(number):
            features, labels = checked_labelled(part, classes, 'training', feature_size)
            seen += len(features)
            waiting.append((features.astype(np.float32), labels.astype(np.int32)))
            if sum(len(y) for _, y in waiting) < batch_size:
                continue
            x, y = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
            full = len(y) // batch_size * batch_size
            for start in range(0, full, batch_size):
                batch = slice(start, start + batch_size)
                yield x[batch], y[batch]
            waiting = [(x[full:], y[full:])]
        if seen != examples:
            raise ValueError(f'epoch {number} has {seen:,} examples, not {examples:,}')


@partial(jax.jit, static_argnames='momentum')
def _sgd_step(
    params: Any, trace: Any, x: np.ndarray, y: np.ndarray, rates: np.ndarray, momentum: float
) -> Any:
    """One step of every classifier, each with its own rate, on the same batch."""

    def loss(params: Any) -> jax.Array:
        # 'highest' keeps GPUs from rounding float32 products to fewer bits.
        scores = jnp.einsum('bd,ldc->lbc', x, params['weights'], precision='highest')
        losses = optax.softmax_cross_entropy_with_integer_labels(
            scores + params['bias'][:, None], jnp.broadcast_to(y, scores.shape[:2])
        )
        # The sum over classifiers: the gradient of each is that of its own mean.
        return losses.mean(axis=1).sum()

    optimizer = optax.trace(momentum, nesterov=True)
    updates, trace = optimizer.update(jax.grad(loss)(params), trace)
    updates = {
        'weights': -rates[:, None, None] * updates['weights'],
        'bias': -rates[:, None] * updates['bias'],
    }
    return optax.apply_updates(params, updates), trace
