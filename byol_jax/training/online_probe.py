"""The online linear probe: a linear classifier of the representation, trained along the networks.

Its input is the online network's representation of view 1, as in DeepMind's
byol/byol_experiment.py. It does not influence the networks: the representation is an auxiliary
output of their gradient computation, so no gradient of the probe can reach the encoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from byol_jax.sources.base import Source

# With more labels there is no probe: with 2,048 features, its weights and their two moments would
# take more than half a gigabyte on every device.
MOST_LABELS = 22_000

# Added to the variance of a channel, as a share of the mean variance of all channels, so that a
# channel that is always 0 stays 0.
_VARIANCE_EPSILON = 1e-5

# Adam's epsilon. It is far above the usual 1e-8, because gradients of a label that no batch has
# had yet are rounding noise of that size. Other gradients are of the order of 1 / batch.
_ADAM_EPSILON = 1e-5


class OnlineProbe(NamedTuple):
    """The state of the probe: the classifier and its optimizer.

    Attributes:
      kernel: float32 [D, C], the weights.
      bias: float32 [C].
      optimizer: optax state of both.
    """

    kernel: jax.Array
    bias: jax.Array
    optimizer: Any


def labels_of_probe(source: Source) -> int:
    """The number of labels of a probe for this source; 0 if it can have no probe."""
    count = len(source.label_names)
    return count if count <= MOST_LABELS else 0


def too_many_labels(source: Source) -> str:
    """A line that says there is no probe because of too many labels; '' if that is not so."""
    count = len(source.label_names)
    if count <= MOST_LABELS:
        return ''
    return f'no online linear probe: there are {count:,} labels, more than {MOST_LABELS:,}'


def start_probe(features: int, labels: int) -> OnlineProbe:
    """The probe before the first step; all weights are 0, so all labels have the same score.

    Args:
      features: D, size of the representation.
      labels: C, number of labels.
    """
    kernel, bias = jnp.zeros((features, labels)), jnp.zeros(labels)
    return OnlineProbe(kernel, bias, _optimizer(features).init((kernel, bias)))


def _optimizer(features: int) -> optax.GradientTransformation:
    """Adam with a learning rate of 1 / D, so that a step changes a score by about 1 at most.

    That holds for any encoder, because channels are scaled to a variance of 1 and Adam moves every
    weight by about the learning rate. docs/monitors.md has measurements.
    """
    return optax.adam(1 / features, eps=_ADAM_EPSILON)


def probe_step(
    probe: OnlineProbe, representation: jax.Array, labels: jax.Array, axis_name: str
) -> tuple[OnlineProbe, dict[str, jax.Array]]:
    """Trains the probe for one step, by cross-entropy on the labelled examples of all devices.

    Every channel of the representation is first scaled to mean 0 and variance 1 over the batch.

    Args:
      probe: the probe before the step.
      representation: y of view 1, float [B, D], on this device.
      labels: int [B], in [0, C); negative for examples without a label.
      axis_name: name of the device axis.

    Returns:
      The probe after the step, and metrics of the probe before it: 'online_probe_loss', the mean
      cross-entropy; 'online_probe_accuracy', in [0, 1]; 'online_probe_examples', the number of
      labelled examples (if it is 0, the other two are 0 and meaningless). All are the same on all
      devices.
    """
    x = _standardise(jax.lax.stop_gradient(representation).astype(jnp.float32), axis_name)
    labelled = labels >= 0
    examples = jax.lax.psum(jnp.sum(labelled), axis_name)

    def share(which: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(labelled, which, 0)) / jnp.maximum(examples, 1)

    def loss_and_accuracy(params: Any) -> tuple[jax.Array, jax.Array]:
        kernel, bias = params
        scores = x @ kernel + bias
        target = jnp.maximum(labels, 0)
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, target)
        return share(loss), share(jnp.argmax(scores, axis=-1) == target)

    params = (probe.kernel, probe.bias)
    own, grads = jax.value_and_grad(loss_and_accuracy, has_aux=True)(params)
    (loss, accuracy), grads = jax.lax.psum((own, grads), axis_name)
    updates, optimizer = _optimizer(len(probe.kernel)).update(grads, probe.optimizer, params)
    kernel, bias = optax.apply_updates(params, updates)
    metrics = {
        'online_probe_loss': loss,
        'online_probe_accuracy': accuracy,
        'online_probe_examples': examples,
    }
    return OnlineProbe(kernel, bias, optimizer), metrics


def _standardise(x: jax.Array, axis_name: str) -> jax.Array:
    """Scales the channels of [B, D] to mean 0 and variance 1 over the examples of all devices."""
    x = x - jax.lax.pmean(jnp.mean(x, axis=0), axis_name)
    variance = jax.lax.pmean(jnp.mean(x**2, axis=0), axis_name)
    # Tiny, not 0, if the representation is the same for all pictures.
    least = _VARIANCE_EPSILON * jnp.mean(variance) + np.finfo(np.float32).tiny
    return x * jax.lax.rsqrt(variance + least)


def without_unlabelled(values: dict[str, float]) -> dict[str, float]:
    """Removes the probe's metrics if the batch had no label, and always its number of examples."""
    examples = values.pop('online_probe_examples', 1)
    if examples:
        return values
    return {name: value for name, value in values.items() if not name.startswith('online_probe_')}
