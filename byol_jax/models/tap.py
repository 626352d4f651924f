"""Taps a hidden layer of a network, checks the result, and finds the variables behind the tap."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from byol_jax.errors import UserError, did_you_mean
from byol_jax.models.flops import count_flops
from byol_jax.models.linen_network import LinenNetwork
from byol_jax.models.network import TRAIN_ARGUMENTS, Calls, Network, Variables, path_name
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


def tap(
    network: nn.Module | NnxNetwork,
    hidden_layer: str | int,
    *,
    image_size: int,
    pool: str = 'mean',
    axis_name: str | None = None,
    frozen: Sequence[str] = (),
) -> TappedEncoder:
    """Taps a network, checks that it can be trained, and finds the variables that are not.

    Args:
      network: a Linen module, or an `NnxNetwork`.
      hidden_layer: path of a layer, or its index in the table of layers (`layer_at`).
      image_size: side of the views, pixels.
      pool: as in `TappedEncoder`.
      axis_name: as in `TappedEncoder`.
      frozen: paths of layers whose parameters are not trained.

    Returns:
      The encoder, with its `behind` and `frozen`.

    Raises:
      UserError: the layer does not exist or cannot be tapped, or the network cannot be trained at
        this image size.
    """
    shape = (2, image_size, image_size, 3)
    encoder = TappedEncoder(network, str(hidden_layer), pool, axis_name)
    if _is_index(encoder.hidden_layer):
        path = layer_at(hidden_layer, [layer.path for layer in encoder.layers(shape)])
        encoder = dataclasses.replace(encoder, hidden_layer=path)
    encoder.check(shape)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
    return dataclasses.replace(
        encoder,
        behind=encoder.find_behind(variables, images),
        frozen=encoder.find_frozen(frozen, variables),
    )


def layer_at(layer: str | int, paths: Sequence[str]) -> str:
    """The path that `encoder.hidden_layer` means.

    Args:
      layer: a path, or a list index: -1 is the network's own output, -2 the layer that finishes
        before it. Text such as '-2', as a command line gives it, is an index too, unless it is the
        path of a layer.
      paths: paths of all layers, in the order in which they finish.

    Raises:
      UserError: the index is out of range.
    """
    text = str(layer)
    if text in paths or not _is_index(text):
        return text
    index, count = int(text), len(paths)
    if not -count <= index < count:
        raise UserError(
            f'encoder.hidden_layer={index}: the encoder has {count} layers, 0 to {count - 1} or '
            f'{-count} to -1. --mode=summary lists them.'
        )
    return paths[index]


def _is_index(layer: str) -> bool:
    return layer.removeprefix('-').isdecimal()


@dataclasses.dataclass(frozen=True)
class TappedEncoder:
    """A network seen as a function from images to the output of one hidden layer.

    Attributes:
      module: a Linen module, or the `NnxNetwork` of an NNX class.
      hidden_layer: path of the tapped layer, such as 'avgpool', 'stage4/block2' or 'output'.
      pool: how an output [B, tokens, D] becomes features, one of POOLS: 'mean' averages the tokens,
        'cls' takes the first, 'flatten' takes all. Feature maps [B, H, W, D] are averaged.
      axis_name: mapped axis over which BatchNorms average in training; None for one device.
      behind: paths of the variables behind the tap, such as 'params/head/kernel', from
        `find_behind`; they never change and cost no computation.
      frozen: paths of other parameters that never change, from `find_frozen`.
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
        """Initialises all variables.

        Args:
          rng: a JAX random key.
          images: normalised float32 [B, H, W, 3].

        Returns:
          Nested dicts of arrays by collection ('params', 'batch_stats', ..).
        """
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
          variables: variables as `init` makes them.
          images: normalised float [B, H, W, 3].
          train: whether the network trains: it then normalises with the batch's statistics, updates
            the running ones, and applies dropout.
          rng: a JAX random key; networks that draw in training need one.

        Returns:
          The features, float [B, D], and the collections other than 'params', updated if `train`.
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
        """The variables, with gradients stopped at the frozen ones."""
        if not self.frozen:
            return variables
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                jax.lax.stop_gradient(leaf) if path_name(path) in self.frozen else leaf
            ),
            dict(variables),
        )

    def feature_shape(self, variables: Variables, images: Any) -> tuple[int, ...]:
        """The shape (B, D) of the features, found without computing them."""
        features = jax.eval_shape(
            lambda v, x: self.apply(v, x, train=False)[0], dict(variables), images
        )
        return tuple(features.shape)

    def find_behind(self, variables: Variables, images: Any) -> frozenset[str]:
        """The paths of the variables on which the features never depend.

        They depend on them neither in evaluation nor in training, nor through statistics that
        training keeps for a later step. This is read from the traced computation, so the names of
        layers do not matter.
        """
        paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(dict(variables))]
        needed = _used(self._trace(variables, images), paths, [True])
        training, kept = self.trace_training(variables, images)
        while True:
            # A statistic is needed if features depend on it, in this step or a later one.
            outputs = [True, *(name in needed for name in kept)]
            found = needed | _used(training, paths, outputs)
            if found == needed:
                return frozenset(set(paths) - needed)
            needed = found

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """Number of floating-point operations up to the tap for images [B, H, W, 3] (`flops`)."""
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

        Its inputs are the variables, the images and a key. It is mapped over the axis of batch
        statistics, so its outputs have one more axis.
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
        """The paths of the parameters of some layers, such as 'params/patch_embed/kernel'.

        Args:
          layers: paths of the layers.
          variables: variables as `init` makes them.

        Raises:
          UserError: a layer does not exist or has no parameters.
        """
        paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(variables)]
        params = [path for path in paths if path.startswith('params/')]
        found: set[str] = set()
        for layer in layers:
            inside = [p for p in params if f'{p}/'.startswith(f'params/{layer}/')]
            if not inside:
                known = sorted({p.removeprefix('params/').rpartition('/')[0] for p in params})
                raise UserError(
                    f"encoder.frozen: '{layer}' is not a layer with parameters."
                    f'{did_you_mean(layer, known)} --mode=summary lists them.'
                )
            found.update(inside)
        return frozenset(found)

    def layers(self, image_shape: tuple[int, ...]) -> list[Layer]:
        """All layers that can be tapped, for images [B, H, W, 3]; see `tappable_layers`."""
        return tappable_layers(self.network, image_shape)

    def check(self, image_shape: tuple[int, ...]) -> Layer:
        """Checks that the network can be trained at its tap, before anything is compiled.

        Args:
          image_shape: shape (B, H, W, 3) of the images for the trace.

        Returns:
          The tapped layer.

        Raises:
          UserError: it cannot be trained, or the layer does not exist; the message lists them all.
        """
        layers = {layer.path: layer for layer in self.layers(image_shape)}
        layer = _find(self.hidden_layer, layers)
        _check_pool(self, layer)
        _check_batch(self, layer, image_shape)
        _check_stride(self, list(layers.values()), image_shape)
        _check_modes(self, image_shape)
        return layer


def _used(jaxpr: Any, names: list[str], outputs: list[bool]) -> set[str]:
    """The names of the inputs on which the marked outputs depend; `names` are the first inputs'."""
    used = partial_eval.dce_jaxpr(jaxpr, outputs)[1]
    return {name for name, flag in zip(names, used, strict=False) if flag}


def pooled(output: jax.Array, pool: str = 'mean') -> jax.Array:
    """Turns a layer's output into features.

    Args:
      output: [B, D], [B, tokens, D] or [B, H, W, D].
      pool: one of POOLS, for tokens; maps are averaged.

    Returns:
      [B, D], or [B, tokens x D] for 'flatten'.

    Raises:
      ValueError: `pool` is not one of POOLS.
    """
    if pool not in POOLS:
        raise ValueError(f"pool='{pool}' is not one of {', '.join(POOLS)}")
    if output.ndim == 3 and pool == 'cls':
        return output[:, 0]
    if output.ndim == 3 and pool == 'flatten':
        return output.reshape(output.shape[0], -1)
    return output if output.ndim == 2 else jnp.mean(output, axis=tuple(range(1, output.ndim - 1)))


def _find(name: str, layers: Mapping[str, Layer]) -> Layer:
    if name not in layers:
        width = max(map(len, layers), default=0)
        listing = '\n'.join(f'  {n:<{width}}  {list(layer.shape)}' for n, layer in layers.items())
        raise UserError(
            f"encoder.hidden_layer='{name}' is not a layer of this encoder."
            f'{did_you_mean(name, layers)} Its layers are:\n{listing}'
        )
    layer = layers[name]
    if not 2 <= len(layer.shape) <= 4:
        raise UserError(
            f"encoder.hidden_layer='{layer.path}' returns {list(layer.shape)}; a tap needs "
            '[B, D], [B, tokens, D] or [B, H, W, D].'
        )
    return layer


def _check_pool(encoder: TappedEncoder, layer: Layer) -> None:
    if encoder.pool not in POOLS:
        raise UserError(
            f"encoder.pool='{encoder.pool}' is not one of {', '.join(POOLS)}."
            f'{did_you_mean(encoder.pool, POOLS)}'
        )
    if encoder.pool != 'mean' and len(layer.shape) != 3:
        what = 'averaged' if len(layer.shape) == 4 else 'taken as it is'
        raise UserError(
            f"encoder.pool='{encoder.pool}' is for layers that return tokens, [B, tokens, D]; "
            f"'{layer.path}' returns {list(layer.shape)}, which is {what}. Leave "
            "encoder.pool at 'mean', or tap a layer of tokens (--mode=summary lists them)."
        )


def _check_batch(encoder: TappedEncoder, layer: Layer, image_shape: tuple[int, ...]) -> None:
    """Raises UserError if the tapped output is not one row of floats for each image."""
    for batch in (image_shape[0], image_shape[0] + 1):
        shape = (batch, *image_shape[1:])
        images = jax.ShapeDtypeStruct(shape, jnp.float32)
        variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
        try:
            features = jax.eval_shape(
                lambda v, x: encoder.apply(v, x, train=False)[0], variables, images
            )
        except NETWORK_ERRORS as error:
            where = f' in batches of {batch}'
            raise UserError(fails(encoder.network, shape, where, error)) from error
        if features.shape[0] != batch or not jnp.issubdtype(features.dtype, jnp.floating):
            raise UserError(
                f"encoder.hidden_layer='{layer.path}' returns {features.dtype} "
                f'{list(features.shape)}, pooled, for {batch} images: a tap needs floats, and '
                'one row for each image. Tap a layer that keeps the batch as its first axis.'
            )


def _check_modes(encoder: TappedEncoder, image_shape: tuple[int, ...]) -> None:
    """Raises UserError if the network cannot train, or draws random numbers in evaluation."""
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), images)

    def evaluate(rng: jax.Array, variables: Variables, images: jax.Array) -> jax.Array:
        return encoder.apply(variables, images, train=False, rng=rng)[0]

    jaxpr = jax.make_jaxpr(evaluate)(jax.random.key(0), variables, images).jaxpr
    if partial_eval.dce_jaxpr(jaxpr, [True])[1][0]:
        raise UserError(draws_in_evaluation(encoder.network))
    try:
        training, kept = encoder.trace_training(variables, images)
    except NETWORK_ERRORS as error:
        raise UserError(fails(encoder.network, image_shape, ' in training mode', error)) from error
    before = {path_name(p): leaf for p, leaf in jax.tree.leaves_with_path(dict(variables))}
    for name, variable in zip(kept, training.outvars[1:], strict=True):
        leaf, after = before[name], variable.aval
        if (after.shape[1:], after.dtype) != (leaf.shape, leaf.dtype):
            raise UserError(
                f"The encoder {encoder.network.name} changes its variable '{name}' in training, "
                f'from {leaf.dtype} {list(leaf.shape)} to {after.dtype} '
                f'{list(after.shape[1:])}: shape and type must stay the same.'
            )
    _check_told(encoder, training, kept)


def _check_told(encoder: TappedEncoder, training: Any, kept: list[str]) -> None:
    """Raises UserError if an unknown argument seems to turn training on, and so it stays off."""
    switches = encoder.network.unknown_switches()
    statistics = [i for i, name in enumerate(kept) if name.startswith('batch_stats/')]
    if not switches:
        return

    def depends(outputs: list[bool]) -> tuple[bool, bool]:
        """Whether these outputs need the images and the key."""
        used = partial_eval.dce_jaxpr(training, outputs)[1]
        return used[-2], used[-1]

    draws = depends([True] * len(training.outvars))[1]
    moves = any(depends([j == i + 1 for j in range(len(training.outvars))])[0] for i in statistics)
    if not draws and not moves:
        raise UserError(
            f'The encoder {encoder.network.name} does the same in training and in evaluation, and '
            f'its __call__ takes {", ".join(switches)}, which is not a known argument. Rename the '
            f'argument that turns training on to one of {", ".join(TRAIN_ARGUMENTS)}.'
        )


def _check_stride(
    encoder: TappedEncoder, layers: list[Layer], image_shape: tuple[int, ...]
) -> None:
    """Raises UserError if the last feature map before the tap would be mostly padding."""
    before = layers[: [layer.path for layer in layers].index(encoder.hidden_layer) + 1]
    maps = [layer for layer in before if len(layer.shape) == 4]
    if not maps or maps[-1].shape[1] > 1:
        return
    probe = max(256, 16 * image_shape[1])
    try:
        wide = encoder.layers((1, probe, probe, image_shape[3]))
    except UserError:
        return  # A network for one fixed image size cannot be tried at another.
    height = next(layer.shape[1] for layer in wide if layer.path == maps[-1].path)
    stride = probe // height
    if height > 1 and stride > image_shape[1]:
        reason = f"'{maps[-1].path}' shrinks pictures {stride} times: use at least {stride}"
        raise UserError(too_small(image_shape, reason))
