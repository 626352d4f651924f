"""Views as lists of operations: draws of each, own operations, boxes, refusals."""

from __future__ import annotations

import re
import sys
import types

import jax
import numpy as np
import pytest
from conftest import ROOT
from drawn import Params, draw_view
from own_operations import Darken, Far, Patch, Turn, Wrong

from byol_jax.errors import UserError
from byol_jax.settings import Settings
from byol_jax.views.colors import Blur, Flip, Gray, Jitter, Solarize
from byol_jax.views.crop import Crop
from byol_jax.views.draws import stream_of
from byol_jax.views.recipes import config_views, crop_and_flip, paper_views
from byol_jax.views.view import View
from configs import default
from configs.default import get_view

PAPER = (Crop(32), Flip(), Jitter(), Gray(0.4), Blur(0.5), Solarize(0.5))
COUNT = 40


def pictures(count: int, height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def draw(view: View, seed: int = 2, number: int = 1):
    return view.draw(seed, number, np.arange(COUNT) % 3, np.arange(COUNT))


def drawn_by(view: View, operation) -> tuple[np.ndarray, np.ndarray]:
    """The draws of the one operation of this class in a view."""
    (place,) = (i for i, op in enumerate(view.operations) if type(op) is type(operation))
    drawn = draw(view)
    return drawn.done[place], drawn.u[place]


@pytest.mark.parametrize('place', range(len(PAPER) + 1))
@pytest.mark.parametrize('own', [Darken(), Turn(), Patch()], ids=lambda op: type(op).__name__)
def test_an_operation_more_changes_no_other_draw(place, own):
    """Wherever an operation is added, every other one keeps its draws, and the added one draws the
    same at any place.
    """
    plain, more = View(PAPER), View([*PAPER[:place], own, *PAPER[place:]])
    for op in PAPER:
        for a, b in zip(drawn_by(plain, op), drawn_by(more, op), strict=True):
            np.testing.assert_array_equal(a, b)
    first = drawn_by(View([own, *PAPER]), own)
    for a, b in zip(first, drawn_by(more, own), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_operation_less_changes_no_other_draw():
    """Neither leaving one out nor another order changes the draws."""
    for kept in (PAPER[::2], PAPER[:1] + PAPER[3:], PAPER[::-1]):
        for op in kept:
            for a, b in zip(drawn_by(View(PAPER), op), drawn_by(View(kept), op), strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_second_one_of_a_name_draws_its_own():
    """The first blur keeps its draws, the second and the third have their own; an operation of
    another name between them changes nothing.
    """
    drawn = draw(View([*PAPER, Blur(), Blur()])).u
    np.testing.assert_array_equal(drawn[4], draw(View(PAPER)).u[4])
    assert len({u.tobytes() for u in (drawn[4], drawn[6], drawn[7])}) == 3
    np.testing.assert_array_equal(draw(View([*PAPER, Darken(), Blur()])).u[7], drawn[6])


def test_streams_are_those_of_names():
    """These very streams: a resumed run must continue with the same views."""
    assert stream_of('augment:Rotate') == 3910126119381405879
    assert stream_of('blur', 1) == stream_of('blur#1') != stream_of('blur')
    assert Darken.name == 'own_operations:Darken'


def test_the_papers_draws_are_what_they_always_were():
    """These very numbers, for the same reason."""
    (first, second) = (
        draw_view(get_view(1.0, 0.0), 375, 500, seed=0, epoch=epoch, example=example, number=1)
        for epoch, example in ((0, 0), (1, 7))
    )
    other = draw_view(get_view(0.1, 0.2), 375, 500, seed=5, epoch=0, example=3, number=2)
    order = ('contrast', 'brightness', 'hue', 'saturation')
    jitter = (0.050605553781081336, 1.061941544930602, 0.8938335945999364, -0.008166904613212761)
    assert first == Params((98, 155, 246, 209), False, order, *jitter, sigma=0.2626963944726204)
    jitter = (-0.10342338642103882, 1.035757256078613, 0.8795251603462932, -0.09106385156723638)
    assert second == Params((0, 41, 375, 424), True, order, *jitter, sigma=0.48804070860976834)
    order = ('brightness', 'saturation', 'hue', 'contrast')
    jitter = (-0.03309224771239183, 0.9469734315590853, 1.1417710982526261, 0.05043386735246097)
    assert other == Params((3, 59, 328, 333), True, order, *jitter)


def test_operations_of_ones_own():
    """An operation gets what it asks for, and is applied with its probability and draws in place:
    after the paper's, before the crop, on grey, in uint8.
    """
    images = pictures(COUNT)
    view = View([Turn(), *PAPER, Darken(probability=0.3), Patch()])
    drawn = draw(view)
    assert 5 < drawn.done[7].sum() < 20
    factors = Darken().parameters(drawn.u[7], None, None)['factor']
    corners = Patch().parameters(drawn.u[8], np.full(COUNT, 32), np.full(COUNT, 32))
    plain = View([Turn(), *PAPER])
    rows = zip(images, view.steps(drawn), plain.steps(draw(plain)), strict=True)
    for i, (image, steps, without) in enumerate(rows):
        y, x = corners[i]
        made, expected = view.make(image, steps), plain.make(image, without).astype(float)
        if drawn.done[7][i]:
            expected *= factors[i]
        expected[y : y + 4, x : x + 4] = 128
        assert made.flags.c_contiguous
        # Rounded once before it, and once more after it.
        np.testing.assert_allclose(made, expected, atol=1.01)


def test_own_operations_in_jax_are_those_of_the_cpu():
    """Views with own operations agree within 1 of 255, at any place."""
    images = pictures(COUNT)
    view = View([Patch(), Flip(), PAPER[0], Darken(), *PAPER[1:], Patch()])
    drawn = draw(view)
    given = view.for_device_whole(drawn, 40, 50)
    made, boxes = jax.jit(view.make_jax)(images, given, view.resizing.tables(50))
    for image, steps, result, box in zip(images, view.steps(drawn), made, boxes, strict=True):
        _, expected = view.cut(image, steps)
        np.testing.assert_allclose(box, expected, rtol=1e-6)
        apart = np.abs(view.make(image, steps).astype(int) - np.asarray(result))
        assert apart.max() <= 1


def test_what_operations_return_is_clipped_and_checked():
    """Floats outside [0, 1] are clipped; other results are refused with the operation's name."""
    image = pictures(1, 32, 32)[0]

    def made(own) -> np.ndarray:
        view = View([Crop(32, area=(1, 1), ratio=(1, 1)), own])
        (steps,) = view.steps(view.draw(0, 1, np.array([0]), np.array([0])))
        return view.make(image, steps)

    expected = np.clip(2 * (image[:, ::-1] / 255) - 0.5, 0, 1) * 255
    np.testing.assert_allclose(made(Far()), expected, atol=0.51)
    with pytest.raises(UserError, match=r"'own_operations:Wrong' made float32 \[3, 32, 32\]"):
        made(Wrong())


def test_boxes_and_mirrors():
    """A mirror before the crop moves its box, one after it does not; two cancel; a rotation leaves
    no box, unless it is never applied.
    """
    place = np.arange(40 * 50).reshape(40, 50)
    image = np.stack([place // 256, place % 256, 0 * place], axis=-1).astype(np.uint8)
    for before in (0, 1):
        view = View([Flip(before), Crop(10, area=(0.1, 0.5)), Flip(1.0)])
        drawn = draw(view)
        assert view.has_box
        assert np.all(view.mirrored(drawn) == (not before))
        for steps in view.steps(drawn):
            cut, (top, left, high, wide) = view.cut(image, steps)
            y, x, h, w = (round(v) for v in (top * 40, left * 50, high * 40, wide * 50))
            shown = image[y : y + h, x : x + w]
            shown = shown[:, ::-1] if before else shown
            alone = View([Crop(10)]).resizing.apply(shown, (0, 0, h, w))
            np.testing.assert_array_equal(cut, alone)
    assert not View([Crop(8), Turn()]).has_box
    assert View([Crop(8), Rarely(), Flip()]).has_box


class Rarely(Turn):
    """A rotation that is never applied."""

    probability = 0.0


def test_one_crop():
    """A view has exactly one operation that resizes, and valid probabilities."""
    for operations in ([Flip()], [Crop(), Crop()]):
        with pytest.raises(UserError, match=r"must hold one 'crop'"):
            View(operations)
    with pytest.raises(UserError, match=r"'flip' has probability=1.5"):
        View([Crop(), Flip(1.5)])


def config_of(*operations, on: str = 'cpu'):
    config = default.get_config()
    config.views.view1.operations = operations
    config.views.on = on
    return Settings.of(config)


def test_operations_of_a_config():
    """Built-in names take their settings from the flat keys, and arguments beside a name override
    them; other names are 'package.module:Class' with arguments. The defaults are the paper's.
    """
    own = ('own_operations:Darken', {'least': 0.5})
    config = default.get_config()
    config.views.view1.operations = ('crop', own, ('blur', {'sigma': (1.0, 3.0)}), 'flip')
    config.views.view1.flip = 0.25
    view1 = config_views(Settings.of(config).views, ('image', 'other'))['view1']
    assert view1.operations == (Crop(224), Darken(least=0.5), Blur(1.0, (1.0, 3.0)), Flip(0.25))
    plain = default.get_config()
    assert config_views(Settings.of(plain).views, ('a', 'b')) == paper_views(
        224, pictures=('a', 'b')
    )
    listed = [*config.views.view1.operations[:1], ['flip', {'probability': 1.0}]]
    config.views.view1.operations = listed
    assert config_views(Settings.of(config).views, ('a', 'b'))['view1'].operations[1] == Flip(1.0)


def test_no_jax_version_is_refused_at_once():
    """With views.on='accelerator', an operation without apply_jax is refused in one line, unless it
    is never applied or comes before the crop, on the CPU.
    """
    with pytest.raises(UserError, match=r"'own_operations:Turn' has no apply_jax\. Write one") as e:
        config_views(config_of('crop', 'own_operations:Turn', on='accelerator').views, ('a', 'a'))
    assert '\n' not in str(e.value)
    before = config_of('own_operations:Turn', 'crop', on='accelerator')
    view = config_views(before.views, ('a', 'a'))['view1']
    with pytest.raises(UserError, match='apply_jax'):
        view.check_jax(whole=True)
    never = ('own_operations:Darken', {'probability': 0.0})
    config_views(config_of('crop', never, on='accelerator').views, ('a', 'a'))


def test_crop_and_flip_draw_as_in_the_view():
    """The linear protocol's crop and flip have the draws of the view itself."""
    view = paper_views(32)['view1']
    plain = crop_and_flip(view)
    assert [op.name for op in plain.operations] == ['crop', 'flip']
    for a, b in zip(draw(plain).u, draw(view).u, strict=False):
        np.testing.assert_array_equal(a, b)


def test_the_operation_of_the_docs():
    """The rotation in docs/views.md runs as it is written there."""
    text = (ROOT / 'docs' / 'views.md').read_text()
    (code,) = [
        block for block in re.findall(r'```python\n(.*?)```', text, re.S) if 'Rotate' in block
    ]
    module = types.ModuleType('my_views')
    sys.modules['my_views'] = module
    exec(code, module.__dict__)
    view = View([Crop(32), module.Rotate(probability=1.0), Flip()])
    assert module.Rotate.name == 'my_views:Rotate'
    assert not view.has_box
    (steps, *_) = view.steps(draw(view))
    image = pictures(1)[0]
    cut = view.cut(image, steps)[0]
    assert steps.after[0][0] == module.Rotate(probability=1.0)
    turned = module.Rotate().apply(cut, steps.after[0][1])
    turned = turned[:, ::-1] if len(steps.after) == 2 else turned
    np.testing.assert_array_equal(view.make(image, steps), turned)
