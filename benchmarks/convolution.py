"""Compares the time of weight gradients of convolutions on the CPU: XLA's own, and ours.

    JAX_PLATFORMS=cpu python benchmarks/convolution.py [--rounds=7]

The layers are those of ResNet-50 at 224 pixels and of configs/cifar10.py:cpu. The two take turns.
Prints the medians over the rounds, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from byol_jax.models.convolution import quick_convolution

# Number of pictures, side, input channels, output channels, kernel size, stride.
LAYERS = (
    (16, 224, 3, 64, 7, 2),
    (16, 56, 64, 256, 1, 1),
    (16, 56, 64, 64, 3, 1),
    (16, 56, 256, 512, 1, 2),
    (16, 56, 128, 128, 3, 2),
    (16, 28, 128, 128, 3, 1),
    (16, 14, 256, 256, 3, 1),
    (128, 32, 3, 32, 3, 1),
    (128, 32, 32, 32, 3, 2),
    (128, 32, 32, 32, 1, 2),
    (128, 16, 32, 32, 3, 1),
    (128, 8, 64, 64, 3, 1),
    (128, 4, 128, 128, 3, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=7)
    rounds = parser.parse_args().rounds
    print('pictures side channels kernel stride |  XLA   ours  ratio')
    for pictures, side, before, after, size, stride in LAYERS:
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.normal(size=(pictures, side, side, before)), jnp.float32)
        kernel = jnp.asarray(rng.normal(size=(size, size, before, after)), jnp.float32)
        pads = (((size - 1) // 2,) * 2,) * 2
        seconds: tuple[list[float], list[float]] = ([], [])
        gradients = [
            weight_gradient(convolution, images, kernel, stride, pads)
            for convolution in (plain, quick_convolution)
        ]
        for _ in range(rounds):
            for spent, gradient in zip(seconds, gradients, strict=True):
                begun = time.perf_counter()
                gradient()
                spent.append(time.perf_counter() - begun)
        xla, ours = (1000 * statistics.median(spent) for spent in seconds)
        ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
        channels = f'{before}-{after}'
        print(
            f'{pictures:8} {side:4} {channels:>8} {size:6} {stride:6} | {xla:4.0f} {ours:6.0f} ms'
            f' {ratio:5.1f}'
        )


def plain(images: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> jax.Array:
    layout = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=layout)


def weight_gradient(
    convolution: Callable[..., jax.Array],
    images: jax.Array,
    kernel: jax.Array,
    stride: int,
    pads: Any,
) -> Callable[[], None]:
    def gradient(images: jax.Array, kernel: jax.Array, of_result: jax.Array) -> Any:
        _, back = jax.vjp(lambda w: convolution(images, w, (stride, stride), pads), kernel)
        return back(of_result)

    compiled = jax.jit(gradient)
    of_result = convolution(images, kernel, (stride, stride), pads)

    def run() -> None:
        jax.block_until_ready(compiled(images, kernel, of_result))

    run()
    return run


if __name__ == '__main__':
    main()
