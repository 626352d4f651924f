"""Pillow's antialiased bicubic resizing, to the bit, in less than half of its time.

Pillow resizes in integers, with weights in units of 2^-22, along one axis and then the other, each
time rounded to 8 bits (its src/libImaging/Resample.c, which `weights` follows). Here a pass is a
float32 product with a banded matrix, split into small dense blocks along the band; NumPy leaves the
products to BLAS without holding the interpreter's lock. The few results so near to half a level
that float32 may have rounded them wrongly are found and computed again in integers.

`sharp_weights` has the weights of OpenCV's bicubic resizing, which has no antialiasing.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL

# Pillow Resample.c: PRECISION_BITS (32 - 8 - 2); bicubic_filter's a and its support.
BITS = 22
_A, SUPPORT = -0.5, 2.0
# OpenCV imgproc/src/resize.cpp, interpolateCubic.
_SHARP_A, SHARP_TAPS = -0.75, 4
# Pillow resizes the width first. From version 13.0 on it resizes the height first if the height
# shrinks much more than the width (its pull request 9549; `height_first` is the rule for square
# results, found by comparing).
_TALL_FIRST = int(PIL.__version__.split('.')[0]) >= 13

# Rows of a block, the fastest number measured: larger blocks hold more zeros, smaller ones need
# more calls.
_BLOCK_ROWS = 8
# The number of multiplications in a product above which OpenBLAS starts its own threads, which
# would compete with those of other examples (its interface/gemm.c: SMP_THRESHOLD_MIN x
# GEMM_MULTITHREAD_THRESHOLD).
_MOST_PRODUCTS = 65536 * 4
# How many bands are kept. For 224 results a band takes 30 kB, or 200 kB if pictures are ten times
# as large.
_BANDS = 512


class Band(NamedTuple):
    """The matrix of one pass, from L pixels to S results.

    Attributes:
      blocks: tuples (start, stop, first, last, weights): the results [start, stop) are the weights,
        float32 [stop - start, last - first], times the pixels [first, last).
      pixels: the pixels that feed each result, int64 [S, K]; pixels beyond the end are L - 1.
      weights: the weights of these pixels in units of 2^-BITS, int64 [S, K].
      error: the largest error of a float32 result, in levels of [0, 255].
    """

    blocks: tuple[tuple[int, int, int, int, np.ndarray], ...]
    pixels: np.ndarray
    weights: np.ndarray
    error: float


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to uint8 [size, size, 3], equal to Pillow's bicubic resize."""
    height, width = image.shape[:2]
    if height_first(height, width, size):
        down = _pass(image, size)
        return cv2.transpose(_pass(cv2.transpose(down), size))
    across = cv2.transpose(_pass(cv2.transpose(image), size))
    return _pass(across, size)


def height_first(height: Any, width: Any, size: int) -> Any:
    """Whether Pillow resizes the height before the width: bool, or bool arrays for arrays."""
    return _TALL_FIRST & (height > size) & (height - size > 2 * (width - size))


def most_taps(scale: float) -> int:
    """The largest number of pixels that feed one result if `scale` pixels become one."""
    return math.ceil(SUPPORT * max(scale, 1.0)) * 2 + 1


def weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's weights for `length` pixels resized to `size`.

    Returns:
      The first pixel that feeds each result, int64 [S], and the weights of the pixels from there
      on, in units of 2^-BITS, int64 [S, most_taps].
    """
    scale = length / size
    stretch = max(scale, 1.0)
    center = (np.arange(size) + 0.5) * scale
    # `astype` truncates as C does; negative values become 0.
    first = np.maximum((center - SUPPORT * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((center + SUPPORT * stretch + 0.5).astype(np.int64), length)
    taps = np.arange(most_taps(scale))
    x = np.abs((taps + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch))
    found = _cubic(x, _A)
    found[taps >= (last - first)[:, None]] = 0.0
    total = np.zeros(size)
    # Add in Pillow's order, since another order may round differently.
    for column in found.T:
        total += column
    found /= total[:, None]
    return first, np.trunc(found * 2**BITS + np.copysign(0.5, found)).astype(np.int64)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic filter (Keys 1981, equation 8) at distances x of at least 0."""
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def sharp_weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """OpenCV's weights (INTER_CUBIC) for `length` pixels resized to `size`, without antialiasing.

    A result lies between the second and the third of the SHARP_TAPS pixels that feed it; beyond the
    border, the last pixel is repeated.

    Returns:
      The first pixel that feeds each result, int64 [S], and the weights of the pixels from there
      on, in units of 1, float64 [S, SHARP_TAPS].
    """
    at = (np.arange(size) + 0.5) * (length / size) - 0.5
    left = np.floor(at).astype(np.int64) - 1
    found = _cubic(np.abs(at[:, None] - (left[:, None] + np.arange(SHARP_TAPS))), _SHARP_A)
    first = np.clip(left, 0, max(length - SHARP_TAPS, 0))
    pixels = np.clip(left[:, None] + np.arange(SHARP_TAPS), 0, length - 1)
    total = np.zeros_like(found)
    np.add.at(total, (np.arange(size)[:, None], pixels - first[:, None]), found)
    return first, total


@functools.lru_cache(maxsize=_BANDS)
def band(length: int, size: int) -> Band:
    """The matrix that resizes `length` pixels to `size`."""
    first, whole = weights(length, size)
    pixels = first[:, None] + np.arange(whole.shape[1])
    starts = np.arange(0, size, _BLOCK_ROWS)
    stops = np.minimum(starts + _BLOCK_ROWS, size)
    low, high = first[starts], np.minimum(pixels[stops - 1, -1] + 1, length)
    places = pixels - np.repeat(low, stops - starts)[:, None]
    dense = np.zeros((len(starts), _BLOCK_ROWS, int(places.max()) + 1), np.float32)
    # Weights of pixels beyond the border are 0 and are left out.
    row, tap = np.nonzero(pixels < length)
    # The weights are integers of at most 23 bits, which float32 holds exactly.
    dense[(*np.divmod(row, _BLOCK_ROWS), places[row, tap])] = whole[row, tap] / 2**BITS
    blocks = [
        (int(start), int(stop), int(left), int(right), matrix[: stop - start, : right - left])
        for start, stop, left, right, matrix in zip(starts, stops, low, high, dense, strict=True)
    ]
    # The error of K products and sums in float32 is at most K / 2^24 of the sum of their absolute
    # values (Higham 2002, equation 3.5; zeros in a block add none). Adding this bound to a result,
    # below, counts as one more sum.
    most = 255 * float(np.abs(whole).sum(axis=1).max()) / 2**BITS
    error = most * (whole.shape[1] + 1) * 2.0**-24
    return Band(tuple(blocks), np.minimum(pixels, length - 1), whole, error)


def _pass(lines: np.ndarray, size: int) -> np.ndarray:
    """Resizes the first axis: uint8 [L, M, 3] -> uint8 [size, M, 3]."""
    length, width, channels = lines.shape
    if length == size:
        return lines
    flat = lines.reshape(length, -1)
    x = flat.astype(np.float32)
    columns = x.shape[1]
    y = np.empty((size, columns), np.float32)
    matrix = band(length, size)
    for start, stop, first, last, dense in matrix.blocks:
        step = max(_MOST_PRODUCTS // (_BLOCK_ROWS * (last - first)), 1)
        if step >= columns:
            np.dot(dense, x[first:last], out=y[start:stop])
            continue
        for left in range(0, columns, step):
            y[start:stop, left : left + step] = dense @ x[first:last, left : left + step]
    # `convertScaleAbs` rounds and clips at 255, but takes absolute values: negative ones go first.
    cv2.threshold(y, 0, 0, cv2.THRESH_TOZERO, dst=y)
    result = cv2.convertScaleAbs(y, alpha=1, beta=matrix.error)
    # Not `flatnonzero`, which takes as long as the product where pictures are tiny.
    unsure = (result != cv2.convertScaleAbs(y, alpha=1, beta=-matrix.error)).ravel().nonzero()[0]
    if len(unsure):
        rows, places = np.divmod(unsure, columns)
        values = flat[matrix.pixels[rows], places[:, None]].astype(np.int64)
        total = (values * matrix.weights[rows]).sum(axis=1) + 2 ** (BITS - 1)
        result[rows, places] = np.clip(total >> BITS, 0, 255)
    return result.reshape(size, width, channels)
