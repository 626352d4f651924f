"""Drawn parameters as one record, and views made from them, for the tests of views."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from byol_jax import settings
from byol_jax.names import Named
from byol_jax.views.colors import ORDERS, Blur, Flip, Gray, Jitter, Jittered, Solarize
from byol_jax.views.crop import Crop
from byol_jax.views.recipes import config_operations
from byol_jax.views.view import Steps, View


class Params(NamedTuple):
    """Everything random about one of the paper's views.

    Attributes:
      crop: (top, left, height, width) in pixels of the picture.
      flip: mirror left-right.
      order: the order of the four jitters, or () for no colour jitter.
      brightness, contrast, saturation, hue: as `Jittered`.
      gray: replace colours by their luma.
      sigma: of the Gaussian blur; 0 for no blur.
      solarize: the threshold; above 1 for none.
    """

    crop: tuple[int, int, int, int]
    flip: bool = False
    order: tuple[str, ...] = ()
    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    gray: bool = False
    sigma: float = 0.0
    solarize: float = math.inf


@dataclasses.dataclass(frozen=True)
class FixedCrop(Crop):
    """A crop that draws nothing."""

    variates = 0
    box: tuple[int, int, int, int] = (0, 0, 1, 1)

    def parameters_of_one(self, u, height, width):
        return self.box


def steps_of(params: Params, size: int, antialias: bool = True) -> Steps:
    """The operations that make a view with these parameters."""
    after: list[tuple[Any, Any]] = []
    if params.flip:
        after.append((Flip(), ()))
    if params.order:
        amounts = (params.brightness, params.contrast, params.saturation, params.hue)
        after.append((Jitter(), Jittered(ORDERS.index(params.order), *amounts)))
    if params.gray:
        after.append((Gray(), ()))
    if params.sigma:
        after.append((Blur(), params.sigma))
    if params.solarize <= 1:
        after.append((Solarize(threshold=params.solarize), ()))
    return Steps([(FixedCrop(size, antialias=antialias, box=params.crop), [])], after)


def make_view(image: np.ndarray, params: Params, size: int) -> np.ndarray:
    return View([Crop(size)]).make(image, steps_of(params, size))


def view_of(config: Any, size: int = 224) -> View:
    """The view of a view's config."""
    operations = tuple(map(Named, config.operations))
    section = settings.View(**(dict(config) | {'operations': operations}))
    return View(config_operations(section, size, True))


def draw_views(
    config: Any, height: int, width: int, *, seed: int, number: int, epochs: Any, examples: Any
) -> list[Params]:
    """What a view's config draws for some examples, for operations that are applied and others."""
    view = view_of(config)
    drawn = view.draw(seed, number, np.asarray(epochs), np.asarray(examples))
    count = len(examples)
    sides = np.full(count, height), np.full(count, width)
    crop, _, jitter, _, blur, solarize = view.operations
    boxes = [crop.parameters_of_one(u, height, width) for u in drawn.u[0].tolist()]
    jittered = jitter.parameters(drawn.u[2], *sides)
    sigmas = blur.parameters(drawn.u[4], *sides)
    return [
        Params(
            crop=boxes[i],
            flip=bool(drawn.done[1][i]),
            order=ORDERS[jittered.order[i]] if drawn.done[2][i] else (),
            brightness=float(jittered.brightness[i]),
            contrast=float(jittered.contrast[i]),
            saturation=float(jittered.saturation[i]),
            hue=float(jittered.hue[i]),
            gray=bool(drawn.done[3][i]),
            sigma=float(sigmas[i]) if drawn.done[4][i] else 0.0,
            solarize=solarize.threshold if drawn.done[5][i] else math.inf,
        )
        for i in range(count)
    ]


def draw_view(
    config: Any, height: int, width: int, *, seed: int, epoch: int, example: int, number: int
) -> Params:
    (params,) = draw_views(
        config, height, width, seed=seed, number=number, epochs=[epoch], examples=[example]
    )
    return params
