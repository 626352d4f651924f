"""The interface of a network as pure functions, for both Flax APIs.

`linen_network.py` and `nnx_network.py` implement it, and `tap.py` uses it.
"""

from __future__ import annotations

import abc
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

Variables = Mapping[str, Any]

# The path under which a network's own output can be tapped.
OUTPUT = 'output'

# The arguments by which networks are told that they train, and the value that means training.
TRAIN_ARGUMENTS = {
    'train': True,
    'training': True,
    'is_training': True,
    'deterministic': False,
    'use_running_average': False,
}


# Finds arguments that may have the same meaning under another name.
_ABOUT_TRAINING = re.compile('train|eval|infer|test|determin|running')


class Calls:
    """The outputs of layers in one pass, by path, in the order in which the layers finish.

    Attributes:
      wanted: tells for a path whether that layer's output is kept.
      outputs: the kept outputs; the last one of a layer that is called several times. '' is the
        whole network.
      kinds: class names of all layers that were called, by path.
    """

    def __init__(self, wanted: Callable[[str], bool]):
        self.wanted = wanted
        self.outputs: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}

    def elements(self) -> dict[str, jax.Array]:
        """The kept arrays by tappable path; an output of several arrays has a path for each.

        If 'block' returns a tuple, its second array is 'block.1'; if it returns a dict, the entry
        'features' is 'block.features'. The network's own output is 'output'.
        """
        found: dict[str, jax.Array] = {}
        for path, value in self.outputs.items():
            name = path or OUTPUT
            for keys, leaf in jax.tree.leaves_with_path(value):
                if hasattr(leaf, 'shape'):
                    # A layer named 'output' takes precedence over the network's own output.
                    found.setdefault('.'.join([name, *map(_key_name, keys)]), leaf)
        return found


class Network(abc.ABC):
    """What training needs from a network: pure functions, which can be jitted and mapped."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name of the network's class, for messages."""

    @abc.abstractmethod
    def call(self) -> Callable[..., Any]:
        """The network's `__call__`, whose signature is inspected."""

    def unknown_switches(self) -> list[str]:
        """Boolean arguments of the call whose names suggest a training mode, but are not known.

        Empty if the call has one of TRAIN_ARGUMENTS.
        """
        arguments = inspect.signature(self.call()).parameters
        if any(name in TRAIN_ARGUMENTS for name in arguments):
            return []
        return [
            name
            for name, given in arguments.items()
            if isinstance(given.default, bool) and _ABOUT_TRAINING.search(name)
        ]

    @abc.abstractmethod
    def init(self, rng: jax.Array, images: jax.Array) -> dict[str, Any]:
        """Initialises the variables.

        Args:
          rng: a JAX random key.
          images: normalised float32 [B, H, W, 3].

        Returns:
          Nested dicts of arrays by collection ('params', 'batch_stats', ..).
        """

    @abc.abstractmethod
    def run(
        self,
        variables: Variables,
        images: jax.Array,
        calls: Calls,
        *,
        train: bool,
        rng: jax.Array | None,
        axis_name: str | None,
    ) -> dict[str, Any]:
        """Runs the network and keeps its layers' outputs in `calls`.

        Args:
          variables: variables as `init` makes them.
          images: normalised float [B, H, W, 3].
          calls: receives the outputs.
          train: whether the network trains.
          rng: JAX random key for dropout and the like; None if the network may not draw.
          axis_name: mapped axis over which every BatchNorm averages in training, unless the network
            has set its axis itself.

        Returns:
          The collections other than 'params', as the pass leaves them.
        """


def train_keywords(call: Callable[..., Any], train: bool) -> dict[str, bool]:
    """The keywords that tell a network's `__call__` whether it trains; may be empty."""
    return {name: TRAIN_ARGUMENTS[name] is train for name in _train_names(call)}


@functools.cache
def _train_names(call: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(n for n in inspect.signature(call).parameters if n in TRAIN_ARGUMENTS)


def train_fields(fields: Mapping[str, Any], train: bool) -> dict[str, bool]:
    """Like `train_keywords`, for networks that are told by attributes: values for `fields`."""
    return {name: on is train for name, on in TRAIN_ARGUMENTS.items() if name in fields}


def constructor_parameters(constructor: Any) -> dict[str, inspect.Parameter]:
    """The free arguments of a module class, or of a functools.partial of one.

    `inspect.signature` of an NNX class does not show them, because of its metaclass.
    """
    bound = 1  # self
    if isinstance(constructor, functools.partial):
        bound += len(constructor.args)
        constructor = constructor.func
    return dict(list(inspect.signature(constructor.__init__).parameters.items())[bound:])


def path_name(keys: Any) -> str:
    """A JAX key path as text, such as 'stage1/block1/conv1/kernel'."""
    return '/'.join(str(getattr(key, 'key', getattr(key, 'name', key))) for key in keys)


def _key_name(key: Any) -> str:
    return str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key))))


def subtree(tree: Any, path: str) -> Any:
    """The value at a path in nested dicts; {} if there is none."""
    for name in path.split('/') if path else ():
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree
