"""Data is known by names, sizes and sampled contents, wherever it lies and however spelled."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from encoders import write_pictures

from byol_jax.app import fingerprint as module
from byol_jax.app.data import build_data
from byol_jax.app.fingerprint import Excuses, check_same_data, fingerprint
from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.base import Source, Subset
from byol_jax.sources.data import Data
from byol_jax.sources.folder import Files
from configs import default


def data_of(path, **data):
    config = default.get_config()
    config.data.update({'path': str(path), 'index': ''} | data)
    return build_data(config)


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_pictures(tmp_path / 'photos', {'a': 5, 'b': 4}, 0)


def test_the_same_data_elsewhere(pictures, tmp_path, monkeypatch):
    """A slash more, a relative path, a link and a copy are the same data."""
    first = fingerprint(data_of(pictures))
    assert set(first) == {'examples', 'held_out', 'names_sha256', 'sizes', 'contents'}
    (tmp_path / 'link').symlink_to(pictures)
    shutil.copytree(pictures, tmp_path / 'copy')
    monkeypatch.chdir(tmp_path)
    for path in (f'{pictures}/', 'photos', './photos', tmp_path / 'link', tmp_path / 'copy'):
        now = fingerprint(data_of(path))
        assert now == first
        assert check_same_data(first, now) == []


def test_other_pictures_under_the_same_names(pictures, tmp_path):
    """Sizes tell them; of the same size, bytes do; what an older version noted, does not."""
    first = fingerprint(data_of(pictures))
    other = write_pictures(tmp_path / 'other', {'a': 5, 'b': 4}, 1)
    with pytest.raises(UserError, match=r'names are the same, but (all|\d of) 9 files have other'):
        check_same_data(first, fingerprint(data_of(other)))
    old = {key: first[key] for key in ('examples', 'held_out', 'names_sha256')}
    assert check_same_data(old, fingerprint(data_of(other))) == []
    path = pictures / 'a' / '02.png'
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match='1 of 9 files looked at have another content'):
        check_same_data(first, fingerprint(data_of(pictures)))
    path.rename(path.with_name('x.png'))
    with pytest.raises(UserError, match='or other names'):
        check_same_data(first, fingerprint(data_of(pictures)))


@pytest.mark.parametrize('groups', [1024, 3])
def test_files_that_are_bad_may_change(pictures, tmp_path, monkeypatch, groups):
    """A listed file may be mended, a lost one be empty, one be cut off; a sound one may not
    change."""
    monkeypatch.setattr(module, '_GROUPS', groups)
    listed = tmp_path / 'bad_files.txt'
    path = pictures / 'a' / '02.png'
    sound = path.read_bytes()

    def check(then):
        data = data_of(pictures)
        return check_same_data(then, fingerprint(data), Excuses(data, (), listed))

    whole = fingerprint(data_of(pictures))
    path.write_bytes(sound[: len(sound) // 2])
    cut = fingerprint(data_of(pictures))
    assert check(whole) == ['1 file(s) that were bad then, or are now, have changed']
    path.write_bytes(b'')
    assert len(check(whole)) == 1
    path.write_bytes(sound)
    with pytest.raises(UserError, match='not what this run began with'):
        check(cut)
    listed.write_text(f'{path}\tis truncated\n')
    assert len(check(cut)) == 1


def test_large_folders_are_looked_at_in_part(pictures, monkeypatch):
    """No more sizes and contents than the limits say, evenly spaced, and grouped."""
    monkeypatch.setattr(module, '_MOST_SIZES', 5)
    monkeypatch.setattr(module, '_GROUPS', 2)
    monkeypatch.setattr(module, '_READ', 3)
    stated = []

    def stat(path, **how):
        stated.append(path)
        return os_stat(path, **how)

    monkeypatch.setattr(module.os, 'stat', stat)
    found = fingerprint(data_of(pictures))
    assert len(found['sizes'].split()) == 2
    assert len(found['contents'].split()) == 3
    assert len([path for path in stated if str(path).endswith('.png')]) == 5


os_stat = os.stat


def test_tiles_and_caches_are_of_the_same_files(pictures, tmp_path):
    """Sizes and contents are those of the files, whatever is made of them."""
    plain = fingerprint(data_of(pictures))
    tiled = fingerprint(data_of(pictures, tile_size=10, cache=str(tmp_path / 'cache')))
    assert (tiled['sizes'], tiled['contents']) == (plain['sizes'], plain['contents'])
    assert tiled['names_sha256'] != plain['names_sha256']


class Made(Source):
    """Pictures of one colour each, of no file."""

    def __init__(self, shift=0.0, bad=()):
        self.shift, self.bad = shift, bad

    def __len__(self):
        return 6

    def load(self, index, key):
        if index in self.bad:
            raise BadPicture(self.name(index), 'is bad')
        return np.full((4, 5, 3), 20 * index + self.shift, np.uint8)

    def name(self, index):
        return f'#{index}'


def made(**kwargs):
    source = Made(**kwargs)
    return Data(source, Subset(source, np.arange(0)))


def test_pictures_without_files():
    """They are known by their pixels: rounding of a decoder is no difference, colours are."""
    first = fingerprint(made())
    assert 'sizes' not in first
    assert check_same_data(first, fingerprint(made(shift=1))) == []
    assert check_same_data(first, fingerprint(made(bad=(2,)))) == []
    with pytest.raises(UserError, match='all 6 files looked at'):
        check_same_data(first, fingerprint(made(shift=9)))


def test_a_list_of_files_may_be_moved(pictures, tmp_path):
    """Their names are paths; the folder in which all of them lie may be another."""

    def of(folder):
        source = Files(sorted(folder.rglob('*.png')))
        return fingerprint(Data(source, Subset(source, np.arange(0)), opened=source))

    first = of(pictures)
    shutil.copytree(pictures, tmp_path / 'copy')
    now = of(tmp_path / 'copy')
    assert now['names_sha256'] != first['names_sha256']
    assert check_same_data(first, now) == []
    (tmp_path / 'copy' / 'a' / '00.png').rename(tmp_path / 'copy' / 'a' / '0.png')
    with pytest.raises(UserError, match='or other names'):
        check_same_data(first, of(tmp_path / 'copy'))
