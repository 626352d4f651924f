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
from byol_jax.models.tappable import (
    NETWORK_ERRORS,
    Layer,
    draws_in_evaluation,
    fails,
    may_hold,
    tappable_layers,
    too_small,
)

POOLS = ('mean', 'cls', 'flatten')


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
        """Paths of the variables that the tapped output does not depend on.

        Decided on the traced computation, so that no layer behind the tap is ever taken for a
        trained one, whatever it is called.
        """
        paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(dict(variables))]
        _, used = self._needed(variables, images)
        return frozenset(
            path for path, flag in zip(paths, used[: len(paths)], strict=True) if not flag
        )

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """Floating-point operations of the features of images [B, H, W, 3] (`flops.py`)."""
        images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
        variables = jax.eval_shape(self.init, jax.random.key(0), images)
        return count_flops(self._needed(variables, images)[0])['']

    def _needed(self, variables: Variables, images: Any) -> tuple[Any, list[bool]]:
        """The computation of the features without all they do not need, and the inputs used."""
        jaxpr = jax.make_jaxpr(lambda v, x: self.apply(v, x, train=False)[0])(
            dict(variables), images
        ).jaxpr
        return partial_eval.dce_jaxpr(jaxpr, [True])

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
        """Returns the tapped layer, or raises UserError naming the layers there are."""
        layers = {layer.path: layer for layer in self.layers(image_shape)}
        if self.hidden_layer not in layers:
            width = max(map(len, layers), default=0)
            listing = '\n'.join(
                f'  {n:<{width}}  {list(layer.shape)}' for n, layer in layers.items()
            )
            raise UserError(
                f"encoder.hidden_layer='{self.hidden_layer}' is not a layer of this encoder."
                f'{did_you_mean(self.hidden_layer, layers)} Its layers are:\n{listing}'
            )
        layer = layers[self.hidden_layer]
        if not 2 <= len(layer.shape) <= 4:
            raise UserError(
                f"encoder.hidden_layer='{layer.path}' puts out {list(layer.shape)}; a tap needs "
                '[B, D], [B, tokens, D] or [B, H, W, D].'
            )
        self._check_pool(layer)
        self._check_stride(list(layers.values()), image_shape)
        self._check_modes(image_shape)
        return layer

    def _check_pool(self, layer: Layer) -> None:
        if self.pool not in POOLS:
            raise UserError(
                f"encoder.pool='{self.pool}' is not one of {', '.join(POOLS)}."
                f'{did_you_mean(self.pool, POOLS)}'
            )
        if self.pool != 'mean' and len(layer.shape) != 3:
            what = 'averaged' if len(layer.shape) == 4 else 'taken as it is'
            raise UserError(
                f"encoder.pool='{self.pool}' is for layers that put out tokens, [B, tokens, D]; "
                f"'{layer.path}' puts out {list(layer.shape)}, which is {what}. Leave "
                "encoder.pool at 'mean', or tap a layer of tokens (--mode=summary lists them)."
            )

    def _check_modes(self, image_shape: tuple[int, ...]) -> None:
        """Raises UserError if the network cannot train, or draws when it does not."""
        images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
        variables = jax.eval_shape(self.init, jax.random.key(0), images)

        def evaluate(rng: jax.Array, variables: Variables, images: jax.Array) -> jax.Array:
            return self.apply(variables, images, train=False, rng=rng)[0]

        jaxpr = jax.make_jaxpr(evaluate)(jax.random.key(0), variables, images).jaxpr
        if partial_eval.dce_jaxpr(jaxpr, [True])[1][0]:
            raise UserError(draws_in_evaluation(self.network))

        def train(images: jax.Array, variables: Variables, rng: jax.Array) -> Any:
            return self.apply(variables, images, train=True, rng=rng)[1]

        # Batch statistics are averaged over an axis, which must be there.
        axis = self.axis_name or getattr(self.module, 'axis_name', None)
        mapped = jax.vmap(train, in_axes=(0, None, None), axis_name=axis)
        try:
            one = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
            after = jax.eval_shape(mapped, one, variables, jax.random.key(0))
        except NETWORK_ERRORS as error:
            raise UserError(fails(self.network, image_shape, ' in training mode', error)) from error
        before = {path_name(p): leaf.shape for p, leaf in jax.tree.leaves_with_path(variables)}
        for path, leaf in jax.tree.leaves_with_path(after):
            if leaf.shape[1:] != before[path_name(path)]:
                raise UserError(
                    f'The encoder {self.network.name} changes the shape of its variable '
                    f"'{path_name(path)}' in training, from {list(before[path_name(path)])} to "
                    f'{list(leaf.shape[1:])}.'
                )

    def _check_stride(self, layers: list[Layer], image_shape: tuple[int, ...]) -> None:
        """Raises UserError if the last feature map before the tap would be mostly padding."""
        before = layers[: [layer.path for layer in layers].index(self.hidden_layer) + 1]
        maps = [layer for layer in before if len(layer.shape) == 4]
        if not maps or maps[-1].shape[1] > 1:
            return
        probe = max(256, 16 * image_shape[1])
        try:
            wide = self.layers((1, probe, probe, image_shape[3]))
        except UserError:
            return  # Networks of one fixed size have no stride to speak of.
        height = next(layer.shape[1] for layer in wide if layer.path == maps[-1].path)
        stride = probe // height
        if height > 1 and stride > image_shape[1]:
            reason = f"'{maps[-1].path}' shrinks pictures {stride} times: use at least {stride}"
            raise UserError(too_small(image_shape, reason))


def pooled(output: jax.Array, pool: str = 'mean') -> jax.Array:
    """A layer's output as features.

    Args:
      output: [B, D], [B, tokens, D] or [B, H, W, D].
      pool: one of POOLS, for tokens; maps are averaged.

    Returns:
      [B, D], or [B, tokens x D] of 'flatten'.
    """
    if output.ndim == 3 and pool == 'cls':
        return output[:, 0]
    if output.ndim == 3 and pool == 'flatten':
        return output.reshape(output.shape[0], -1)
    return output if output.ndim == 2 else jnp.mean(output, axis=tuple(range(1, output.ndim - 1)))
