"""Networks that a file declares: they are built only as far as their weights go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from byol_jax.errors import UserError, shown
from byol_jax.models.network import OUTPUT
from byol_jax.models.nnx_network import NnxNetwork
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder

# Gives the shape of a network's array by its name, such as 'params/conv1/kernel'; None of none.
ShapeOf = Callable[[str], tuple[int, ...] | None]

# Calls of functions that building may take. Tracing a ResNet-50, ViT-Ti or ConvNeXt-T twice takes
# about 10,000 for each array. Networks that use their weights many times take more.
_CALLS, _CALLS_PER_ARRAY = 10_000_000, 100_000


class CannotBuild(UserError):
    """A network that a file declares cannot be built, whatever its weights are."""


def declared_network(
    name: str,
    kwargs: Mapping[str, Any],
    image_size: int,
    shape_of: ShapeOf,
    arrays: int,
    where: str,
    spare: int = 0,
) -> tuple[nn.Module | NnxNetwork, Any]:
    """Builds a network that a file declares, as far as the file has weights for it.

    A few bytes can declare a network that takes years to trace, or more memory than there is. So
    of a network of this package each layer is compared with the weights as it is built, and of any
    other the calls of functions are counted: a network of so many arrays may take so many.

    Args:
      name: of the network, as in the config's `encoder`; `names.check_word` has passed it.
      kwargs: of its constructor, likewise.
      image_size: side of the views it was trained on, pixels.
      shape_of: the weights that there are.
      arrays: how many there are.
      where: they are, for messages.
      spare: arrays that may be missing or odd, where the caller says it better.

    Returns:
      The network, and its variables as shapes.

    Raises:
      CannotBuild: there is no such network, it does not take the arguments, or it fails.
      UserError: it is larger than its weights.
    """
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    try:
        with _counted(arrays, where):
            network = build_encoder(name, kwargs)
            # Somebody's own may transform its layers (nn.scan): inside, shapes are others.
            ours = type(network).__module__.startswith('byol_jax.')
            with nn.intercept_methods(_comparing(shape_of, where, spare) if ours else _call):
                init = TappedEncoder(network, OUTPUT).init
                return network, jax.eval_shape(init, jax.random.key(0), images)
    except _TooLarge:
        raise
    except UserError as error:
        raise CannotBuild(f'{str(error).rstrip(".")}.') from error
    except Exception as error:  # Arguments of a file: anything may come of them.
        why = shown(str(error).strip().rstrip('.'))
        raise CannotBuild(f"'{shown(name)}' fails: {type(error).__name__}: {why}.") from error


class _TooLarge(UserError):
    """A network has more layers than weights."""


@contextmanager
def _counted(arrays: int, where: str) -> Iterator[None]:
    """Raises _TooLarge at a call of a function beyond those that so many arrays may take.

    The count does not depend on how fast a machine is. A profiler that is at work prevents it.
    """
    if sys.getprofile() is not None:
        yield
        return
    left = _CALLS + _CALLS_PER_ARRAY * arrays

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        # Python takes this function away when it raises.
        if left < 0:
            raise _TooLarge(
                f'{where}: the network would have far more layers than its {arrays:,} arrays of '
                'weights. Building it was stopped.'
            )

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def _call(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """An interceptor of Linen's methods that does nothing."""
    return call(*args, **kwargs)


def _comparing(shape_of: ShapeOf, where: str, spare: int) -> Any:
    """An interceptor that compares the variables of each layer with the weights."""
    odd: set[str] = set()

    def compare(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name != '__call__':
            return output
        layer = context.module
        for collection, tree in layer.variables.items():
            for name, leaf in tree.items():
                path = '/'.join((collection, *layer.path, name))
                if not isinstance(leaf, Mapping) and shape_of(path) != leaf.shape:
                    odd.add(path)
                    if len(odd) > spare:
                        raise _TooLarge(misfit(where, path, leaf.shape, shape_of(path)))
        return output

    return compare


def misfit(where: str, name: str, wanted: Any, found: Any) -> str:
    """What a user is told about the first array that is not what the network has there.

    Args:
      where: the weights are, and whose.
      name: of the array.
      wanted: what the network has; None: no such array.
      found: what there is; None: no such array.
    """
    return (
        f"{where}: '{shown(name)}' should be {shown(_or_absent(wanted))} and is "
        f'{shown(_or_absent(found))}.'
    )


def _or_absent(what: Any) -> Any:
    return 'absent' if what is None else what
