"""The restricted unpickler loads arrays and plain containers, and never runs anything."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import subprocess
import time

import numpy as np
import pytest
from pickles import Named, raw

from byol_jax import UserError
from byol_jax.interop.unpickle import Array, Record, check_pickle, read_pickle

ARRAY = Named('numpy', 'ndarray')
RECONSTRUCT = Named('numpy.core.multiarray', '_reconstruct')
HARMFUL = {
    'os.system': lambda m: Named('os', 'system', f'touch {m}'),
    'posix.system': lambda m: Named('posix', 'system', f'touch {m}'),
    'builtins.eval': lambda m: Named('builtins', 'eval', f'open({str(m)!r}, "w")'),
    '__builtin__.eval': lambda m: Named('__builtin__', 'eval', f'open({str(m)!r}, "w")'),
    'builtins.getattr': lambda m: Named('builtins', 'getattr', 'a', 'join'),
    'subprocess.Popen': lambda m: Named('subprocess', 'Popen', ['touch', str(m)]),
    'numpy.load': lambda m: Named('numpy', 'load', str(m)),
    'numpy.memmap': lambda m: Named('numpy', 'memmap', str(m), 'u1', 'w+', 0, (1,)),
    'os': lambda m: Named(
        'dill._dill', '_get_attr', Named('dill._dill', '_import_module', 'os'), 'system'
    ),
    'builtins.eval ': lambda m: Named('dill._dill', '_get_attr', 'builtins', 'eval'),
    'builtins.CodeType': lambda m: Named('dill._dill', '_load_type', 'CodeType'),
    'dill._dill._create_code': lambda m: Named('dill._dill', '_create_code', 0),
    'haiku._src.data_structures.to_dict': lambda m: Named('haiku._src.data_structures', 'to_dict'),
    'evil._ByolExperimentState': lambda m: Named('evil', '_ByolExperimentState', str(m)),
}


@pytest.mark.parametrize('name', HARMFUL)
def test_harmful_names_are_refused(tmp_path, monkeypatch, name):
    """Only names of arrays and containers are allowed; others are neither imported nor called."""
    mark, path = tmp_path / 'mark', tmp_path / 'evil.pkl'
    path.write_bytes(raw({'step': 1, 'experiment_state': HARMFUL[name](mark)}))

    def called(*args, **kwargs):
        raise AssertionError('something was called')

    for module, function in ((os, 'system'), (subprocess, 'Popen'), (np, 'load'), (np, 'memmap')):
        monkeypatch.setattr(module, function, called)
    monkeypatch.setattr(builtins, 'eval', called)
    with pytest.raises(UserError, match='neither imported nor called') as error:
        read_pickle(path)
    assert name.strip() in str(error.value)
    assert not mark.exists()


DTYPE = Named('numpy', 'dtype', 'f4', False, True)
WRONG = {
    'ndarray-called': Named('numpy', 'ndarray', (10**12,)),
    'bytes-of-a-size': Named('builtins', 'bytes', 10**12),
    'encode-rot13': Named('_codecs', 'encode', 'abc', 'rot13'),
    'dtype-of-objects': Named('numpy', 'dtype', 'O8', False, True),
    'dtype-of-text': Named('numpy', 'dtype', '<U8', False, True),
    'dtype-of-fields': Named('numpy', 'dtype', [('a', 'O')]),
    'another-array-class': Named('numpy.core.multiarray', '_reconstruct', DTYPE, (0,), b'b'),
    'scalar-too-short': Named('numpy.core.multiarray', 'scalar', DTYPE, b'ab'),
    'scalar-of-objects': Named('numpy.core.multiarray', 'scalar', 'O', b'12345678'),
    'buffer-too-short': Named('numpy.core.numeric', '_frombuffer', b'1234', DTYPE, (10**12,), 'C'),
    'buffer-negative': Named('numpy.core.numeric', '_frombuffer', b'1234', DTYPE, (-1,), 'C'),
    'jax-calls-other': Named(
        'jax._src.array', '_reconstruct_array', Named('_codecs', 'encode'), ('a', 'latin1'), (), {}
    ),
    'dict-of-number': Named('haiku._src.data_structures', 'FlatMapping', 3),
    'state-of-two': Named('byol.byol_experiment', '_ByolExperimentState', 1, 2),
    'fields-of-numbers': Named('dill._dill', '_create_namedtuple', 'A', (1, 2), 'm'),
    'module-of-a-list': Named('dill._dill', '_get_attr', ['os'], 'system'),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_arguments_are_refused(tmp_path, name):
    """An allowed name with other than its own arguments makes the file unreadable."""
    path = tmp_path / 'wrong.pkl'
    path.write_bytes(raw([WRONG[name]]))
    with pytest.raises(UserError, match=r'wrong\.pkl'):
        read_pickle(path)


@pytest.mark.parametrize(
    'target',
    [
        ('_codecs', 'encode'),
        ('numpy', 'ndarray'),
        ('byol.byol_experiment', '_ByolExperimentState'),
        ('optax.x', 'TraceState'),
    ],
    ids='.'.join,
)
@pytest.mark.parametrize('state', [{'a': 1}, (None, {'__defaults__': (1,)})], ids=['dict', 'slots'])
def test_stand_ins_cannot_be_changed(tmp_path, target, state):
    """A pickle cannot set attributes of the functions and classes that it may name."""
    path = tmp_path / 'build.pkl'
    body = pickle.dumps(state, 2)[2:-1]
    path.write_bytes(b'\x80\x02c' + '\n'.join(target).encode() + b'\n' + body + b'b.')
    with pytest.raises(UserError, match='cannot be read'):
        read_pickle(path)


def test_forged_array_states_are_refused(tmp_path):
    """An array whose bytes do not fill it, or are not bytes, is refused."""
    good = (1, (2,), DTYPE, False, b'12345678')
    for i, part in ((1, (3,)), (1, (1,)), (1, 'ab'), (2, 'f4'), (4, [1, 2]), (4, 'text')):
        state = (*good[:i], part, *good[i + 1 :])
        made = Named('dill._dill', '_create_array', RECONSTRUCT, (ARRAY, (0,), b'b'), state, None)
        path = tmp_path / 'forged.pkl'
        path.write_bytes(raw([made]))
        with pytest.raises(UserError, match='cannot be read'):
            read_pickle(path)


def test_read_pickle_leaves_plain_data(tmp_path):
    """Plain data is returned unchanged, arrays read-only, and optimizer states as plain records."""
    data = {'a': [1, 2.5, None, True, 'x', b'y', b''], 'b': (np.arange(6).reshape(2, 3),)}
    for protocol in (2, 4, 5):
        path = tmp_path / 'plain.pkl'
        path.write_bytes(pickle.dumps(data, protocol))
        read = read_pickle(path)
        assert read['a'] == data['a']
        (array,) = read['b']
        assert isinstance(array, Array)
        np.testing.assert_array_equal(array.value, data['b'][0])
        assert not array.value.flags.writeable
    state = tmp_path / 'state.pkl'
    state.write_bytes(raw(Named('optax._src.transform', 'TraceState', {})))
    assert read_pickle(state) == Record({})


def nested(levels):
    """A pickle of ((..), (..)), each tuple holding the one before it twice: 2^levels of them."""
    return b')' + b'q\x00h\x00\x86' * levels


SECONDS = 20
NESTED = nested(60)
DICT, SET = b'}', b'\x8f'
TEXT = b'X\x01\x00\x00\x00a'
# What takes 2^60 steps or bytes if it is obeyed.
ENDLESS = {
    'key': DICT + NESTED + b'Ns.',
    'keys': DICT + b'(' + NESTED + b'Nu.',
    'dict': b'(' + NESTED + b'Nd.',
    'set': SET + b'(' + NESTED + b'\x90.',
    'frozenset': b'(' + NESTED + b'\x91.',
    'ordered': b'ccollections\nOrderedDict\n](' + NESTED + b'N\x86e\x85R.',
    'name': b'cdill._dill\n_get_attr\n' + NESTED + TEXT + b'\x86R.',
    'type': b'cdill._dill\n_load_type\n' + NESTED + b'\x85R.',
    'shape': b'cnumpy.core.multiarray\nscalar\n' + NESTED + TEXT + b'\x86R.',
    'bytes': b'\x8e' + (2**60).to_bytes(8, 'little') + b'a.',
    'bytearray': b'\x96' + (2**60).to_bytes(8, 'little') + b'a.',
    'gigabytes': b'\x96' + (12 * 10**9).to_bytes(8, 'little') + b'a.',
    'memo': b'Nr\xf0\xff\xff\xff.',
    'frame': b'\x80\x04\x95' + (2**60).to_bytes(8, 'little') + b'N.',
    'line': b'c' + b'a' * 10**6,
}


@pytest.mark.timeout(60, method='thread')
@pytest.mark.parametrize('name', ENDLESS)
def test_endless_pickles_end(tmp_path, name):
    """A pickle of a few bytes takes neither years nor memory, whatever it declares."""
    path = tmp_path / 'endless.pkl'
    path.write_bytes(b'\x80\x04' + ENDLESS[name])
    began = time.perf_counter()
    if name == 'memo':
        assert read_pickle(path) is None
    else:
        with pytest.raises(UserError, match=r'endless\.pkl'):
            read_pickle(path)
    assert time.perf_counter() - began < SECONDS


@pytest.mark.timeout(60, method='thread')
def test_what_another_library_reads_is_checked():
    """Keys are checked of whatever a pickle names, and nothing that it names is called."""
    good = raw({'a': [Named('os', 'system', 'x'), {'b': 1}], 3: (1, 2)})
    check_pickle(io.BytesIO(good))
    with pytest.raises(TypeError, match='a tuple as the key'):
        check_pickle(io.BytesIO(b'\x80\x04' + ENDLESS['keys']))
    with pytest.raises(EOFError):
        check_pickle(io.BytesIO(good[:-1]))
