"""Reads pickles of arrays and plain containers without importing or calling what they name.

A pickle is a program that can import and call anything. Here every name in the file is looked up in
a table of stand-ins that this module defines, and any other name is refused. Even NumPy's own
functions are not called, because a forged dtype can make them read memory outside of the array.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from byol_jax.errors import UserError, shown
from byol_jax.interop.weights_file import free_memory

# Bytes of a line of a pickle at most, and beyond which memory is looked at before they are read.
_LONGEST_LINE, _LARGE = 2**16, 2**24


class Array:
    """Stand-in for a NumPy or JAX array, or a NumPy scalar.

    Attributes:
      value: the array, read-only; it shares the memory of the bytes that were read.
    """

    __slots__ = ('value',)

    def __init__(self, value: np.ndarray | None = None):
        self.value = np.zeros(0, np.float32) if value is None else value

    def __setstate__(self, state: Any) -> None:
        """Takes the state of numpy.ndarray: ([version,] shape, dtype, Fortran order, bytes)."""
        shape, dtype, fortran, data = state[-4:]
        self.value = _array(data, dtype, shape, 'F' if fortran else 'C')


class Record(tuple):
    """Stand-in for a NamedTuple of any class: the values, and their names if known."""

    _fields: tuple[str, ...] = ()

    def __new__(cls, *values: Any) -> Record:
        if cls._fields and len(values) != len(cls._fields):
            raise TypeError(f'{len(values)} values for the fields {", ".join(cls._fields)}')
        return super().__new__(cls, values)

    def __setstate__(self, state: Any) -> None:
        raise TypeError('a NamedTuple has no further state')

    def named(self) -> dict[str, Any]:
        """The values by name; empty if the names are not known."""
        return dict(zip(self._fields, self, strict=True)) if self._fields else {}


def read_pickle(path: str | Path) -> Any:
    """Reads a file written by pickle or dill.

    Args:
      path: the file. Reading takes about twice its size in memory.

    Returns:
      Plain dicts, lists, tuples, strings, numbers, and `Array` and `Record` objects.

    Raises:
      UserError: there is no such file, it is cut off or no pickle, or it names something that is
        neither an array nor a plain container (which is neither imported nor called).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f'There is no file {path}.')
    try:
        with path.open('rb') as file:
            return _Unpickler(_Exact(file)).load()
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    except OSError:
        raise
    except Exception as error:  # The bytes may be anything, and every opcode raises its own errors.
        raise UserError(
            f'{path} cannot be read: it is cut off, damaged or no pickle of plain data '
            f'({type(error).__name__}: {shown(str(error))}).'
        ) from error


def check_pickle(file: BinaryIO) -> None:
    """Reads one pickle as `read_pickle` does, whatever it names, and keeps nothing of it.

    For what another library reads afterwards, which takes as long as the file says.

    Args:
      file: at the pickle's first byte; afterwards behind its last one.

    Raises:
      Exception: of any kind: it is cut off, damaged or no pickle of plain keys.
    """
    _Checker(_Exact(file)).load()


class _Exact:
    """A file of which no more is read than it and memory hold: a pickle may ask for 2^60 bytes."""

    def __init__(self, file: BinaryIO):
        self._file = file
        place = file.tell()
        self._left = file.seek(0, os.SEEK_END) - place
        file.seek(place)

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._left:
            raise EOFError(f'{count} bytes where {self._left} are left')
        if count > _LARGE and count > free_memory():
            raise MemoryError(f'{count} bytes at once')
        self._left -= count
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(_LONGEST_LINE)
        if not line.endswith(b'\n'):
            raise EOFError('a line without an end')
        self._left -= len(line)
        return line


# The one that is written in Python: each opcode is a method, and memory follows what is read.
_InPython: Any = pickle._Unpickler


class _Unpickler(_InPython):
    """Checks each key before it is hashed: a tuple of tuples may take 2^60 steps."""

    def find_class(self, module: str, name: str) -> Any:
        """Called by pickle for every name in the file; imports nothing."""
        return _lookup(module, name)

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        _check_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), 'little')
        self.append(bytearray(self.read(size)))

    dispatch = {  # noqa: RUF012 (the unpickler's own way to register)
        **_InPython.dispatch,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


class _Anything:
    """Stands for whatever a pickle names or makes; it takes every call and keeps nothing."""

    def __call__(self, *args: Any) -> _Anything:
        return self

    def __setstate__(self, state: Any) -> None:
        return None

    def _take(self, *args: Any) -> None:
        return None

    __setitem__ = append = extend = add = _take


class _Checker(_Unpickler):
    """Reads anything: nothing it names is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        return _Anything()

    def persistent_load(self, pid: Any) -> Any:
        return _Anything()

    def _make(self) -> None:
        """Objects that a pickle makes without a call."""
        self.stack.pop()
        self.stack[-1] = _Anything()

    def _make_with_keywords(self) -> None:
        self.stack.pop()
        self._make()

    dispatch = {  # noqa: RUF012
        **_Unpickler.dispatch,
        pickle.NEWOBJ[0]: _make,
        pickle.NEWOBJ_EX[0]: _make_with_keywords,
    }


def _check_keys(keys: Iterable[Any]) -> None:
    """Raises TypeError unless the keys of a dict or set are texts, numbers or the like."""
    for key in keys:
        if type(key) not in (str, bytes, int, float, bool, type(None), _Anything):
            raise TypeError(f'a {type(key).__name__} as the key of a dict')


def _lookup(module: str, name: str) -> Any:
    """The stand-in for `module.name`."""
    if type(module) is not str or type(name) is not str:
        raise TypeError('a name that is no text')
    if (module, name) in _STANDINS:
        return _STANDINS[module, name]
    if name in _STATES and module.rpartition('.')[2] in _STATE_MODULES:
        return _STATES[name]
    if name.endswith('State') and module.startswith(('optax.', 'byol.utils.')):
        return Record
    asked = shown(f'{module}.{name}')
    raise UserError(
        f"the file asks for '{asked}', which is neither an array nor a plain container. Refused: "
        'it was neither imported nor called.'
    )


class _Call:
    """A function that a pickle can call but not change."""

    __slots__ = ('function',)

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        # Otherwise a pickle could set attributes of the function for the whole process.
        raise TypeError('a function has no state')


class _Ndarray:
    """Stand-in for the class numpy.ndarray as an argument; it cannot be called."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise TypeError('the class numpy.ndarray has no state')


class _Dtype:
    """Stand-in for a numpy.dtype of booleans, integers or floats."""

    __slots__ = ('code', 'order')

    def __init__(self, code: str, align: int = 0, copy: int = 0):
        if not re.fullmatch('b1|[iu][1248]|f[248]', code):
            raise UserError(f"the file holds an array of dtype '{shown(code)}', not of numbers.")
        self.code, self.order = code, '='

    def __setstate__(self, state: Any) -> None:
        """Takes only the byte order from the state of numpy.dtype."""
        if state[1] not in ('<', '>', '=', '|'):
            raise ValueError('a byte order that is none')
        self.order = state[1]


def _array(data: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str) -> Any:
    if type(data) not in (bytes, bytearray) or type(dtype) is not _Dtype or order not in ('C', 'F'):
        raise TypeError('an array without its bytes or dtype')
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError('an array of a shape that is none')
    value: np.ndarray = np.ndarray(
        shape, np.dtype(dtype.order + dtype.code), data, order='F' if order == 'F' else 'C'
    )
    if value.nbytes != len(data):
        raise ValueError(f'{len(data)} bytes for an array of {value.nbytes}')
    value.flags.writeable = False
    return value


def _reconstruct(subtype: Any, shape: Any, typecode: Any) -> Array:
    """Stand-in for numpy.core.multiarray._reconstruct: an array whose content follows."""
    if type(subtype) is not _Ndarray:
        raise TypeError('an array of another class than numpy.ndarray')
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> Array:
    """Stand-in for numpy.core.numeric._frombuffer, which pickle protocol 5 uses."""
    if axis_order is not None:
        raise ValueError('an array with its axes permuted')
    return Array(_array(data, dtype, shape, order))


def _scalar(dtype: Any, data: Any) -> Array:
    """Stand-in for numpy.core.multiarray.scalar."""
    return Array(_array(data, dtype, (), 'C'))


def _with_state(function: Any, args: Any, state: Any, extra: Any = None) -> Array:
    """Stand-in for the functions of JAX and dill that rebuild an array from numpy's pieces."""
    if function is not _RECONSTRUCT:
        raise TypeError('an array that is not rebuilt by numpy')
    array = _reconstruct(*args)
    array.__setstate__(state)
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Stand-in for _codecs.encode, by which pickle protocol 2 writes bytes, always as latin1."""
    if type(text) is not str or encoding != 'latin1':
        raise TypeError('bytes in another encoding than latin1')
    return text.encode('latin1')


def _empty() -> bytes:
    """Stand-in for bytes(), by which pickle protocol 2 writes empty bytes."""
    return b''


def _dict(items: Any = ()) -> dict[Any, Any]:
    """Stand-in for OrderedDict and Haiku's immutable mappings."""
    if not isinstance(items, dict):
        items = list(items)
        _check_keys(key for key, _ in items)
    return dict(items)


def _namedtuple(name: str, fields: Iterable[str], module: str, defaults: Any = None) -> type:
    """Stand-in for dill's _create_namedtuple, which makes a class; only field names are kept."""
    fields = tuple(fields)
    if not all(type(field) is str for field in fields):
        raise TypeError('a NamedTuple whose fields have no names')
    return type('Record', (Record,), {'_fields': fields, '__slots__': ()})


def _import_module(name: str, safe: bool = False) -> str:
    """Stand-in for dill's _import_module; returns the name, which `_get_attr` looks up."""
    if type(name) is not str:
        raise TypeError('a module without a name')
    return name


def _get_attr(module: str, name: str) -> Any:
    """Stand-in for dill's _get_attr, by which it writes functions such as `_reconstruct`."""
    return _lookup(module, name)


def _load_type(name: str) -> Any:
    """Stand-in for dill's _load_type, for built-in types."""
    return _lookup('builtins', 'bytes' if name == 'BytesType' else name)


def _state(fields: str) -> type:
    return _namedtuple('', fields.split(), '')


_RECONSTRUCT = _Call(_reconstruct)
# dill before 0.3.4 names the C module of numpy's functions, pickle the Python module.
_MULTIARRAY = tuple(
    f'numpy.{core}.{name}'
    for core in ('core', '_core')
    for name in ('multiarray', '_multiarray_umath')
)
_STANDINS: dict[tuple[str, str], Any] = {
    **{(module, '_reconstruct'): _RECONSTRUCT for module in _MULTIARRAY},
    **{(module, 'scalar'): _Call(_scalar) for module in _MULTIARRAY},
    ('numpy.core.numeric', '_frombuffer'): _Call(_from_buffer),
    ('numpy._core.numeric', '_frombuffer'): _Call(_from_buffer),
    ('numpy', 'ndarray'): _Ndarray(),
    ('numpy', 'dtype'): _Call(_Dtype),
    ('jax._src.array', '_reconstruct_array'): _Call(_with_state),
    ('jax._src.device_array', 'reconstruct_device_array'): _Call(_with_state),
    ('_codecs', 'encode'): _Call(_encode),
    ('builtins', 'bytes'): _Call(_empty),
    ('__builtin__', 'bytes'): _Call(_empty),
    ('collections', 'OrderedDict'): _Call(_dict),
    **{
        ('haiku._src.data_structures', name): _Call(_dict)
        for name in ('FlatMapping', 'FlatMap', 'frozendict')
    },
    ('dill._dill', '_create_array'): _Call(_with_state),
    ('dill._dill', '_create_namedtuple'): _Call(_namedtuple),
    ('dill._dill', '_import_module'): _Call(_import_module),
    ('dill._dill', '_get_attr'): _Call(_get_attr),
    ('dill._dill', '_load_type'): _Call(_load_type),
}
# The NamedTuples of DeepMind's byol/byol_experiment.py and byol/eval_experiment.py.
_STATES = {
    '_ByolExperimentState': _state(
        'online_params target_params online_state target_state opt_state'
    ),
    '_EvalExperimentState': _state(
        'backbone_params classif_params backbone_state backbone_opt_state classif_opt_state'
    ),
}
_STATE_MODULES = ('__main__', 'byol_experiment', 'eval_experiment')
