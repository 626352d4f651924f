"""Two arrays in each kind of container that a layer may return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax


class Pair(NamedTuple):
    first: Any
    second: Any


@flax.struct.dataclass
class Outputs:
    features: Any
    more: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    features: Any
    more: Any


class Packed(NamedTuple):
    """How two arrays are packed, and their names for the tap."""

    pack: Callable[[Any, Any], Any]
    first: str
    second: str


PACKED = {
    'tuple': Packed(lambda x, y: (x, y), '0', '1'),
    'list': Packed(lambda x, y: [x, None, y], '0', '2'),
    'dict': Packed(lambda x, y: {'features': x, 'more': {'deep': y}}, 'features', 'more.deep'),
    'namedtuple': Packed(Pair, 'first', 'second'),
    'struct': Packed(lambda x, y: Outputs(x, [y]), 'features', 'more.0'),
    'dataclass': Packed(Registered, 'features', 'more'),
}
