"""View operations as users write them."""

from __future__ import annotations

import dataclasses

import cv2
import jax.numpy as jnp
import numpy as np

from byol_jax.views.operation import Operation


@dataclasses.dataclass(frozen=True)
class Darken(Operation):
    """Multiplies by a random factor; has a JAX version."""

    variates = 1
    probability: float = 0.5
    least: float = 0.2

    def parameters(self, u, height, width):
        return {'factor': self.least + (1 - self.least) * u[:, 0]}

    def apply(self, image, params):
        return image * np.float32(params['factor'])

    def apply_jax(self, image, params):
        return image * params['factor']


@dataclasses.dataclass(frozen=True)
class Turn(Operation):
    """Rotates by a random angle, on the CPU only."""

    variates = 1
    dtype = 'uint8'
    geometry = 'other'
    degrees: float = 20.0

    def parameters(self, u, height, width):
        return self.degrees * (2 * u[:, 0] - 1)

    def apply(self, image, params):
        height, width = image.shape[:2]
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), params, 1)
        return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)


class Far(Operation):
    """Returns float64 values far outside [0, 1], not contiguous."""

    def apply(self, image, params):
        return (2.0 * image.astype(np.float64) - 0.5)[:, ::-1]


class Patch(Operation):
    """Greys a square at a random place; its corner is an array for each image."""

    variates = 2
    dtype = 'uint8'

    def parameters(self, u, height, width):
        return (u * np.stack([height, width], axis=1) / 2).astype(int)

    def apply(self, image, params):
        out = image.copy()
        out[params[0] : params[0] + 4, params[1] : params[1] + 4] = 128
        return out

    def apply_jax(self, image, params):
        y, x = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])
        inside = (abs(y - params[0] - 1.5) < 2) & (abs(x - params[1] - 1.5) < 2)
        return jnp.where(inside[..., None], jnp.uint8(128), image)


class Wrong(Operation):
    """Returns something that is not an image."""

    def apply(self, image, params):
        return image.transpose(2, 0, 1)
