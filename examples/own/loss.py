"""A loss with another distance: the angle between the vectors instead of the squared distance.

python main.py --config=div2k:sample --config.method.name=examples.own.loss:AngleByol
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from byol_jax.methods import Byol, LossScale
from byol_jax.methods.base import l2_normalize


class AngleByol(Byol):
    """BYOL that minimises the angle between prediction and target, in radians."""

    # The loss is the sum of two angles, each 0 for a perfect prediction and pi / 2 by chance.
    loss_scale = LossScale(lowest=0.0, chance=math.pi, highest=2 * math.pi)

    def distance(self, prediction: jax.Array, projection: jax.Array) -> jax.Array:
        """The angle between the rows of two [B, P]: float [B] in [0, pi]."""
        cosine = jnp.sum(l2_normalize(prediction) * l2_normalize(projection), axis=-1)
        # The gradient of arccos is infinite at -1 and 1.
        return jnp.arccos(jnp.clip(cosine, -0.9999, 0.9999))
