"""The online linear probe: a classifier of the representation, trained beside the networks.

It sees what the online network makes of view 1, as in DeepMind's byol/byol_experiment.py, and gives
nothing back: the representation comes out of the step's gradient as a by-product, so no gradient
can reach the encoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from byol_jax.sources.base import Source

# With more labels there is no probe: its weights and their two moments, of 2,048 features, would
# take more than half a gigabyte on every device.
MOST_LABELS = 22_000

# Added to a channel's variance, as a share of the channels' mean variance: a channel that is
# always 0 stays so.
_VARIANCE_EPSILON = 1e-5

# Adam's, far above 1e-8, which is the size of a gradient that is 0 but for rounding: that of a
# label which no batch has had yet. Gradients of the others are of the order of 1 / batch.
_ADAM_EPSILON = 1e-5


class OnlineProbe(NamedTuple):
    """The classifier and its optimizer.

    Attributes:
      kernel: float32 [D, C].
      bias: float32 [C].
      optimizer: optax state over both.
    """

    kernel: jax.Array
    bias: jax.Array
    optimizer: Any


def labels_of_probe(source: Source) -> int:
    """How many labels a probe of this source tells apart; 0: there can be none."""
    count = len(source.label_names)
    return count if count <= MOST_LABELS else 0


def too_many_labels(source: Source) -> str:
    """A line for a person if a source has no probe for that reason; else ''."""
    count = len(source.label_names)
    if count <= MOST_LABELS:
        return ''
    return f'no online linear probe: there are {count:,} labels, and it is for {MOST_LABELS:,}'


def start_probe(features: int, labels: int) -> OnlineProbe:
    """The probe before the first step, which finds all labels alike.

    Args:
      features: D, size of the representation.
      labels: C.
    """
    kernel, bias = jnp.zeros((features, labels)), jnp.zeros(labels)
    return OnlineProbe(kernel, bias, _optimizer(features).init((kernel, bias)))


def _optimizer(features: int) -> optax.GradientTransformation:
    """Adam whose step moves a score by about 1 at most, of whatever encoder.

    Channels have a variance of 1 here and Adam moves every weight by about its learning rate, so
    1 / D is what does that. docs/monitors.md has measurements.
    """
    return optax.adam(1 / features, eps=_ADAM_EPSILON)


def probe_step(
    probe: OnlineProbe, representation: jax.Array, labels: jax.Array, axis_name: str
) -> tuple[OnlineProbe, dict[str, jax.Array]]:
    """One step on the cross entropy of the examples that have labels, over all devices.

    Every channel of the representation is first given mean 0 and variance 1 over the batch.

    Args:
      probe: before the step.
      representation: y of view 1, float [B, D], of this device.
      labels: int [B], in [0, C); negative where there is none.
      axis_name: of the device axis.

    Returns:
      The probe after the step, and of the probe before it 'online_probe_loss', the mean cross
      entropy, 'online_probe_accuracy', in [0, 1], and 'online_probe_examples', how many these are
      of: without any, both are 0 and mean nothing. All the same on all devices.
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
    """Channels of [B, D] at mean 0 and variance 1 over all devices' examples."""
    x = x - jax.lax.pmean(jnp.mean(x, axis=0), axis_name)
    variance = jax.lax.pmean(jnp.mean(x**2, axis=0), axis_name)
    # Not 0 of a representation that is the same for all pictures.
    least = _VARIANCE_EPSILON * jnp.mean(variance) + np.finfo(np.float32).tiny
    return x * jax.lax.rsqrt(variance + least)


def without_unlabelled(values: dict[str, float]) -> dict[str, float]:
    """A step's metrics less what its probe says of a batch that has no label."""
    examples = values.pop('online_probe_examples', 1)
    if examples:
        return values
    return {name: value for name, value in values.items() if not name.startswith('online_probe_')}
