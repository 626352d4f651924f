"""The operations: their draws follow the paper, their results formulae in float64."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from drawn import Params, draw_view, draw_views, make_view
from PIL import Image
from scipy import ndimage, stats

from byol_jax.views import colors, crop
from configs.default import get_view

# Float32 holds [0, 1] to 6e-8; an operation has a handful of roundings.
FLOAT32 = 1e-6

# Distribution tests are deterministic, so this only guards against wrong distributions.
P_VALUE = 1e-3

DRAWS = 5000


def noise(height: int, width: int, seed: int = 0, low: int = 0, high: int = 255) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(low, high, (height, width, 3), dtype=np.uint8, endpoint=True)


def photograph(height: int, width: int) -> np.ndarray:
    """Smooth colours that reach both ends of the range, with noise: uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7 + c) * np.cos(y / (5 + c)) for c in range(3)]
    scaled = 140 * np.stack(waves, axis=-1) + 128
    grain = np.random.default_rng(1).normal(0, 10, scaled.shape)
    return np.clip(scaled + grain, 0, 255).astype(np.uint8)


def floats(image: np.ndarray) -> np.ndarray:
    return (image / 255).astype(np.float32)


# The references in float64.


def bicubic_weights(inputs: int, outputs: int) -> np.ndarray:
    """Rows of the antialiased cubic filter with a = -0.5: float64 [outputs, inputs]."""
    a = -0.5
    scale = inputs / outputs
    stretch = max(1.0, scale)
    centers = (np.arange(outputs) + 0.5) * scale
    x = np.abs((np.arange(inputs)[None, :] + 0.5 - centers[:, None]) / stretch)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * a * x - 4 * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def bicubic(image: np.ndarray, size: int) -> np.ndarray:
    rows = bicubic_weights(image.shape[0], size)
    columns = bicubic_weights(image.shape[1], size)
    return np.einsum('ih,jw,hwc->ijc', rows, columns, image.astype(np.float64), optimize=True)


def brightness(x: np.ndarray, delta: float) -> np.ndarray:
    return np.clip(x + delta, 0, 1)


def contrast(x: np.ndarray, factor: float) -> np.ndarray:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return np.clip((x - mean) * factor + mean, 0, 1)


def pixelwise_hsv(x: np.ndarray, change) -> np.ndarray:
    out = np.empty(x.shape, np.float64)
    for place in np.ndindex(x.shape[:2]):
        out[place] = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*map(float, x[place]))))
    return out


def saturation(x: np.ndarray, factor: float) -> np.ndarray:
    return pixelwise_hsv(x, lambda h, s, v: (h, min(s * factor, 1), v))


def hue(x: np.ndarray, turns: float) -> np.ndarray:
    return pixelwise_hsv(x, lambda h, s, v: ((h + turns) % 1, s, v))


def gray(x: np.ndarray) -> np.ndarray:
    luma = 0.2989 * x[..., 0] + 0.5870 * x[..., 1] + 0.1140 * x[..., 2]
    return np.repeat(luma[..., None], 3, axis=-1)


def blur(x: np.ndarray, sigma: float) -> np.ndarray:
    radius = x.shape[0] // 20
    taps = np.arange(-radius, radius + 1, dtype=np.float64)
    kernel = np.exp(-((taps / sigma) ** 2) / 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        x = ndimage.correlate1d(x.astype(np.float64), kernel, axis=axis, mode='constant')
    return x


def solarize(x: np.ndarray, threshold: float) -> np.ndarray:
    return np.where(x < threshold, x, 1 - x)


JITTERS = {'brightness': brightness, 'contrast': contrast, 'saturation': saturation, 'hue': hue}


# The operations' functions.


@pytest.mark.parametrize(
    ('height', 'width', 'size'),
    [
        pytest.param(17, 23, 64, id='enlarge'),
        pytest.param(200, 301, 64, id='shrink'),
        pytest.param(40, 150, 64, id='enlarge and shrink'),
        pytest.param(63, 65, 64, id='nearly the same'),
        pytest.param(1, 1, 8, id='one pixel'),
        pytest.param(64, 64, 1, id='to one pixel'),
    ],
)
def test_resize_is_antialiased_bicubic(height, width, size):
    """crop_resize is the antialiased cubic filter (a = -0.5), in both directions."""
    # Away from both ends, where Pillow clips between its two passes.
    image = noise(height, width, low=50, high=205)
    ours = crop.crop_resize(image, (0, 0, height, width), size)
    error = ours - bicubic(image, size)
    assert ours.shape == (size, size, 3)
    # Pillow rounds after each pass: 0.5 x (sum of |weights|, at most 1.25) + 0.5.
    assert np.abs(error).max() <= 1.125
    # Rounding is fair: its mean over n values stays within 5 standard errors of 0.
    assert abs(error.mean()) <= 5 * 0.5 / math.sqrt(error.size)


@pytest.mark.parametrize('size', [1, 37, 224])
def test_resize_is_pillows_to_the_bit(size):
    """Float32 products, with unsure results made exact, equal Pillow's integers."""
    rng = np.random.default_rng(size)
    # Taller, wider and square; 336 and 448 to 224 put many results near half a level; the last are
    # so wide that their products are split into columns.
    sides = [*rng.integers(1, 420, (30, 2)).tolist(), (336, 336), (448, 300), (1, 90), (90, 1)]
    for height, width in [*sides, (900, 1300), (1300, 900)]:
        image = noise(height, width, seed=height)
        for picture in (image, np.where(image < 128, 0, 255).astype(np.uint8)):
            expected = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
            ours = crop.crop_resize(picture, (0, 0, height, width), size)
            np.testing.assert_array_equal(ours, np.asarray(expected), f'{height}x{width}')


@pytest.mark.parametrize(('height', 'width', 'size'), [(50, 70, 32), (20, 33, 48), (3, 2, 8)])
def test_without_antialiasing_four_pixels_make_one(height, width, size):
    """antialias=False is the cubic filter with a = -0.75 over 4 x 4 pixels at any scale; beyond the
    border, the last pixel is repeated.
    """
    image = noise(height, width)

    def matrix(inputs: int) -> np.ndarray:
        found = np.zeros((size, inputs))
        for result in range(size):
            at = (result + 0.5) * inputs / size - 0.5
            for pixel in range(math.floor(at) - 1, math.floor(at) + 3):
                x = abs(at - pixel)
                near = 1.25 * x**3 - 2.25 * x**2 + 1
                far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
                found[result, min(max(pixel, 0), inputs - 1)] += near if x < 1 else far
        return found

    expected = np.einsum('ij,jkc,lk->ilc', matrix(height), image / 1.0, matrix(width))
    ours = crop.crop_resize(image, (0, 0, height, width), size, antialias=False)
    # OpenCV's weights are in units of 2^-11.
    np.testing.assert_allclose(ours, np.clip(expected, 0, 255), atol=1, rtol=0)


def test_resize_of_a_crop_sees_nothing_outside_it():
    """crop_resize equals cutting the picture first and resizing all of the result."""
    image = noise(60, 80)
    cut = image[11:41, 20:65].copy()
    whole = crop.crop_resize(cut, (0, 0, 30, 45), 32)
    np.testing.assert_array_equal(crop.crop_resize(image, (11, 20, 30, 45), 32), whole)
    lit = np.full_like(image, 255)
    lit[11:41, 20:65] = cut
    np.testing.assert_array_equal(crop.crop_resize(lit, (11, 20, 30, 45), 32), whole)


def test_crop_of_the_right_size_is_not_resampled():
    """A crop as large as the view has the picture's own pixels."""
    image = noise(40, 50)
    np.testing.assert_array_equal(crop.crop_resize(image, (3, 7, 32, 32), 32), image[3:35, 7:39])


@pytest.mark.parametrize('delta', [-0.4, -0.1, 0.0, 0.25, 0.4])
def test_brightness(delta):
    """Brightness is added, then clipped to [0, 1]."""
    x = floats(noise(20, 30))
    expected = brightness(x.astype(np.float64), delta)
    np.testing.assert_allclose(colors.adjust_brightness(x, delta), expected, atol=FLOAT32, rtol=0)


@pytest.mark.parametrize('factor', [0.0, 0.6, 1.0, 1.4])
def test_contrast_is_about_the_mean_of_each_channel(factor):
    """Contrast scales about each channel's own mean, not about that of all three."""
    x = floats(noise(20, 30)) * np.array([1.0, 0.5, 0.2], np.float32)
    expected = contrast(x.astype(np.float64), factor)
    np.testing.assert_allclose(colors.adjust_contrast(x, factor), expected, atol=FLOAT32, rtol=0)


@pytest.mark.parametrize('factor', [0.0, 0.8, 1.0, 1.2, 3.0])
def test_saturation_against_colorsys(factor):
    """Saturation scales the S of HSV and clips it, pixel by pixel as colorsys says."""
    x = floats(np.concatenate([noise(30, 30), photograph(30, 30), extreme_colors()]))
    # OpenCV adds 1e-7 to divisors, which changes a colour by about that much.
    np.testing.assert_allclose(
        colors.adjust_saturation(x, factor), saturation(x, factor), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize('turns', [-0.1, -0.03, 0.0, 0.07, 0.1, 0.5])
def test_hue_against_colorsys(turns):
    """Hue is turned by a fraction of the circle, both ways, pixel by pixel as colorsys says."""
    x = floats(np.concatenate([noise(30, 30), photograph(30, 30), extreme_colors()]))
    # Near 360 degrees, float32 has steps of 3e-5; 60 degrees are a full change of colour.
    np.testing.assert_allclose(colors.adjust_hue(x, turns), hue(x, turns), atol=2e-6, rtol=0)


def extreme_colors() -> np.ndarray:
    """Black, white, greys, pure and almost grey colours: uint8 [1, 30, 3]."""
    corners = list(itertools.product((0, 1, 255), repeat=3))
    return np.array([[*corners, (128, 128, 128), (128, 128, 129), (254, 255, 255)]], np.uint8)


def test_gray_is_the_luma():
    """Grey is .2989 R + .5870 G + .1140 B."""
    x = floats(noise(20, 30))
    expected = gray(x.astype(np.float64))[..., 0]
    np.testing.assert_allclose(colors.luma(x), expected, atol=FLOAT32, rtol=0)


@pytest.mark.parametrize('threshold', [0.0, 0.5, 1.0])
def test_solarize_inverts_from_the_threshold_up(threshold):
    """Solarize inverts values at and above the threshold and leaves those below."""
    x = np.linspace(0, 1, 3 * 65, dtype=np.float32).reshape(65, 1, 3)
    assert np.any(x == np.float32(threshold))
    expected = solarize(x.astype(np.float64), threshold)
    np.testing.assert_allclose(colors.solarize(x, threshold), expected, atol=FLOAT32, rtol=0)


@pytest.mark.parametrize('sigma', [0.1, 0.7, 2.0])
@pytest.mark.parametrize('size', [48, 224])
def test_blur_against_scipy(size, sigma):
    """Blur is the separable Gaussian of a tenth of the view, with zeros beyond the border."""
    x = floats(photograph(size, size))
    # Beyond 4 sigma lie 6e-5 of a Gaussian, half of it beyond the taps kept: 0.01 of a level.
    np.testing.assert_allclose(colors.blur(x, sigma), blur(x, sigma), atol=4e-5, rtol=0)


def test_blur_kernel_has_23_taps_at_224_pixels():
    """The kernel spans a tenth of the view made odd, is symmetric and sums to 1."""
    kernel = colors.blur_kernel(224, 1.3)
    assert kernel.shape == (23,)
    assert colors.blur_kernel(19, 1.3).tolist() == [1.0]
    np.testing.assert_array_equal(kernel, kernel[::-1])
    assert kernel.sum(dtype=np.float64) == pytest.approx(1, abs=FLOAT32)
    # Neighbouring taps of a Gaussian: exp(-1 / (2 sigma^2)) at the centre.
    assert kernel[12] / kernel[11] == pytest.approx(math.exp(-1 / (2 * 1.3**2)), rel=FLOAT32)


def test_cores_do_not_change_their_input():
    """No operation and no view changes the picture it is given, which may be cached."""
    x, image = floats(noise(40, 40)), noise(40, 40)
    x.setflags(write=False)
    image.setflags(write=False)
    before = x.copy(), image.copy()
    for core, amount in (
        (colors.adjust_brightness, 0.3),
        (colors.adjust_contrast, 1.3),
        (colors.adjust_saturation, 1.2),
        (colors.adjust_hue, 0.1),
        (colors.blur, 1.0),
        (colors.solarize, 0.5),
    ):
        core(x, amount)
    colors.luma(x)
    make_view(image, Params((0, 0, 40, 40), order=colors.ORDERS[0], brightness=0.3), 40)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(image, before[1])


# Whole views.


def test_orders_are_all_permutations():
    """There are exactly the 24 orders of the four jitters."""
    assert len(colors.ORDERS) == 24
    assert set(colors.ORDERS) == set(itertools.permutations(JITTERS))


@pytest.mark.parametrize('grayed', [False, True])
@pytest.mark.parametrize('order', colors.ORDERS, ids='-'.join)
def test_view_is_the_cores_in_the_drawn_order(order, grayed):
    """A view is resize, flip, the jitters in the drawn order, gray, blur, solarize."""
    image = photograph(50, 60)
    params = Params(
        crop=(4, 6, 40, 36),
        flip=True,
        order=order,
        brightness=0.35,
        contrast=1.4,
        saturation=1.2,
        hue=0.1,
        gray=grayed,
        sigma=0.8,
        solarize=0.5,
    )
    expected = crop.crop_resize(image, params.crop, 40)[:, ::-1] / 255
    for name in order:
        expected = JITTERS[name](expected, getattr(params, name))
    if grayed:
        expected = gray(expected)
    expected = 255 * solarize(blur(expected, params.sigma), params.solarize)
    # Half a level of rounding, and float32 against float64.
    np.testing.assert_allclose(
        make_view(image, params, 40), expected, atol=0.5 + 255 * 1e-5, rtol=0
    )


def test_order_matters():
    """Different orders give different views, so the test of the order above can fail."""
    image = photograph(40, 40)
    base = Params((0, 0, 40, 40), brightness=0.35, contrast=1.4, saturation=1.2, hue=0.1)
    views = {make_view(image, base._replace(order=o), 40).tobytes() for o in colors.ORDERS}
    # Saturation and hue commute if they are adjacent, in 12 orders: 6 pairs may coincide.
    assert len(views) >= 18


@pytest.mark.parametrize('order', [(), colors.ORDERS[0], colors.ORDERS[-1]])
@pytest.mark.parametrize('flip', [False, True])
def test_parameters_that_change_nothing(order, flip):
    """Neutral parameters give the resized crop, mirrored if flipped."""
    image = noise(50, 60)
    params = Params((3, 5, 30, 40), flip=flip, order=order)
    expected = crop.crop_resize(image, params.crop, 24)
    expected = expected[:, ::-1] if flip else expected
    view = make_view(image, params, 24)
    np.testing.assert_array_equal(view, expected)
    assert view.dtype == np.uint8
    assert view.flags.c_contiguous


def test_jitter_amounts_without_jitter_change_nothing():
    """Amounts drawn for a view without colour jitter are not applied."""
    image = noise(40, 40)
    params = Params((0, 0, 40, 40), order=(), brightness=0.4, contrast=0.6, hue=0.1)
    np.testing.assert_array_equal(make_view(image, params, 40), image)


def test_flip_mirrors_left_and_right():
    """A flipped view is the unflipped one with reversed columns, whatever else is done."""
    image = photograph(50, 60)
    params = Params((3, 5, 30, 40), order=colors.ORDERS[5], contrast=0.7, sigma=1.0)
    plain = make_view(image, params, 40)
    flipped = make_view(image, params._replace(flip=True), 40)
    # Sums have another order, so a value at half a level may be rounded differently.
    assert np.abs(flipped[:, ::-1].astype(int) - plain).max() <= 1
    assert np.mean(flipped[:, ::-1] == plain) > 0.999


@pytest.mark.parametrize('shape', [(1, 1), (1, 37), (41, 1), (2, 3)])
def test_view_of_a_tiny_picture(shape):
    """Pictures of one or a few pixels give a view of the right shape, without an error."""
    image = noise(*shape)
    params = Params((0, 0, *shape), True, colors.ORDERS[0], 0.1, 1.2, 1.1, 0.05, True, 1.0, 0.5)
    assert make_view(image, params, 16).shape == (16, 16, 3)


# Drawn parameters.

SQUARE = (10_000, 10_000)


def draws(view, height: int, width: int, number: int = 1, count: int = DRAWS) -> list[Params]:
    numbers = np.arange(count)
    where = {'epochs': numbers % 5, 'examples': numbers // 5}
    return draw_views(view, height, width, seed=0, number=number, **where)


@pytest.fixture(scope='module')
def view1() -> list[Params]:
    return draws(get_view(blur=1.0, solarize=0.0), *SQUARE)


@pytest.fixture(scope='module')
def view2() -> list[Params]:
    return draws(get_view(blur=0.1, solarize=0.2), *SQUARE, number=2)


def follows_uniform(values: list[float], low: float, high: float) -> bool:
    assert min(values) >= low
    assert max(values) <= high
    return stats.kstest(values, 'uniform', (low, high - low)).pvalue > P_VALUE


def has_probability(events: list[bool], probability: float) -> bool:
    return stats.binomtest(sum(events), len(events), probability).pvalue > P_VALUE


def test_draw_is_a_pure_function_of_four_integers():
    """The same seed, epoch, example and number always draw the same view, in any order."""
    view = get_view(blur=0.5, solarize=0.2)
    tickets = list(itertools.product((0, 3), (0, 1), (0, 9), (1, 2)))

    def draw(ticket):
        seed, epoch, example, number = ticket
        return draw_view(view, 300, 400, seed=seed, epoch=epoch, example=example, number=number)

    first = [draw(t) for t in tickets]
    np.random.seed(1)
    assert [draw(t) for t in reversed(tickets)] == first[::-1]
    assert len(set(first)) == len(tickets)


@pytest.mark.parametrize('name', ['seed', 'epoch', 'example', 'number'])
def test_each_integer_matters(name):
    """Changing any one of the four integers gives an unrelated draw."""
    view = get_view(blur=1.0, solarize=0.0)
    integers = {'seed': 0, 'epoch': 0, 'example': 0, 'number': 1}
    values = [draw_view(view, *SQUARE, **(integers | {name: i})).brightness for i in range(1, 2001)]
    assert follows_uniform(values, -0.4, 0.4)
    assert stats.spearmanr(values[:-1], values[1:]).pvalue > P_VALUE


def test_large_integers_are_not_folded():
    """Examples and epochs beyond 2^32 are different from each other."""
    view = get_view(blur=1.0, solarize=0.0)
    integers = {'seed': 2**40, 'epoch': 2**33, 'example': 2**35, 'number': 1}
    high = draw_view(view, *SQUARE, **integers)
    low = draw_view(view, *SQUARE, **{k: v % 2**32 for k, v in integers.items()})
    assert high.brightness != low.brightness


@pytest.mark.parametrize(
    ('probability', 'governed'),
    [
        ('flip', {'flip'}),
        ('jitter', {'order'}),
        ('gray', {'gray'}),
        ('blur', {'sigma'}),
        ('solarize', {'solarize'}),
    ],
)
def test_one_probability_changes_one_choice(probability, governed):
    """Setting a probability to 0 or 1 does not change any other draw."""
    view = get_view(blur=0.5, solarize=0.5)
    base = draws(view, 333, 500, count=200)
    never, always = get_view(blur=0.5, solarize=0.5), get_view(blur=0.5, solarize=0.5)
    never[probability], always[probability] = 0.0, 1.0
    changed = set()
    for old, off, on in zip(
        base, draws(never, 333, 500, count=200), draws(always, 333, 500, count=200), strict=True
    ):
        for field in Params._fields:
            versions = {getattr(old, field), getattr(off, field), getattr(on, field)}
            if len(versions) > 1:
                changed.add(field)
            if field in governed:
                assert getattr(old, field) in (getattr(off, field), getattr(on, field))
    assert changed == governed


def test_area_and_ratio_where_no_crop_is_cut():
    """The crop's area is uniform, and so is the logarithm of its ratio."""
    view = get_view(blur=1.0, solarize=0.0)
    view.crop_area = (0.08, 0.75)  # 0.75 x 4/3 = 1: every crop fits.
    crops = [p.crop for p in draws(view, *SQUARE)]
    areas = [h * w / 1e8 for _, _, h, w in crops]
    logs = [math.log(w / h) for _, _, h, w in crops]
    # A crop's sides are rounded to pixels: 1e-4 of a ten-thousandth.
    slack = 5e-4
    assert follows_uniform(areas, 0.08 - slack, 0.75 + slack)
    assert follows_uniform(logs, math.log(3 / 4) - slack, math.log(4 / 3) + slack)
    assert stats.spearmanr(areas, logs).pvalue > P_VALUE


def test_crop_of_the_paper(view1):
    """With areas up to 1, sides longer than the picture are cut, and the rest is unchanged."""
    rng = np.random.default_rng(0)
    area = rng.uniform(0.08, 1, 200_000)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), area.size))
    width, height = np.minimum(np.sqrt([area * ratio, area / ratio]), 1)
    crops = np.array([p.crop for p in view1]) / 10_000
    assert stats.ks_2samp(crops[:, 2], height).pvalue > P_VALUE
    assert stats.ks_2samp(crops[:, 3], width).pvalue > P_VALUE
    assert stats.ks_2samp(crops[:, 2] * crops[:, 3], width * height).pvalue > P_VALUE


def test_ratio_is_width_over_height():
    """crop_ratio is width / height: above 1, crops are wide."""
    view = get_view(blur=1.0, solarize=0.0)
    view.crop_area, view.crop_ratio = (0.1, 0.2), (2.0, 3.0)
    for params in draws(view, *SQUARE, count=100):
        _, _, height, width = params.crop
        assert 1.99 < width / height < 3.01


def test_crop_place_is_uniform(view1):
    """A crop lies at every place where it fits with the same probability, borders included."""
    tops, lefts = [], []
    for params in view1:
        top, left, height, width = params.crop
        if height < 9000 and width < 9000:
            tops.append((top + 0.5) / (10_001 - height))
            lefts.append((left + 0.5) / (10_001 - width))
    assert len(tops) > 3000
    assert follows_uniform(tops, 0, 1)
    assert follows_uniform(lefts, 0, 1)
    assert stats.spearmanr(tops, lefts).pvalue > P_VALUE

    view = get_view(blur=1.0, solarize=0.0)
    view.crop_area, view.crop_ratio = (0.25, 0.25), (1.0, 1.0)
    small = Counter(p.crop[:2] for p in draws(view, 4, 4))
    assert len(small) == 9
    assert stats.chisquare(list(small.values())).pvalue > P_VALUE


@pytest.mark.parametrize('shape', [(1, 1), (1, 50), (50, 1), (2, 3), (7, 1000), (1001, 3)])
def test_crops_stay_inside(shape):
    """Crops have at least a pixel and never leave the picture, whatever its shape."""
    height, width = shape
    for params in draws(get_view(blur=1.0, solarize=0.0), height, width, count=500):
        top, left, h, w = params.crop
        assert 0 <= top < top + h <= height
        assert 0 <= left < left + w <= width
        assert all(type(v) is int for v in params.crop)


def test_probabilities_of_both_views(view1, view2):
    """Flip 0.5, jitter 0.8, gray 0.2 in both; blur 1.0 and 0.1, solarize 0.0 and 0.2."""
    for params in (view1, view2):
        assert has_probability([p.flip for p in params], 0.5)
        assert has_probability([p.order != () for p in params], 0.8)
        assert has_probability([p.gray for p in params], 0.2)
    assert all(p.sigma > 0 for p in view1)
    assert has_probability([p.sigma > 0 for p in view2], 0.1)
    assert all(p.solarize == math.inf for p in view1)
    assert has_probability([p.solarize == 0.5 for p in view2], 0.2)
    assert {p.solarize for p in view2} == {0.5, math.inf}


def test_amounts(view1, view2):
    """Brightness, contrast, saturation, hue and sigma are uniform over the paper's ranges."""
    for params in (view1, view2):
        assert follows_uniform([p.brightness for p in params], -0.4, 0.4)
        assert follows_uniform([p.contrast for p in params], 0.6, 1.4)
        assert follows_uniform([p.saturation for p in params], 0.8, 1.2)
        assert follows_uniform([p.hue for p in params], -0.1, 0.1)
        assert follows_uniform([p.sigma for p in params if p.sigma], 0.1, 2.0)


def test_all_orders_are_equally_likely(view1, view2):
    """Each of the 24 orders of the jitters has the same probability."""
    for params in (view1, view2):
        counts = Counter(p.order for p in params if p.order)
        assert set(counts) == set(itertools.permutations(JITTERS))
        assert stats.chisquare(list(counts.values())).pvalue > P_VALUE


def test_choices_are_independent(view1, view2):
    """The choices of a view are independent of each other and of the example's other view."""

    def table(params):
        return np.array(
            [
                (p.flip, bool(p.order), p.brightness, p.contrast, p.saturation, p.hue, p.gray)
                for p in params
            ],
            np.float64,
        )

    both = np.concatenate([table(view1), table(view2)], axis=1)
    correlation = np.corrcoef(both, rowvar=False) - np.eye(both.shape[1])
    # 91 pairs; a correlation of unrelated columns has a standard deviation of 1 / sqrt(5000).
    assert np.abs(correlation).max() < 4.5 / math.sqrt(DRAWS)


# The view of evaluation.


def test_center_view_is_the_centre_square():
    """A 256 pixel picture at 0.875 gives its own middle 224 pixels, without resampling."""
    image = noise(256, 300)
    np.testing.assert_array_equal(crop.center_view(image, 224, 224 / 256), image[16:240, 38:262])


@pytest.mark.parametrize('shape', [(90, 151), (151, 90), (1, 60)])
def test_center_view_of_any_shape(shape):
    """The centre view is the resized centre square of the shorter side, at least a pixel."""
    image = noise(*shape, low=50, high=205)
    side = max(1, int(min(shape) * 0.875))
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    expected = bicubic(image[top : top + side, left : left + side], 32)
    np.testing.assert_allclose(crop.center_view(image, 32, 0.875), expected, atol=1.125, rtol=0)


def test_center_view_of_all():
    """A crop fraction of 1 keeps all of a square picture."""
    image = noise(32, 32)
    np.testing.assert_array_equal(crop.center_view(image, 32, 1.0), image)
