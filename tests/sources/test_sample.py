"""The embedded sample."""

from __future__ import annotations

import numpy as np
import pytest

from byol_jax.app.data import build_data
from byol_jax.errors import UserError
from byol_jax.sources.sample import SamplePhotographs
from configs import div2k

# The sample and DIV2K.


def test_sample_is_ten_photographs():
    """The embedded sample is ten different colour photographs, each its own class."""
    source = SamplePhotographs()
    assert len(source) == 10
    assert source.labels.tolist() == list(range(10))
    assert len({source.name(i) for i in range(10)}) == 10
    for i in range(10):
        picture = source.load(i, 'image')
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert 300 <= min(picture.shape[:2]) <= max(picture.shape[:2]) <= 1411
        assert picture.std(axis=(0, 1)).min() > 5
        assert source.size(i, 'image') == picture.shape[:2]
        assert not np.array_equal(picture[..., 0], picture[..., 2])


def test_sample_without_its_packages_says_what_to_install(monkeypatch):
    """The message says what to install."""
    monkeypatch.setattr(
        'byol_jax.sources.sample.PHOTOGRAPHS', {'cat': ('skimage.data', 'no_such_cat.png')}
    )
    with pytest.raises(UserError, match=r'no_such_cat.*scikit-image'):
        SamplePhotographs()


def test_tiles_of_the_sample():
    """The sample config cuts tiles from all ten photographs, without overlap of the parts."""
    config = div2k.get_config('sample')
    data = build_data(config)
    for part in data[:2]:
        assert set(part.labels) == set(range(10))
        assert part.load(0, 'image').shape == (64, 64, 3)
    assert not set(data.train.indices) & set(data.held_out.indices)
