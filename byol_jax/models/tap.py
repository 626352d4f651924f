"""Taps a hidden layer of a network by its name and says what lies behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from byol_jax.errors import UserError, did_you_mean
from byol_jax.models.flops import count_flops
from byol_jax.models.linen_network import LinenNetwork
from byol_jax.models.network import Calls, Network, Variables, path_name
from byol_jax.models.nnx_network import NnxNetwork
from byol_jax.models.tap_check import POOLS, check_tap
from byol_jax.models.tappable import (
    Layer,
    may_hold,
    tappable_layers,
)


@dataclasses.dataclass(frozen=True)
class TappedEncoder:
    """A network seen as a function from images to the output of one hidden layer.

    Attributes:
      module: the network: a Linen module, or the `NnxNetwork` of an NNX class.
      hidden_layer: path of the tapped layer, such as 'avgpool', 'stage4/block2' or 'output'.
      pool: how a [B, tokens, D] output becomes features: 'mean' of the tokens, 'cls' for the first
        one, 'flatten' for all of them. Feature maps [B, H, W, D] are averaged.
      axis_name: mapped axis over which batch normalisations average in training; None for one
        device.
      behind: paths of the variables behind the tap ('params/head/kernel'), from `find_behind`;
        they never change and cost no compute.
      frozen: paths of further parameters that never change, from `find_frozen`.
    """

    module: nn.Module | NnxNetwork
    hidden_layer: str
    pool: str = 'mean'
    axis_name: str | None = None
    behind: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()

    @property
    def network(self) -> Network:
        """The network as pure functions."""
        return self.module if isinstance(self.module, NnxNetwork) else LinenNetwork(self.module)

    def init(self, rng: jax.Array, images: jax.Array) -> Variables:
        """Initialises all variables for normalised float32 images [B, H, W, 3]."""
        return self.network.init(rng, images)

    def apply(
        self,
        variables: Variables,
        images: jax.Array,
        train: bool,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Variables]:
        """Runs the network up to the tap.

        Args:
          variables: as made by `init`.
          images: normalised float [B, H, W, 3].
          train: use and update batch statistics instead of the running ones, drop what is to be
            dropped.
          rng: a key for dropout and the like; needed by networks that draw in training.

        Returns:
          Features, float [B, D], and the collections other than 'params', updated when `train`.
        """
        calls = Calls(lambda path: may_hold(path, self.hidden_layer))
        changed = self.network.run(
            self._hold(variables),
            images,
            calls,
            train=train,
            rng=rng,
            axis_name=self.axis_name if train else None,
        )
        features = pooled(calls.elements()[self.hidden_layer], self.pool)
        if not train:
            return features, {name: tree for name, tree in variables.items() if name != 'params'}
        state = {
            name: jax.tree_util.tree_map_with_path(
                lambda path, new, old, name=name: (
                    old if f'{name}/{path_name(path)}' in self.behind else new
                ),
                tree,
                variables[name],
            )
            for name, tree in changed.items()
        }
        return features, state

    def _hold(self, variables: Variables) -> Variables:
        """The variables, with no gradient for the frozen ones."""
        if not self.frozen:
            return variables
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                jax.lax.stop_gradient(leaf) if path_name(path) in self.frozen else leaf
            ),
            dict(variables),
        )

    def find_behind(self, variables: Variables, images: Any) -> frozenset[str]:
        """Paths of the variables that the tapped output never depends on.

        Neither in evaluation, nor in training, nor by way of statistics that training keeps for a
        later step. Decided on the traced computation, so that no layer behind the tap is ever taken
        for a trained one, whatever it is called.
        """
        paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(dict(variables))]
        needed = _used(self._trace(variables, images), paths, [True])
        training, kept = self.trace_training(variables, images)
        while True:
            # A statistic is needed if the features are made of it, now or later.
            outputs = [True, *(name in needed for name in kept)]
            found = needed | _used(training, paths, outputs)
            if found == needed:
                return frozenset(set(paths) - needed)
            needed = found

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """Floating-point operations of the features of images [B, H, W, 3] (`flops.py`)."""
        images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
        variables = jax.eval_shape(self.init, jax.random.key(0), images)
        return count_flops(partial_eval.dce_jaxpr(self._trace(variables, images), [True])[0])['']

    def _trace(self, variables: Variables, images: Any) -> Any:
        """The computation of the features in evaluation."""
        return jax.make_jaxpr(lambda v, x: self.apply(v, x, train=False)[0])(
            dict(variables), images
        ).jaxpr

    def trace_training(self, variables: Variables, images: Any) -> tuple[Any, list[str]]:
        """The computation in training, and the names of its outputs after the features.

        Its inputs are the variables, the images and a key. It runs under the axis that batch
        statistics are averaged over, of which outputs have one more.
        """
        kept: list[str] = []

        def train(variables: Variables, images: jax.Array, rng: jax.Array) -> list[jax.Array]:
            features, state = self.apply(variables, images, train=True, rng=rng)
            kept[:] = [path_name(path) for path, _ in jax.tree.leaves_with_path(state)]
            return [features, *jax.tree.leaves(state)]

        axis = self.axis_name or getattr(self.module, 'axis_name', None)
        mapped = jax.vmap(train, in_axes=(None, 0, None), axis_name=axis)
        one = jax.ShapeDtypeStruct((1, *images.shape), images.dtype)
        return jax.make_jaxpr(mapped)(dict(variables), one, jax.random.key(0)).jaxpr, kept

    def find_frozen(self, layers: Sequence[str], variables: Variables) -> frozenset[str]:
        """Paths of the parameters of the layers named, such as 'params/patch_embed/kernel'.

        Raises:
          UserError: a layer has no parameters or is none.
        """
        paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(variables)]
        params = [path for path in paths if path.startswith('params/')]
        found: set[str] = set()
        for layer in layers:
            inside = [p for p in params if f'{p}/'.startswith(f'params/{layer}/')]
            if not inside:
                known = sorted({p.removeprefix('params/').rpartition('/')[0] for p in params})
                raise UserError(
                    f"encoder.frozen: '{layer}' is no layer with parameters."
                    f'{did_you_mean(layer, known)} --mode=summary lists them.'
                )
            found.update(inside)
        return frozenset(found)

    def layers(self, image_shape: tuple[int, ...]) -> list[Layer]:
        """All layers that could be tapped, for images [B, H, W, 3] (`tappable.py`)."""
        return tappable_layers(self.network, image_shape)

    def check(self, image_shape: tuple[int, ...]) -> Layer:
        """Returns the tapped layer, or raises UserError (`tap_check.py`)."""
        return check_tap(self, image_shape)


def _used(jaxpr: Any, names: list[str], outputs: list[bool]) -> set[str]:
    """The names of those of the first inputs of a computation that some outputs depend on."""
    used = partial_eval.dce_jaxpr(jaxpr, outputs)[1]
    return {name for name, flag in zip(names, used, strict=False) if flag}


def pooled(output: jax.Array, pool: str = 'mean') -> jax.Array:
    """A layer's output as features.

    Args:
      output: [B, D], [B, tokens, D] or [B, H, W, D].
      pool: one of POOLS, for tokens; maps are averaged.

    Returns:
      [B, D], or [B, tokens x D] of 'flatten'.
    """
    if pool not in POOLS:
        raise ValueError(f"pool='{pool}' is not one of {', '.join(POOLS)}")
    if output.ndim == 3 and pool == 'cls':
        return output[:, 0]
    if output.ndim == 3 and pool == 'flatten':
        return output.reshape(output.shape[0], -1)
    return output if output.ndim == 2 else jnp.mean(output, axis=tuple(range(1, output.ndim - 1)))
