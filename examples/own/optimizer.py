"""An optimizer: SGD with Nesterov momentum and clipped gradients.

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
    """Builds SGD from optax's transformations.

    Args:
      learning_rate: learning rate by optimizer step.
      weight_decay: this times the parameter is added to the gradient.
      mask: tree of bools like the parameters, True for those with weight decay.
      momentum: Nesterov momentum, in [0, 1).
      clip: largest norm of the whole gradient, which is scaled down to it.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(learning_rate, momentum, nesterov=True),
    )
