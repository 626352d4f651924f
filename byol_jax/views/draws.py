"""The parameters of many views at once: `augment.draw_view` for whole batches, bit for bit.

Drawing one view takes NumPy longer to set up its generator than to draw. Here the generator itself,
Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", the function that
NumPy's `Philox` runs), is written over arrays.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from byol_jax.views.augment import ORDERS, VARIATES

# The jitters by number, as `Photometric.order` has them; NO_JITTER fills the places without one.
JITTERS = ('brightness', 'contrast', 'saturation', 'hue')
NO_JITTER = len(JITTERS)

# Philox4x64-10: rounds, multipliers and what is added to the two keys (the paper, Section 3.3;
# Random123 philox.h).
_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MASK32 = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

_ORDERS = np.array([[JITTERS.index(name) for name in order] for order in ORDERS], np.uint8)


class Photometric(NamedTuple):
    """What `augment.ViewParams` says of colours and the flip, for B views.

    Attributes:
      flip: bool [B].
      order: uint8 [B, 4], indices of JITTERS, or NO_JITTER in all four places.
      brightness, contrast, saturation, hue: float32 [B].
      gray: bool [B].
      sigma: float32 [B], pixels of the view; 0 for no blur.
      solarize: float32 [B]; inf for none.
    """

    flip: Any
    order: Any
    brightness: Any
    contrast: Any
    saturation: Any
    hue: Any
    gray: Any
    sigma: Any
    solarize: Any


def uniforms(seed: int, number: int, epochs: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """The variates of B views: float64 [B, 15] in [0, 1).

    Args:
      seed: the run's seed. number: 1 or 2. epochs, examples: int [B], as `draw_view` takes them.
    """
    blocks = -(-VARIATES // 4)
    # NumPy counts up before it draws: the first block is number 1.
    block = np.arange(1, blocks + 1, dtype=np.uint64)
    shape = (len(examples), blocks)
    words = _philox(
        [
            np.broadcast_to(block, shape),
            np.full(shape, number, np.uint64),
            np.broadcast_to(np.asarray(examples).astype(np.uint64)[:, None], shape),
            np.broadcast_to(np.asarray(epochs).astype(np.uint64)[:, None], shape),
        ],
        (seed, 0),
    )
    drawn = np.stack(words, axis=-1).reshape(len(examples), -1)[:, :VARIATES]
    # The upper 53 bits, as NumPy's Generator.random takes them.
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_photometric(view: Any, u: np.ndarray) -> Photometric:
    """Flip and colours of B views.

    Args:
      view: the view's config (configs/default.py, `get_view`).
      u: float64 [B, 15], from `uniforms`.
    """
    jitter = u[:, 5] < view.jitter
    orders = _ORDERS[(u[:, 6] * len(ORDERS)).astype(np.int64)]
    return Photometric(
        flip=u[:, 4] < view.flip,
        order=np.where(jitter[:, None], orders, np.uint8(NO_JITTER)),
        brightness=_uniform(u[:, 7], -view.brightness, view.brightness).astype(np.float32),
        contrast=_uniform(u[:, 8], 1 - view.contrast, 1 + view.contrast).astype(np.float32),
        saturation=_uniform(u[:, 9], 1 - view.saturation, 1 + view.saturation).astype(np.float32),
        hue=_uniform(u[:, 10], -view.hue, view.hue).astype(np.float32),
        gray=u[:, 11] < view.gray,
        sigma=np.where(u[:, 12] < view.blur, _uniform(u[:, 13], *view.blur_sigma), 0).astype(
            np.float32
        ),
        solarize=np.where(u[:, 14] < view.solarize, view.solarize_threshold, math.inf).astype(
            np.float32
        ),
    )


def draw_crops(view: Any, height: int, width: int, u: np.ndarray) -> np.ndarray:
    """Crops of B views of pictures of one size: int32 [B, 4], (top, left, height, width).

    Args:
      view: the view's config. height, width: of the pictures, pixels.
      u: float64 [B, 15], from `uniforms`.
    """
    target = _uniform(u[:, 0], *view.crop_area) * height * width
    low, high = map(math.log, view.crop_ratio)
    # Not np.exp, which may differ from math.exp in the last bit.
    aspect = np.array([math.exp(x) for x in _uniform(u[:, 1], low, high).tolist()])
    w = np.clip(np.rint(np.sqrt(target * aspect)), 1, width)
    h = np.clip(np.rint(np.sqrt(target / aspect)), 1, height)
    top, left = (u[:, 2] * (height - h + 1)), (u[:, 3] * (width - w + 1))
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


def _philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Four words of output for each counter of four words, all uint64 of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = ((k + weyl) % 2**64 for k, weyl in zip((k0, k1), _WEYL, strict=True))
    return [c0, c1, c2, c3]


def _product(a: np.ndarray, b: int) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower 64 bits of a x b: uint64 arrays, for uint64 `a`."""
    a1, a0 = a >> _HALF, a & _MASK32
    b1, b0 = np.uint64(b >> 32), np.uint64(b & 0xFFFFFFFF)
    low, middle = a0 * b0, a1 * b0
    # Neither sum can leave 64 bits: (2^32 - 1)^2 + 2 (2^32 - 1) < 2^64.
    cross = (low >> _HALF) + (middle & _MASK32) + a0 * b1
    high = a1 * b1 + (middle >> _HALF) + (cross >> _HALF)
    return high, (cross << _HALF) | (low & _MASK32)


def _uniform(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u
