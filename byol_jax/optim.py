"""LARS with the paper's exclusions, and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from byol_jax.errors import UserError
from byol_jax.models.tap import path_name

Tree = Any


def learning_rate_schedule(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then cosine to 0 at `total_steps` (paper, Section 3.3).

    At step k < warmup_steps: peak k / warmup_steps; then peak (1 + cos(pi t)) / 2 with t the
    share of the steps behind the warm-up (DeepMind byol/utils/schedules.py, learning_schedule).
    """

    def schedule(step: jax.Array | int) -> jax.Array:
        warm = step / max(warmup_steps, 1)
        t = jnp.minimum((step - warmup_steps) / (total_steps - warmup_steps), 1)
        return peak * jnp.where(step < warmup_steps, warm, (1 + jnp.cos(jnp.pi * t)) / 2)

    return schedule


def lars(
    schedule: optax.Schedule,
    adapted: Tree,
    *,
    weight_decay: float,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
) -> optax.GradientTransformation:
    """LARS in the order of DeepMind's byol/utils/optimizers.py.

    Weight decay, then trust ratio, then momentum, then learning rate: with the learning rate last,
    a changing schedule does not linger in the momentum, as it would in `optax.lars`.

    Args:
      schedule: learning rate by optimizer step.
      adapted: tree of bools like the parameters: True for those that get weight decay and trust
        ratio, False for those that only get momentum (`adapted_params`).
      weight_decay: paper, Appendix J: 1.5e-6 for 1000 epochs, 1e-6 for fewer.
      momentum: paper, Appendix J: 0.9.
      trust_coefficient: eta; DeepMind byol/configs/byol.py: 1e-3.
    """
    return optax.chain(
        optax.masked(optax.add_decayed_weights(weight_decay), adapted),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), adapted),
        optax.trace(momentum),
        optax.scale_by_learning_rate(schedule),
    )


def adapted_params(params: Tree, behind: frozenset[str] = frozenset()) -> Tree:
    """Which parameters LARS decays and adapts: all but biases, norm parameters and dead ones.

    The paper (Section 3.3) excludes biases and batch normalisation parameters. Told by structure:
    a leaf called 'bias' or 'scale', or one with at most one axis longer than 1 that is no
    'kernel'. Parameters behind the tap have no gradient and must not decay.

    Args:
      params: tree of arrays.
      behind: paths of the parameters behind the tap, such as 'encoder/head/kernel'.

    Raises:
      UserError: nothing is excluded, or nothing is left, which means the network's parameters
        are laid out in a way this rule does not know.
    """

    def rule(path: Any, leaf: Any) -> bool:
        full = path_name(path)
        name = full.split('/')[-1]
        vector = sum(side > 1 for side in leaf.shape) <= 1 and name != 'kernel'
        return not (vector or name in ('bias', 'scale') or full in behind)

    adapted = jax.tree_util.tree_map_with_path(rule, params)
    flags = jax.tree.leaves(adapted)
    if all(flags) or not any(flags):
        what = 'excluded from' if all(flags) else 'left for'
        names = ', '.join(path_name(path) for path, _ in jax.tree.leaves_with_path(params))
        raise UserError(
            f'No parameter is {what} weight decay and LARS adaptation. Biases and norm parameters '
            f"are told by the names 'bias' and 'scale' or by being vectors. Parameters: {names}"
        )
    return adapted


def describe_excluded(params: Tree, adapted: Tree) -> str:
    """One line a run prints: how many parameters are excluded, and which kinds of leaf they are."""
    kinds: dict[str, int] = {}
    excluded = total = 0
    for (path, leaf), flag in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(adapted), strict=True
    ):
        total += leaf.size
        if not flag:
            excluded += leaf.size
            kind = '/'.join(path_name(path).split('/')[-2:])
            kinds[kind] = kinds.get(kind, 0) + 1
    listing = ', '.join(f'{kind} x{count}' for kind, count in sorted(kinds.items()))
    return (
        f'{excluded:,} of {total:,} parameters get no weight decay and no LARS adaptation: '
        f'{listing}'
    )
