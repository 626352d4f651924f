"""Optimizers by name, LARS, the mask of weight decay, and freezing the encoder at the start."""

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

# The largest learning rate that is accepted for an optimizer like Adam. Good rates are at most
# about 5e-3, and at 0.5 the sample run collapses. LARS has rates of 0.5 to 5.
MOST_OF_ADAM = 0.02

# Names that optimizers have for the mask of decayed parameters. optax.lars has a second mask, for
# the trust ratio; the paper (Section 3.3) excludes the same parameters from both.
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

    `weight_decay` is passed if the factory has an argument of that name. `decay_mask` is passed as
    'mask', 'weight_decay_mask', 'decay_mask' and 'trust_ratio_mask', if the factory has them.

    Args:
      name: one of OPTIMIZERS, or 'package.module:attribute' of a factory like those of optax.
      kwargs: other arguments of the factory.
      learning_rate: learning rate by optimizer step; `freeze_steps` does not delay it.
      weight_decay: share of a parameter that is subtracted per step and unit of learning rate.
      decay_mask: tree of bools like the parameters, from the function of that name.
      freeze_steps: number of optimizer steps at the start during which the part 'encoder' and its
        optimizer state do not change (`hold`); other parts train from the first step.

    Raises:
      UserError: there is no such optimizer, it does not take these arguments, or weight_decay is
        not 0 and it has no weight decay or no mask.
    """
    factory = OPTIMIZERS.find(name)
    takes = inspect.signature(factory).parameters if callable(factory) else {}
    if 'epsilon' in kwargs and 'eps' in takes and 'epsilon' not in takes:
        # Older configs spell it out, as the paper of Adam does.
        kwargs = {('eps' if key == 'epsilon' else key): kwargs[key] for key in kwargs}
    masks = [mask for mask in _MASKS if mask in takes]
    ours: dict[str, Any] = dict.fromkeys(masks, decay_mask)
    if 'weight_decay' in takes:
        ours['weight_decay'] = weight_decay
    if weight_decay and not ('weight_decay' in takes and masks):
        missing = 'weight_decay' if 'weight_decay' not in takes else 'mask'
        raise UserError(
            f"optimizer.weight_decay={weight_decay:g}: '{name}' has no argument '{missing}'. Set "
            'it to 0, or use an optimizer that has weight_decay and mask, such as optax:adamw.'
        )

    # The first argument is the schedule.
    first = next(iter(takes), None)
    if callable(factory):
        OPTIMIZERS.check_kwargs(name, factory, kwargs, given=(first, *ours))

    def build(rate: optax.Schedule) -> optax.GradientTransformation:
        made = OPTIMIZERS.build(name, kwargs, rate, **ours)
        if not isinstance(made, optax.GradientTransformation):
            raise UserError(
                f"optimizer.name='{name}' makes a {type(made).__name__}, not an "
                'optax.GradientTransformation.'
            )
        return made

    if not freeze_steps:
        return build(learning_rate)
    # While held, the encoder's optimizer does not count steps: its step 0 is the run's step
    # `freeze_steps`.
    sides = {
        'encoder': hold(build(lambda step: learning_rate(step + freeze_steps)), freeze_steps),
        'heads': build(learning_rate),
    }
    labels = {
        part: jax.tree.map(lambda _, side=part if part in sides else 'heads': side, flags)
        for part, flags in decay_mask.items()
    }
    return optax.partition(sides, labels)


def steps_by_rate(optimizer: optax.GradientTransformation, params: Tree) -> bool:
    """Whether an optimizer moves each weight by about its learning rate, whatever the gradient is.

    Adam and its relatives do. A step of SGD is proportional to the gradient, a step of LARS or LAMB
    to the weights. It is found out by one step with gradients of 0.0001.

    Args:
      optimizer: the optimizer, made with a learning rate of 1.
      params: parameters of the network.
    """

    @jax.jit
    def moved(params: Tree) -> jax.Array:
        grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-4), params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        leaves = jax.tree.leaves(updates)
        return jnp.sqrt(sum(jnp.sum(x**2) for x in leaves) / sum(x.size for x in leaves))

    return bool(moved(params) > 0.1)


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    mask: Tree | None = None,
) -> optax.GradientTransformation:
    """LARS in the order of DeepMind's byol/utils/optimizers.py.

    The order is weight decay, trust ratio, momentum, learning rate. Because the learning rate comes
    last, the momentum does not contain past learning rates, as it does in `optax.lars`.

    Args:
      learning_rate: a number, or a schedule by optimizer step.
      weight_decay: at least 0. Paper, Appendix J: 1.5e-6 for 1000 epochs, 1e-6 for fewer.
      momentum: in [0, 1). Paper, Appendix J: 0.9.
      trust_coefficient: eta. DeepMind byol/configs/byol.py: 1e-3.
      mask: tree of bools like the parameters (`decay_mask`): True for weight decay and trust ratio,
        False for momentum only. None for all parameters.
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
      made: int32 [], number of updates so far; counts no further than the number of held updates.
      inner: state of the held transformation.
    """

    made: jax.Array
    inner: Tree


def hold(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """Holds a transformation for `steps` updates: updates are zero and its state does not change.

    Afterwards it starts like a fresh one, without momentum or moments of earlier gradients and with
    the bias correction of its first step.

    Args:
      inner: the transformation.
      steps: number of updates to hold it for.
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
    """The mask of the parameters that get weight decay (and, in LARS, the trust ratio).

    Excluded are biases and parameters of normalisation, as in the paper (Section 3.3): leaves named
    'bias' or 'scale', and leaves with at most one axis longer than 1 unless they are named
    'kernel'. Learned positions, 'pos_embed..', are excluded as in DeiT (models.py,
    no_weight_decay), and so are parameters that get no gradient.

    Args:
      params: tree of arrays.
      untrained: paths of the parameters that get no gradient, such as 'encoder/head/kernel'
        (`Method.untrained`).

    Returns:
      A tree of bools like `params`, True for parameters that decay.

    Raises:
      UserError: no parameter is excluded or none is left, so the network names its parameters in a
        way that this rule does not know.
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
            "parameters are recognised by the names 'bias' and 'scale' or by being vectors. "
            f'Parameters: {names}'
        )
    return mask


def describe_excluded(params: Tree, mask: Tree, optimizer: str = 'lars') -> str:
    """A line on how many parameters are excluded from weight decay, with the names of the leaves.

    Args:
      params: tree of arrays.
      mask: mask from `decay_mask`.
      optimizer: name of the optimizer; LARS also excludes them from adaptation.
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
