"""Embeddings on disk: .npz and .parquet, complete or absent."""

from __future__ import annotations

import errno
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from byol_jax.app import embeddings
from byol_jax.app.embeddings import Embeddings, check_embeddings_path, write_embeddings
from byol_jax.errors import UserError

N, D = 11, 6
SUFFIXES = ('.npz', '.parquet')
# A digest as long as a real one.
SHA256 = '0123456789abcdef' * 4
NAMES = [f'cats/{i:03} né.jpg' for i in range(N)]
LABELS = np.arange(N) % 3
LABEL_NAMES = ('cat', 'dog', 'bird')


def make_features():
    features = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    features[0, :3] = np.nan, np.inf, -0.0
    return features


def write(path, **changed):
    """Writes the embeddings above, with some arguments changed, and returns the features."""
    given = {
        'features': make_features(),
        'names': NAMES,
        'labels': LABELS,
        'label_names': LABEL_NAMES,
        'encoder_sha256': SHA256,
    } | changed
    write_embeddings(path, Embeddings(**given))
    return given['features']


def read_parquet(path):
    parquet = pytest.importorskip('pyarrow.parquet')
    return parquet.read_table(path)


def same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_npz(tmp_path):
    """A .npz returns everything bit for bit without pickle, with the digest of the weights."""
    features = write(tmp_path / 'e.npz')
    with np.load(tmp_path / 'e.npz', allow_pickle=False) as arrays:
        assert set(arrays) == {'features', 'names', 'labels', 'label_names', 'encoder_sha256'}
        same_bits(arrays['features'], features)
        assert arrays['names'].tolist() == NAMES
        np.testing.assert_array_equal(arrays['labels'], LABELS)
        assert tuple(arrays['label_names']) == LABEL_NAMES
        assert str(arrays['encoder_sha256']) == SHA256


# Rows of D float32 in a group: all at once, groups with a remainder, and one by one.
@pytest.mark.parametrize('group_bytes', [2**26, 4 * D * 4, 1])
def test_parquet(tmp_path, monkeypatch, group_bytes):
    """A .parquet returns everything bit for bit, for any number of row groups."""
    monkeypatch.setattr(embeddings, '_ROW_GROUP_BYTES', group_bytes)
    features = write(tmp_path / 'e.parquet')
    table = read_parquet(tmp_path / 'e.parquet')
    assert table.column_names == ['name', 'features', 'label', 'label_index']
    types = [str(kind) for kind in table.schema.types]
    assert types == ['string', f'fixed_size_list<element: float>[{D}]', 'string', 'int64']
    assert table.schema.metadata[b'byol_jax.encoder_sha256'] == SHA256.encode()
    assert table.schema.metadata[b'byol_jax.feature_size'] == str(D).encode()
    column = table['features'].combine_chunks()
    same_bits(column.flatten().to_numpy().reshape(N, D), features)
    assert column.null_count == column.flatten().null_count == 0
    assert table['name'].to_pylist() == NAMES
    assert table['label'].to_pylist() == [LABEL_NAMES[i] for i in LABELS]
    assert table['label_index'].to_pylist() == LABELS.tolist()


def test_pandas_reads_parquet(tmp_path):
    """pandas reads the same values, with a vector in each row."""
    pandas = pytest.importorskip('pandas')
    pytest.importorskip('pyarrow')
    features = write(tmp_path / 'e.parquet')
    frame = pandas.read_parquet(tmp_path / 'e.parquet')
    same_bits(np.stack(frame['features'].to_list()), features)
    assert frame['name'].to_list() == NAMES
    assert frame['label'].to_list() == [LABEL_NAMES[i] for i in LABELS]


def test_polars_reads_parquet(tmp_path):
    """polars reads the same values."""
    polars = pytest.importorskip('polars')
    pytest.importorskip('pyarrow')
    features = write(tmp_path / 'e.parquet')
    frame = polars.read_parquet(tmp_path / 'e.parquet')
    same_bits(np.array(frame['features'].to_list(), np.float32), features)
    assert frame['name'].to_list() == NAMES
    assert frame['label_index'].to_list() == LABELS.tolist()


def test_without_labels(tmp_path):
    """Pictures without labels leave no arrays or columns of labels."""
    for suffix in SUFFIXES:
        write(tmp_path / f'e{suffix}', labels=None, label_names=())
    with np.load(tmp_path / 'e.npz', allow_pickle=False) as arrays:
        assert set(arrays) == {'features', 'names', 'encoder_sha256'}
    assert read_parquet(tmp_path / 'e.parquet').column_names == ['name', 'features']


def test_label_without_a_name(tmp_path):
    """A label that is not an index (-1 of an unlabelled split) is null, not the last name."""
    labels = np.where(np.arange(N) == 1, -1, LABELS)
    labels[2] = len(LABEL_NAMES)
    write(tmp_path / 'e.parquet', labels=labels)
    table = read_parquet(tmp_path / 'e.parquet')
    assert table['label'].to_pylist()[:4] == ['cat', None, None, 'cat']
    assert table['label_index'].to_pylist() == labels.tolist()


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_name_that_is_no_text(tmp_path, suffix):
    """A file name that is not UTF-8 does not lose hours of features."""
    names = ['b\udcff.jpg', *NAMES[1:]]
    write(tmp_path / f'e{suffix}', names=names)
    if suffix == '.parquet':
        assert read_parquet(tmp_path / 'e.parquet')['name'][0].as_py() == 'b\\udcff.jpg'
    else:
        with np.load(tmp_path / 'e.npz', allow_pickle=False) as arrays:
            assert arrays['names'][0] == names[0]


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize(
    'changed', [{'names': NAMES[1:]}, {'labels': LABELS[1:]}], ids=['names', 'labels']
)
def test_lengths_that_differ(tmp_path, suffix, changed):
    """Names or labels of another number than the features are refused, not cut off."""
    with pytest.raises(ValueError, match='as many'):
        write(tmp_path / f'e{suffix}', **changed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_full_disk_leaves_the_old_file(tmp_path, suffix):
    """A full disk leaves the old file and no temporary one; the error names the file."""
    if not Path('/dev/full').exists():
        pytest.skip('no /dev/full here')
    path = tmp_path / f'e{suffix}'
    write(path)
    before = path.read_bytes()
    (tmp_path / f'e{suffix}.partial').symlink_to('/dev/full')
    with pytest.raises(OSError, match='No space left') as caught:
        write(path, features=np.ones((N, D), np.float32))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_parquet_copies_no_more_than_a_row_group(tmp_path, monkeypatch):
    """Features that fill the memory can be written, because they are never copied as a whole."""
    pa = pytest.importorskip('pyarrow')
    rows = 4096
    monkeypatch.setattr(embeddings, '_ROW_GROUP_BYTES', 2**20)
    features = np.random.default_rng(0).normal(size=(rows, 1024)).astype(np.float32)
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        write(
            tmp_path / 'e.parquet',
            features=features,
            names=[str(i) for i in range(rows)],
            labels=None,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert 0 < pool.max_memory() < features.nbytes / 2
    assert peak < features.nbytes / 2


@pytest.mark.parametrize('name', ['e.csv', 'e', 'e.npz.gz', 'npz'])
def test_other_suffix(tmp_path, name):
    """A file of another kind is refused, naming the two there are."""
    for refuse in (check_embeddings_path, write):
        with pytest.raises(UserError, match=r'ends in \.npz or \.parquet'):
            refuse(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_something_in_the_way(tmp_path):
    """A folder with the file's name, or a file as its parent, is found before encoding."""
    (tmp_path / 'e.npz').mkdir()
    with pytest.raises(UserError, match='is a folder'):
        check_embeddings_path(tmp_path / 'e.npz')
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='file is not a folder'):
        check_embeddings_path(tmp_path / 'file' / 'new' / 'e.npz')
    check_embeddings_path(tmp_path / 'new' / 'newer' / 'e.npz')


def test_without_pyarrow(tmp_path, monkeypatch):
    """Without pyarrow a .parquet is refused at once, with what to do; .npz works."""
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(UserError, match=r'pip install pyarrow, or write \.npz'):
        check_embeddings_path(tmp_path / 'e.parquet')
    write(tmp_path / 'e.npz')
    assert (tmp_path / 'e.npz').is_file()
