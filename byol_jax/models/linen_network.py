"""Linen modules as pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from byol_jax.models.flops import layer_scope
from byol_jax.models.network import (
    Calls,
    Network,
    Variables,
    subtree,
    train_fields,
    train_keywords,
)


@dataclasses.dataclass(frozen=True)
class LinenNetwork(Network):
    """A Linen module, called with images and, if it takes one, an argument that turns training on.

    Attributes:
      module: the module, not bound to any variables.
    """

    module: nn.Module

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def call(self) -> Callable[..., Any]:
        return type(self.module).__call__

    def init(self, rng: jax.Array, images: jax.Array) -> dict[str, Any]:
        module, keywords = self._mode(train=False)
        variables = nn.meta.unbox(module.init(rng, images, **keywords))
        # Sown values are reports that grow with every call, not state.
        return {name: tree for name, tree in variables.items() if not _is_sown(tree)}

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
        def around(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != '__call__':
                return next_method(*args, **kwargs)
            layer = context.module
            path = '/'.join(layer.path)
            synchronise = (
                train
                and axis_name is not None
                and isinstance(layer, nn.BatchNorm)
                and layer.axis_name is None
            )
            # Linen modules are frozen, so the attribute is set around Flax, and reset afterwards.
            if synchronise:
                object.__setattr__(layer, 'axis_name', axis_name)
            try:
                with jax.named_scope(layer_scope(path)):
                    return next_method(*args, **kwargs)
            finally:
                calls.kinds.pop(path, None)
                calls.kinds[path] = type(layer).__name__
                if synchronise:
                    object.__setattr__(layer, 'axis_name', None)

        state = [name for name in variables if name != 'params']
        module, keywords = self._mode(train)
        with nn.intercept_methods(around):
            # Flax captures the outputs, since `around` could not pass them out of nn.remat.
            _, changed = module.apply(
                variables,
                images,
                **keywords,
                rngs=_streams(rng),
                mutable=[*(state if train else ()), 'intermediates'],
                capture_intermediates=lambda layer, method: (
                    method == '__call__' and calls.wanted('/'.join(layer.path))
                ),
            )
        for path in calls.kinds:
            found = subtree(changed['intermediates'], path).get('__call__', ())
            if found and calls.wanted(path):
                calls.outputs[path] = found[-1]
        return {name: changed.get(name, variables[name]) for name in state}

    def _mode(self, train: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The module and the keywords of its call, for training or evaluation."""
        keywords = train_keywords(self.call(), train)
        fields = {field.name: None for field in dataclasses.fields(self.module)}
        # Set either the argument or the attribute of a name: nn.merge_param refuses both.
        known = train_fields(fields, train)
        attributes: dict[str, Any] = {k: v for k, v in known.items() if k not in keywords}
        return self.module.clone(**attributes) if attributes else self.module, keywords


def _streams(rng: jax.Array | None) -> dict[str, jax.Array]:
    """Keys for the module's random streams; streams of other names use that of 'params'."""
    if rng is None:
        return {}
    return {'params': jax.random.fold_in(rng, 0), 'dropout': jax.random.fold_in(rng, 1)}


def _is_sown(tree: Any) -> bool:
    """Whether a collection was made by `sow`, which puts values into tuples."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, tuple))
    return any(isinstance(node, tuple) for node in nodes)
