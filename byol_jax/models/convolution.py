"""A convolution whose weight gradient is fast on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def quick_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """`lax.conv_general_dilated` of images, as `nn.Conv` calls it, with another weight gradient.

    The weight gradient is one matrix product for each tap of the kernel. XLA's own is a convolution
    with a kernel of the picture's size, which takes 0.9 to 14 times as long on a CPU
    (benchmarks/convolution.py). There is no forward-mode derivative.

    Args:
      lhs: images, float [B, H, W, C].
      rhs: the kernel, float [h, w, C, D].
      window_strides: strides of height and width.
      padding: 'SAME', 'VALID', or (before, after) for height and for width.
      lhs_dilation: must be ones.
      rhs_dilation: must be ones.
      feature_group_count: must be 1.
      dimension_numbers: must mean the layouts above.
      precision: precision of all products, as in `lax.conv_general_dilated`.

    Returns:
      float [B, H', W', D].

    Raises:
      ValueError: the convolution has dilation, groups or another layout.
    """
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers or _LAYOUT)
    plain = layout == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
    if not plain or {*lhs_dilation, *rhs_dilation, feature_group_count} != {1}:
        raise ValueError(
            'Convolutions with dilation, in groups or of a layout other than NHWC, HWIO have no '
            'quick gradient: use lax.conv_general_dilated.'
        )
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    top, side = ((int(before), int(after)) for before, after in padding)
    if (*rhs.shape[:2], *top, *side) == (1, 1, 0, 0, 0, 0):
        # With a stride, XLA would put zeros between the gradient's pixels and convolve them too.
        lhs, strides = lhs[:, :: strides[0], :: strides[1]], (1, 1)
    return _convolution(lhs, rhs, strides, (top, side), precision)


def _plain(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: Pads, precision: Any
) -> jax.Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        strides,
        pads,
        dimension_numbers=_LAYOUT,
        precision=precision,
    )


_convolution = jax.custom_vjp(_plain, nondiff_argnums=(2, 3, 4))


def _forward(
    images: jax.Array, kernel: jax.Array, *how: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(images, kernel, *how), (images, kernel)


def _backward(
    strides: tuple[int, int],
    pads: Pads,
    precision: Any,
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    images, kernel = saved
    (of_images,) = jax.linear_transpose(
        lambda x: _plain(x, kernel, strides, pads, precision), images
    )(gradient)
    padded = lax.pad(
        images,
        jnp.zeros((), images.dtype),
        ((0, 0, 0), *((before, after, 0) for before, after in pads), (0, 0, 0)),
    )
    sizes = zip(gradient.shape[1:3], strides, strict=True)
    ends = [max(0, (n - 1) * stride + 1) for n, stride in sizes]
    taps = []
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            seen = padded[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
            taps.append(_product(seen, gradient, precision))
    of_kernel = jnp.stack(taps).reshape(kernel.shape).astype(kernel.dtype)
    return of_images, of_kernel


def _product(seen: jax.Array, gradient: jax.Array, precision: Any) -> jax.Array:
    """A tap's inputs, float [B, H', W', C], times the gradient [B, H', W', D]: float [C, D]."""
    seen, gradient = (x.reshape(-1, x.shape[-1]) for x in (seen, gradient))
    return lax.dot_general(
        seen,
        gradient,
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.promote_types(seen.dtype, jnp.float32),
    )


_convolution.defvjp(_forward, _backward)
