"""BYOL's linear evaluation: a classifier of frozen features, trained by SGD.

The protocol of the paper (arXiv:2006.07733, Appendix C.1) and of DeepMind's code
(google-deepmind/deepmind-research, byol/ at f5de0ed): cross-entropy, SGD with Nesterov momentum
0.9, 80 epochs, batches of 1024, no regularisation. Of five learning rates, the one that is best on
held-out training images is used. Two things come from the code, because the paper does not say:
the learning rate falls from base x batch / 256 to 0 by a cosine without warm-up, and the initial
weights of the classifier.
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

# Base learning rates, for a batch of 256 (Appendix C.1; byol/configs/eval.py, line 43, has 0.2
# only).
LEARNING_RATES = (0.4, 0.3, 0.2, 0.1, 0.05)

# A function from the number of an epoch, from 0, to its features and labels in the order of
# training, in parts of any size. Every epoch has the same number of examples. The function makes
# the augmentations.
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
    """Top-1 and top-5 accuracy under BYOL's linear protocol.

    Trains a classifier for every learning rate, all on the same batches, and tests the one with the
    highest top-1 accuracy on held-out training images (the first of equal ones). The test set is
    not used for the choice. The chosen classifier is not trained again with the held-out images,
    as in DeepMind's code (byol/README.md, Linear evaluation).

    Args:
      epoch: the training features, see `Epoch`. In the paper they are of random crops and flips of
        the training images, without the held-out ones.
      examples: N, number of examples of an epoch.
      held_out: features of training images that are not in `epoch`, encoded like the test images.
        10,009 images of ImageNet in the paper.
      test: features to measure the two accuracies on.
      classes: C; labels are in [0, C).
      learning_rates: base learning rates for a batch of 256; scaled by batch_size / 256.
      epochs: passes over the examples.
      batch_size: examples per step.
      momentum: Nesterov momentum.
      seed: seed of the classifier's initial weights.
      progress: called after each step with ('linear evaluation', steps done, steps in all).

    Raises:
      ValueError: features or labels cannot be used, or an epoch does not have `examples` examples.
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
    """Trains a linear classifier for each learning rate, all in one pass over the data, in float32.

    Every classifier has the same initial weights, those of Haiku's Linear (truncated normal, cut at
    two std, x 1 / sqrt(D)), and biases of 0. A batch may span two epochs, as in DeepMind's
    byol/utils/dataset.py. There are epochs x examples // batch_size batches; the remaining examples
    are not used.

    Args:
      epoch: the training features, see `Epoch`.
      examples: N, number of examples of an epoch.
      feature_size: D.
      classes: C; labels are in [0, C).
      learning_rates: base learning rates for a batch of 256, all different.
      epochs: passes over the examples.
      batch_size: examples per step.
      momentum: Nesterov momentum.
      seed: seed of the initial weights.
      progress: called after each step with ('linear evaluation', steps done, steps in all).

    Returns:
      The model of each learning rate. A model that diverged holds NaN; `neighbours.top_k` counts
      its answers as wrong.

    Raises:
      ValueError: features or labels cannot be used, a learning rate is given twice or none is, an
        epoch does not have `examples` examples, or they are too few for one batch.
    """
    steps = epochs * examples // batch_size
    if not learning_rates or len(set(learning_rates)) < len(learning_rates) or not steps:
        raise ValueError(
            'linear evaluation needs learning rates, all different, and at least one step; got '
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
    """Joins parts and epochs and cuts them into batches: float32 [B, D] and int32 [B]."""
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
    """One SGD step of every classifier, each with its own learning rate, on the same batch."""

    def loss(params: Any) -> jax.Array:
        # 'highest' keeps GPUs from rounding the factors of float32 products to fewer bits.
        scores = jnp.einsum('bd,ldc->lbc', x, params['weights'], precision='highest')
        losses = optax.softmax_cross_entropy_with_integer_labels(
            scores + params['bias'][:, None], jnp.broadcast_to(y, scores.shape[:2])
        )
        # Summed over classifiers, so that each gets the gradient of its own mean loss.
        return losses.mean(axis=1).sum()

    optimizer = optax.trace(momentum, nesterov=True)
    updates, trace = optimizer.update(jax.grad(loss)(params), trace)
    updates = {
        'weights': -rates[:, None, None] * updates['weights'],
        'bias': -rates[:, None] * updates['bias'],
    }
    return optax.apply_updates(params, updates), trace
