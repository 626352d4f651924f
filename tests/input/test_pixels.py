"""Pixels that can teach nothing are found before training, with their likely cause."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from streams import stream_of

from byol_jax.input.pixels import Finding, look
from byol_jax.sources.array import Array
from byol_jax.sources.folder import Folder
from configs import default, div2k

SIDE = 16


def config_with(**changes):
    config = default.get_config()
    config.views.image_size = 8
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def found(source, **changes) -> dict[str, Finding]:
    return {each.name: each for each in look(stream_of(source, config_with(**changes)))}


def noise(count=8, largest=255, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, largest + 1, (count, SIDE, SIDE, channels), np.uint16)


def write(folder, pictures, mode=None):
    for number, picture in enumerate(pictures):
        Image.fromarray(picture, mode).save(folder / f'{number}.png')
    return Folder(folder)


def array(pictures):
    return Array.of(pictures.astype(np.uint8))


def test_sound_pictures_have_nothing_odd(tmp_path):
    assert found(array(noise())) == {}
    assert found(write(tmp_path, noise().astype(np.uint8))) == {}
    # A scene at night, among brighter ones.
    assert found(array(np.concatenate([noise(7, 10), noise(1)]))) == {}


@pytest.mark.parametrize(('bits', 'times'), [(12, 16), (10, 64), (14, 4)])
def test_few_bits_in_files_of_16(tmp_path, bits, times):
    """12-bit values in 16-bit files reach 16 of 255; the cause is told from the file."""
    source = write(tmp_path, noise(8, 2**bits - 1)[..., 0].astype(np.uint16))
    (only,) = found(source).values()
    assert only.name == 'dark_pictures'
    assert only.severe == (bits < 14)
    largest = round((2**bits - 1) / 257)
    assert f'the largest value in the first 8 pictures is {largest} of 255 (' in only.evidence
    assert only.cause == f'the files have 16 bits a channel and hold values of about {bits} bits'
    assert f'(times {times})' in only.remedy
    # All 16 bits are nothing odd.
    (tmp_path / 'whole').mkdir()
    assert found(write(tmp_path / 'whole', noise(8, 65535)[..., 0].astype(np.uint16))) == {}


def test_alpha_that_is_data(tmp_path):
    """RGBA files with small values in alpha come out nearly black: alpha is laid over black."""
    pictures = noise(8, 255, 4).astype(np.uint8)
    pictures[..., 3] = 3
    (only,) = found(write(tmp_path, pictures)).values()
    assert (only.name, only.severe) == ('dark_pictures', True)
    assert only.cause.startswith('the alpha channel is not transparency but data, 3 of 255')
    assert 'without alpha' in only.remedy
    # An opaque alpha is no finding.
    pictures[..., 3] = 255
    assert found(write(tmp_path, pictures)) == {}


def test_black_pictures(tmp_path):
    """All black: severe. Half of them: not, but said. A few of many: nothing."""
    black = np.zeros((8, SIDE, SIDE, 3), np.uint16)
    (only,) = found(array(black)).values()
    assert (only.name, only.severe) == ('black_pictures', True)
    assert only.evidence.startswith('8 of the first 8 pictures are black (')
    half = np.concatenate([black, noise(8)])
    assert found(array(half))['black_pictures'].severe is False
    assert found(array(np.concatenate([black[:3], noise(8)]))) == {}
    alpha = np.zeros((4, SIDE, SIDE, 4), np.uint8)
    alpha[..., 3] = noise(4, 100)[..., 0]
    (only,) = found(write(tmp_path, alpha)).values()
    assert only.cause.startswith('the alpha channel is not transparency but data')


def test_values_that_were_cut_to_whole_numbers(tmp_path):
    """Floats in [0, 1] stored as uint8, and label maps."""
    (only,) = found(array(noise(8, 1))).values()
    assert only.name == 'black_pictures'
    assert 'values in [0, 1] that were stored as whole numbers' in only.cause
    (only,) = found(write(tmp_path, noise(8, 20)[..., 0].astype(np.uint8))).values()
    assert (only.name, only.severe) == ('dark_pictures', True)
    assert only.cause.startswith('label maps or masks')


def test_pictures_of_one_colour_and_copies():
    """Each its own colour; and one photograph under many names."""
    colours = np.broadcast_to(noise(8)[:, :1, :1], (8, SIDE, SIDE, 3)).copy()
    colours[..., 0] = 200
    assert found(array(colours))['flat_pictures'].severe
    copies = np.broadcast_to(noise(1), (8, SIDE, SIDE, 3)).copy()
    (only,) = found(array(copies)).values()
    assert (only.name, only.severe) == ('same_pictures', True)
    # One picture alone is no set of copies.
    assert found(array(copies[:1])) == {}


NOTHING = {
    f'views__{view}__{key}': value
    for view in ('view1', 'view2')
    for key, value in {
        'crop_area': (1.0, 1.0),
        'crop_ratio': (1.0, 1.0),
        **dict.fromkeys(('flip', 'jitter', 'gray', 'blur', 'solarize'), 0.0),
    }.items()
}


def test_views_that_are_the_same():
    """Without a crop and with all probabilities at 0 both views are the picture."""
    (only,) = found(array(noise()), **NOTHING).values()
    assert (only.name, only.severe) == ('same_views', True)
    assert 'of 8 of the first 8 pictures the views are the same' in only.evidence
    assert found(array(noise()), **{**NOTHING, 'views__view2__jitter': 1.0}) == {}


def test_views_of_one_colour():
    """Crops of next to nothing of a smooth picture show one colour."""
    ramp = np.linspace(0, 255, 1000).astype(np.uint8)
    smooth = np.broadcast_to(ramp[:, None, None], (1000, 1000, 3))
    pictures = np.stack([np.roll(smooth, shift, 0) for shift in range(4)])
    tiny = {'views__view1__crop_area': (1e-5, 1e-5), 'views__view2__crop_area': (1e-5, 1e-5)}
    plain = {key: value for key, value in NOTHING.items() if 'crop' not in key}
    assert found(array(pictures), **plain, **tiny)['flat_views'].severe
    assert found(array(pictures), **plain) == {}


def test_the_sample_has_nothing_odd():
    """Nor have its tiles."""
    from byol_jax.app.data import build_data

    config = div2k.get_config('sample')
    assert look(stream_of(build_data(config).train, config)) == []
