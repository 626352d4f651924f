"""NNX module classes as pure functions of their variables."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from byol_jax.errors import UserError
from byol_jax.models.flops import layer_scope
from byol_jax.models.network import (
    Calls,
    Network,
    Variables,
    constructor_parameters,
    subtree,
    train_keywords,
)


@dataclasses.dataclass(frozen=True)
class NnxNetwork(Network):
    """An NNX module class with its arguments, but without variables, like a Linen module.

    NNX modules hold their variables. So every pure function here makes a module from a template and
    the given variables, and drops it afterwards.

    Attributes:
      constructor: the class, or a functools.partial of one.
      kwargs: arguments as (name, value) pairs; `rngs` is added if the constructor takes it.
    """

    constructor: Callable[..., nnx.Module]
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self._class.__name__

    def call(self) -> Callable[..., Any]:
        return self._class.__call__

    def init(self, rng: jax.Array, images: jax.Array) -> dict[str, Any]:
        return _by_collection(nnx.to_flat_state(nnx.state(self._make(rng))))

    def build(self, variables: Variables) -> nnx.Module:
        """A new module with these variables, in evaluation mode; the caller may change it."""
        model = self._merge(jax.tree.map(jnp.asarray, dict(variables)), None)
        model.eval()
        return model

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
        if train and rng is None and self._draws:
            raise UserError(
                f'{self.name} has random streams (dropout and the like): training needs a key, '
                'rng=jax.random.key(..), a new one for each step.'
            )
        model: Any = self._merge(variables, rng)
        if train:
            model.train()
        else:
            model.eval()
        paths = {}
        for keys, layer in nnx.iter_modules(model):
            if train and isinstance(layer, nnx.BatchNorm) and layer.axis_name is None:
                layer.axis_name = axis_name
            if '__call__' in dir(type(layer)):
                paths[id(layer)] = ('/'.join(map(str, keys)), type(layer).__name__)
                object.__setattr__(layer, '__class__', _noting(type(layer)))
        keywords = train_keywords(self.call(), train)
        token = _under_way.set((paths, calls))
        try:
            model(images, **keywords)
        finally:
            _under_way.reset(token)
        state = _by_collection(nnx.to_flat_state(nnx.state(model)), like=variables)
        return {name: tree for name, tree in state.items() if name != 'params'}

    @functools.cached_property
    def _template(self) -> tuple[Any, tuple[Any, ...]]:
        """The graph of the network's modules, and its variables as shapes."""
        graph, state = nnx.split(nnx.eval_shape(lambda: self._make(jax.random.key(0))))
        return graph, tuple(nnx.to_flat_state(state))

    @property
    def _class(self) -> Any:
        return getattr(self.constructor, 'func', self.constructor)

    @property
    def _draws(self) -> bool:
        return any(isinstance(variable, nnx.RngKey) for _, variable in self._template[1])

    def _make(self, rng: jax.Array) -> nnx.Module:
        kwargs = dict(self.kwargs)
        takes = constructor_parameters(self.constructor)
        # `**kwargs` passes it on to the base class.
        if 'rngs' in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            kwargs['rngs'] = nnx.Rngs(rng)
        model = self.constructor(**kwargs)
        for keys, layer in nnx.iter_modules(model):
            for name, value in vars(layer).items():
                if isinstance(value, jax.Array | np.ndarray):
                    raise UserError(_plain_array((*keys, name)))
        return model

    def _merge(self, variables: Variables, rng: jax.Array | None) -> nnx.Module:
        """Makes a module with these variables, whose random streams begin from `rng`."""
        graph, template = self._template
        filled = []
        for number, (keys, variable) in enumerate(template):
            collection = _collection(variable)
            if isinstance(variable, nnx.RngKey):
                stream = jax.random.fold_in(jax.random.key(0) if rng is None else rng, number)
                shape = variable.shape
                value = jax.random.split(stream, shape) if shape else stream
            elif collection is None:
                value = jnp.zeros(variable.shape, variable.dtype)
            else:
                *parents, leaf = (collection, *map(str, keys))
                value = subtree(variables, '/'.join(parents))[leaf]
            filled.append((keys, variable.replace(value)))
        return nnx.merge(graph, nnx.from_flat_state(filled))


def _by_collection(flat: Any, like: Variables | None = None) -> dict[str, Any]:
    """Variables as nested dicts of arrays by collection.

    `like` leaves out variables that it lacks: a module may create some, as reports, when it runs.
    """
    result: dict[str, Any] = {'params': {}}
    for keys, variable in flat:
        if not isinstance(variable, nnx.Variable):
            raise UserError(_plain_array(keys))
        collection = _collection(variable)
        *parents, leaf = map(str, keys)
        if collection is None:
            continue
        if like is not None and leaf not in subtree(like, '/'.join([collection, *parents])):
            continue
        node = result.setdefault(collection, {})
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = variable.get_value()
    return result


def _plain_array(keys: Any) -> str:
    """The message about an array that would be lost between traces."""
    path = '.'.join(map(str, keys))
    return (
        f"The NNX module keeps a plain array as its attribute '{path}'. Wrap it: "
        'nnx.Variable(array) is kept and never trained, nnx.Param(array) is trained.'
    )


def _collection(variable: Any) -> str | None:
    """The Linen collection for the kind of a variable; None for random streams and reports."""
    kind = type(variable)
    if issubclass(kind, (nnx.RngState, nnx.Intermediate)):
        return None
    if issubclass(kind, nnx.Param):
        return 'params'
    if issubclass(kind, nnx.BatchStat):
        return 'batch_stats'
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', kind.__name__).lower()


# The pass under way: (path, class name) of each module by its id(), and the `Calls` to fill.
_under_way: contextvars.ContextVar[tuple[dict[int, tuple[str, str]], Calls] | None] = (
    contextvars.ContextVar('under_way', default=None)
)


@functools.cache
def _noting(kind: type) -> Any:
    """A subclass of a module class whose calls keep their output in the `Calls` under way."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        under_way = _under_way.get()
        # NNX's transformations call copies of modules, which are not layers of the pass.
        if under_way is None or id(self) not in under_way[0]:
            return kind.__call__(self, *args, **kwargs)
        (path, name), calls = under_way[0][id(self)], under_way[1]
        with jax.named_scope(layer_scope(path)):
            output = kind.__call__(self, *args, **kwargs)
        calls.kinds.pop(path, None)
        calls.kinds[path] = name
        if calls.wanted(path):
            calls.outputs.pop(path, None)
            calls.outputs[path] = output
        return output

    return type(kind)(kind.__name__, (kind,), {'__call__': __call__, '__module__': kind.__module__})
