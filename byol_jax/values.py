"""Checks the values that a user gives, and converts them to the plain values that JSON keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from byol_jax.errors import UserError, did_you_mean

_LARGEST = float(np.finfo(np.float32).max)

# Returns what is wrong with a value, in words that follow 'key=value ', or '' for a right value.
Check = Callable[[Any], str]


def checked(check: Check) -> Any:
    """A dataclass field whose values must pass a check."""
    return dataclasses.field(metadata={'check': check})


def number(low: float = -math.inf, high: float = math.inf) -> Any:
    """A field whose number, or each of whose numbers, lies in [low, high]; None passes."""

    def check(value: Any) -> str:
        values = value if isinstance(value, tuple) else (value,)
        if all(each is None or low <= each <= high for each in values):
            return ''
        return (
            f'must be at least {low:g}.' if high == math.inf else f'must be in [{low:g}, {high:g}].'
        )

    return checked(check)


def positive(high: float = math.inf) -> Any:
    """A field whose number, or each of whose numbers, is above 0 and at most `high`."""

    def check(value: Any) -> str:
        values = value if isinstance(value, tuple) else (value,)
        if not min(values, default=0) > 0:
            return 'must be above 0.'
        return '' if max(values) <= high else f'must not exceed {high:g}.'

    return checked(check)


def different() -> Any:
    """A field of one or more numbers above 0, no two of them equal."""

    def check(value: tuple[float, ...]) -> str:
        usable = value and min(value) > 0 and len(set(value)) == len(value)
        return '' if usable else 'must be different numbers above 0.'

    return checked(check)


def range_above_0(high: float = math.inf) -> Any:
    """A field of a range (low, high) with 0 < low <= high, and at most the argument `high`."""

    def check(value: tuple[float, float]) -> str:
        if not 0 < value[0] <= value[1]:
            return 'must be a range (low, high) above 0.'
        return '' if value[1] <= high else f'must not exceed {high:g}.'

    return checked(check)


def one_of(*known: str) -> Any:
    """A field whose text is one of `known`."""

    def check(value: str) -> str:
        if value in known:
            return ''
        return f'is not one of {", ".join(known)}.{did_you_mean(value, known)}'

    return checked(check)


def probability() -> Any:
    """A field of numbers in [0, 1]."""
    return checked(
        lambda value: '' if 0 <= value <= 1 else 'is a probability: it must lie in [0, 1].'
    )


def plain_value(value: Any, key: str) -> Any:
    """Converts an argument to the plain value that config.json and encoder.json keep.

    Arrays and NumPy's numbers become Python's, a dtype (`jnp.bfloat16`) becomes its name, and a
    list a tuple. So a network built now gets the same values as one built from the file later.

    Args:
      value: anything that a config may hold.
      key: the config key, for the message.

    Returns:
      None, a bool, number or text, or a tuple or dict of these.

    Raises:
      UserError: a number is not finite, or the value has no plain form: it is a function, a
        `functools.partial` or another object.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        # Networks compute in float32, so the number must also be finite there.
        if not abs(value) <= _LARGEST:
            raise UserError(f'{key}={value!r} must be a finite number.')
        return float(value)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise UserError(f'{key}: the name {name!r} of an argument must be a text.')
        return {name: plain_value(each, f'{key}.{name}') for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return tuple(plain_value(each, key) for each in value)
    dtype = _dtype_name(value)
    if dtype is not None:
        return dtype
    if hasattr(value, 'tolist') and not isinstance(value, type):
        listed = value.tolist()
        if isinstance(listed, bool | str | int | float | list):
            return plain_value(listed, key)
    raise UserError(
        f'{key}={value!r} is a {type(value).__name__}, which config.json and encoder.json cannot '
        'keep. Give a number, a text or a list of them: the name of a function as a text, say, '
        'which your class looks up.'
    )


def _dtype_name(value: Any) -> str | None:
    """The name of a dtype of NumPy or JAX, such as 'bfloat16'; None for other values."""
    if isinstance(value, type) and issubclass(value, np.generic):
        return np.dtype(value).name
    if isinstance(value, np.dtype):
        return str(value.name)
    # jnp.bfloat16 is not a class but a callable with a dtype.
    dtype = getattr(value, 'dtype', None)
    return str(dtype.name) if callable(value) and isinstance(dtype, np.dtype) else None
