"""Finds the layers of a network that can be tapped, without compiling or running it."""

from __future__ import annotations

import dataclasses
import re
import traceback

import flax
import jax
import jax.numpy as jnp

from byol_jax.errors import UserError
from byol_jax.models.flops import count_flops
from byol_jax.models.network import OUTPUT, Calls, Network, Variables, subtree

# The errors that a network may raise for arguments or image sizes that do not fit it.
NETWORK_ERRORS = (
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ZeroDivisionError,
    NameError,  # an unknown mapped axis
    NotImplementedError,
    flax.errors.FlaxError,
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One tappable layer.

    Attributes:
      path: the layer's path, such as 'stage1/block1'; 'output' for the network's own output, and
        'block1.0' or 'block1.features' for one array of several.
      kind: name of the layer's class.
      shape: shape of the output, with the batch.
      parameters: number of parameters, those of inner layers included.
      flops: floating-point operations of a call on the whole batch; a multiply-add counts as 2.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    flops: int


def tappable_layers(network: Network, image_shape: tuple[int, ...]) -> list[Layer]:
    """All tappable layers, in the order in which they finish.

    Args:
      network: the network.
      image_shape: shape (B, H, W, 3) of the images for the trace.

    Raises:
      UserError: the network fails on images of this size.
    """
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    calls = Calls(lambda path: True)
    shapes: dict[str, tuple[int, ...]] = {}

    def run(variables: Variables, images: jax.Array) -> list[jax.Array]:
        network.run(variables, images, calls, train=False, rng=None, axis_name=None)
        outputs = calls.elements()
        shapes.update({path: tuple(output.shape) for path, output in outputs.items()})
        return list(outputs.values())

    try:
        variables = jax.eval_shape(network.init, jax.random.key(0), images)
        jaxpr = jax.make_jaxpr(run)(variables, images)
    except flax.errors.InvalidRngError as error:
        raise UserError(draws_in_evaluation(network)) from error
    except NETWORK_ERRORS as error:
        raise UserError(fails(network, image_shape, '', error)) from error
    flops = count_flops(jaxpr.jaxpr)
    found = []
    for path, shape in shapes.items():
        if 0 in shape:
            raise UserError(too_small(image_shape, f"layer '{path}' would be empty"))
        layer = max((name for name in calls.outputs if may_hold(name, path)), key=len)
        inside = jax.tree.leaves(subtree(variables['params'], layer))
        found.append(
            Layer(
                path,
                calls.kinds[layer],
                shape,
                sum(leaf.size for leaf in inside),
                flops.get(layer, 0),
            )
        )
    return found


def may_hold(layer: str, tap: str) -> bool:
    """Whether the tappable path `tap` may name the output of `layer`, or one array of it."""
    name = layer or OUTPUT
    return tap == name or tap.startswith(f'{name}.')


def draws_in_evaluation(network: Network) -> str:
    """The message about a network that draws random numbers in evaluation."""
    return (
        f'The encoder {network.name} draws random numbers outside of training too, so its '
        'features would differ from call to call. Give its __call__ a `train` or `deterministic` '
        'argument that turns this off, or set the rate to 0 in encoder.kwargs.'
    )


def fails(network: Network, image_shape: tuple[int, ...], where: str, error: BaseException) -> str:
    """The message about a network that raises an error; it names the user's own line."""
    reason = (str(error).splitlines() or [''])[0]
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not re.search(r'[/\\](flax|jax|byol_jax)[/\\]', frame.filename)
    ]
    place = f' ({own[-1].filename}, line {own[-1].lineno})' if own else ''
    return (
        f'The encoder {network.name} fails{where} on images of '
        f'{image_shape[1]}x{image_shape[2]} pixels: {type(error).__name__}: {reason}{place}'
    )


def too_small(image_shape: tuple[int, ...], reason: str) -> str:
    """The message about views that are too small for a network."""
    return (
        f'views.image_size={image_shape[1]} is too small for the encoder: {reason}, or take a '
        'stem for small images (--config.encoder.kwargs.small_images=True for ResNets).'
    )
