"""Optimizers by name, LARS, the parameters that do not decay, and the encoder's frozen start."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from byol_jax.errors import UserError
from byol_jax.models.network import path_name
from byol_jax.names import Registry

Tree = Any

OPTIMIZERS = Registry(
    'optimizer',
    'optimizer.name',
    {'lars': 'byol_jax.training.optimizers:lars', 'adamw': 'optax:adamw'},
    kwargs_key='optimizer.kwargs',
)

# What optimizers call the mask of the parameters that decay. LARS of optax has a second one, for
# those that it adapts; the paper (Section 3.3) leaves out the same of both.
_MASKS = ('mask', 'weight_decay_mask', 'decay_mask', 'trust_ratio_mask')


def build_optimizer(
    name: str,
    kwargs: Mapping[str, Any],
    *,
    learning_rate: optax.Schedule,
    weight_decay: float,
    decay_mask: Tree,
    freeze_steps: int = 0,
) -> optax.GradientTransformation:
    """Builds an optimizer: `factory(learning_rate, weight_decay=.., mask=.., **kwargs)`.

    `weight_decay` and `decay_mask` are passed where the factory has an argument of that name;
    the mask's may be 'mask', 'weight_decay_mask' or 'decay_mask'.

    Args:
      name: one of OPTIMIZERS, or 'package.module:attribute' of any factory like those of optax.
      kwargs: the factory's other arguments.
      learning_rate: by optimizer step; the frozen start does not delay it.
      weight_decay: share of a parameter taken off in a step, per unit of learning rate.
      decay_mask: tree of bools like the parameters, from the function of that name.
      freeze_steps: for this many optimizer steps the part 'encoder' stays as it is, and so does
        its share of the optimizer's state (`hold`); the other parts train from the first step.

    Raises:
      UserError: there is no such optimizer, it does not take these arguments, or it cannot decay.
    """
    factory = OPTIMIZERS.find(name)
    takes = inspect.signature(factory).parameters if callable(factory) else {}
    if 'epsilon' in kwargs and 'eps' in takes and 'epsilon' not in takes:
        # The word of the paper of Adam and of our older configs.
        kwargs = {('eps' if key == 'epsilon' else key): kwargs[key] for key in kwargs}
    masks = [mask for mask in _MASKS if mask in takes]
    ours: dict[str, Any] = dict.fromkeys(masks, decay_mask)
    if 'weight_decay' in takes:
        ours['weight_decay'] = weight_decay
    if weight_decay and not ('weight_decay' in takes and masks):
        missing = 'weight_decay' if 'weight_decay' not in takes else 'mask'
        raise UserError(
            f"optimizer.weight_decay={weight_decay:g}: '{name}' has no argument '{missing}'. Set "
            'it to 0, or take an optimizer that has weight_decay and mask, such as optax:adamw.'
        )

    # The first is the schedule.
    first = next(iter(takes), None)
    if callable(factory):
        OPTIMIZERS.check_kwargs(name, factory, kwargs, given=(first, *ours))

    def build(rate: optax.Schedule) -> optax.GradientTransformation:
        made = OPTIMIZERS.build(name, kwargs, rate, **ours)
        if not isinstance(made, optax.GradientTransformation):
            raise UserError(
                f"optimizer.name='{name}' makes a {type(made).__name__}, and not an "
                'optax.GradientTransformation.'
            )
        return made

    if not freeze_steps:
        return build(learning_rate)
    # Held, it does not count: its first step is the run's step `freeze_steps`.
    sides = {
        'encoder': hold(build(lambda step: learning_rate(step + freeze_steps)), freeze_steps),
        'heads': build(learning_rate),
    }
    labels = {
        part: jax.tree.map(lambda _, side=part if part in sides else 'heads': side, flags)
        for part, flags in decay_mask.items()
    }
    return optax.partition(sides, labels)


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    mask: Tree | None = None,
) -> optax.GradientTransformation:
    """LARS in the order of DeepMind's byol/utils/optimizers.py.

    Weight decay, then trust ratio, then momentum, then learning rate: with the learning rate last,
    a changing schedule does not linger in the momentum, as it would in `optax.lars`.

    Args:
      learning_rate: a number, or a schedule by optimizer step.
      weight_decay: paper, Appendix J: 1.5e-6 for 1000 epochs, 1e-6 for fewer.
      momentum: paper, Appendix J: 0.9.
      trust_coefficient: eta; DeepMind byol/configs/byol.py: 1e-3.
      mask: tree of bools like the parameters: True for those that get weight decay and trust
        ratio, False for those that only get momentum (`decay_mask`); None: all get them.
    """
    trust = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        trust if mask is None else optax.masked(trust, mask),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


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

    Args:
      inner: what is held.
      steps: for how many updates.
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


def decay_mask(params: Tree, untrained: frozenset[str] = frozenset()) -> Tree:
    """Which parameters decay, and LARS adapts: all but biases, norm parameters and untrained ones.

    The paper (Section 3.3) excludes biases and batch normalisation parameters. Told by structure:
    a leaf called 'bias' or 'scale', or one with at most one axis longer than 1 that is no
    'kernel'; also learned positions, 'pos_embed..', as DeiT does (models.py, no_weight_decay).
    Parameters that get no gradient must not decay either.

    Args:
      params: tree of arrays.
      untrained: paths of the parameters that get no gradient, such as 'encoder/head/kernel'
        (`Method.untrained`).

    Returns:
      A tree of bools like `params`.

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

    mask = jax.tree_util.tree_map_with_path(rule, params)
    flags = jax.tree.leaves(mask)
    if all(flags) or not any(flags):
        what = 'excluded from' if all(flags) else 'left for'
        names = ', '.join(path_name(path) for path, _ in jax.tree.leaves_with_path(params))
        raise UserError(
            f'No parameter is {what} weight decay (and, in LARS, adaptation). Biases and norm '
            "parameters are told by the names 'bias' and 'scale' or by being vectors. "
            f'Parameters: {names}'
        )
    return mask


def describe_excluded(params: Tree, mask: Tree, optimizer: str = 'lars') -> str:
    """One line a run prints: how many parameters are excluded, and which kinds of leaf they are.

    Args:
      params: as of `decay_mask`.
      mask: from `decay_mask`.
      optimizer: its name, which says excluded from what.
    """
    kinds: dict[str, int] = {}
    excluded = total = 0
    for (path, leaf), flag in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(mask), strict=True
    ):
        total += leaf.size
        if not flag:
            excluded += leaf.size
            kind = '/'.join(path_name(path).split('/')[-2:])
            kinds[kind] = kinds.get(kind, 0) + 1
    listing = ', '.join(f'{kind} x{count}' for kind, count in sorted(kinds.items()))
    what = 'no weight decay' + (' and no LARS adaptation' if 'lars' in optimizer else '')
    return f'{excluded:,} of {total:,} parameters get {what}: {listing}'
