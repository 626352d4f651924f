"""One optimizer step: a pure function, and its pmap over devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from byol_jax.errors import UserError
from byol_jax.input.feed import Feed
from byol_jax.methods.base import Method, l2_normalize
from byol_jax.training.online_probe import probe_step
from byol_jax.training.schedules import target_tau
from byol_jax.training.state import TrainState

# The name of the device axis: gradients, metrics and batch statistics are averaged over it.
AXIS = 'devices'

Tree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    total_steps: int,
    tau_base: float,
    seed: int,
    schedule: optax.Schedule | None = None,
    accumulate_steps: int = 1,
    freeze_steps: int = 0,
    monitored: int = 0,
) -> Callable[[TrainState, Batch], Any]:
    """Makes the pure training step of one device.

    The step must run where the axis AXIS is mapped (`pmap_step`). It takes a `TrainState` and a
    batch: this device's share of what `method.loss` takes, arrays with B examples on the first
    axis; B must be divisible by `accumulate_steps`. If the state has an online probe, the step
    trains it too (`online_probe.probe_step`) and the batch needs 'label', int [B]; the networks
    are trained the same with and without a probe.

    Random numbers of the networks depend on (seed, step, device, microbatch) only, so there is no
    random state to save.

    Args:
      method: the method to train.
      optimizer: the optimizer of the online network's parameters.
      total_steps: K, optimizer steps of the whole run.
      tau_base: tau of the target's moving average at step 0, in [0, 1] (`target_tau`).
      seed: seed of the random numbers that the networks draw.
      schedule: the learning rate by step, for the metric 'learning_rate'; None for no such metric.
      accumulate_steps: number of microbatches that the batch is split into. Their gradients are
        averaged. Batch statistics are updated by each microbatch; the optimizer, the target and the
        schedules advance once per step.
      freeze_steps: number of steps at the start without gradients of the part 'encoder'.
      monitored: number of examples per microbatch, M, whose features the step returns; 0 for none.

    Returns:
      A function `(state, batch) -> (state, metrics)`; metrics are float32 scalars by name, equal on
      all devices, the method's own among them. With `monitored` it is `(state, batch) -> (state,
      metrics, features)`: the method's features, float [V, accumulate_steps * M, size] by name,
      and two more metrics: 'parameter_norm', the norm of the online network's parameters after the
      step, and 'stats_spread', how far its batch statistics differ between devices (root mean
      square, relative to their size).
    """
    whole_gradient = jax.value_and_grad(method.loss, has_aux=True)

    def loss_with_fixed_encoder(params: Tree, *arguments: Any) -> Any:
        encoder = jax.lax.stop_gradient(params['encoder'])
        return method.loss({**params, 'encoder': encoder}, *arguments)

    def value_and_grad(step: jax.Array, *arguments: Any) -> Any:
        if not freeze_steps:
            return whole_gradient(*arguments)
        heads_gradient = jax.value_and_grad(loss_with_fixed_encoder, has_aux=True)
        return jax.lax.cond(step < freeze_steps, heads_gradient, whole_gradient, *arguments)

    def all_microbatches(state: TrainState, batch: Batch) -> Any:
        """Passes this device's whole batch through the method, in microbatches.

        Returns loss, extra (the method's metrics), gradients, online and target statistics,
        projections, probe_x (the probe's input) and samples (features for the monitors).
        """
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        rng = jax.random.fold_in(rng, _device())

        def one_microbatch(carry: Any, inputs: tuple[Batch, jax.Array]) -> Any:
            grads, online_stats, target_stats = carry
            microbatch, number = inputs
            (loss, outputs), new_grads = value_and_grad(
                state.step,
                state.online_params,
                state.target_params,
                online_stats,
                target_stats,
                microbatch,
                jax.random.fold_in(rng, number),
            )
            grads = new_grads if grads is None else jax.tree.map(jnp.add, grads, new_grads)
            features = dict(outputs.features)
            watched = 'projection' if 'projection' in features else 'representation'
            projections = jnp.concatenate(list(features[watched]))
            samples = {name: x[:, :monitored] for name, x in features.items()}
            probe_x = None if state.online_probe is None else features['representation'][0]
            carry = (grads, outputs.stats, outputs.target_stats)
            return carry, (loss, dict(outputs.metrics), projections, probe_x, samples)

        n = accumulate_steps
        if n == 1:
            start = (None, state.online_stats, state.target_stats)
            carry, (loss, extra, *rest) = one_microbatch(start, (batch, jnp.zeros((), jnp.int32)))
            return loss, extra, *carry, *rest
        zeros = jax.tree.map(jnp.zeros_like, state.online_params)
        split = {key: x.reshape(n, -1, *x.shape[1:]) for key, x in batch.items()}
        (grads, *stats), (losses, extra, projections, probe_x, samples) = jax.lax.scan(
            one_microbatch, (zeros, state.online_stats, state.target_stats), (split, jnp.arange(n))
        )
        grads = jax.tree.map(lambda g: g / n, grads)
        projections, probe_x = jax.tree.map(
            lambda x: x.reshape(-1, x.shape[-1]), (projections, probe_x)
        )
        # [microbatches, V, M, size] -> [V, microbatches * M, size]
        samples = jax.tree.map(
            lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1]), samples
        )
        extra = jax.tree.map(lambda x: x.mean(axis=0), extra)
        return losses.mean(), extra, grads, *stats, projections, probe_x, samples

    def train_step(state: TrainState, batch: Batch) -> Any:
        loss, extra, grads, own_stats, target_stats, projections, probe_x, samples = (
            all_microbatches(state, batch)
        )
        loss, grads = jax.lax.pmean((loss, grads), AXIS)
        online_stats, target_stats = average_stats((own_stats, target_stats))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.online_params)
        online_params = optax.apply_updates(state.online_params, updates)
        tau = target_tau(state.step, total_steps, tau_base)
        metrics = {
            'loss': loss,
            'tau': tau,
            'feature_std': feature_std(projections, AXIS),
            'gradient_norm': global_norm(grads),
            'update_norm': global_norm(updates),
        }
        if schedule is not None:
            metrics['learning_rate'] = schedule(state.step)
        if monitored:
            metrics['parameter_norm'] = global_norm(online_params)
            metrics['stats_spread'] = spread(own_stats, online_stats)
        probe = state.online_probe
        if probe is not None:
            probe, probe_metrics = probe_step(probe, probe_x, batch['label'], AXIS)
            metrics |= probe_metrics
        taken = sorted(metrics.keys() & extra.keys())
        if taken:
            raise UserError(
                f"The method's metric '{taken[0]}' has the name of one of the step's own metrics: "
                'rename it.'
            )
        metrics |= jax.lax.pmean(extra, AXIS)
        state = TrainState(
            step=state.step + 1,
            online_params=online_params,
            online_stats=online_stats,
            target_params=update_target(state.target_params, online_params, tau),
            target_stats=target_stats,
            optimizer=optimizer_state,
            online_probe=probe,
        )
        metrics = {key: jnp.asarray(value, jnp.float32) for key, value in metrics.items()}
        return (state, metrics, samples) if monitored else (state, metrics)

    return train_step


def update_target(target_params: Tree, online_params: Tree, tau: jax.Array) -> Tree:
    """xi <- tau xi + (1 - tau) theta for every leaf of the target (paper, Equation 1)."""
    online = {part: online_params[part] for part in target_params}
    return jax.tree.map(lambda xi, theta: xi + (1 - tau) * (theta - xi), target_params, online)


def feature_std(projections: jax.Array, axis_name: str | None = None) -> jax.Array:
    """The mean over channels of the std of unit-length projections.

    It is near 1/sqrt(P) in a healthy run, and 0 if all images have the same projection (collapse).
    Definition: SimSiam, arXiv:2011.10566, Section 4.1.

    Args:
      projections: float [B, P], of this device.
      axis_name: name of the device axis to compute the std over; None for this device alone.
    """
    z = l2_normalize(projections)
    mean, square = jnp.mean(z, axis=0), jnp.mean(z**2, axis=0)
    if axis_name is not None:
        mean, square = jax.lax.pmean((mean, square), axis_name)
    return jnp.mean(jnp.sqrt(jnp.maximum(square - mean**2, 0)))


def average_stats(stats: Any) -> Any:
    """Makes statistics equal on all devices: floats are averaged, integers taken from device 0.

    Flax's batch normalisation is synchronised already, so this does not change it. It is for
    networks with statistics of their own.
    """
    first = jax.lax.axis_index(AXIS) == 0

    def same(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jax.lax.pmean(x, AXIS)
        return jax.lax.psum(jnp.where(first, x, 0).astype(jnp.int32), AXIS).astype(x.dtype)

    return jax.tree.map(same, stats)


def spread(own: Any, average: Any) -> jax.Array:
    """Root mean square over devices of the distance of their statistics from the average.

    Args:
      own: statistics of this device.
      average: their average over devices.

    Returns:
      float32 [], relative to the norm of the average; 0 if there are no float statistics.
    """
    pairs = zip(jax.tree.leaves(own), jax.tree.leaves(average), strict=True)
    real = [(x, mean) for x, mean in pairs if jnp.issubdtype(x.dtype, jnp.inexact)]
    if not real:
        return jnp.zeros(())
    away = global_norm([x - mean for x, mean in real])
    size = global_norm([mean for _, mean in real])
    return jnp.sqrt(jax.lax.pmean(away**2, AXIS)) / jnp.maximum(size, 1e-12)


def global_norm(tree: Any) -> jax.Array:
    """The L2 norm of all leaves of a tree, taken as one vector: float32 []."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def pmap_step(
    train_step: Callable[..., Any], shared: int = 0, monitored: bool = False
) -> Callable[..., Any]:
    """Maps the pure step over the local devices' shares of a batch. The state has no device axis.

    The state's buffers are donated if that is safe, so use only the returned state after a call.

    Args:
      train_step: `(state, batch, *more) -> (state, metrics)`, or a monitored step.
      shared: number of further arguments. Each is whole on every device (`everywhere`) and is not
        donated.
      monitored: whether the step also returns features; they get a device axis:
        [devices, V, M, size].
    """
    out_axes = (None, None, 0) if monitored else (None, None)
    return jax.pmap(
        train_step,
        axis_name=AXIS,
        in_axes=(None, 0) + (None,) * shared,
        out_axes=out_axes,
        donate_argnums=0 if _may_donate() else (),
    )


def pmap_feed(
    train_step: Callable[..., Any], feed: Feed, monitored: bool = False
) -> Callable[[TrainState, Batch], Any]:
    """Like `pmap_step`, but the step first makes the views from a feed's batch.

    Args:
      train_step: the pure step, as for `pmap_step`.
      feed: the feed whose batches the step will get, with a device axis (`shard_batch`).
      monitored: whether the step also returns features.

    Returns:
      A function of (state, batch) that returns what `pmap_step`'s function does.
    """
    shared = everywhere(feed.shared)

    def step(state: TrainState, batch: Batch, *shared: Any) -> Any:
        return train_step(state, feed.views(batch, *shared))

    mapped = pmap_step(step, len(shared), monitored)
    return lambda state, batch: mapped(state, batch, *shared)


def _device() -> jax.Array:
    """The number of the device that a mapped step runs on.

    Raises:
      UserError: the step is not mapped.
    """
    try:
        return jax.lax.axis_index(AXIS)
    except NameError as error:
        raise UserError(
            f"The step must run where the axis '{AXIS}' is mapped, on one device too. Wrap it: "
            'step = byol_jax.pmap_step(byol_jax.make_train_step(...)), then '
            'step(byol_jax.replicate(state), byol_jax.shard_batch(batch, devices)).'
        ) from error


def _may_donate() -> bool:
    # A CPU program with donated inputs that is read from JAX's compilation cache can kill the
    # process (jaxlib 0.10.2; seen with two devices, not with one).
    return jax.default_backend() != 'cpu' or not jax.config.values['jax_compilation_cache_dir']


def replicate(state: TrainState) -> TrainState:
    """Copies a state to every device of this process, sharded like the mapped step's result.

    Otherwise the second step would be compiled again, for the sharding of the first step's result.
    The given state stays usable after the copy is donated.
    """
    return everywhere(jax.tree.map(np.array, state))


def everywhere(tree: Any) -> Any:
    """Copies a tree of NumPy arrays to every device of this process, sharded as in `replicate`."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def shard_batch(batch: dict[str, Any], devices: int) -> dict[str, Any]:
    """Adds the device axis that pmap maps to a batch: [B, ...] -> [devices, B / devices, ...].

    Args:
      batch: arrays with the examples on the first axis.
      devices: number of local devices; must divide B.
    """
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
