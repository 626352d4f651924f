"""Views made in JAX equal the CPU's: same draws, crops bit for bit, values to 1/255."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from drawn import Params, make_view, view_of

from byol_jax.errors import UserError
from byol_jax.input.stream import Stream
from byol_jax.sources.base import Source
from byol_jax.views import crop as crops_module
from byol_jax.views.colors import JITTERS, ORDERS, Blur, Flip, Gray, Jitter, Jittered, Solarize
from byol_jax.views.crop import Crop, crop_resize, crop_resize_jax, resize_tables
from byol_jax.views.draws import uniforms
from byol_jax.views.recipes import paper_views
from byol_jax.views.view import View
from configs import default

# (height, width) of pictures and the side of the views: shrinking, growing, flat, tall, one pixel.
SHAPES = ((32, 32, 32), (48, 37, 16), (20, 90, 24), (200, 60, 24), (1, 1, 8), (40, 40, 40))


def busy_view(blur: float = 0.7, solarize: float = 0.5):
    """A view that applies every operation often."""
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


def drawn(view, count: int):
    return view.draw(5, 1, np.arange(count) % 3, np.arange(count))


def boxes(count: int, height: int, width: int) -> np.ndarray:
    """Random crops: int32 [count, 4]."""
    view = view_of(busy_view())
    sides = np.full(count, height), np.full(count, width)
    return view.resizing.parameters(drawn(view, count).u[0], *sides)


def on_device(view, images, drawn) -> np.ndarray:
    """The views and their boxes, all made on the device."""
    height, width = images.shape[1:3]
    given = view.for_device_whole(drawn, height, width)
    made, shown = jax.jit(view.make_jax)(images, given, view.resizing.tables(max(height, width)))
    pixels = np.asarray(shown) * (height, width, height, width)
    np.testing.assert_allclose(pixels, given['crop'], atol=1e-3)
    return np.asarray(made)


def alone(jitter: str) -> tuple[str, ...]:
    """An order of all four jitters; those with neutral amounts change nothing."""
    return next(order for order in ORDERS if order[0] == jitter)


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(('height', 'width', 'size'), SHAPES)
def test_crops_without_antialiasing_are_opencvs(height, width, size):
    """Crops of any size equal OpenCV's bicubic without antialiasing, up to rounding."""
    images = pictures(6, height, width)
    crops = boxes(6, height, width)
    weights = resize_tables(max(height, width), size, antialias=False)
    made = jax.jit(crop_resize_jax, static_argnames='size')(images, crops, weights, size=size)
    for result, image, crop in zip(np.asarray(made), images, crops, strict=True):
        expected = crop_resize(image, tuple(map(int, crop)), size, antialias=False)
        assert levels_apart(result, expected) <= 1


@pytest.mark.parametrize('number', [1, 2])
def test_batches_draw_what_single_views_draw(number):
    """For any seed, epoch and example, a batch draws what each example draws alone, bit for bit;
    a crop's box is the same for a batch of pictures and for one.
    """
    view = view_of(busy_view())
    rng = np.random.default_rng(number)
    for seed in (0, 1, 2**31 - 1):
        epochs = rng.integers(0, 2**20, 100)
        examples = rng.integers(0, 2**31, 100)
        batch = view.draw(seed, number, epochs, examples)
        steps = view.steps(batch)
        found = view.resizing.parameters(batch.u[0], np.full(100, 37), np.full(100, 61))
        assert found.dtype == np.int32
        for i in range(100):
            alone = view.draw(seed, number, epochs[i : i + 1], examples[i : i + 1])
            assert list(view.steps(alone)) == [steps[i]]
            ((crop, u),) = steps[i].before
            assert crop.parameters_of_one(u, 37, 61) == tuple(found[i])


def test_uniforms_are_numpys_generator():
    """All variates, in float64, are those of NumPy's own Philox generator, in any stream."""
    epochs, examples = np.array([0, 3, 2**33, 5]), np.array([7, 0, 2**40 + 1, 9])
    for stream in (0, 2**63 + 12345):
        batch = uniforms(11, stream, 2, epochs, examples, 15)
        for row, epoch, example in zip(batch, epochs, examples, strict=True):
            key = np.array([11, stream], np.uint64)
            generator = np.random.Philox(key=key, counter=[0, 2, example, epoch])
            np.testing.assert_array_equal(row, np.random.Generator(generator).random(15))


@pytest.mark.parametrize(('height', 'width', 'size'), SHAPES)
def test_crop_and_resize_are_pillows_to_the_bit(height, width, size):
    """The crop equals Pillow's bit for bit, for pictures that shrink, grow, or are flat or tall."""
    images = pictures(60, height, width)
    crops = boxes(len(images), height, width)
    # Beside the drawn crops: the whole picture, one pixel, a row and a column.
    crops[:4] = (
        (0, 0, height, width),
        (height - 1, width - 1, 1, 1),
        (0, 0, 1, width),
        (0, width - 1, height, 1),
    )
    made = np.asarray(
        jax.jit(crop_resize_jax, static_argnames='size')(
            images, crops, resize_tables(max(height, width), size), size=size
        )
    )
    for image, crop, result in zip(images, crops, made, strict=True):
        np.testing.assert_array_equal(result, crop_resize(image, tuple(map(int, crop)), size))


@pytest.mark.parametrize(('height', 'width', 'size'), [SHAPES[1], SHAPES[2]])
def test_views_agree_within_one_of_255(height, width, size):
    """With the same parameters, a view in JAX is everywhere within 1 of 255 of the CPU's."""
    images = pictures(60, height, width)
    view = view_of(busy_view(), size)
    draws = drawn(view, len(images))
    made = on_device(view, images, draws)
    assert made.dtype == np.uint8
    steps = view.steps(draws)
    expected = [view.make(image, own) for image, own in zip(images, steps, strict=True)]
    assert levels_apart(made, np.stack(expected)) <= 1
    # At least something was done.
    cut = [view.cut(image, own)[0] for image, own in zip(images, steps, strict=True)]
    assert (made != np.stack(cut)).any()


def test_extremes_agree():
    """They also agree at the strongest settings, one effect at a time and all together: full
    brightness, no contrast, no saturation, half a turn of hue, the widest blur.
    """
    neutral = Params((0, 0, 40, 40))
    extremes = {
        'brightness': (-1.0, 1.0),
        'contrast': (0.0, 2.0),
        'saturation': (0.0, 2.0),
        'hue': (-0.5, 0.5, 1 / 6, -1 / 3),
    }
    cases = [
        neutral._replace(order=alone(name), **{name: value})
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
    view = View([Crop(40), Flip(), Jitter(), Gray(), Blur(), Solarize(0.5, threshold=0.5)])

    def column(name: str) -> np.ndarray:
        return np.array([getattr(case, name) for case in cases])

    jittered = Jittered(
        np.array([ORDERS.index(case.order) if case.order else 0 for case in cases], np.uint8),
        *(column(name).astype(np.float32) for name in JITTERS),
    )
    given = (
        (column('flip'), ()),
        (np.array([bool(case.order) for case in cases]), jittered),
        (column('gray'), ()),
        (column('sigma') > 0, column('sigma').astype(np.float32)),
        (column('solarize') <= 1, ()),
    )
    made = np.asarray(jax.jit(view.finish_jax)(images, given))
    for case, image, result in zip(cases, images, made, strict=True):
        assert levels_apart(result, make_view(image, case, 40)) <= 1, case


def test_what_cannot_be_drawn_is_left_out():
    """A view without blur, grey, jitter and solarization equals the crop and the flip, bit for bit,
    and no other operation is in its program.
    """
    config = default.get_view(blur=0.0, solarize=0.0)
    config.jitter = config.gray = 0.0
    view = view_of(config, 24)
    images = pictures(20, 24, 24)
    draws = drawn(view, 20)
    assert len(view.for_device(draws)) == 1
    program = str(jax.make_jaxpr(view.finish_jax)(images, view.for_device(draws)))
    assert 'f32' not in program
    made = on_device(view, images, draws)
    for result, image, steps in zip(made, images, view.steps(draws), strict=True):
        np.testing.assert_array_equal(result, view.make(image, steps))


def test_parts_are_the_whole(monkeypatch):
    """Working through a batch in parts, to save memory, changes nothing."""
    images = pictures(10, 4, 4)
    monkeypatch.setattr(crops_module, '_VALUES_AT_ONCE', 3 * images[0].size)

    def mirrored(image):
        return image[::-1]

    # Three at a time, which leaves one over.
    made = crops_module.map_in_parts(mirrored, images, images[0].size)
    np.testing.assert_array_equal(made, images[:, ::-1])
    lowered = str(jax.make_jaxpr(lambda x: crops_module.map_in_parts(mirrored, x, 48))(images))
    assert 'length=3' in lowered


def test_pictures_far_larger_than_the_views_are_refused():
    """If sums of weights would not be exact, the error says what to do instead."""
    assert resize_tables(15 * 8, 8).upper.shape[2] <= 64
    with pytest.raises(UserError, match=r'15 times the views \(views.image_size=8\).*views.on'):
        resize_tables(16 * 8, 8)


class Sized(Source):
    """Seven pictures of noise of 20x24 pixels."""

    def __len__(self) -> int:
        return 7

    def load(self, index: int, key: str) -> np.ndarray:
        return pictures(7, 20, 24)[index]

    def name(self, index: int) -> str:
        return str(index)


def test_drawn_batches_follow_the_stream():
    """Batches of positions, over the end of an epoch too, draw what single positions draw."""
    views = paper_views(16)
    stream = Stream(Sized(), views)
    positions = range(4, 20)
    batch = stream.drawn_whole(positions, 20, 24)
    for i, position in enumerate(positions):
        epoch, example = stream.example(position)
        assert batch['example'][i] == example
        for number, (name, view) in enumerate(views.items(), 1):
            alone = view.draw(0, number, np.array([epoch]), np.array([example]))
            expected = view.for_device_whole(alone, 20, 24)
            own = jax.tree.map(lambda x, i=i: x[i : i + 1], batch[f'{name}/drawn'])
            assert jax.tree.all(jax.tree.map(np.array_equal, own, expected))
            assert batch[f'{name}/mirrored'][i] == alone.done[1][0]
