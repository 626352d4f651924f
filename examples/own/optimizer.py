"""An optimizer: SGD with Nesterov momentum, and gradients clipped at a length.

python main.py --config=div2k:sample --config.optimizer.name=examples.own.optimizer:clipped_sgd \
    --config.optimizer.base_learning_rate=0.2 --config.optimizer.kwargs.clip=1.0
"""

from __future__ import annotations

from typing import Any

import optax


def clipped_sgd(
    learning_rate: optax.Schedule,
    weight_decay: float = 0.0,
    mask: Any = None,
    momentum: float = 0.9,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """SGD as a chain of optax's parts.

    Args:
      learning_rate: by optimizer step.
      weight_decay: added to the gradient, times the parameter.
      mask: tree of bools like the parameters: which decay.
      momentum: Nesterov's.
      clip: gradients longer than this, all together, are shortened to it.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(learning_rate, momentum, nesterov=True),
    )
