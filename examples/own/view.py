"""A view operation: rotation by quarter turns, for pictures that have no top.

python main.py --config=div2k:sample \
    --config.views.view1.operations="('crop','flip','examples.own.view:QuarterTurns','jitter')"
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from byol_jax.views import Operation


@dataclasses.dataclass(frozen=True)
class QuarterTurns(Operation):
    """Rotates a square view by 0, 90, 180 or 270 degrees, each with the same probability."""

    probability: float = 1.0

    variates: ClassVar[int] = 1
    dtype: ClassVar[Literal['float32', 'uint8', 'any']] = 'any'
    # A box and a mirror flag cannot describe a rotated view.
    geometry: ClassVar[Literal['same', 'mirror', 'other']] = 'other'

    def parameters(self, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        return (4 * u[:, 0]).astype(np.int32)

    def apply(self, image: np.ndarray, params: Any) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(image, params))

    def apply_jax(self, image: jax.Array, params: Any) -> jax.Array:
        turned = jnp.stack([jnp.rot90(image, turns) for turns in range(4)])
        return turned[params]
