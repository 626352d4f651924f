"""Measures which optimizer of an online probe works for all encoders without tuning.

    python benchmarks/online_probe.py [--steps=400] [--batch_size=64]

The encoders are random ReLU layers of several widths on scikit-learn's handwritten digits. Each
optimizer, with one setting, trains a linear classifier of each encoder's features. Prints one JSON
line for each encoder: its number of features and, for each optimizer, the accuracy on a batch
before its update, around step 100 and over the last 60 steps. `probe` is the one used in training.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from sklearn.datasets import load_digits

from byol_jax.training.online_probe import probe_step, start_probe
from byol_jax.training.step import AXIS

_STEPS = flags.DEFINE_integer('steps', 400, 'Steps of each optimizer.', lower_bound=120)
_BATCH = flags.DEFINE_integer('batch_size', 64, 'Examples in a step.', lower_bound=2)

LABELS = 10
# (width, layers) of the encoders.
ENCODERS = ((32, 1), (512, 2), (2048, 3))
# The other optimizers get unscaled features. DeepMind's byol/byol_experiment.py has the classifier
# in the online network, and LARS trains both.
OTHERS = {
    'adam_1e-3': optax.adam(1e-3),
    'sgd_0.1': optax.sgd(0.1, 0.9),
    'lars_0.2': optax.lars(0.2, trust_coefficient=1e-3, momentum=0.9),
}


def encode(images: np.ndarray, width: int, layers: int) -> np.ndarray:
    """Features of random ReLU layers: [N, 64] -> float32 [N, width]."""
    rng = np.random.default_rng(0)
    x = images
    for _ in range(layers):
        weights = rng.normal(size=(x.shape[1], width)) / np.sqrt(x.shape[1])
        x = np.maximum(x @ weights - 0.1, 0)
    return x.astype(np.float32)


def of_probe(features: int) -> tuple[Any, Any]:
    """(first state, step) of the probe that training uses."""
    mapped = jax.vmap(
        functools.partial(probe_step, axis_name=AXIS), axis_name=AXIS, in_axes=(None, 0, 0)
    )

    @jax.jit
    def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        state, metrics = jax.tree.map(lambda leaf: leaf[0], mapped(state, x[None], y[None]))
        return state, metrics['online_probe_accuracy']

    return start_probe(features, LABELS), step


def of_optimizer(optimizer: optax.GradientTransformation, features: int) -> tuple[Any, Any]:
    """(first state, step) of softmax regression with another optimizer."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = x @ params[0] + params[1]
        each = optax.softmax_cross_entropy_with_integer_labels(scores, y)
        return each.mean(), (scores.argmax(axis=-1) == y).mean()

    @jax.jit
    def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        params, inner = state
        (_, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(params, x, y)
        updates, inner = optimizer.update(grads, inner, params)
        return (optax.apply_updates(params, updates), inner), accuracy

    params = (jnp.zeros((features, LABELS)), jnp.zeros(LABELS))
    return (params, optimizer.init(params)), step


def accuracies(state: Any, step: Any, x: np.ndarray, y: np.ndarray) -> list[float]:
    """The accuracy on each batch before its update, over epochs in random order."""
    rng = np.random.default_rng(1)
    steps, batch = _STEPS.value, _BATCH.value
    epochs = steps * batch // len(x) + 1
    order = np.concatenate([rng.permutation(len(x)) for _ in range(epochs)])
    found = []
    for number in range(steps):
        rows = order[number * batch : (number + 1) * batch]
        state, accuracy = step(state, x[rows], y[rows])
        found.append(float(accuracy))
    return found


def main(argv: list[str]) -> None:
    del argv
    images, labels = load_digits(return_X_y=True)
    for width, layers in ENCODERS:
        x, result = encode(images / 16, width, layers), {'features': width}
        ways = {'probe': of_probe(width)}
        ways |= {name: of_optimizer(optimizer, width) for name, optimizer in OTHERS.items()}
        for name, (state, step) in ways.items():
            found = accuracies(state, step, x, labels.astype(np.int32))
            result[name] = [round(float(np.mean(part)), 3) for part in (found[80:120], found[-60:])]
        print(json.dumps(result), flush=True)


if __name__ == '__main__':
    app.run(main)
