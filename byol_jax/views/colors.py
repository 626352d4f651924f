"""Flip, colour jitter, grey, blur and solarization: the paper's operations after the crop.

The formulae are those of google-deepmind/deepmind-research byol/utils/augmentations.py at f5de0ed:
additive brightness, contrast about each channel's mean, saturation and hue in HSV, clipping after
each, blur with zero padding. Default values are the paper's for both views (arXiv:2006.07733,
Appendix B, Table 6); `recipes.paper_views` has what differs between the two.

Each operation has its CPU version (OpenCV, float32) beside its JAX version.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from byol_jax.views.draws import uniform
from byol_jax.views.operation import Operation

# DeepMind byol/utils/augmentations.py, _to_grayscale (ITU-R BT.601 luma).
LUMA = (0.2989, 0.5870, 0.1140)

# DeepMind byol/utils/augmentations.py, blur_divider: the kernel spans a tenth of the view.
BLUR_DIVIDER = 10

JITTERS = ('brightness', 'contrast', 'saturation', 'hue')
ORDERS = tuple(itertools.permutations(JITTERS))

# OpenCV adds it to what it divides by in RGB -> HSV (FLT_EPSILON).
_EPSILON = 2.0**-23


@dataclass(frozen=True)
class Flip(Operation):
    """Mirrors left and right."""

    name: ClassVar[str] = 'flip'
    dtype: ClassVar[Literal['float32', 'uint8', 'any']] = 'any'
    takes_gray: ClassVar[bool] = True
    geometry: ClassVar[Literal['same', 'mirror', 'other']] = 'mirror'
    in_range: ClassVar[bool] = True

    probability: float = 0.5

    def apply(self, image: np.ndarray, params: Any) -> np.ndarray:
        return cv2.flip(image, 1)

    def apply_jax(self, image: jax.Array, params: Any) -> jax.Array:
        return image[:, ::-1]


class Jittered(NamedTuple):
    """What `Jitter` draws.

    Attributes:
      order: index in ORDERS of the order of the four.
      brightness: added to every value, in [-1, 1] of full scale.
      contrast: factor about each channel's mean, at least 0.
      saturation: factor on the S of HSV, at least 0.
      hue: added to the H of HSV, in turns.
    """

    order: Any
    brightness: Any
    contrast: Any
    saturation: Any
    hue: Any


@dataclass(frozen=True)
class Jitter(Operation):
    """Changes brightness, contrast, saturation and hue, in a random order.

    Attributes:
      brightness: largest shift, fraction of full scale.
      contrast: largest relative change.
      saturation: largest relative change.
      hue: largest shift, turns of the colour circle.
    """

    name: ClassVar[str] = 'jitter'
    variates: ClassVar[int] = 5
    in_range: ClassVar[bool] = True

    probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1

    def parameters(self, u: np.ndarray, height: Any, width: Any) -> Jittered:
        return Jittered(
            order=(u[:, 0] * len(ORDERS)).astype(np.uint8),
            brightness=uniform(u[:, 1], -self.brightness, self.brightness),
            contrast=uniform(u[:, 2], 1 - self.contrast, 1 + self.contrast),
            saturation=uniform(u[:, 3], 1 - self.saturation, 1 + self.saturation),
            hue=uniform(u[:, 4], -self.hue, self.hue),
        )

    def apply(self, image: np.ndarray, params: Jittered) -> np.ndarray:
        for names in _PARTS[params.order]:
            image = _CORES[names](image, *(getattr(params, name) for name in names))
        return image

    def apply_jax(self, image: jax.Array, params: Jittered) -> jax.Array:
        order = jnp.asarray(_ORDER_NUMBERS)[params.order]
        for place in range(len(JITTERS)):
            image = _jitter_jax(image, order[place], params)
        return image


@dataclass(frozen=True)
class Gray(Operation):
    """Replaces colours by their luma."""

    name: ClassVar[str] = 'gray'
    in_range: ClassVar[bool] = True

    probability: float = 0.2

    def apply(self, image: np.ndarray, params: Any) -> np.ndarray:
        return luma(image)

    def apply_jax(self, image: jax.Array, params: Any) -> jax.Array:
        gray = image[..., 0] * LUMA[0] + image[..., 1] * LUMA[1] + image[..., 2] * LUMA[2]
        return jnp.broadcast_to(gray[..., None], image.shape)


@dataclass(frozen=True)
class Blur(Operation):
    """Blurs with a Gaussian that spans a tenth of the view; pixels beyond the border count as 0.

    Attributes:
      sigma: range of the standard deviation, pixels of the view, uniform.
    """

    name: ClassVar[str] = 'blur'
    variates: ClassVar[int] = 1
    takes_gray: ClassVar[bool] = True
    in_range: ClassVar[bool] = True

    probability: float = 1.0
    sigma: tuple[float, float] = (0.1, 2.0)

    def parameters(self, u: np.ndarray, height: Any, width: Any) -> np.ndarray:
        return uniform(u[:, 0], *self.sigma)

    def apply(self, image: np.ndarray, params: float) -> np.ndarray:
        return blur(image, params) if params else image

    def apply_jax(self, image: jax.Array, params: jax.Array) -> jax.Array:
        return jnp.where(params > 0, blur_jax(image, params), image)


@dataclass(frozen=True)
class Solarize(Operation):
    """Inverts the values that are not below a threshold.

    Attributes:
      threshold: fraction of full scale.
    """

    name: ClassVar[str] = 'solarize'
    takes_gray: ClassVar[bool] = True
    in_range: ClassVar[bool] = True

    probability: float = 0.2
    threshold: float = 0.5

    def apply(self, image: np.ndarray, params: Any) -> np.ndarray:
        return solarize(image, self.threshold)

    def apply_jax(self, image: jax.Array, params: Any) -> jax.Array:
        return jnp.where(image < self.threshold, image, 1 - image)


# The CPU versions.


def adjust_brightness(image: np.ndarray, delta: float) -> np.ndarray:
    """Adds `delta` to float32 [H, W, 3] in [0, 1] and clips."""
    out = np.add(image, np.float32(delta))
    return _not_above_1(out) if delta > 0 else _not_below_0(out)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales float32 [H, W, 3] in [0, 1] about each channel's mean and clips."""
    matrix = np.zeros((3, 4))
    for channel, mean in enumerate(cv2.mean(image)[:3]):
        matrix[channel, channel] = factor
        matrix[channel, 3] = (1 - factor) * mean
    out = cv2.transform(image, matrix)
    # Towards the mean nothing leaves [0, 1].
    return out if factor <= 1 else _not_above_1(_not_below_0(out))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales the S of HSV of float32 [H, W, 3] in [0, 1]; S is clipped to [0, 1]."""
    return adjust_hsv(image, factor, 0.0)


def adjust_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Turns the H of HSV of float32 [H, W, 3] in [0, 1] by a fraction of the colour circle."""
    return adjust_hsv(image, 1.0, turns)


def adjust_hsv(image: np.ndarray, factor: float, turns: float) -> np.ndarray:
    """`adjust_saturation` and `adjust_hue` in one; their order does not matter."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    # OpenCV's float hue is in degrees; it takes those from 360 to 720 too.
    change = np.array([[1, 0, 0, 360 * (turns % 1)], [0, factor, 0, 0], [0, 0, 1, 0]])
    hsv = cv2.transform(hsv, change)
    if factor > 1:
        hsv = cv2.min(hsv, (math.inf, 1, math.inf, 0))
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def luma(image: np.ndarray) -> np.ndarray:
    """The luma of float32 [H, W, 3]: float32 [H, W]."""
    return cv2.transform(image, np.array([LUMA]))


def blur_kernel(size: int, sigma: float) -> np.ndarray:
    """The 1-D Gaussian for a view of `size` pixels: float32 [2 * (size // 20) + 1], sum 1.

    A tenth of the view, made odd: 23 taps at 224 pixels (DeepMind augmentations.py,
    _gaussian_blur_single_image).
    """
    radius = int(size / BLUR_DIVIDER / 2)
    taps = np.arange(-radius, radius + 1)
    kernel = np.exp(-(taps**2) / (2.0 * sigma**2))
    return (kernel / kernel.sum()).astype(np.float32)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs float32 [H, W, 3] or [H, W] with `blur_kernel`; beyond the border pixels count as 0.

    Taps beyond 4 sigma are left out: they are 3e-5 of the sum, less than a hundredth of a level.
    """
    kernel = blur_kernel(image.shape[0], sigma)
    spare = max(len(kernel) // 2 - math.ceil(4 * sigma), 0)
    kernel = kernel[spare : len(kernel) - spare]
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_CONSTANT)


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts values of float32 [H, W, 3] or [H, W] in [0, 1] that are not below `threshold`."""
    inverted = np.float32(1) - image
    if threshold == 0.5:
        return cv2.min(image, inverted)
    return np.where(image < np.float32(threshold), image, inverted)


def _not_above_1(image: np.ndarray) -> np.ndarray:
    return cv2.threshold(image, 1, 1, cv2.THRESH_TRUNC, dst=image)[1]


def _not_below_0(image: np.ndarray) -> np.ndarray:
    return cv2.threshold(image, 0, 0, cv2.THRESH_TOZERO, dst=image)[1]


_CORES: dict[tuple[str, ...], Callable[..., np.ndarray]] = {
    ('brightness',): adjust_brightness,
    ('contrast',): adjust_contrast,
    ('saturation',): adjust_saturation,
    ('hue',): adjust_hue,
    ('saturation', 'hue'): adjust_hsv,
}


def _adjacent(order: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Splits an order of jitters into parts; adjacent saturation and hue are one part."""
    parts: list[tuple[str, ...]] = []
    for name in order:
        if parts and {name, *parts[-1]} == {'saturation', 'hue'}:
            parts[-1] = ('saturation', 'hue')
        else:
            parts.append((name,))
    return tuple(parts)


_PARTS = tuple(map(_adjacent, ORDERS))


# The JAX versions.

_ORDER_NUMBERS = np.array([[JITTERS.index(name) for name in order] for order in ORDERS], np.uint8)


def _jitter_jax(x: jax.Array, which: jax.Array, params: Jittered) -> jax.Array:
    """The jitter JITTERS[which] of float32 [S, S, 3] in [0, 1].

    Under `vmap` a choice computes all its branches. So brightness and contrast share one formula,
    and saturation and hue another; each formula leaves alone what is not chosen.
    """
    brightness, contrast, saturation, hue = (which == number for number in range(len(JITTERS)))
    mean = jnp.mean(x, axis=(0, 1))
    factor = jnp.where(contrast, params.contrast, 1)
    delta = jnp.where(contrast, (1 - params.contrast) * mean, 0)
    delta = jnp.where(brightness, params.brightness, delta)
    straight = jnp.clip(x * factor + delta, 0, 1)
    coloured = adjust_hsv_jax(
        x, jnp.where(saturation, params.saturation, 1), jnp.where(hue, params.hue, 0)
    )
    return jnp.where(saturation | hue, coloured, straight)


def adjust_hsv_jax(x: jax.Array, factor: jax.Array, turns: jax.Array) -> jax.Array:
    """`adjust_hsv` in JAX: float32 [..., 3] in [0, 1] -> the same."""
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


def blur_jax(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """`blur` in JAX, of float32 [S, S, 3].

    Args:
      x: float32 [S, S, 3].
      sigma: float32 [], pixels. At 0 the result is meaningless, but finite.
    """
    size = x.shape[0]
    radius = int(size / BLUR_DIVIDER / 2)
    sigma = jnp.where(sigma > 0, sigma, 1)
    kernel = jnp.exp(-(jnp.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    # Matrix products, because a convolution would need a kernel of its own for each picture.
    pixels = jnp.arange(size)
    apart = pixels[:, None] - pixels
    matrix = jnp.where(
        jnp.abs(apart) <= radius, jnp.exp(-(apart**2) / (2 * sigma**2)) / kernel.sum(), 0
    )
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum('sw,hwc->hsc', matrix, x, precision=highest)
    return jnp.einsum('sh,hwc->swc', matrix, x, precision=highest)
