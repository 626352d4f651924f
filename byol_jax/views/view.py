"""A view: a list of operations, how they draw, and how they are run on the CPU and in JAX.

What a view of an example looks like is a function of (seed, epoch, example, the view's number).
The paper's six operations draw from one stream. Every other operation, and a second one of the same
name, draws from a stream of its own (`draws.stream_of`), so adding one changes nothing else that is
drawn.

Images stay uint8 until the first operation that takes float32, and are rounded once, at the end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from byol_jax.errors import UserError
from byol_jax.views.crop import map_in_parts
from byol_jax.views.draws import PAPER_STREAM, stream_of, uniforms
from byol_jax.views.operation import Operation, Resizing

_UINT8 = np.dtype(np.uint8)
# One level of 255, in float32.
_STEP = np.float32(1 / 255)

# Where the numbers of each of the paper's operations begin in their stream. The first one decides
# whether the operation is applied (not for the crop, which always is); its parameters follow.
_PAPER_PLACES = {'crop': 0, 'flip': 4, 'jitter': 5, 'gray': 11, 'blur': 12, 'solarize': 14}
_PAPER_NUMBERS = 15


# (top, left, height, width) of what a view shows, as fractions of its picture.
Box = tuple[float, float, float, float]


class Drawn(NamedTuple):
    """What one view of B examples draws; each tuple has one entry for each operation of the view.

    Attributes:
      done: bool [B], whether the operation is applied.
      u: float64 [B, variates], for `Operation.parameters`.
    """

    done: tuple[np.ndarray, ...]
    u: tuple[np.ndarray, ...]


class Steps(NamedTuple):
    """What is done to make one view of one example.

    Attributes:
      before: operations up to and including the crop, and the numbers they draw; their parameters
        depend on the size of the picture.
      after: operations after the crop, and their parameters.
    """

    before: list[tuple[Operation, list[float]]]
    after: list[tuple[Operation, Any]]


@dataclasses.dataclass(frozen=True)
class View:
    """One view of an example.

    Attributes:
      operations: applied in this order. Exactly one is a Crop (or another Resizing).
      picture: key of the picture that the view is made from (`Source.keys`).
      partner: whether it shows the example's partner, if it has one (`Source.partners`).
    """

    operations: Sequence[Operation]
    picture: str = 'image'
    partner: bool = False

    def __post_init__(self) -> None:
        """Checks the operations.

        Raises:
          UserError: not exactly one operation resizes, or a probability is not in [0, 1].
        """
        object.__setattr__(self, 'operations', tuple(self.operations))
        resizing = [op.name for op in self.operations if isinstance(op, Resizing)]
        if len(resizing) != 1:
            raise UserError(
                f'The operations of a view, {", ".join(op.name for op in self.operations)}, must '
                f"hold one 'crop', which makes all pictures one size; they hold {len(resizing)}."
            )
        for op in self.operations:
            if not 0 <= op.probability <= 1:
                raise UserError(
                    f"The view operation '{op.name}' has probability={op.probability}, which must "
                    'lie in [0, 1].'
                )

    @property
    def resizing(self) -> Resizing:
        """The operation that makes pictures of any size one size."""
        return next(op for op in self.operations if isinstance(op, Resizing))

    @property
    def size(self) -> int:
        """Side of the view, pixels."""
        return self.resizing.size

    @property
    def antialias(self) -> bool:
        """Whether what is shrunk is smoothed; an own `Resizing` that does not say is taken to."""
        return bool(getattr(self.resizing, 'antialias', True))

    @functools.cached_property
    def has_box(self) -> bool:
        """Whether a box describes what the view shows: no operation moves pixels in other ways."""
        return all(op.geometry != 'other' or not op.probability for op in self.operations)

    @functools.cached_property
    def _cut(self) -> int:
        """The place of the crop among the operations."""
        return self.operations.index(self.resizing)

    @functools.cached_property
    def _streams(self) -> tuple[int, ...]:
        """The stream that each operation draws from."""
        streams = []
        for place, op in enumerate(self.operations):
            before = [other.name for other in self.operations[:place]].count(op.name)
            ours = op.name in _PAPER_PLACES and not before
            streams.append(PAPER_STREAM if ours else stream_of(op.name, before))
        return tuple(streams)

    def check_jax(self, whole: bool = False) -> None:
        """Checks that the accelerator can make the view.

        Args:
          whole: whether it makes all of the view; otherwise only what follows the crop.

        Raises:
          UserError: an operation that it would apply has no JAX version.
        """
        before = (*self._before, self._cut) if whole else ()
        for op in (self.operations[place] for place in (*before, *self._after)):
            if not op.has_jax:
                raise UserError(
                    f"views.on='accelerator': the view operation '{op.name}' has no apply_jax. "
                    "Write one, or take views.on='cpu'."
                )

    # What is drawn.

    def draw(self, seed: int, number: int, epochs: np.ndarray, examples: np.ndarray) -> Drawn:
        """What this view of B examples draws.

        Args:
          seed: seed of the run.
          number: number of the view among the views of an example, from 1.
          epochs: epoch of each example, from 0, int [B].
          examples: indices in the source, int [B].
        """
        paper = None
        done, u = [], []
        for op, stream in zip(self.operations, self._streams, strict=True):
            coin = not isinstance(op, Resizing)
            count = coin + op.variates
            if stream != PAPER_STREAM:
                drawn = uniforms(seed, stream, number, epochs, examples, count)
            else:
                if paper is None:
                    paper = uniforms(seed, stream, number, epochs, examples, _PAPER_NUMBERS)
                drawn = paper[:, _PAPER_PLACES[op.name] :][:, :count]
            done.append(drawn[:, 0] < op.probability if coin else np.ones(len(drawn), bool))
            u.append(drawn[:, coin:])
        return Drawn(tuple(done), tuple(u))

    def steps(self, drawn: Drawn) -> Sequence[Steps]:
        """What `make` does for each of the B examples."""
        before: list[tuple[Operation, list[bool], np.ndarray]] = []
        after: list[tuple[Operation, list[bool], _Row]] = []
        sides = np.full(len(drawn.done[0]), self.size)
        for place, (op, done, u) in enumerate(zip(self.operations, *drawn, strict=True)):
            if place <= self._cut:
                before.append((op, done.tolist(), u))
            elif done.any():
                after.append((op, done.tolist(), _rows(op.parameters(u, sides, sides))))
        return _StepsOfBatch(len(sides), before, after)

    def mirrored(self, drawn: Drawn) -> np.ndarray:
        """Whether each view is mirrored as a whole: bool [B]."""
        flips = [
            done
            for op, done in zip(self.operations, drawn.done, strict=True)
            if op.geometry == 'mirror'
        ]
        return np.logical_xor.reduce([np.zeros(len(drawn.done[0]), bool), *flips])

    # On the CPU.

    def make(self, picture: np.ndarray, steps: Steps) -> np.ndarray:
        """Makes the view of a picture: uint8 [H, W, 3] -> uint8 [size, size, 3], contiguous."""
        return np.ascontiguousarray(self.finish(self.cut(picture, steps)[0], steps))

    def cut(self, picture: np.ndarray, steps: Steps) -> tuple[np.ndarray, Box]:
        """The view as it is after the crop, and its box.

        Args:
          picture: uint8 [H, W, 3].
          steps: the steps of its example.

        Returns:
          uint8 [size, size, 3], and the box of what it shows.
        """
        image = picture
        mirrored = False
        for op, u in steps.before:
            height, width = image.shape[:2]
            params = op.parameters_of_one(u, height, width)
            image = _applied(op, image, params)
            mirrored ^= op.geometry == 'mirror'
        top, left, high, wide = params
        if mirrored:
            left = width - left - wide
        return _bytes(image), (top / height, left / width, high / height, wide / width)

    def finish(self, image: np.ndarray, steps: Steps) -> np.ndarray:
        """What follows the crop: uint8 [size, size, 3] -> the same."""
        for op, params in steps.after:
            image = _applied(op, image, params)
        image = _bytes(image)
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image

    # In JAX.

    @functools.cached_property
    def _after(self) -> tuple[int, ...]:
        """Places of the operations after the crop that can be applied; others are not compiled."""
        places = range(self._cut + 1, len(self.operations))
        return tuple(place for place in places if self.operations[place].probability)

    @functools.cached_property
    def _before(self) -> tuple[int, ...]:
        """The same for the operations before the crop."""
        return tuple(place for place in range(self._cut) if self.operations[place].probability)

    def for_device(self, drawn: Drawn) -> tuple[Any, ...]:
        """What `finish_jax` needs of what was drawn: a tree of arrays [B, ...]."""
        return self._on_device(drawn, self._after, self.size, self.size)

    def for_device_whole(self, drawn: Drawn, height: int, width: int) -> dict[str, Any]:
        """What `make_jax` needs of what was drawn, for pictures of one size: a tree of arrays."""
        ((_, boxes),) = self._on_device(drawn, (self._cut,), height, width)
        return {
            'before': self._on_device(drawn, self._before, height, width),
            'crop': boxes,
            'after': self.for_device(drawn),
        }

    def _on_device(
        self, drawn: Drawn, places: tuple[int, ...], height: int, width: int
    ) -> tuple[Any, ...]:
        """(done, parameters) of some of the operations, in types that JAX has."""
        found = []
        for place in places:
            u = drawn.u[place]
            heights, widths = np.full(len(u), height), np.full(len(u), width)
            params = self.operations[place].parameters(u, heights, widths)
            found.append((drawn.done[place], jax.tree.map(_narrow, params)))
        return tuple(found)

    def _run_jax(self, places: tuple[int, ...], images: jax.Array, drawn: Any) -> jax.Array:
        """Applies the operations at `places`: uint8 [B, H, W, 3] -> uint8 [B, H, W, 3]."""
        operations = [self.operations[place] for place in places]

        def one(inputs: tuple[jax.Array, Any]) -> jax.Array:
            return _run_jax(operations, *inputs)

        return map_in_parts(one, (images, drawn), images[0].size)

    def finish_jax(self, images: jax.Array, drawn: tuple[Any, ...]) -> jax.Array:
        """`finish` in JAX: uint8 [B, size, size, 3] -> the same.

        Args:
          images: the images that `cut` gives.
          drawn: the result of `for_device`.
        """
        return self._run_jax(self._after, images, drawn)

    def make_jax(
        self, pictures: jax.Array, drawn: Mapping[str, Any], tables: Any
    ) -> tuple[jax.Array, jax.Array]:
        """`make` in JAX, for pictures of one size.

        Args:
          pictures: uint8 [B, H, W, 3].
          drawn: the result of `for_device_whole`.
          tables: `Resizing.tables` for sides of at least max(H, W).

        Returns:
          The views, uint8 [B, size, size, 3], and their boxes, float32 [B, 4], as `cut` has them.
        """
        height, width = pictures.shape[1:3]
        boxes = drawn['crop']
        if self._before:
            pictures = self._run_jax(self._before, pictures, drawn['before'])
        images = self.resizing.resize_jax(pictures, boxes, tables)
        top, left, high, wide = boxes.T
        for place, (done, _) in zip(self._before, drawn['before'], strict=True):
            if self.operations[place].geometry == 'mirror':
                left = jnp.where(done, width - left - wide, left)
        shown = jnp.stack([top, left, high, wide], axis=1).astype(jnp.float32)
        shown = shown / jnp.array([height, width, height, width], jnp.float32)
        return self.finish_jax(images, drawn['after']), shown


# An example's place in a batch -> its parameters of an operation.
_Row = Callable[[int], Any]


class _StepsOfBatch(Sequence[Steps]):
    """The steps of a batch, each made when it is asked for.

    Made all at once, they would be thousands of objects for Python's garbage collector.
    """

    def __init__(
        self,
        count: int,
        before: list[tuple[Operation, list[bool], np.ndarray]],
        after: list[tuple[Operation, list[bool], _Row]],
    ):
        self._count, self._before, self._after = count, before, after

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < self._count:
            raise IndexError(row)
        return Steps(
            [(op, u[row].tolist()) for op, done, u in self._before if done[row]],
            [(op, params(row)) for op, done, params in self._after if done[row]],
        )


def _rows(params: Any) -> _Row:
    """The rows of a tree of arrays: Python numbers for arrays [B], arrays for arrays [B, ...]."""
    if isinstance(params, np.ndarray) and params.ndim == 1:
        return params.tolist().__getitem__
    leaves, kind = jax.tree.flatten(params)
    if not leaves:
        return lambda row: params
    columns = [x.tolist() if x.ndim == 1 else x for x in map(np.asarray, leaves)]
    return lambda row: jax.tree.unflatten(kind, [column[row] for column in columns])


def _narrow(x: np.ndarray) -> np.ndarray:
    """Converts 64-bit numbers to JAX's 32-bit types."""
    x = np.asarray(x)
    if x.dtype == np.float64:
        return x.astype(np.float32)
    return x.astype(np.int32) if x.dtype == np.int64 else x


def _applied(op: Operation, image: np.ndarray, params: Any) -> np.ndarray:
    """Applies an operation to an image of whichever type it is at that point."""
    if image.ndim == 2 and not op.takes_gray:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if op.dtype != 'any':
        if image.dtype != _UINT8:
            image = _bytes(image) if op.dtype == 'uint8' else image
        elif op.dtype == 'float32':
            image = np.multiply(image, _STEP, dtype=np.float32)
    out = op.apply(image, params)
    return out if op.in_range else _checked(op, out)


def _checked(op: Operation, out: Any) -> np.ndarray:
    """Checks what a user's operation made; clips floats to [0, 1] and makes it contiguous.

    Raises:
      UserError: it is not an image.
    """
    shape, dtype = np.shape(out), getattr(out, 'dtype', type(out).__name__)
    image = len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)
    if not image or dtype not in (np.uint8, np.float32, np.float64):
        raise UserError(
            f"The view operation '{op.name}' made {dtype} {list(shape)}: apply must return uint8 "
            'or float32 in [0, 1], [H, W, 3].'
        )
    if dtype == np.uint8:
        return np.ascontiguousarray(out)
    return np.clip(np.ascontiguousarray(out, np.float32), 0, 1)


def _bytes(image: np.ndarray) -> np.ndarray:
    """uint8 or float32 in [0, 1] -> uint8."""
    if image.dtype == _UINT8:
        return image
    # Rounds. It takes absolute values, but nothing here is negative by more than rounding.
    return cv2.convertScaleAbs(image, alpha=255)


def _run_jax(operations: Sequence[Operation], image: jax.Array, drawn: Any) -> jax.Array:
    """Applies operations to one image: uint8 [H, W, 3] -> uint8 [H, W, 3]."""
    for op, (done, params) in zip(operations, drawn, strict=True):
        given = image
        if op.dtype == 'float32' and given.dtype == jnp.uint8:
            # Also for images that the operation is not applied to: one program runs for all.
            given = image = image.astype(jnp.float32) * jnp.float32(1 / 255)
        elif op.dtype == 'uint8':
            given = _bytes_jax(given)
        made = op.apply_jax(given, params)
        if made.dtype == jnp.uint8 and image.dtype != jnp.uint8:
            made = made.astype(jnp.float32) * jnp.float32(1 / 255)
        elif made.dtype != jnp.uint8 and image.dtype == jnp.uint8:
            image = image.astype(jnp.float32) * jnp.float32(1 / 255)
        if not op.in_range and made.dtype != jnp.uint8:
            made = jnp.clip(made, 0, 1)
        image = jnp.where(done, made, image)
    return _bytes_jax(image)


def _bytes_jax(image: jax.Array) -> jax.Array:
    if image.dtype == jnp.uint8:
        return image
    return jnp.rint(jnp.clip(image, 0, 1) * 255).astype(jnp.uint8)
