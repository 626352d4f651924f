"""The random crop with its resize: on the CPU and in JAX.

With antialiasing, the CPU resizes as Pillow does (`resize.py`): in integers, with weights in units
of 2^-22, along one axis and then the other, each time rounded to 8 bits. JAX gives the same bits:
each pass is a float32 matrix product that is exact, because the weights are split into two parts
so small that no sum of products exceeds 2^24, up to which float32 holds every integer.

Without antialiasing, the CPU resizes with OpenCV, which rounds once, at the end. In JAX both passes
are in float32, and a result near half a level may differ by 1 of 255.
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
# Full float32, since matrix units would use fewer bits by default.
_EXACT = jax.lax.Precision.HIGHEST
# How many float32 values of pictures and weights are in memory at a time.
_VALUES_AT_ONCE = 2**26


@dataclass(frozen=True)
class Crop(Resizing):
    """Cuts out a random box and resizes it bicubically to a square.

    The box's area is uniform and its aspect ratio log-uniform; a side longer than the picture's is
    shortened to it, and the place is uniform (DeepMind byol/utils/dataset.py,
    _decode_and_random_crop).

    Attributes:
      size: side of the result, pixels.
      area: range of the box's area, as a fraction of the picture's area, in (0, 1].
      ratio: range of the box's width over its height, above 0.
      antialias: see `crop_resize`.
    """

    name: ClassVar[str] = 'crop'
    variates: ClassVar[int] = 4
    in_range: ClassVar[bool] = True

    size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    antialias: bool = True

    @functools.cached_property
    def _logs(self) -> tuple[float, float]:
        low, high = self.ratio
        return math.log(low), math.log(high)

    def parameters(self, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        logs = uniform(u[:, 1], *self._logs)
        # np.exp may differ in the last bit from math.exp, which `parameters_of_one` uses.
        aspect = np.array([math.exp(x) for x in logs.tolist()])
        target = uniform(u[:, 0], *self.area) * height * width
        w = np.clip(np.rint(np.sqrt(target * aspect)), 1, width)
        h = np.clip(np.rint(np.sqrt(target / aspect)), 1, height)
        top, left = u[:, 2] * (height - h + 1), u[:, 3] * (width - w + 1)
        return np.stack([top, left, h, w], axis=1).astype(np.int32)

    def parameters_of_one(
        self, u: list[float], height: int, width: int
    ) -> tuple[int, int, int, int]:
        # The formulae of `parameters` in plain Python, three times as fast for one box.
        target = uniform(u[0], *self.area) * height * width
        aspect = math.exp(uniform(u[1], *self._logs))
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
    """Cuts out a box and resizes it bicubically to a square.

    Args:
      image: uint8 [H, W, 3].
      crop: the box, (top, left, height, width), pixels.
      size: side of the result, pixels.
      antialias: True: the filter (a = -0.5) grows with the scale to cover all pixels, as in Pillow
        and torchvision. False: it covers 4 x 4 pixels at any scale (a = -0.75), as in OpenCV.

    Returns:
      uint8 [size, size, 3].
    """
    top, left, height, width = crop
    window = image[top : top + height, left : left + width]
    if (height, width) == (size, size):
        return window
    if antialias:
        return resize(window, size)
    return cv2.resize(window, (size, size), interpolation=cv2.INTER_CUBIC)


def center_view(
    image: np.ndarray, size: int, crop_fraction: float, antialias: bool = True
) -> np.ndarray:
    """The view used for evaluation: the picture's centre square, resized.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result, pixels.
      crop_fraction: side of the square as a fraction of the picture's shorter side, in (0, 1];
        224 / 256 in DeepMind byol/utils/dataset.py, _decode_and_center_crop.
      antialias: as in training; see `crop_resize`.

    Returns:
      uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    side = max(1, int(min(height, width) * crop_fraction))
    box = ((height - side) // 2, (width - side) // 2, side, side)
    return crop_resize(image, box, size, antialias)


class ResizeTables(NamedTuple):
    """Weights for resizing any length 1 .. L to S pixels; entry 0 is not used.

    With antialiasing, a weight in units of 2^-22 is upper x 2^11 + lower, both integers. Without,
    a weight is `upper`.

    Attributes:
      start: the first pixel that feeds each result, int32 [L + 1, S].
      upper: upper parts of the weights of K pixels from there on, float32 [L + 1, S, K].
      lower: lower parts of the weights, float32 [L + 1, S, K]; None without antialiasing.
    """

    start: Any
    upper: Any
    lower: Any


@functools.lru_cache(maxsize=2)
def resize_tables(longest: int, size: int, antialias: bool = True) -> ResizeTables:
    """Bicubic weights from every length up to `longest` to `size` pixels, as NumPy arrays.

    Args:
      longest: longest side of the pictures, pixels.
      size: side of the result, pixels.
      antialias: see `crop_resize`.

    Raises:
      UserError: the pictures are too large for views of this size.
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
    """`crop_resize` in JAX, for a batch.

    Args:
      pictures: uint8 [B, H, W, 3].
      crops: boxes (top, left, height, width), pixels, int32 [B, 4].
      weights: `resize_tables` from at least max(H, W) pixels to `size`.
      size: side of the results, pixels.

    Returns:
      uint8 [B, size, size, 3].
    """
    # Padded to squares, so that a transposed picture has the same shape.
    height, width = pictures.shape[1:3]
    side = max(height, width)
    pictures = jnp.pad(pictures, ((0, 0), (0, side - height), (0, side - width), (0, 0)))

    summed = _rounded if weights.lower is not None else _unrounded

    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        picture, (top, left, height, width) = inputs
        x = picture.astype(jnp.float32)
        # Without antialiasing nothing is rounded between the passes: their order does not matter.
        tall = weights.lower is not None and height_first(height, width, size)
        # The first pass resizes the width: a picture is transposed to resize its height first.
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
    """Maps a function over the leading axis, with few enough elements at a time to save memory.

    Args:
      function: takes one element of `inputs`.
      inputs: a tree of arrays [N, ...].
      values: how many float32 numbers one element takes.
    """
    count = len(jax.tree.leaves(inputs)[0])
    at_once = max(1, _VALUES_AT_ONCE // values)
    if at_once >= count:
        return jax.vmap(function)(inputs)
    return jax.lax.map(function, inputs, batch_size=at_once)


def _matrices(weights: ResizeTables, first: jax.Array, length: jax.Array, pixels: int) -> jax.Array:
    """Matrices that resize `length` of `pixels` from `first` on: float32 [1 or 2, S, pixels].

    The two are of the upper and the lower parts of the weights; without antialiasing there is one.
    """
    offset = jnp.arange(pixels) - first - weights.start[length][:, None]
    taps = weights.upper.shape[-1]
    parts = [part[length] for part in weights[1:] if part is not None]
    index = jnp.broadcast_to(jnp.clip(offset, 0, taps - 1), (len(parts), *offset.shape))
    inside = (offset >= 0) & (offset < taps)
    return jnp.where(inside, jnp.take_along_axis(jnp.stack(parts), index, axis=2), 0)


def _rounded(sums: jax.Array) -> jax.Array:
    """Joins and rounds the sums of upper and lower parts, [2, ...], to integers 0 .. 255."""
    upper, lower = sums.astype(jnp.int32)
    total = (upper << _LOWER_BITS) + lower + 2 ** (BITS - 1)
    return jnp.clip(total >> BITS, 0, 255).astype(jnp.float32)


def _unrounded(sums: jax.Array) -> jax.Array:
    return sums[0]
