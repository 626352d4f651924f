"""Taps a hidden layer of a network by its name and says what lies behind it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from byol_jax.errors import UserError, did_you_mean

Variables = Mapping[str, Any]

# How networks spell "training": value passed for train=True.
_TRAIN_ARGUMENTS = {
    'train': True,
    'training': True,
    'is_training': True,
    'deterministic': False,
    'use_running_average': False,
}


# What a network raises for arguments or image sizes it cannot work with.
_ENCODER_ERRORS = (
    TypeError,
    ValueError,
    IndexError,
    AssertionError,
    ZeroDivisionError,
    flax.errors.FlaxError,
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One tappable layer: its path, the shape of its output and the parameters it holds."""

    path: str
    kind: str
    shape: tuple[int, ...]
    parameters: int


@dataclasses.dataclass(frozen=True)
class TappedEncoder:
    """A Linen network seen as a function from images to the output of one hidden layer.

    Attributes:
      module: the network.
      hidden_layer: path of the tapped layer, such as 'avgpool' or 'stage4/block2'.
      behind: paths of the variables behind the tap ('params/head/kernel'), from `find_behind`;
        they never change and cost no compute.
    """

    module: nn.Module
    hidden_layer: str
    behind: frozenset[str] = frozenset()

    def init(self, rng: jax.Array, images: jax.Array) -> Variables:
        """Initialises all variables for normalised float32 images [B, H, W, 3]."""
        return self.module.init(rng, images, **self._train(False))

    def apply(
        self, variables: Variables, images: jax.Array, train: bool
    ) -> tuple[jax.Array, Variables]:
        """Runs the network up to the tap.

        Args:
          variables: as made by `init`.
          images: normalised float [B, H, W, 3].
          train: use and update batch statistics instead of the running ones.

        Returns:
          Features, float [B, D] (a [B, H, W, C] tap is averaged over H and W, a [B, N, C] tap over
          N), and the collections other than 'params', updated when `train`.
        """
        mutable = [name for name in variables if name != 'params'] if train else []
        _, changed = self.module.apply(
            variables,
            images,
            **self._train(train),
            mutable=[*mutable, 'intermediates'],
            capture_intermediates=lambda module, method: (
                method == '__call__' and '/'.join(module.path) == self.hidden_layer
            ),
        )
        features = pooled(_output(changed['intermediates'], self.hidden_layer))
        state = {
            name: jax.tree_util.tree_map_with_path(
                lambda path, new, old, name=name: (
                    old if f'{name}/{path_name(path)}' in self.behind else new
                ),
                changed.get(name, value),
                value,
            )
            for name, value in variables.items()
            if name != 'params'
        }
        return features, state

    def find_behind(self, variables: Variables, images: Any) -> frozenset[str]:
        """Paths of the variables that the tapped output does not depend on.

        Decided on the traced computation, so that no layer behind the tap is ever taken for a
        trained one, whatever it is called.
        """
        paths, structure = jax.tree.flatten_with_path(variables)

        def features(leaves: list[jax.Array], images: jax.Array) -> jax.Array:
            return self.apply(jax.tree.unflatten(structure, leaves), images, train=False)[0]

        jaxpr = jax.make_jaxpr(features)([leaf for _, leaf in paths], images).jaxpr
        _, used = partial_eval.dce_jaxpr(jaxpr, [True])
        flags = used[: len(paths)]
        return frozenset(
            path_name(path) for (path, _), flag in zip(paths, flags, strict=True) if not flag
        )

    def layers(self, image_shape: tuple[int, ...]) -> list[Layer]:
        """All tappable layers, in the order they run, for images [B, H, W, 3]. Compiles nothing.

        Raises:
          UserError: the network cannot take images of this size.
        """
        images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
        kinds: dict[str, str] = {}

        def remember(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            output = next_method(*args, **kwargs)
            if context.method_name == '__call__':
                kinds['/'.join(context.module.path)] = type(context.module).__name__
            return output

        def run(rng: jax.Array, images: jax.Array) -> tuple[Any, Any]:
            with nn.intercept_methods(remember):
                return self.module.init_with_output(
                    rng,
                    images,
                    **self._train(False),
                    capture_intermediates=True,
                    mutable=True,
                )

        try:
            _, variables = jax.eval_shape(run, jax.random.key(0), images)
        except _ENCODER_ERRORS as error:
            reason = (str(error).splitlines() or [''])[0]
            raise UserError(
                f'The encoder {type(self.module).__name__} fails on images of '
                f'{image_shape[1]}x{image_shape[2]} pixels: {type(error).__name__}: {reason}'
            ) from error
        found = []
        for path, kind in kinds.items():
            shape = _output(variables['intermediates'], path, missing_ok=True)
            if path and hasattr(shape, 'shape'):
                if 0 in shape.shape:
                    raise UserError(_too_small(image_shape, f"layer '{path}' would be empty"))
                inside = _subtree(variables.get('params', {}), path)
                count = sum(leaf.size for leaf in jax.tree.leaves(inside))
                found.append(Layer(path, kind, tuple(shape.shape), count))
        return found

    def check(self, image_shape: tuple[int, ...]) -> Layer:
        """Returns the tapped layer, or raises UserError naming the layers there are."""
        layers = {layer.path: layer for layer in self.layers(image_shape)}
        if self.hidden_layer not in layers:
            listing = '\n'.join(f'  {n:<32} {list(layer.shape)}' for n, layer in layers.items())
            raise UserError(
                f"encoder.hidden_layer='{self.hidden_layer}' is not a layer of this encoder."
                f'{did_you_mean(self.hidden_layer, layers)} Its layers are:\n{listing}'
            )
        layer = layers[self.hidden_layer]
        if not 2 <= len(layer.shape) <= 4:
            raise UserError(
                f"encoder.hidden_layer='{layer.path}' puts out {list(layer.shape)}; a tap needs "
                '[B, D], [B, N, D] or [B, H, W, D].'
            )
        self._check_stride(list(layers.values()), image_shape)
        self._check_training(image_shape)
        return layer

    def _check_training(self, image_shape: tuple[int, ...]) -> None:
        """Raises UserError if the network cannot run in training mode."""
        images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
        # Outside of a mapped step batch statistics cannot be averaged over its axis.
        unmapped = self.module
        if getattr(unmapped, 'axis_name', None) is not None:
            unmapped = unmapped.copy(axis_name=None)
        tapped = dataclasses.replace(self, module=unmapped)
        variables = jax.eval_shape(tapped.init, jax.random.key(0), images)
        try:
            jax.eval_shape(lambda v, x: tapped.apply(v, x, train=True), variables, images)
        except flax.errors.InvalidRngError as error:
            raise UserError(
                f'The encoder {type(self.module).__name__} draws random numbers in training '
                '(dropout, stochastic depth), which training does not give it. Set its rates to 0 '
                'in encoder.kwargs.'
            ) from error

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
            raise UserError(_too_small(image_shape, reason))

    def _train(self, train: bool) -> dict[str, Any]:
        """The keyword with which this network is told whether it trains."""
        name = _train_argument(type(self.module).__call__)
        return {} if name is None else {name: _TRAIN_ARGUMENTS[name] is train}


def pooled(output: jax.Array) -> jax.Array:
    """Averages all axes between the first and the last: [B, ..., D] -> [B, D]."""
    return output if output.ndim == 2 else jnp.mean(output, axis=tuple(range(1, output.ndim - 1)))


def _too_small(image_shape: tuple[int, ...], reason: str) -> str:
    return (
        f'views.image_size={image_shape[1]} is too small for the encoder: {reason}, or take a '
        'stem for small images (--config.encoder.kwargs.small_images=True for ResNets).'
    )


def path_name(path: Any) -> str:
    """A JAX key path as 'stage1/block1/conv1/kernel'."""
    return '/'.join(str(getattr(key, 'key', getattr(key, 'name', key))) for key in path)


@functools.cache
def _train_argument(call: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(call).parameters
    return next((name for name in _TRAIN_ARGUMENTS if name in parameters), None)


def _subtree(tree: Any, path: str) -> Any:
    for name in path.split('/'):
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree


def _output(intermediates: Any, path: str, missing_ok: bool = False) -> Any:
    """The captured output of the layer at `path`; of several calls, the last."""
    calls = _subtree(intermediates, path).get('__call__')
    if calls is None and missing_ok:
        return None
    return calls[-1]
