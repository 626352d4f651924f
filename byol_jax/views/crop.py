"""The random crop, resized: on the CPU and, equal to it to the bit, in JAX.

With antialiasing the CPU's resize is Pillow's (`resize.py`): whole numbers, weights in units of
2^-22, the sum rounded to 8 bits, first along one axis and then along the other. In JAX each of the
two is a matrix product in float32 that is exact: weights are split in two, so that no sum of
products exceeds the 2^24 up to which float32 holds every whole number.

OpenCV's, without antialiasing, rounds once, at the end; in JAX both products are in float32, and a
result may be 1 of 255 off where it lies halfway.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from byol_jax.errors import UserError
from byol_jax.views.draws import uniform
from byol_jax.views.operation import Resizing
from byol_jax.views.resize import (
    BITS,
    SHARP_TAPS,
    height_first,
    most_taps,
    resize,
    sharp_weights,
)
from byol_jax.views.resize import weights as pillow_weights

# A weight is upper x 2^11 + lower, with lower in [-1024, 1023].
_LOWER_BITS = 11
# 64 x 1024 x 255 is the largest sum of lower parts below 2^24.
_MOST_TAPS = 64
# The whole of float32, also where matrix units would take less.
_EXACT = jax.lax.Precision.HIGHEST
# Values of pictures and weights worked on at a time.
_VALUES_AT_ONCE = 2**26


@dataclass(frozen=True)
class Crop(Resizing):
    """Cuts a random box out and resizes it, bicubic, to a square.

    The area is uniform, the ratio log-uniform, a side that leaves the picture is cut to it, and
    the place is uniform (DeepMind byol/utils/dataset.py, _decode_and_random_crop).

    Attributes:
      size: side of the result, pixels.
      area: range of the box's area, fraction of the picture's.
      ratio: range of its width over its height.
      antialias: see `crop_resize`.
    """

    name: ClassVar[str] = 'crop'
    variates: ClassVar[int] = 4
    in_range: ClassVar[bool] = True

    size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    antialias: bool = True

    def parameters(self, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        logs = uniform(u[:, 1], *map(math.log, self.ratio))
        # Not np.exp, which may differ from math.exp in the last bit.
        aspect = np.array([math.exp(x) for x in logs.tolist()])
        target = uniform(u[:, 0], *self.area) * height * width
        w = np.clip(np.rint(np.sqrt(target * aspect)), 1, width)
        h = np.clip(np.rint(np.sqrt(target / aspect)), 1, height)
        top, left = u[:, 2] * (height - h + 1), u[:, 3] * (width - w + 1)
        return np.stack([top, left, h, w], axis=1).astype(np.int32)

    def parameters_of_one(
        self, u: list[float], height: int, width: int
    ) -> tuple[int, int, int, int]:
        # The formulae of `parameters` in plain Python, which for one box is three times as fast.
        target = uniform(u[0], *self.area) * height * width
        aspect = math.exp(uniform(u[1], *map(math.log, self.ratio)))
        w = min(max(round(math.sqrt(target * aspect)), 1), width)
        h = min(max(round(math.sqrt(target / aspect)), 1), height)
        return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w

    def apply(self, image: np.ndarray, params: tuple[int, int, int, int]) -> np.ndarray:
        return crop_resize(image, params, self.size, self.antialias)

    def tables(self, longest: int) -> ResizeTables:
        return resize_tables(longest, self.size, self.antialias)

    def resize_jax(self, pictures: jax.Array, boxes: jax.Array, tables: Any) -> jax.Array:
        return crop_resize_jax(pictures, boxes, tables, self.size)


def crop_resize(
    image: np.ndarray, crop: tuple[int, int, int, int], size: int, antialias: bool = True
) -> np.ndarray:
    """Cuts (top, left, height, width) and resizes: uint8 [H, W, 3] -> uint8 [size, size, 3].

    Args:
      image: uint8 [H, W, 3].
      crop: in pixels.
      size: side of the result, pixels.
      antialias: bicubic with a = -0.5 over all pixels that become one, as Pillow and torchvision
        resize. False: over 4 x 4 pixels whatever the scale, a = -0.75, as OpenCV does.
    """
    top, left, height, width = crop
    window = image[top : top + height, left : left + width]
    if (height, width) == (size, size):
        return window
    if antialias:
        return resize(window, size)
    return cv2.resize(window, (size, size), interpolation=cv2.INTER_CUBIC)


def center_view(image: np.ndarray, size: int, crop_fraction: float) -> np.ndarray:
    """The view used for evaluation: the centre square of uint8 [H, W, 3], resized.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result, pixels.
      crop_fraction: side of the square over the picture's shorter side, in (0, 1]; 224 / 256 in
        DeepMind byol/utils/dataset.py, _decode_and_center_crop.
    """
    height, width = image.shape[:2]
    side = max(1, int(min(height, width) * crop_fraction))
    return crop_resize(image, ((height - side) // 2, (width - side) // 2, side, side), size)


class ResizeTables(NamedTuple):
    """Weights for resizing any length 1 .. L to S pixels; entry 0 is not used.

    Attributes:
      start: int32 [L + 1, S], the first pixel that feeds each result.
      upper: float32 [L + 1, S, K], of the weights of K pixels from there on: whole numbers, of
        which upper x 2^11 + lower is the weight in units of 2^-22. Without antialiasing it is the
        weight.
      lower: likewise; None without antialiasing.
    """

    start: Any
    upper: Any
    lower: Any


@functools.lru_cache(maxsize=2)
def resize_tables(longest: int, size: int, antialias: bool = True) -> ResizeTables:
    """Bicubic weights from every length up to `longest` to `size` pixels, in NumPy.

    Args:
      longest: sides of the pictures, at most.
      size: side of the result.
      antialias: see `crop_resize`.

    Raises:
      UserError: pictures are too large for these views.
    """
    start = np.zeros((longest + 1, size), np.int32)
    if not antialias:
        sharp = np.zeros((longest + 1, size, SHARP_TAPS), np.float32)
        for length in range(1, longest + 1):
            start[length], sharp[length] = sharp_weights(length, size)
        return ResizeTables(start, sharp, None)
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
    return ResizeTables(start, upper.astype(np.float32), lower.astype(np.float32))


def crop_resize_jax(
    pictures: jax.Array, crops: jax.Array, weights: ResizeTables, size: int
) -> jax.Array:
    """Cuts and resizes: uint8 [B, H, W, 3] -> uint8 [B, S, S, 3], as `crop_resize`.

    Args:
      pictures: uint8 [B, H, W, 3].
      crops: int32 [B, 4], (top, left, height, width) in pixels.
      weights: `resize_tables` of at least max(H, W), for S.
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
      function: of one element.
      inputs: any tree.
      values: float32 numbers that an element takes.
    """
    count = len(jax.tree.leaves(inputs)[0])
    at_once = max(1, _VALUES_AT_ONCE // values)
    if at_once >= count:
        return jax.vmap(function)(inputs)
    return jax.lax.map(function, inputs, batch_size=at_once)


def _matrices(weights: ResizeTables, first: jax.Array, length: jax.Array, pixels: int) -> jax.Array:
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
