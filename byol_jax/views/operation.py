"""The interface of a view operation.

A view is a list of operations (`view.View`). To add one of your own, write a class and name it as
'package.module:Class' in `views.view1.operations` (docs/views.md).
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Literal

import jax
import numpy as np


class Operation(abc.ABC):
    """One step of making a view, such as a flip or a blur. Its fields are its settings.

    A subclass is usually a frozen dataclass. It gets its random numbers and draws none itself:
    `parameters` and `apply` are pure functions.

    Attributes:
      name: the key of its random numbers: operations with different names draw independently. By
        default 'module:Class'; set it to keep the draws when you move or rename the class.
      variates: how many uniform numbers `parameters` needs, without the one for `probability`.
      dtype: what `apply` and `apply_jax` take: 'float32' in [0, 1], 'uint8' in [0, 255], or 'any'
        for either of them. An image starts as uint8.
      takes_gray: whether `apply` also takes [H, W] for three equal channels, the form that grey
        images have after Gray. If not, they are passed as [H, W, 3].
      geometry: what it does to places in the image: 'same' (nothing moves), 'mirror' (left and
        right are swapped) or 'other' (anything else; the view then has no box).
      in_range: whether the result of `apply` is float32 in [0, 1] except for rounding, and so needs
        no check and no clipping.
      probability: how often it is applied, in [0, 1]; usually a field of the dataclass.
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
        """Turns uniform numbers into the parameters of `apply`, for B images at once.

        Args:
          u: uniform numbers in [0, 1), float64 [B, variates].
          height: heights of the images, pixels, int [B].
          width: widths of the images, pixels, int [B].

        Returns:
          Any tree (an array, a tuple, a dict) of arrays [B, ...]. By default the empty tuple.
        """
        return ()

    def parameters_of_one(self, u: list[float], height: int, width: int) -> Any:
        """`parameters` for one image: the tree without the axis [B]."""
        drawn = self.parameters(np.array([u]), np.array([height]), np.array([width]))
        return jax.tree.map(lambda x: x[0], drawn)

    @abc.abstractmethod
    def apply(self, image: np.ndarray, params: Any) -> np.ndarray:
        """Applies the operation to one image on the CPU. Called from many threads.

        Args:
          image: the image, RGB, [H, W, 3], of the type of `dtype`. It must not be changed in place.
          params: this image's entry of `parameters`: Python numbers where the tree has arrays [B],
            arrays elsewhere.

        Returns:
          [H, W, 3] (or [H, W], grey), float32 in [0, 1] or uint8. Floats outside are clipped.
        """

    def apply_jax(self, image: jax.Array, params: Any) -> jax.Array:
        """`apply` in JAX, for views.on='accelerator'; equal to it within 1/255. Optional.

        It runs under `jax.vmap` on all images; the result is used only for those whose draw of
        `probability` says so. The image keeps its shape and always has three channels.

        Args:
          image: the image, RGB, [H, W, 3], of the type of `dtype`.
          params: this image's entry of `parameters`.

        Returns:
          [H, W, 3], float32 in [0, 1] or uint8.
        """
        raise NotImplementedError

    @property
    def has_jax(self) -> bool:
        """Whether the class defines `apply_jax`."""
        return type(self).apply_jax is not Operation.apply_jax


class Resizing(Operation):
    """The operation of a view that brings images of any size to one size. Always applied.

    `parameters` gives boxes, int [B, 4]: (top, left, height, width) of the part that is kept, in
    pixels of the given image.

    Attributes:
      size: side of the result, pixels.
    """

    dtype: ClassVar[Literal['float32', 'uint8', 'any']] = 'uint8'
    size: int

    def tables(self, longest: int) -> Any:
        """The arrays that `resize_jax` needs for sides of up to `longest` pixels: any tree."""
        return ()

    def resize_jax(self, pictures: jax.Array, boxes: jax.Array, tables: Any) -> jax.Array:
        """`apply` in JAX, for a batch. Optional.

        Args:
          pictures: uint8 [B, H, W, 3].
          boxes: the boxes, as `parameters` gives them, int32 [B, 4].
          tables: the result of `tables` for at least max(H, W).

        Returns:
          uint8 [B, size, size, 3].
        """
        raise NotImplementedError

    @property
    def has_jax(self) -> bool:
        return type(self).resize_jax is not Resizing.resize_jax
