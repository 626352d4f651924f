"""Counts the floating-point operations of a traced computation, layer by layer.

Nothing is compiled or run: the count is read from a jaxpr. It adds

- 2 for every multiply-add of a matrix product or convolution. Taps of a convolution that fall on
  its padding, or between dilated input values, do no work and are not counted;
- 1 for every result of an arithmetic function, be it a sum or a hyperbolic tangent;
- 1 for every value that enters a reduction or a window of a pooling layer.

Comparing, selecting, casting, moving and drawing values are not counted, nor are operations on
other types than floats. FFTs, sorts, matrix decompositions and complex numbers are not counted
either.
"""

from __future__ import annotations

import math
import re
import urllib.parse
from collections import Counter
from typing import Any

import jax.extend.core
import jax.numpy as jnp
import numpy as np

# One operation for every output value.
ELEMENTWISE = frozenset({
    'add', 'add_any', 'sub', 'mul', 'div', 'rem', 'neg', 'abs', 'sign', 'max', 'min', 'clamp',
    'floor', 'ceil', 'round', 'square', 'sqrt', 'rsqrt', 'cbrt', 'pow', 'integer_pow', 'exp',
    'exp2', 'expm1', 'log', 'log1p', 'log2', 'logistic', 'erf', 'erfc', 'erf_inv', 'lgamma',
    'digamma', 'sin', 'cos', 'tan', 'asin', 'acos', 'atan', 'atan2', 'sinh', 'cosh', 'tanh',
    'asinh', 'acosh', 'atanh', 'one_minus_square',
})  # fmt: skip

# One operation for every input value.
REDUCTIONS = frozenset({
    'reduce', 'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'argmax', 'argmin',
    'cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp',
})  # fmt: skip

# One operation for every value in the window of every output value.
WINDOWS = frozenset({
    'reduce_window', 'reduce_window_sum', 'reduce_window_max', 'reduce_window_min',
})  # fmt: skip

# Finds the scopes of layers among those of Flax, JAX and the network itself. A transformation wraps
# them: 'transpose(jvp(N/layer<a%2Fb>))'.
_LAYER_SCOPE = re.compile(r'layer<([\w.~%-]*)>', re.ASCII)


def layer_scope(path: str) -> str:
    """The name of the `jax.named_scope` in which the layer at `path` must be called to be counted.

    Any string is a path except '', which is the whole computation with or without a scope.
    """
    return f'layer<{urllib.parse.quote(path, safe="")}>'


def layer_paths(scopes: str) -> list[str]:
    """The paths of the layers that are open in a name stack, outermost first.

    Args:
      scopes: the name stack as text; scopes that `layer_scope` did not make are skipped.
    """
    return [urllib.parse.unquote(name) for name in _LAYER_SCOPE.findall(scopes)]


def count_flops(
    jaxpr: jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr, every_tap: bool = False
) -> dict[str, int]:
    """Counts floating-point operations (a multiply-add is two) by layer.

    Args:
      jaxpr: the result of `jax.make_jaxpr` for a function that calls each of its layers in
        `jax.named_scope(layer_scope(path))`.
      every_tap: whether to count all taps of a convolution, as most published figures do; for a
        ResNet at 224 pixels this gives 3 % more.

    Returns:
      Operations by path of the layer, over all its calls and including the layers inside it; '' is
      the whole computation. A layer without any equation is missing. A loop of unknown length
      counts as one round, and a choice as its most expensive branch. A function that JAX traces
      once for several layers (`flax.linen.jit`) counts for the layer for which it was traced.
    """
    flops = Counter({'': 0})
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        inside = _equation_flops(equation, every_tap)
        # Name stacks begin again inside a called function: this equation's scopes enclose them all.
        around = {'', *layer_paths(str(equation.source_info.name_stack))}
        for path in around:
            flops[path] += inside['']
        for path in inside.keys() - around:
            flops[path] += inside[path]
    return dict(flops)


def _equation_flops(equation: Any, every_tap: bool) -> Counter[str]:
    """Operations of an equation: '' for all of it, and one entry for each layer inside it."""
    name, params = equation.primitive.name, equation.params
    result = equation.outvars[0].aval if equation.outvars else None
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return _total(result, 2 * depth)
    if name == 'conv_general_dilated':
        return Counter({'': _convolution(equation, result, every_tap) if _is_float(result) else 0})
    if name in ELEMENTWISE:
        return _total(result, 1)
    if name in REDUCTIONS:
        return _total(equation.invars[0].aval, 1)
    if name in WINDOWS:
        return _total(result, math.prod(params['window_dimensions']))
    called = [count_flops(j, every_tap) for j in jax.extend.core.jaxprs_in_params(params)]
    if name == 'cond':
        called = [max(called, key=lambda flops: flops[''])]
    rounds = params['length'] if name == 'scan' else 1
    flops = Counter({'': 0})
    for inner in called:
        for path, count in inner.items():
            flops[path] += rounds * count
    return flops


def _total(aval: Any, each: int) -> Counter[str]:
    return Counter({'': each * math.prod(aval.shape) if _is_float(aval) else 0})


def _is_float(aval: Any) -> bool:
    # References and tokens have no dtype.
    return hasattr(aval, 'dtype') and jnp.issubdtype(aval.dtype, jnp.floating)


def _convolution(equation: Any, result: Any, every_tap: bool) -> int:
    """Operations of a convolution, counting every tap or only those that meet an input value.

    Each spatial dimension decides separately whether a tap meets one, so the number of taps of all
    outputs is a product over the dimensions.
    """
    params = equation.params
    images, kernel = (operand.aval.shape for operand in equation.invars)
    image_axes, kernel_axes, result_axes = params['dimension_numbers']
    taps = 1
    for i, (stride, (low, _), image_dilation, kernel_dilation) in enumerate(
        zip(
            params['window_strides'],
            params['padding'],
            params['lhs_dilation'],
            params['rhs_dilation'],
            strict=True,
        )
    ):
        outputs = np.arange(result.shape[result_axes[2 + i]])[:, None] * stride
        places = outputs + np.arange(kernel[kernel_axes[2 + i]]) * kernel_dilation - low
        size = images[image_axes[2 + i]] * image_dilation
        meets = (places >= 0) & (places < size) & (places % image_dilation == 0)
        taps *= meets.size if every_tap else int(meets.sum())
    batch, features = (result.shape[axis] for axis in result_axes[:2])
    # The kernel's shape has the input features of one group.
    return 2 * batch * features * kernel[kernel_axes[1]] * taps
