"""The deterministic cores of `augment`, in JAX, for whole batches on the device.

They give what `augment.make_view` gives for the same parameters, but for rounding: at most 1 of
255, and the crop to the bit. Formulae and sources are those of `augment`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from byol_jax.views.augment import BLUR_DIVIDER, LUMA
from byol_jax.views.device_crop import map_in_parts
from byol_jax.views.draws import JITTERS, Photometric

# OpenCV adds it to what it divides by in RGB -> HSV (FLT_EPSILON).
_EPSILON = 2.0**-23


class Possible(NamedTuple):
    """What a view can draw at all; the rest is not even compiled.

    Attributes:
      jitter, gray, blur, solarize: whether their probabilities are above 0.
    """

    jitter: bool = True
    gray: bool = True
    blur: bool = True
    solarize: bool = True

    @classmethod
    def of(cls, view: Any) -> Possible:
        """Of a view's config."""
        return cls(*(getattr(view, name) > 0 for name in cls._fields))


def photometric(views: jax.Array, params: Photometric, possible: Possible) -> jax.Array:
    """Flips and recolours cropped pictures: uint8 [B, S, S, 3] -> uint8 [B, S, S, 3].

    Args:
      views: cropped and resized.
      params: for each of them.
      possible: what is not possible must not be drawn in `params`.
    """

    def one(inputs: tuple[jax.Array, Photometric]) -> jax.Array:
        return _photometric(*inputs, possible)

    return map_in_parts(one, (views, params), views[0].size)


def _photometric(view: jax.Array, params: Photometric, possible: Possible) -> jax.Array:
    """One view: uint8 [S, S, 3] and scalars -> uint8 [S, S, 3]."""
    view = jnp.where(params.flip, view[:, ::-1], view)
    x = view.astype(jnp.float32) * jnp.float32(1 / 255)
    if possible.jitter:
        for place in range(len(JITTERS)):
            x = _jitter(x, params.order[place], params)
    if possible.gray:
        x = jnp.where(params.gray, to_gray(x), x)
    if possible.blur:
        x = jnp.where(params.sigma > 0, blur(x, params.sigma), x)
    if possible.solarize:
        x = jnp.where(x < params.solarize, x, 1 - x)
    return jnp.rint(jnp.clip(x, 0, 1) * 255).astype(jnp.uint8)


def _jitter(x: jax.Array, which: jax.Array, params: Photometric) -> jax.Array:
    """The jitter JITTERS[which], or none, of float32 [S, S, 3] in [0, 1].

    Under `vmap` a choice computes all there is to choose from. So brightness and contrast are one
    formula, and saturation and hue another, with what they do not change left as it is.
    """
    brightness, contrast, saturation, hue = (which == number for number in range(len(JITTERS)))
    mean = jnp.mean(x, axis=(0, 1))
    factor = jnp.where(contrast, params.contrast, 1)
    delta = jnp.where(contrast, (1 - params.contrast) * mean, 0)
    delta = jnp.where(brightness, params.brightness, delta)
    straight = jnp.clip(x * factor + delta, 0, 1)
    coloured = adjust_hsv(
        x, jnp.where(saturation, params.saturation, 1), jnp.where(hue, params.hue, 0)
    )
    return jnp.where(saturation | hue, coloured, straight)


def adjust_hsv(x: jax.Array, factor: jax.Array, turns: jax.Array) -> jax.Array:
    """Scales the S of HSV and turns its H: float32 [..., 3] in [0, 1] -> the same.

    Args:
      x: RGB. factor: of S, which is clipped to [0, 1]. turns: of the colour circle, added to H.
    """
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    value = jnp.max(x, axis=-1)
    spread = value - jnp.min(x, axis=-1)
    saturation = jnp.clip(spread / (value + _EPSILON) * factor, 0, 1)
    # H in sixths of the circle.
    over = 1 / (spread + _EPSILON)
    hue = jnp.where(
        value == r,
        (g - b) * over,
        jnp.where(value == g, (b - r) * over + 2, (r - g) * over + 4),
    )
    hue = hue + 6 * turns
    hue = hue - 6 * jnp.floor(hue / 6)
    chroma = value * saturation

    def channel(start: int) -> jax.Array:
        k = hue + start
        k = jnp.where(k < 6, k, k - 6)
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return jnp.clip(jnp.stack([channel(5), channel(3), channel(1)], axis=-1), 0, 1)


def to_gray(x: jax.Array) -> jax.Array:
    """The luma of float32 [..., 3] in all three channels."""
    luma = x[..., 0] * LUMA[0] + x[..., 1] * LUMA[1] + x[..., 2] * LUMA[2]
    return jnp.broadcast_to(luma[..., None], x.shape)


def blur(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """Blurs float32 [S, S, 3] as `augment.blur` does; beyond the border all is 0.

    Args:
      sigma: float32 [], pixels. At 0 the result means nothing, but is finite.
    """
    size = x.shape[0]
    radius = int(size / BLUR_DIVIDER / 2)
    sigma = jnp.where(sigma > 0, sigma, 1)
    kernel = jnp.exp(-(jnp.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    # As products with a matrix: a convolution would need a kernel of its own for each picture.
    pixels = jnp.arange(size)
    apart = pixels[:, None] - pixels
    matrix = jnp.where(
        jnp.abs(apart) <= radius, jnp.exp(-(apart**2) / (2 * sigma**2)) / kernel.sum(), 0
    )
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum('sw,hwc->hsc', matrix, x, precision=highest)
    return jnp.einsum('sh,hwc->swc', matrix, x, precision=highest)
