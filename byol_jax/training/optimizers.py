"""LARS and AdamW with the paper's exclusions, the frozen start, and the learning-rate schedule."""

from __future__ import annotations

from typing import Any, NamedTuple

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


def make_optimizer(
    options: Any, schedule: optax.Schedule, adapted: Tree, freeze_steps: int
) -> optax.GradientTransformation:
    """The optimizer a config asks for; in every one the learning rate comes last.

    Args:
      options: the config's `optimizer`: `name`, one of OPTIMIZERS, `weight_decay`, and `momentum`
        and `trust_coefficient` for LARS, `b1`, `b2` and `epsilon` for AdamW.
      schedule: learning rate by optimizer step; the frozen start does not delay it.
      adapted: tree of bools like the parameters, from `adapted_params`; the top level is a dict
        with a part 'encoder'.
      freeze_steps: for this many optimizer steps the part 'encoder' stays as it is, and so does
        its share of the optimizer's state (`hold`); the other parts train from the first step.

    Raises:
      UserError: there is no optimizer of this name.
    """
    if options.name == 'lars':
        stages = _lars_stages(
            adapted,
            options.weight_decay,
            options.kwargs.get('momentum', 0.9),
            options.kwargs.get('trust_coefficient', 1e-3),
        )
    elif options.name == 'adamw':
        stages = _adamw_stages(
            adapted,
            options.weight_decay,
            options.kwargs.get('b1', 0.9),
            options.kwargs.get('b2', 0.999),
            options.kwargs.get('epsilon', 1e-8),
        )
    else:
        raise UserError(f"optimizer.name='{options.name}': there is no such optimizer.")
    if freeze_steps:
        # Each side has a state of its own: AdamW counts the steps that its moments have seen.
        inner = optax.chain(*stages)
        sides = {'encoder': hold(inner, freeze_steps), 'heads': inner}
        labels = {
            part: jax.tree.map(lambda _, side=part if part in sides else 'heads': side, flags)
            for part, flags in adapted.items()
        }
        stages = (optax.partition(sides, labels),)
    return optax.chain(*stages, optax.scale_by_learning_rate(schedule))


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
    stages = _lars_stages(adapted, weight_decay, momentum, trust_coefficient)
    return optax.chain(*stages, optax.scale_by_learning_rate(schedule))


def adamw(
    schedule: optax.Schedule,
    adapted: Tree,
    *,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam with bias correction and decoupled weight decay (arXiv:1711.05101, Algorithm 2).

    As in torch.optim.AdamW the decay is multiplied by the learning rate, and by nothing else.

    Args:
      schedule: learning rate by optimizer step.
      adapted: tree of bools like the parameters: True for those that decay (`adapted_params`).
      weight_decay: share of a parameter taken off in a step, per unit of learning rate.
      b1, b2: decay of the means of the gradients and of their squares; epsilon: added to the root
        of the latter. Defaults: arXiv:1412.6980, Algorithm 1.
    """
    stages = _adamw_stages(adapted, weight_decay, b1, b2, epsilon)
    return optax.chain(*stages, optax.scale_by_learning_rate(schedule))


class HoldState(NamedTuple):
    """State of `hold`.

    Attributes:
      made: int32 [], updates made, up to the number held.
      inner: state of the transformation that is held.
    """

    made: jax.Array
    inner: Tree


def hold(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """Keeps a transformation as it starts for `steps` updates, during which updates are zero.

    Its state does not move either, so it then begins like a fresh one: no momentum or moments of
    gradients from before, and a bias correction that starts at its first step.
    """

    def init(params: Tree) -> HoldState:
        return HoldState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Tree, state: HoldState, params: Tree | None = None
    ) -> tuple[Tree, HoldState]:
        moving = state.made >= steps
        updates, new = inner.update(updates, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(moving, u, jnp.zeros_like(u)), updates)
        new = jax.tree.map(lambda n, old: jnp.where(moving, n, old), new, state.inner)
        return updates, HoldState(jnp.minimum(state.made + 1, steps), new)

    return optax.GradientTransformation(init, update)


def _lars_stages(
    adapted: Tree, weight_decay: float, momentum: float, trust_coefficient: float
) -> tuple[optax.GradientTransformation, ...]:
    return (
        optax.masked(optax.add_decayed_weights(weight_decay), adapted),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), adapted),
        optax.trace(momentum),
    )


def _adamw_stages(
    adapted: Tree, weight_decay: float, b1: float, b2: float, epsilon: float
) -> tuple[optax.GradientTransformation, ...]:
    return (
        optax.scale_by_adam(b1, b2, epsilon),
        optax.masked(optax.add_decayed_weights(weight_decay), adapted),
    )


def adapted_params(params: Tree, untrained: frozenset[str] = frozenset()) -> Tree:
    """Which parameters decay, and LARS adapts: all but biases, norm parameters and untrained ones.

    The paper (Section 3.3) excludes biases and batch normalisation parameters. Told by structure:
    a leaf called 'bias' or 'scale', or one with at most one axis longer than 1 that is no
    'kernel'; also learned positions, 'pos_embed..', as DeiT does (models.py, no_weight_decay).
    Parameters that get no gradient must not decay either.

    Args:
      params: tree of arrays.
      untrained: paths of the parameters behind the tap or frozen by the config's
        `encoder.frozen`, such as 'encoder/head/kernel'.

    Raises:
      UserError: nothing is excluded, or nothing is left, which means the network's parameters
        are laid out in a way this rule does not know.
    """

    def rule(path: Any, leaf: Any) -> bool:
        full = path_name(path)
        name = full.split('/')[-1]
        vector = sum(side > 1 for side in leaf.shape) <= 1 and name != 'kernel'
        told = name in ('bias', 'scale') or name.startswith('pos_embed')
        return not (vector or told or full in untrained)

    adapted = jax.tree_util.tree_map_with_path(rule, params)
    flags = jax.tree.leaves(adapted)
    if all(flags) or not any(flags):
        what = 'excluded from' if all(flags) else 'left for'
        names = ', '.join(path_name(path) for path, _ in jax.tree.leaves_with_path(params))
        raise UserError(
            f'No parameter is {what} weight decay (and, in LARS, adaptation). Biases and norm '
            "parameters are told by the names 'bias' and 'scale' or by being vectors. "
            f'Parameters: {names}'
        )
    return adapted


def describe_excluded(params: Tree, adapted: Tree, optimizer: str = 'lars') -> str:
    """One line a run prints: how many parameters are excluded, and which kinds of leaf they are.

    Args:
      params, adapted: as of `adapted_params`. optimizer: its name, which says excluded from what.
    """
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
    what = 'no weight decay' + (' and no LARS adaptation' if optimizer == 'lars' else '')
    return f'{excluded:,} of {total:,} parameters get {what}: {listing}'
