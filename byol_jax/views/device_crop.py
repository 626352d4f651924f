"""Crop and resize on the device; antialiased, equal to Pillow's to the bit.

Pillow resizes with whole numbers: weights in units of 2^-22, the sum rounded to 8 bits, first along
one axis and then along the other (see `views/resize.py`, whose weights these are). Here each of the
two is a matrix product in float32 that is exact: weights are split in two, so that no sum of
products exceeds the 2^24 up to which float32 holds every whole number.

OpenCV's, without antialiasing, rounds once, at the end; here both products are in float32, and a
result may be 1 of 255 off where it lies halfway.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from byol_jax.errors import UserError
from byol_jax.views.resize import BITS, SHARP_TAPS, height_first, most_taps, sharp_weights
from byol_jax.views.resize import weights as pillow_weights

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
        which upper x 2^11 + lower is the weight in units of 2^-22. Without antialiasing lower is
        None and upper the weight.
    """

    start: Any
    upper: Any
    lower: Any


def resize_weights(longest: int, size: int, antialias: bool = True) -> Resize:
    """Bicubic weights from every length up to `longest` to `size` pixels, in NumPy.

    Args:
      antialias: see `augment.crop_resize`.

    Raises:
      UserError: pictures are too large for these views.
    """
    start = np.zeros((longest + 1, size), np.int32)
    if not antialias:
        sharp = np.zeros((longest + 1, size, SHARP_TAPS), np.float32)
        for length in range(1, longest + 1):
            start[length], sharp[length] = sharp_weights(length, size)
        return Resize(start, sharp, None)
    most = most_taps(longest / size)
    if most > _MOST_TAPS:
        raise UserError(
            f'Pictures of {longest} pixels are more than 15 times the views '
            f"(views.image_size={size}). With views.on='accelerator' they must be smaller: store "
            "them at about twice the size of the views, or use views.on='cpu'."
        )
    weights = np.zeros((longest + 1, size, most), np.int64)
    for length in range(1, longest + 1):
        start[length], row = pillow_weights(length, size)
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

    summed = _rounded if weights.lower is not None else _unrounded

    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        picture, (top, left, height, width) = inputs
        x = picture.astype(jnp.float32)
        # Without rounding in between the order does not matter.
        tall = weights.lower is not None and height_first(height, width, size)
        # Turned on its side it has its columns resized first.
        x = jnp.where(tall, x.swapaxes(0, 1), x)
        first, length = jnp.where(tall, top, left), jnp.where(tall, height, width)
        matrices = _matrices(weights, first, length, side)
        x = summed(jnp.einsum('psw,hwc->phsc', matrices, x, precision=_EXACT))
        first, length = jnp.where(tall, left, top), jnp.where(tall, width, height)
        matrices = _matrices(weights, first, length, side)
        x = summed(jnp.einsum('psh,hwc->pswc', matrices, x, precision=_EXACT))
        if weights.lower is None:
            x = jnp.rint(jnp.clip(x, 0, 255))
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
    """Weights of a stretch of a line, upper and lower if both: float32 [1 or 2, S, pixels]."""
    offset = jnp.arange(pixels) - first - weights.start[length][:, None]
    taps = weights.upper.shape[-1]
    parts = [part[length] for part in weights[1:] if part is not None]
    index = jnp.broadcast_to(jnp.clip(offset, 0, taps - 1), (len(parts), *offset.shape))
    inside = (offset >= 0) & (offset < taps)
    return jnp.where(inside, jnp.take_along_axis(jnp.stack(parts), index, axis=2), 0)


def _rounded(sums: jax.Array) -> jax.Array:
    """Sums of upper and of lower parts, [2, ...], to whole numbers 0 .. 255, all float32."""
    upper, lower = sums.astype(jnp.int32)
    total = (upper << _LOWER_BITS) + lower + 2 ** (BITS - 1)
    return jnp.clip(total >> BITS, 0, 255).astype(jnp.float32)


def _unrounded(sums: jax.Array) -> jax.Array:
    return sums[0]
