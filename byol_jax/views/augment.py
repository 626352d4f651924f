"""The two views of BYOL (paper, Appendix B): drawn parameters and the deterministic cores.

A view is made in two halves. `draw_view` turns integers (seed, epoch, example, view) into a
`ViewParams`; `make_view` applies one to a picture and has no randomness at all. The formulae are
those of google-deepmind/deepmind-research byol/utils/augmentations.py at f5de0ed (additive
brightness, contrast about each channel's mean, saturation and hue in HSV, clipping after each,
blur with zero padding); the resize is bicubic, antialiased or not (`views/resize.py`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from byol_jax.views.resize import resize

# One process runs many examples at once already; threads inside OpenCV would only fight over cores.
cv2.setNumThreads(0)

# DeepMind byol/utils/augmentations.py, _to_grayscale (ITU-R BT.601 luma).
LUMA = (0.2989, 0.5870, 0.1140)

# DeepMind byol/utils/augmentations.py, blur_divider: the kernel spans a tenth of the view.
BLUR_DIVIDER = 10

Floats = Sequence[float] | np.ndarray

# Variates that one view draws.
VARIATES = 15

ORDERS = tuple(itertools.permutations(('brightness', 'contrast', 'saturation', 'hue')))


class ViewParams(NamedTuple):
    """Everything random about one view.

    Attributes:
      crop: (top, left, height, width) in pixels of the picture.
      flip: mirror left-right.
      order: the order of the four jitters, or () for no colour jitter.
      brightness: added to every value, in [-1, 1] of full scale.
      contrast: factor about each channel's mean, at least 0.
      saturation: factor on the S of HSV, at least 0.
      hue: added to the H of HSV, in turns.
      gray: replace colours by their luma.
      sigma: of the Gaussian blur in pixels of the view; 0 for no blur.
      solarize: values from this threshold in [0, 1] up are inverted; above 1 for none.
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


def draw_view(
    view: Any, height: int, width: int, *, seed: int, epoch: int, example: int, number: int
) -> ViewParams:
    """Draws one view's parameters, a pure function of the four integers.

    Args:
      view: the view's config (configs/default.py, `get_view`).
      height, width: of the picture, pixels.
      seed: the run's seed. epoch: from 0. example: index in the data set. number: 1 or 2.

    A fixed number of variates is drawn in a fixed order, so that changing one probability leaves
    every other choice as it was.
    """
    u = np.random.Generator(
        np.random.Philox(key=[seed, 0], counter=[0, number, example, epoch])
    ).random(VARIATES)
    return view_params(view, height, width, u)


def view_params(view: Any, height: int, width: int, u: Floats) -> ViewParams:
    """Turns VARIATES uniforms in [0, 1) into one view's parameters.

    Args:
      view, height, width: see `draw_view`.
      u: one for each choice, whether it is made or not.
    """
    jitter = u[5] < view.jitter
    return ViewParams(
        crop=draw_crop(view.crop_area, view.crop_ratio, height, width, u[0:4]),
        flip=bool(u[4] < view.flip),
        order=ORDERS[int(u[6] * len(ORDERS))] if jitter else (),
        brightness=_uniform(u[7], -view.brightness, view.brightness),
        contrast=_uniform(u[8], 1 - view.contrast, 1 + view.contrast),
        saturation=_uniform(u[9], 1 - view.saturation, 1 + view.saturation),
        hue=_uniform(u[10], -view.hue, view.hue),
        gray=bool(u[11] < view.gray),
        sigma=_uniform(u[13], *view.blur_sigma) if u[12] < view.blur else 0.0,
        solarize=view.solarize_threshold if u[14] < view.solarize else math.inf,
    )


def draw_crop(
    area: tuple[float, float],
    ratio: tuple[float, float],
    height: int,
    width: int,
    u: Floats,
) -> tuple[int, int, int, int]:
    """Turns four uniforms in [0, 1) into a crop (top, left, height, width), all in pixels.

    The area is uniform, the ratio log-uniform, a side that leaves the picture is cut to it, and
    the place is uniform (DeepMind byol/utils/dataset.py, _decode_and_random_crop).
    """
    target = _uniform(u[0], *area) * height * width
    aspect = math.exp(_uniform(u[1], math.log(ratio[0]), math.log(ratio[1])))
    w = min(max(round(math.sqrt(target * aspect)), 1), width)
    h = min(max(round(math.sqrt(target / aspect)), 1), height)
    return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w


def make_view(
    image: np.ndarray, params: ViewParams, size: int, antialias: bool = True
) -> np.ndarray:
    """Applies drawn parameters: uint8 [H, W, 3] -> uint8 [size, size, 3].

    Args:
      antialias: see `crop_resize`.
    """
    out = crop_resize(image, params.crop, size, antialias)
    if params.flip:
        out = cv2.flip(out, 1)
    if not (params.order or params.gray or params.sigma or params.solarize <= 1):
        return np.ascontiguousarray(out)
    x = np.multiply(out, np.float32(1 / 255), dtype=np.float32)
    for names in _adjacent(params.order):
        x = _JITTERS[names](x, *(getattr(params, name) for name in names))
    if params.gray:
        x = luma(x)
    if params.sigma:
        x = blur(x, params.sigma)
    if params.solarize <= 1:
        x = solarize(x, params.solarize)
    # Rounds, and takes the size of what is negative, which nothing here is by more than rounding.
    out = cv2.convertScaleAbs(x, alpha=255)
    return cv2.cvtColor(out, cv2.COLOR_GRAY2RGB) if params.gray else out


def crop_resize(
    image: np.ndarray, crop: tuple[int, int, int, int], size: int, antialias: bool = True
) -> np.ndarray:
    """Cuts (top, left, height, width) and resizes: uint8 [H, W, 3] -> uint8 [size, size, 3].

    Args:
      antialias: bicubic with a = -0.5 over all pixels that become one, as Pillow and torchvision
        resize. False: over 4 x 4 pixels whatever the scale, a = -0.75, as OpenCV does.
    """
    top, left, height, width = crop
    window = image[top : top + height, left : left + width]
    if (height, width) == (size, size):
        return window
    if antialias:
        return resize(window, size)
    return cv2.resize(window, (size, size), interpolation=cv2.INTER_CUBIC)


def adjust_brightness(image: np.ndarray, delta: float) -> np.ndarray:
    """Adds `delta` to float32 [H, W, 3] in [0, 1] and clips."""
    out = np.add(image, np.float32(delta))
    return _not_above_1(out) if delta > 0 else _not_below_0(out)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales float32 [H, W, 3] in [0, 1] about each channel's mean and clips."""
    matrix = np.zeros((3, 4))
    for channel, mean in enumerate(cv2.mean(image)[:3]):
        matrix[channel, channel] = factor
        matrix[channel, 3] = (1 - factor) * mean
    out = cv2.transform(image, matrix)
    # Towards the mean nothing leaves [0, 1].
    return out if factor <= 1 else _not_above_1(_not_below_0(out))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales the S of HSV of float32 [H, W, 3] in [0, 1]; S is clipped to [0, 1]."""
    return adjust_hsv(image, factor, 0.0)


def adjust_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Turns the H of HSV of float32 [H, W, 3] in [0, 1] by a fraction of the colour circle."""
    return adjust_hsv(image, 1.0, turns)


def adjust_hsv(image: np.ndarray, factor: float, turns: float) -> np.ndarray:
    """`adjust_saturation` and `adjust_hue`, in either order: each leaves the other's part alone."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    # OpenCV's float hue is in degrees; it takes those from 360 to 720 too.
    change = np.array([[1, 0, 0, 360 * (turns % 1)], [0, factor, 0, 0], [0, 0, 1, 0]])
    hsv = cv2.transform(hsv, change)
    if factor > 1:
        hsv = cv2.min(hsv, (math.inf, 1, math.inf, 0))
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def luma(image: np.ndarray) -> np.ndarray:
    """The luma of float32 [H, W, 3]: float32 [H, W]."""
    return cv2.transform(image, np.array([LUMA]))


def blur_kernel(size: int, sigma: float) -> np.ndarray:
    """The 1-D Gaussian for a view of `size` pixels: float32 [2 * (size // 20) + 1], sum 1.

    A tenth of the view, made odd: 23 taps at 224 pixels (DeepMind augmentations.py,
    _gaussian_blur_single_image).
    """
    radius = int(size / BLUR_DIVIDER / 2)
    taps = np.arange(-radius, radius + 1)
    kernel = np.exp(-(taps**2) / (2.0 * sigma**2))
    return (kernel / kernel.sum()).astype(np.float32)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs float32 [H, W, 3] or [H, W] with `blur_kernel`; beyond the border all is 0.

    Its taps beyond 4 sigma are left out: 3e-5 of it all, less than a hundredth of a level.
    """
    kernel = blur_kernel(image.shape[0], sigma)
    spare = max(len(kernel) // 2 - math.ceil(4 * sigma), 0)
    kernel = kernel[spare : len(kernel) - spare]
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_CONSTANT)


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts values of float32 [H, W, 3] or [H, W] in [0, 1] that are not below `threshold`."""
    inverted = np.float32(1) - image
    if threshold == 0.5:
        return cv2.min(image, inverted)
    return np.where(image < np.float32(threshold), image, inverted)


def center_view(image: np.ndarray, size: int, crop_fraction: float) -> np.ndarray:
    """The view used for evaluation: the centre square of uint8 [H, W, 3], resized.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result, pixels.
      crop_fraction: side of the square over the picture's shorter side, in (0, 1]; 224 / 256 in
        DeepMind byol/utils/dataset.py, _decode_and_center_crop.
    """
    height, width = image.shape[:2]
    side = max(1, int(min(height, width) * crop_fraction))
    return crop_resize(image, ((height - side) // 2, (width - side) // 2, side, side), size)


def _uniform(u: float, low: float, high: float) -> float:
    return float(low + (high - low) * u)


def _not_above_1(image: np.ndarray) -> np.ndarray:
    return cv2.threshold(image, 1, 1, cv2.THRESH_TRUNC, dst=image)[1]


def _not_below_0(image: np.ndarray) -> np.ndarray:
    return cv2.threshold(image, 0, 0, cv2.THRESH_TOZERO, dst=image)[1]


@functools.cache
def _adjacent(order: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """An order of jitters in parts: saturation and hue are one where they follow each other."""
    parts: list[tuple[str, ...]] = []
    for name in order:
        if parts and {name, *parts[-1]} == {'saturation', 'hue'}:
            parts[-1] = ('saturation', 'hue')
        else:
            parts.append((name,))
    return tuple(parts)


_JITTERS: dict[tuple[str, ...], Callable[..., np.ndarray]] = {
    ('brightness',): adjust_brightness,
    ('contrast',): adjust_contrast,
    ('saturation',): adjust_saturation,
    ('hue',): adjust_hue,
    ('saturation', 'hue'): adjust_hsv,
}
