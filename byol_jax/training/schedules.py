"""Schedules of the learning rate and of the target's tau."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def learning_rate_schedule(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then cosine to 0 at `total_steps` (paper, Section 3.3).

    At step k < warmup_steps it is peak k / warmup_steps, then peak (1 + cos(pi t)) / 2, where t is
    the share of the steps after the warm-up that are made (DeepMind byol/utils/schedules.py,
    learning_schedule).

    Args:
      peak: learning rate at the end of the warm-up.
      warmup_steps: optimizer steps of the warm-up, at least 0.
      total_steps: optimizer steps of the whole run, more than `warmup_steps`.

    Returns:
      A function of the optimizer step, from 0, that returns the learning rate.
    """

    def schedule(step: jax.Array | int) -> jax.Array:
        warm = step / max(warmup_steps, 1)
        t = jnp.minimum((step - warmup_steps) / (total_steps - warmup_steps), 1)
        return peak * jnp.where(step < warmup_steps, warm, (1 + jnp.cos(jnp.pi * t)) / 2)

    return schedule


def target_tau(step: jax.Array | int, total_steps: int, tau_base: float) -> jax.Array:
    """tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2, from tau_base to 1 (paper, Section 3.2).

    Args:
      step: k, number of optimizer steps made before this one.
      total_steps: K, optimizer steps of the whole run.
      tau_base: tau at step 0, in [0, 1].
    """
    return 1 - (1 - tau_base) * (jnp.cos(jnp.pi * step / total_steps) + 1) / 2
