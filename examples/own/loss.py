"""A loss with another distance: the cosine's angle in place of the squared distance.

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

    # Two angles, each 0 for a perfect prediction and pi / 2 for unrelated vectors.
    loss_scale = LossScale(lowest=0.0, chance=math.pi, highest=2 * math.pi)

    def distance(self, prediction: jax.Array, projection: jax.Array) -> jax.Array:
        """The angle between rows: [B, P] x 2 -> [B], in [0, pi]."""
        cosine = jnp.sum(l2_normalize(prediction) * l2_normalize(projection), axis=-1)
        # The slope of arccos has no bound at -1 and 1.
        return jnp.arccos(jnp.clip(cosine, -0.9999, 0.9999))
