"""A network as pure functions, whichever Flax API it is written in.

`linen_network.py` and `nnx_network.py` say how; `tap.py` builds on what stands here.
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

# How networks spell "training": value passed for train=True.
TRAIN_ARGUMENTS = {
    'train': True,
    'training': True,
    'is_training': True,
    'deterministic': False,
    'use_running_average': False,
}


# What other words for it are made of.
_ABOUT_TRAINING = re.compile('train|eval|infer|test|determin|running')


class Calls:
    """The outputs of layers during one pass, by path, in the order the layers finish.

    Attributes:
      wanted: whether the output of the layer at a path is kept.
      outputs: kept outputs; of several calls of one layer, the last. '' is the whole network.
      kinds: class names of all layers called.
    """

    def __init__(self, wanted: Callable[[str], bool]):
        self.wanted = wanted
        self.outputs: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}

    def elements(self) -> dict[str, jax.Array]:
        """Arrays by tappable path: an output of several arrays has one path for each.

        The second of a tuple put out by 'block' is 'block.1', the entry 'features' of a dict
        'block.features'; the network's own output is 'output'.
        """
        found: dict[str, jax.Array] = {}
        for path, value in self.outputs.items():
            name = path or OUTPUT
            for keys, leaf in jax.tree.leaves_with_path(value):
                if hasattr(leaf, 'shape'):
                    # A layer called 'output' comes before the network's own.
                    found.setdefault('.'.join([name, *map(_key_name, keys)]), leaf)
        return found


class Network(abc.ABC):
    """What training needs of a network; all of it pure, so that it can be jitted and mapped."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name of its class, for messages."""

    @abc.abstractmethod
    def call(self) -> Callable[..., Any]:
        """Its `__call__`, of which the arguments are looked at."""

    def unknown_switches(self) -> list[str]:
        """Arguments of its call that are true or false and seem to say that it trains, or not.

        Empty if one of TRAIN_ARGUMENTS is among them.
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
        """Variables by collection ('params', 'batch_stats', ..), nested dicts of arrays.

        Args:
          rng: a key.
          images: normalised float32 [B, H, W, 3].
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
        """Runs the network, noting its layers' outputs in `calls`.

        Args:
          variables: as made by `init`.
          images: normalised float [B, H, W, 3].
          calls: gets the outputs.
          train: training mode.
          rng: for whatever the network draws; None if it may not draw.
          axis_name: mapped axis over which every batch normalisation averages in training, unless
            the network has given it an axis itself.

        Returns:
          The collections other than 'params', as they are afterwards.
        """


def train_keywords(call: Callable[..., Any], train: bool) -> dict[str, bool]:
    """The keywords with which a network's `__call__` is told whether it trains; may be none."""
    return {name: TRAIN_ARGUMENTS[name] is train for name in _train_names(call)}


@functools.cache
def _train_names(call: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(n for n in inspect.signature(call).parameters if n in TRAIN_ARGUMENTS)


def train_fields(fields: Mapping[str, Any], train: bool) -> dict[str, bool]:
    """The same for networks that are told by attributes: those of `fields` that say so."""
    return {name: on is train for name, on in TRAIN_ARGUMENTS.items() if name in fields}


def constructor_parameters(constructor: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a module class, or of a functools.partial of one, that are still free.

    NNX's metaclass hides them from `inspect.signature` of the class.
    """
    bound = 1  # self
    if isinstance(constructor, functools.partial):
        bound += len(constructor.args)
        constructor = constructor.func
    return dict(list(inspect.signature(constructor.__init__).parameters.items())[bound:])


def path_name(keys: Any) -> str:
    """A JAX key path as 'stage1/block1/conv1/kernel'."""
    return '/'.join(str(getattr(key, 'key', getattr(key, 'name', key))) for key in keys)


def _key_name(key: Any) -> str:
    return str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key))))


def subtree(tree: Any, path: str) -> Any:
    """What lies at a path in nested dicts; {} if there is nothing."""
    for name in path.split('/') if path else ():
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree
