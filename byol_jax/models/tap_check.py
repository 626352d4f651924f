"""Whether a tapped encoder can be trained: everything that can be known before compiling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from byol_jax.errors import UserError, did_you_mean
from byol_jax.models.network import TRAIN_ARGUMENTS, Variables, path_name
from byol_jax.models.tappable import (
    NETWORK_ERRORS,
    Layer,
    draws_in_evaluation,
    fails,
    too_small,
)

if TYPE_CHECKING:
    from byol_jax.models.tap import TappedEncoder

POOLS = ('mean', 'cls', 'flatten')


def check_tap(encoder: TappedEncoder, image_shape: tuple[int, ...]) -> Layer:
    """Returns the tapped layer, or raises UserError naming the layers there are."""
    layers = {layer.path: layer for layer in encoder.layers(image_shape)}
    if encoder.hidden_layer not in layers:
        width = max(map(len, layers), default=0)
        listing = '\n'.join(f'  {n:<{width}}  {list(layer.shape)}' for n, layer in layers.items())
        raise UserError(
            f"encoder.hidden_layer='{encoder.hidden_layer}' is not a layer of this encoder."
            f'{did_you_mean(encoder.hidden_layer, layers)} Its layers are:\n{listing}'
        )
    layer = layers[encoder.hidden_layer]
    if not 2 <= len(layer.shape) <= 4:
        raise UserError(
            f"encoder.hidden_layer='{layer.path}' puts out {list(layer.shape)}; a tap needs "
            '[B, D], [B, tokens, D] or [B, H, W, D].'
        )
    _check_pool(encoder, layer)
    _check_batch(encoder, layer, image_shape)
    _check_stride(encoder, list(layers.values()), image_shape)
    _check_modes(encoder, image_shape)
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
            f"encoder.pool='{encoder.pool}' is for layers that put out tokens, [B, tokens, D]; "
            f"'{layer.path}' puts out {list(layer.shape)}, which is {what}. Leave "
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
                f"encoder.hidden_layer='{layer.path}' puts out {features.dtype} "
                f'{list(features.shape)}, pooled, for {batch} images: a tap needs floats, and '
                'one row for each image. Tap a layer that keeps the batch as its first axis.'
            )


def _check_modes(encoder: TappedEncoder, image_shape: tuple[int, ...]) -> None:
    """Raises UserError if the network cannot train, or draws when it does not."""
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
                f'{list(after.shape[1:])}: shape and type must stay.'
            )
    _check_told(encoder, training, kept)


def _check_told(encoder: TappedEncoder, training: Any, kept: list[str]) -> None:
    """Raises UserError if training looks like evaluation because its word is not known."""
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
            f'The encoder {encoder.network.name} does the same in training as outside of it, and '
            f'its __call__ takes {", ".join(switches)}, which is not known here. Call the '
            f'argument that says whether it trains one of {", ".join(TRAIN_ARGUMENTS)}.'
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
        return  # Networks of one fixed size have no stride to speak of.
    height = next(layer.shape[1] for layer in wide if layer.path == maps[-1].path)
    stride = probe // height
    if height > 1 and stride > image_shape[1]:
        reason = f"'{maps[-1].path}' shrinks pictures {stride} times: use at least {stride}"
        raise UserError(too_small(image_shape, reason))
