"""Safetensors files: what their headers say is checked, and nothing is read before it is used."""

from __future__ import annotations

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from byol_jax.errors import UserError
from byol_jax.interop import weights_file
from byol_jax.interop.weights_file import in_memory, map_safetensors

ARRAYS = {
    'a': np.arange(6, dtype=np.float32).reshape(2, 3),
    'scalar': np.array(3, np.int64),
    'empty': np.zeros((0, 4), np.float16),
    'bits': np.array([True, False]),
}


def entry(dtype='F32', shape=(1,), place=(0, 4)):
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(place)}


def write(path, header, data=b'1234'):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)
    return path


def test_arrays_are_those_that_safetensors_wrote(tmp_path):
    path = tmp_path / 'x.safetensors'
    safetensors.numpy.save_file(ARRAYS, path, {'key': 'value'})
    found, metadata = map_safetensors(path)
    assert metadata == {'key': 'value'}
    assert found.keys() == ARRAYS.keys()
    for arrays in (found, in_memory(found, path)):
        for name, array in ARRAYS.items():
            assert arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(arrays[name], array)


def test_bfloat16(tmp_path):
    path = write(tmp_path / 'x', {'x': entry('BF16', (2,), (0, 4))}, b'\x80\x3f\x00\x40')
    array = map_safetensors(path)[0]['x']
    assert array.dtype == jnp.bfloat16
    assert array.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ('header', 'says'),
    [
        ({'x': entry(place=(0, 8))}, r'\[1\] in \[0, 8\]'),
        ({'x': entry(place=(4, 8))}, 'begins at byte 4, not at 0'),
        ({'x': entry(), 'y': entry()}, 'begins at byte 0, not at 4'),
        ({'x': entry(shape=(2**62, 4))}, 'is damaged'),
        ({'x': entry(shape=(-1,))}, 'nothing usable'),
        ({'x': entry(shape=(True,))}, 'nothing usable'),
        ({'x': entry(shape=(1,) * 40)}, 'is damaged'),
        ({'x': entry(place=(4, 0))}, 'is damaged'),
        ({'x': entry('O8')}, 'of type O8'),
        ({'x': entry([])}, r'of type \[\]'),
        ({'x': [1]}, 'nothing usable'),
        ({'\x1b[2J': [1]}, r'\\x1b\[2J'),
        ({}, 'it has 16 bytes'),
        ([], 'no object'),
        ({'__metadata__': 3}, 'free text'),
        (b'{', 'not JSON'),
        (b'[' * 100_000, 'brackets'),
    ],
)
def test_odd_headers(tmp_path, header, says):
    """The first thing that is wrong is named, in one line."""
    if header == {}:
        says = 'bytes, not'
    with pytest.raises(UserError, match=says) as caught:
        map_safetensors(write(tmp_path / 'x', header))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize('size', [0, 4, 8])
def test_short_files(tmp_path, size):
    path = tmp_path / 'x'
    path.write_bytes(b'\xff' * size)
    with pytest.raises(UserError, match='ends within its header'):
        map_safetensors(path)


def test_more_than_memory(tmp_path, monkeypatch):
    """Weights that memory cannot hold are refused before they are read."""
    path = write(tmp_path / 'x', {'x': entry()})
    monkeypatch.setattr(weights_file, 'free_memory', lambda: 3.0)
    with pytest.raises(UserError, match=r'GB of weights, and 0\.0 GB of memory are free'):
        in_memory(map_safetensors(path)[0], path)
