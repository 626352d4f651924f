"""The random numbers of views: a pure function of (seed, epoch, example, view, operation).

Setting up NumPy's generator for one view takes longer than drawing from it. This module implements
the generator, Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), on
arrays: it gives the same numbers as NumPy's `Philox`, for a whole batch at once.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

# The stream of the paper's operations. Streams 1 and 5 belong to the sources' splits and shifts of
# tiles, 2, 3 and 4 to input/stream.py.
PAPER_STREAM = 0

# Philox4x64-10: number of rounds, multipliers, and increments of the two keys (Salmon et al.,
# Section 3.3; Random123 philox.h).
_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MASK32 = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def stream_of(name: str, before: int = 0) -> int:
    """The stream that an operation draws from: the first 64 bits of its name's SHA-256.

    Args:
      name: the operation's name.
      before: how many operations of this name precede it in the view. If this is above 0, '#' and
        the number are added to the name.
    """
    text = f'{name}#{before}' if before else name
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'little')


def uniforms(
    seed: int, stream: int, number: int, epochs: np.ndarray, examples: np.ndarray, count: int
) -> np.ndarray:
    """The random numbers of one view of B examples.

    Args:
      seed: the run's seed.
      stream: PAPER_STREAM, or an operation's stream (`stream_of`).
      number: number of the view, from 1.
      epochs: epoch of each example, from 0, int [B].
      examples: indices in the source, int [B].
      count: how many numbers each example gets.

    Returns:
      Numbers in [0, 1), float64 [B, count]. Row i equals `np.random.Generator(np.random.Philox(
      key=[seed, stream], counter=[0, number, examples[i], epochs[i]])).random(count)`.
    """
    if len(examples) == 1:
        counter = [0, number, int(examples[0]), int(epochs[0])]
        philox = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter)
        return np.random.Generator(philox).random((1, count))
    blocks = -(-count // 4)
    # NumPy increments the counter before it draws, so the first block has number 1.
    block = np.arange(1, blocks + 1, dtype=np.uint64)
    shape = (len(examples), blocks)
    words = _philox(
        [
            np.broadcast_to(block, shape),
            np.full(shape, number, np.uint64),
            np.broadcast_to(np.asarray(examples).astype(np.uint64)[:, None], shape),
            np.broadcast_to(np.asarray(epochs).astype(np.uint64)[:, None], shape),
        ],
        (seed, stream),
    )
    drawn = np.stack(words, axis=-1).reshape(len(examples), -1)[:, :count]
    # NumPy's Generator.random uses the upper 53 bits.
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(u: Any, low: float, high: float) -> Any:
    """Maps uniform numbers in [0, 1), one or an array, to [low, high)."""
    return low + (high - low) * u


def _philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Turns counters of four words into four random words each, all uint64 arrays of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = ((k + weyl) % 2**64 for k, weyl in zip((k0, k1), _WEYL, strict=True))
    return [c0, c1, c2, c3]


def _product(a: np.ndarray, b: int) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower 64 bits of a x b, as uint64 arrays; `a` is a uint64 array."""
    a1, a0 = a >> _HALF, a & _MASK32
    b1, b0 = np.uint64(b >> 32), np.uint64(b & 0xFFFFFFFF)
    low, middle = a0 * b0, a1 * b0
    # Neither sum overflows: (2^32 - 1)^2 + 2 (2^32 - 1) < 2^64.
    cross = (low >> _HALF) + (middle & _MASK32) + a0 * b1
    high = a1 * b1 + (middle >> _HALF) + (cross >> _HALF)
    return high, (cross << _HALF) | (low & _MASK32)
