"""Pillow's antialiased bicubic resizing, to the bit, in less than half of its time.

Pillow resizes with whole numbers: weights in units of 2^-22, the sum rounded to 8 bits, first along
one axis and then along the other (its src/libImaging/Resample.c, followed in `weights`). Here a
pass is a product with a banded matrix in float32, as small dense blocks along the band, which NumPy
leaves to BLAS without holding the interpreter's lock. The few results so near to half a number that
float32 may have rounded them the wrong way are found and computed again in whole numbers.

OpenCV itself resizes without antialiasing; `sharp_weights` tell `crop` how.
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
# Pillow 13.0 resizes the height first where it shrinks much more than the width (its pull request
# 9549; `height_first` is the rule for square results, found by comparing), else the width.
_TALL_FIRST = int(PIL.__version__.split('.')[0]) >= 13

# Results of a block: more cost more zeros of the band, fewer more calls. Measured.
_BLOCK_ROWS = 8
# Multiplications of a product from which on OpenBLAS starts threads of its own, which would fight
# with the other examples' (its interface/gemm.c: SMP_THRESHOLD_MIN x GEMM_MULTITHREAD_THRESHOLD).
_MOST_PRODUCTS = 65536 * 4
# Bands that are kept: for 224 results each takes 30 kB, from pictures ten times as large 200 kB.
_BANDS = 512


class Band(NamedTuple):
    """The matrix of one pass over L pixels.

    Attributes:
      blocks: (start, stop, first, last, weights): the results [start, stop) are float32 weights
        [stop - start, last - first] times the pixels [first, last).
      pixels: int64 [S, K], the pixels that feed each result; those beyond L are set to L - 1.
      weights: int64 [S, K], theirs, in units of 2^-BITS.
      error: how far a result in float32 may be from the exact one, in levels.
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
    """Whether Pillow resizes the height before the width: bool, or an array if the sides are."""
    return _TALL_FIRST & (height > size) & (height - size > 2 * (width - size))


def most_taps(scale: float) -> int:
    """Pixels that feed one result, at most, where `scale` pixels become one."""
    return math.ceil(SUPPORT * max(scale, 1.0)) * 2 + 1


def weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's weights for `length` pixels resized to `size`.

    Returns:
      The first pixel that feeds each result, int64 [S], and the weights of it and of the pixels
      after it, int64 [S, most_taps], in units of 2^-BITS.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    center = (np.arange(size) + 0.5) * scale
    # Truncated as C does; negative values are set to 0 anyway.
    first = np.maximum((center - SUPPORT * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((center + SUPPORT * stretch + 0.5).astype(np.int64), length)
    taps = np.arange(most_taps(scale))
    x = np.abs((taps + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch))
    found = _cubic(x, _A)
    found[taps >= (last - first)[:, None]] = 0.0
    total = np.zeros(size)
    # One after the other, as Pillow adds them: another order may round another way.
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

    Results lie between the second and the third of SHARP_TAPS pixels; beyond the border the last
    pixel goes on.

    Returns:
      As `weights`, but the weights are float64 [S, SHARP_TAPS], in units of 1.
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
    # Beyond the picture weights are 0.
    row, tap = np.nonzero(pixels < length)
    # Whole numbers of at most 23 bits, so exact in float32.
    dense[(*np.divmod(row, _BLOCK_ROWS), places[row, tap])] = whole[row, tap] / 2**BITS
    blocks = [
        (int(start), int(stop), int(left), int(right), matrix[: stop - start, : right - left])
        for start, stop, left, right, matrix in zip(starts, stops, low, high, dense, strict=True)
    ]
    # K products and sums in float32 are wrong by at most K / 2^24 of the sum of sizes (Higham 2002,
    # equation 3.5; a block's zeros are exact), and adding this bound to a result by one more.
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
    # `convertScaleAbs` rounds and cuts at 255, but would take the size of what is negative.
    cv2.threshold(y, 0, 0, cv2.THRESH_TOZERO, dst=y)
    result = cv2.convertScaleAbs(y, alpha=1, beta=matrix.error)
    unsure = np.flatnonzero(result != cv2.convertScaleAbs(y, alpha=1, beta=-matrix.error))
    if len(unsure):
        rows, places = np.divmod(unsure, columns)
        values = flat[matrix.pixels[rows], places[:, None]].astype(np.int64)
        total = (values * matrix.weights[rows]).sum(axis=1) + 2 ** (BITS - 1)
        result[rows, places] = np.clip(total >> BITS, 0, 255)
    return result.reshape(size, width, channels)
