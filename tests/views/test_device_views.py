"""Views made in JAX are those made on the CPU: same draws, crops to the bit, values to 1/255."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from byol_jax.errors import UserError
from byol_jax.input.stream import PairMaker
from byol_jax.sources.base import Source
from byol_jax.views import device_crop
from byol_jax.views.augment import ViewParams, crop_resize, draw_view, make_view
from byol_jax.views.device_crop import resize_weights
from byol_jax.views.device_views import Possible, photometric
from byol_jax.views.draws import (
    JITTERS,
    NO_JITTER,
    Photometric,
    draw_crops,
    draw_photometric,
    uniforms,
)
from configs import default

# (height, width) of pictures and the side of the views: shrinking, growing, flat, tall, one pixel.
SHAPES = ((32, 32, 32), (48, 37, 16), (20, 90, 24), (200, 60, 24), (1, 1, 8), (40, 40, 40))


def busy_view(blur: float = 0.7, solarize: float = 0.5):
    """A view in which everything is drawn often."""
    view = default.get_view(blur=blur, solarize=solarize)
    view.gray = 0.3
    return view


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Noise, black and white checks, and smooth colours: uint8 [count, H, W, 3]."""
    rng = np.random.default_rng([height, width])
    images = rng.integers(0, 256, (count, height, width, 3))
    images[::3] = 255 * (images[::3] > 127)
    slope = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    images[1::3] = slope
    return images.astype(np.uint8)


def drawn(view, count: int, height: int, width: int):
    u = uniforms(5, 1, np.arange(count) % 3, np.arange(count))
    return draw_crops(view, height, width, u), draw_photometric(view, u)


def as_params(crop, colors: Photometric, i: int) -> ViewParams:
    """Row i of drawn arrays as the CPU's parameters."""
    one = Photometric(*(np.asarray(field)[i] for field in colors))
    return ViewParams(
        crop=tuple(map(int, crop)),
        flip=bool(one.flip),
        order=tuple(JITTERS[k] for k in one.order if k != NO_JITTER),
        brightness=float(one.brightness),
        contrast=float(one.contrast),
        saturation=float(one.saturation),
        hue=float(one.hue),
        gray=bool(one.gray),
        sigma=float(one.sigma),
        solarize=float(one.solarize),
    )


def on_device(images, crops, colors, size, possible=None) -> np.ndarray:
    possible = possible or Possible()

    @jax.jit
    def make(images, crops, colors, weights):
        return photometric(device_crop.crop_resize(images, crops, weights, size), colors, possible)

    weights = resize_weights(max(images.shape[1:3]), size)
    return np.asarray(make(images, crops, colors, weights))


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(('height', 'width', 'size'), SHAPES)
def test_crops_without_antialiasing_are_opencvs(height, width, size):
    """Crops of any size are OpenCV's bicubic without antialiasing, but for rounding."""
    images = pictures(6, height, width)
    crops, _ = drawn(busy_view(), 6, height, width)
    weights = resize_weights(max(height, width), size, antialias=False)
    made = jax.jit(device_crop.crop_resize, static_argnames='size')(
        images, crops, weights, size=size
    )
    for result, image, crop in zip(np.asarray(made), images, crops, strict=True):
        expected = crop_resize(image, tuple(map(int, crop)), size, antialias=False)
        assert levels_apart(result, expected) <= 1


@pytest.mark.parametrize('number', [1, 2])
def test_batches_draw_what_single_views_draw(number):
    """Parameters drawn for a batch are `draw_view`'s to the bit, for any seed, epoch and example:
    the crop as whole numbers, the rest as the float32 that the CPU's arithmetic makes of them."""
    view = busy_view()
    rng = np.random.default_rng(number)
    for seed in (0, 1, 2**31 - 1):
        epochs = rng.integers(0, 2**20, 100)
        examples = rng.integers(0, 2**31, 100)
        u = uniforms(seed, number, epochs, examples)
        crops, colors = draw_crops(view, 37, 61, u), draw_photometric(view, u)
        assert crops.dtype == np.int32
        for i in range(100):
            expected = draw_view(
                view,
                37,
                61,
                seed=seed,
                epoch=int(epochs[i]),
                example=int(examples[i]),
                number=number,
            )
            actual = as_params(crops[i], colors, i)
            for name in ViewParams._fields:
                value = getattr(expected, name)
                if isinstance(value, float):
                    value = float(np.float32(value))
                assert getattr(actual, name) == value, name


def test_uniforms_are_numpys_generator():
    """All variates, in float64, are those of NumPy's own Philox generator."""
    counters = np.array([[0, 7], [3, 0], [2**33, 2**40 + 1]])
    for epoch, example in counters:
        generator = np.random.Philox(key=[11, 0], counter=[0, 2, example, epoch])
        np.testing.assert_array_equal(
            uniforms(11, 2, np.array([epoch]), np.array([example]))[0],
            np.random.Generator(generator).random(15),
        )


@pytest.mark.parametrize(('height', 'width', 'size'), SHAPES)
def test_crop_and_resize_are_pillows_to_the_bit(height, width, size):
    """The crop is Pillow's to the bit, for pictures that shrink, grow, or are flat or tall."""
    images = pictures(60, height, width)
    crops, _ = drawn(busy_view(), len(images), height, width)
    # Besides those drawn: all of it, one pixel, a line and a column.
    crops[:4] = (
        (0, 0, height, width),
        (height - 1, width - 1, 1, 1),
        (0, 0, 1, width),
        (0, width - 1, height, 1),
    )
    made = np.asarray(
        jax.jit(device_crop.crop_resize, static_argnames='size')(
            images, crops, resize_weights(max(height, width), size), size=size
        )
    )
    for image, crop, result in zip(images, crops, made, strict=True):
        np.testing.assert_array_equal(result, crop_resize(image, tuple(map(int, crop)), size))


@pytest.mark.parametrize(('height', 'width', 'size'), [SHAPES[1], SHAPES[2]])
def test_views_agree_within_one_of_255(height, width, size):
    """For the same parameters a view made in JAX is the CPU's, at most 1 of 255 apart anywhere."""
    images = pictures(60, height, width)
    crops, colors = drawn(busy_view(), len(images), height, width)
    made = on_device(images, crops, colors, size)
    assert made.dtype == np.uint8
    expected = [
        make_view(image, as_params(crops[i], colors, i), size) for i, image in enumerate(images)
    ]
    assert levels_apart(made, np.stack(expected)) <= 1
    # Something was done at all.
    assert (
        made
        != np.stack(
            [crop_resize(x, tuple(map(int, c)), size) for x, c in zip(images, crops, strict=True)]
        )
    ).any()


def test_extremes_agree():
    """So they do where everything is as strong as a config allows, one effect at a time and all
    together: full brightness, no contrast, no saturation, half a turn of hue, the widest blur."""
    view = default.get_view(blur=1.0, solarize=1.0)
    neutral = ViewParams((0, 0, 40, 40))
    extremes = {
        'brightness': (-1.0, 1.0),
        'contrast': (0.0, 2.0),
        'saturation': (0.0, 2.0),
        'hue': (-0.5, 0.5, 1 / 6, -1 / 3),
    }
    cases = [
        neutral._replace(order=(name,), **{name: value})
        for name, values in extremes.items()
        for value in values
    ]
    cases += [neutral._replace(sigma=sigma) for sigma in (0.01, 0.1, 2.0, 50.0)]
    cases += [neutral._replace(solarize=0.5), neutral._replace(gray=True), neutral]
    cases += [
        neutral._replace(
            flip=True,
            order=('hue', 'contrast', 'saturation', 'brightness'),
            contrast=2.0,
            saturation=2.0,
            hue=0.5,
            brightness=-0.3,
            sigma=1.5,
            solarize=0.5,
        )
    ]
    images = pictures(len(cases), 40, 40)
    colors = Photometric(
        **{name: np.array([getattr(case, name) for case in cases]) for name in ('flip', 'gray')},
        **{
            name: np.array([getattr(case, name) for case in cases], np.float32)
            for name in (*JITTERS, 'sigma', 'solarize')
        },
        order=np.array(
            [
                [JITTERS.index(n) for n in case.order] + [NO_JITTER] * (4 - len(case.order))
                for case in cases
            ],
            np.uint8,
        ),
    )
    crops = np.array([case.crop for case in cases], np.int32)
    made = on_device(images, crops, colors, 40, Possible.of(view))
    for case, image, result in zip(cases, images, made, strict=True):
        assert levels_apart(result, make_view(image, case, 40)) <= 1, case


def test_what_cannot_be_drawn_is_left_out():
    """A view without blur, grey, jitter and solarization is the crop and the flip, to the bit."""
    view = default.get_view(blur=0.0, solarize=0.0)
    view.jitter = view.gray = 0.0
    possible = Possible.of(view)
    assert possible == Possible(False, False, False, False)
    images = pictures(20, 24, 24)
    crops, colors = drawn(view, 20, 24, 24)
    made = on_device(images, crops, colors, 24, possible)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(made[i], make_view(image, as_params(crops[i], colors, i), 24))


def test_parts_are_the_whole(monkeypatch):
    """Working through a batch in parts, to save memory, changes nothing."""
    images = pictures(10, 4, 4)
    monkeypatch.setattr(device_crop, '_VALUES_AT_ONCE', 3 * images[0].size)

    def mirrored(image):
        return image[::-1]

    # Three at a time, which leaves one over.
    made = device_crop.map_in_parts(mirrored, images, images[0].size)
    np.testing.assert_array_equal(made, images[:, ::-1])
    lowered = str(jax.make_jaxpr(lambda x: device_crop.map_in_parts(mirrored, x, 48))(images))
    assert 'length=3' in lowered


def test_pictures_far_larger_than_the_views_are_refused():
    """Where sums of weights would not be exact, the user is told what to do instead."""
    assert resize_weights(15 * 8, 8).upper.shape[2] <= 64
    with pytest.raises(UserError, match=r'15 times the views \(views.image_size=8\).*views.on'):
        resize_weights(16 * 8, 8)


class Sized(Source):
    """Seven pictures of noise of 20x24 pixels."""

    def __len__(self) -> int:
        return 7

    def load(self, index: int, key: str) -> np.ndarray:
        return pictures(7, 20, 24)[index]

    def name(self, index: int) -> str:
        return str(index)


def test_drawn_batches_follow_the_stream():
    """What is drawn for positions, over the end of an epoch too, is what single positions draw."""
    config = default.get_config()
    config.views.image_size = 16
    maker = PairMaker(Sized(), config.lock())
    positions = range(4, 20)
    batch = maker.drawn(positions, 20, 24)
    for i, position in enumerate(positions):
        epoch, example = maker.example(position)
        assert batch['example'][i] == example
        for number, view in ((1, config.views.view1), (2, config.views.view2)):
            params = draw_view(view, 20, 24, seed=0, epoch=epoch, example=example, number=number)
            actual = as_params(batch[f'crop{number}'][i], batch[f'colors{number}'], i)
            assert (actual.crop, actual.order, actual.flip) == (
                params.crop,
                params.order,
                params.flip,
            )
