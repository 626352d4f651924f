"""Crop and resize on the device, equal to Pillow's to the bit.

Pillow resizes with whole numbers: weights in units of 2^-22, the sum rounded to 8 bits, first along
one axis and then along the other (its src/libImaging/Resample.c, followed in `_weights`). Here each
of the two is a matrix product in float32 that is exact: weights are split in two, so that no sum of
products exceeds the 2^24 up to which float32 holds every whole number.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL

from byol_jax.errors import UserError

# Pillow Resample.c: PRECISION_BITS (32 - 8 - 2); bicubic_filter's a and its support.
_BITS = 22
_A, _SUPPORT = -0.5, 2.0
# Pillow 13.0 resizes the height first where it shrinks much more than the width (its pull request
# 9549; `tall` below is the rule for square results, found by comparing), else the width.
_TALL_FIRST = int(PIL.__version__.split('.')[0]) >= 13
# A weight is upper x 2^11 + lower, with lower in [-1024, 1023].
_LOWER_BITS = 11
# 64 x 1024 x 255 is the largest sum of lower parts below 2^24.
_MOST_TAPS = 64
# The whole of float32, also where matrix units would take less.
_EXACT = jax.lax.Precision.HIGHEST
# Values of pictures and weights worked on at a time.
_VALUES_AT_ONCE = 2**26


class Resize(NamedTuple):
    """Weights for resizing any length 1 .. L to S pixels; entry 0 is not used.

    Attributes:
      start: int32 [L + 1, S], the first pixel that feeds each result.
      upper, lower: float32 [L + 1, S, K], weights of K pixels from there on: whole numbers, of
        which upper x 2^11 + lower is the weight in units of 2^-22.
    """

    start: Any
    upper: Any
    lower: Any


def resize_weights(longest: int, size: int) -> Resize:
    """Pillow's bicubic weights from every length up to `longest` to `size` pixels, in NumPy.

    Raises:
      UserError: pictures are too large for these views.
    """
    most = _taps(longest / size)
    if most > _MOST_TAPS:
        raise UserError(
            f'Pictures of {longest} pixels are more than 15 times the views '
            f"(views.image_size={size}). With views.on='accelerator' they must be smaller: store "
            "them at about twice the size of the views, or use views.on='cpu'."
        )
    start = np.zeros((longest + 1, size), np.int32)
    weights = np.zeros((longest + 1, size, most), np.int64)
    for length in range(1, longest + 1):
        start[length], row = _weights(length, size)
        weights[length, :, : row.shape[1]] = row
    upper = (weights + 2 ** (_LOWER_BITS - 1)) >> _LOWER_BITS
    lower = weights - (upper << _LOWER_BITS)
    return Resize(start, upper.astype(np.float32), lower.astype(np.float32))


def crop_resize(pictures: jax.Array, crops: jax.Array, weights: Resize, size: int) -> jax.Array:
    """Cuts and resizes: uint8 [B, H, W, 3] -> uint8 [B, S, S, 3], as `augment.crop_resize`.

    Args:
      crops: int32 [B, 4], (top, left, height, width) in pixels.
      weights: `resize_weights` of at least max(H, W), for S.
      size: S.
    """

    # Square, so that one of them can lie on its side.
    height, width = pictures.shape[1:3]
    side = max(height, width)
    pictures = jnp.pad(pictures, ((0, 0), (0, side - height), (0, side - width), (0, 0)))

    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        picture, (top, left, height, width) = inputs
        x = picture.astype(jnp.float32)
        tall = _TALL_FIRST & (height > size) & (height - size > 2 * (width - size))
        # Turned on its side it has its columns resized first.
        x = jnp.where(tall, x.swapaxes(0, 1), x)
        first, length = jnp.where(tall, top, left), jnp.where(tall, height, width)
        matrices = _matrices(weights, first, length, side)
        x = _rounded(jnp.einsum('psw,hwc->phsc', matrices, x, precision=_EXACT))
        first, length = jnp.where(tall, left, top), jnp.where(tall, width, height)
        matrices = _matrices(weights, first, length, side)
        x = _rounded(jnp.einsum('psh,hwc->pswc', matrices, x, precision=_EXACT))
        return jnp.where(tall, x.swapaxes(0, 1), x).astype(jnp.uint8)

    return map_in_parts(one, (pictures, crops), 2 * pictures[0].size)


def map_in_parts(function: Any, inputs: Any, values: int) -> Any:
    """Maps over the leading axis, as many at a time as memory should be spent on.

    Args:
      function: of one element. inputs: any tree. values: float32 numbers an element takes.
    """
    count = len(jax.tree.leaves(inputs)[0])
    at_once = max(1, _VALUES_AT_ONCE // values)
    if at_once >= count:
        return jax.vmap(function)(inputs)
    return jax.lax.map(function, inputs, batch_size=at_once)


def _matrices(weights: Resize, first: jax.Array, length: jax.Array, pixels: int) -> jax.Array:
    """Upper and lower weights of a stretch of a line: float32 [2, S, pixels]."""
    offset = jnp.arange(pixels) - first - weights.start[length][:, None]
    taps = weights.upper.shape[-1]
    both = jnp.stack([weights.upper[length], weights.lower[length]])
    index = jnp.broadcast_to(jnp.clip(offset, 0, taps - 1), (2, *offset.shape))
    inside = (offset >= 0) & (offset < taps)
    return jnp.where(inside, jnp.take_along_axis(both, index, axis=2), 0)


def _rounded(sums: jax.Array) -> jax.Array:
    """Sums of upper and of lower parts, [2, ...], to whole numbers 0 .. 255, all float32."""
    upper, lower = sums.astype(jnp.int32)
    total = (upper << _LOWER_BITS) + lower + 2 ** (_BITS - 1)
    return jnp.clip(total >> _BITS, 0, 255).astype(jnp.float32)


def _taps(scale: float) -> int:
    """Pixels that feed one result, at most, where `scale` pixels become one."""
    return math.ceil(_SUPPORT * max(scale, 1.0)) * 2 + 1


def _weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For `length` pixels resized to `size`: the first pixel int [S] and weights int [S, taps]."""
    scale = length / size
    stretch = max(scale, 1.0)
    center = (np.arange(size) + 0.5) * scale
    # Truncated as C does; negative values are set to 0 anyway.
    first = np.maximum((center - _SUPPORT * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((center + _SUPPORT * stretch + 0.5).astype(np.int64), length)
    taps = np.arange(_taps(scale))
    x = np.abs((taps + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch))
    near = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weights[taps >= (last - first)[:, None]] = 0.0
    total = np.zeros(size)
    # One after the other, as Pillow adds them: another order may round another way.
    for column in weights.T:
        total += column
    weights /= total[:, None]
    return first, np.trunc(weights * 2**_BITS + np.copysign(0.5, weights)).astype(np.int64)
