"""What a view operation is, and the names of those there are.

A view is a list of operations (`view.View`). To add one of your own, write a class in a file of
your own and name it 'package.module:Class' in `views.view1.operations` (docs/views.md).
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Literal

import jax
import numpy as np


class Operation(abc.ABC):
    """One step in the making of a view, such as a flip or a blur. Its fields are its settings.

    A subclass is most easily a frozen dataclass. It is given its random numbers and draws none
    itself: `parameters` and `apply` are pure functions.

    Attributes:
      name: keys its random numbers, so two operations with different names draw independently. By
        default 'module:Class'; set it to keep the draws when you move or rename the class.
      variates: uniform numbers that `parameters` needs, without the one for `probability`.
      dtype: what `apply` and `apply_jax` take: 'float32' in [0, 1], 'uint8' in [0, 255], or 'any'
        for whichever the image is at that point. An image starts as uint8.
      takes_gray: `apply` also takes [H, W], which stands for three equal channels, as grey images
        are handed on after Gray. Otherwise they are given as [H, W, 3].
      geometry: what it does to places in the image: 'same' (nothing moves), 'mirror' (left and
        right change places) or 'other' (anything else: a view with it has no box).
      in_range: what `apply` returns is already float32 in [0, 1], but for rounding, and need not be
        checked and clipped.
      probability: how often it is done, in [0, 1]; usually a field of the dataclass.
    """

    name: ClassVar[str] = ''
    variates: ClassVar[int] = 0
    dtype: ClassVar[Literal['float32', 'uint8', 'any']] = 'float32'
    takes_gray: ClassVar[bool] = False
    geometry: ClassVar[Literal['same', 'mirror', 'other']] = 'same'
    in_range: ClassVar[bool] = False
    probability: float = 1.0

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if 'name' not in cls.__dict__:
            cls.name = f'{cls.__module__}:{cls.__qualname__}'

    def parameters(self, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> Any:
        """Turns uniform numbers into what `apply` is given, for B images at once.

        Args:
          u: float64 [B, variates] in [0, 1).
          height: int [B], of the images it will be given, pixels.
          width: int [B], likewise.

        Returns:
          Any tree (an array, a tuple, a dict) of arrays [B, ...]. By default the empty tuple.
        """
        return ()

    def parameters_of_one(self, u: list[float], height: int, width: int) -> Any:
        """`parameters` of one image whose size was not known before: the tree without [B]."""
        drawn = self.parameters(np.array([u]), np.array([height]), np.array([width]))
        return jax.tree.map(lambda x: x[0], drawn)

    @abc.abstractmethod
    def apply(self, image: np.ndarray, params: Any) -> np.ndarray:
        """Changes one image on the CPU. Called from many threads; must not write into `image`.

        Args:
          image: [H, W, 3], RGB, of the type that `dtype` says.
          params: this image's entry of `parameters`: Python numbers, or arrays where an entry is
            one.

        Returns:
          [H, W, 3] (or [H, W], grey), float32 in [0, 1] or uint8. Floats beyond are clipped.
        """

    def apply_jax(self, image: jax.Array, params: Any) -> jax.Array:
        """`apply` in JAX, for views.on='accelerator'; equal to it within 1/255. Optional.

        It runs under `jax.vmap`, for all images, and is then taken where it was drawn; the image
        keeps its shape and always has three channels.
        """
        raise NotImplementedError

    @property
    def has_jax(self) -> bool:
        """Whether there is an `apply_jax`."""
        return type(self).apply_jax is not Operation.apply_jax


class Resizing(Operation):
    """The operation of a view that makes images of any size one size. Always done, so no coin.

    `parameters` gives boxes, int [B, 4]: (top, left, height, width) of what is kept, in pixels of
    the image it is given.

    Attributes:
      size: side of the result, pixels.
    """

    dtype: ClassVar[Literal['float32', 'uint8', 'any']] = 'uint8'
    size: int

    def tables(self, longest: int) -> Any:
        """Arrays that `resize_jax` needs for pictures of sides up to `longest`: any tree."""
        return ()

    def resize_jax(self, pictures: jax.Array, boxes: jax.Array, tables: Any) -> jax.Array:
        """`apply` in JAX: uint8 [B, H, W, 3] -> uint8 [B, size, size, 3].

        Args:
          pictures: uint8 [B, H, W, 3].
          boxes: int32 [B, 4].
          tables: `tables` of at least max(H, W).
        """
        raise NotImplementedError

    @property
    def has_jax(self) -> bool:
        return type(self).resize_jax is not Resizing.resize_jax
