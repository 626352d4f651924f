"""Subsets of sources, sources kept in memory, and a user's own source."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from pictures import (
    Coordinates,
    encode,
    smooth,
)

from byol_jax.app.data import build_data
from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.base import Cached, Subset
from configs import default


def test_subset():
    """A subset renumbers pictures, names, sizes and labels in the same way."""
    source = Coordinates([(10, 12), (14, 16), (18, 20)])
    source.labels, source.label_names = np.array([7, 8, 9]), tuple('abcdefghij')
    subset = Subset(source, np.array([2, 0]))
    assert len(subset) == 2
    assert subset.keys == ('hr', 'lr')
    assert subset.labels.tolist() == [9, 7]
    assert subset.label_names == source.label_names
    assert subset.name(0) == '0002.png'
    assert subset.size(0, 'lr') == (9, 10)
    np.testing.assert_array_equal(subset.load(1, 'hr'), source.load(0, 'hr'))
    assert Subset(Coordinates([(4, 4)]), np.array([0])).labels is None


def test_cached_gives_the_same_pictures_and_loads_them_once():
    """Pictures that fit in the cache are loaded once and returned unchanged."""
    source = Coordinates([(10, 12), (14, 16)])
    cached = Cached(source, 10**6)
    for _ in range(3):
        for i in range(2):
            for key in source.keys:
                np.testing.assert_array_equal(
                    cached.load(i, key), Coordinates(source.shapes).load(i, key)
                )
    assert source.loads == {(i, key): 1 for i in range(2) for key in source.keys}
    assert (len(cached), cached.name(1), cached.keys) == (2, '0001.png', source.keys)


def test_cached_keeps_the_labels():
    """A cached source has the labels of the source it caches."""
    source = Coordinates([(10, 12), (14, 16)])
    source.labels, source.label_names = np.array([1, 0]), ('ant', 'cat')
    cached = Cached(source, 10**6)
    assert cached.labels is not None
    assert cached.labels.tolist() == [1, 0]
    assert cached.labels_of(np.array([1])).tolist() == [0]
    assert cached.label_names == ('ant', 'cat')


def test_cached_drops_what_was_used_longest_ago():
    """With room for two pictures, a third replaces the least recently used one."""
    source = Coordinates([(10, 10)] * 3)
    cached = Cached(source, 2 * 300)
    for i in (0, 1, 0, 2, 0, 2):
        cached.load(i, 'hr')
    assert source.loads == {(0, 'hr'): 1, (1, 'hr'): 1, (2, 'hr'): 1}
    cached.load(1, 'hr')
    assert source.loads[1, 'hr'] == 2


@pytest.mark.parametrize('max_bytes', [0, 299, 300, 1000])
def test_cached_holds_no_more_than_its_bytes(max_bytes):
    """The kept pictures never exceed max_bytes, with many threads too."""
    alive = weakref.WeakSet()

    class Picture(np.ndarray):
        __hash__ = object.__hash__

    class Watched(Coordinates):
        def load(self, index, key):
            picture = super().load(index, key).view(Picture)
            alive.add(picture)
            return picture

    cached = Cached(Watched([(10, 10)] * 20), max_bytes)
    expected = [Coordinates([(10, 10)] * 20).load(i, 'hr') for i in range(20)]
    wrong = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 20, 300):
            if not np.array_equal(cached.load(int(i), 'hr'), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong
    kept = sum(picture.nbytes for picture in alive)
    assert kept <= max_bytes
    assert kept == max_bytes // 300 * 300


# A user's own source.


@pytest.fixture
def own_source(tmp_path, monkeypatch):
    """The config of the source in docs/data.md, with twelve pictures, one of them damaged."""
    page = (ROOT / 'docs' / 'data.md').read_text()
    section = page.split('## A source of your own')[1].split('\n## ')[0]
    (tmp_path / 'mine.py').write_text(section.split('```python\n')[1].split('```')[0])
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / 'pictures.db'
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute('CREATE TABLE pictures (name TEXT, data BLOB)')
        for i in range(12):
            data = b'' if i == 5 else encode(smooth(40 + i, 50), 'PNG')
            database.execute('INSERT INTO pictures VALUES (?, ?)', [f'picture {i}', data])
    config = default.get_config()
    config.data.source, config.data.path = 'mine:Pictures', str(path)
    config.data.pair_keys = ('image', 'image')
    yield config
    sys.modules.pop('mine', None)


def test_the_source_of_the_documentation_works(own_source):
    """Three methods are enough for pictures, names, sizes, a held-out part and bad pictures."""
    own_source.data.held_out_fraction = 0.25
    data = build_data(own_source)
    assert (len(data.train), len(data.held_out)) == (9, 3)
    source = data.everything
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda i: source.load(i, 'image'), [0, 1, 2, 3, 4, 6] * 10))
    np.testing.assert_array_equal(pictures[1], smooth(41, 50))
    assert list(source.names(np.array([0, 11]))) == ['picture 0', 'picture 11']
    assert source.size(3, 'image') == (43, 50)
    assert source.labels is None
    with pytest.raises(BadPicture, match='picture 5 is empty'):
        source.load(5, 'image')


def test_a_source_of_ones_own_is_cut_into_tiles(own_source):
    """Tiles need no other method; a bad picture is left out and named."""
    own_source.data.tile_size = 16
    data = build_data(own_source)
    assert [bad.file for bad in data.bad] == ['picture 5']
    assert data.train.load(0, 'image').shape == (16, 16, 3)


def test_what_a_source_of_ones_own_lacks_is_said(own_source, tmp_path):
    """A cache on disk must know when a picture has changed, so `stamp` is missing."""
    own_source.data.cache = str(tmp_path / 'cache')
    with pytest.raises(UserError, match=r'data\.cache=\S+ .*this one has none'):
        build_data(own_source)
