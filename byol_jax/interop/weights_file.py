"""Safetensors files: the header is checked, and nothing else is read until it is used."""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from byol_jax.errors import UserError, shown
from byol_jax.files import not_a_file, parse_json

# github.com/huggingface/safetensors, "Format": the largest header, bytes.
_LARGEST_HEADER = 100_000_000

_DTYPES: dict[str, Any] = {
    'BOOL': np.bool_,
    'BF16': jnp.bfloat16,
    **{f'F{bits}': f'float{bits}' for bits in (16, 32, 64)},
    **{f'I{bits}': f'int{bits}' for bits in (8, 16, 32, 64)},
    **{f'U{bits}': f'uint{bits}' for bits in (8, 16, 32, 64)},
    'C64': np.complex64,
    'F8_E4M3': jnp.float8_e4m3fn,
    'F8_E5M2': jnp.float8_e5m2,
}


def map_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Opens a safetensors file without reading its arrays.

    Args:
      path: the file.

    Returns:
      Arrays by name, read-only and mapped: what is used of them is read from the file then. And
      the file's free text.

    Raises:
      UserError: the file cannot be read, or its header is not that of a whole file.
    """
    try:
        what = not_a_file(path.stat())
        if what:
            raise UserError(f'{path} is {what}, not a file.')
        with path.open('rb') as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), 'little')
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise _damaged(path, 'it ends within its header')
            header = parse_json(file.read(length), str(path))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error
    if not isinstance(header, dict):
        raise _damaged(path, 'its header is no object')
    metadata = header.pop('__metadata__', {})
    if not isinstance(metadata, dict):
        raise _damaged(path, 'its free text is no object')
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, (start, stop)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if start != end:
            raise _damaged(path, f"'{shown(name)}' begins at byte {start}, not at {end}")
        end = stop
    if 8 + length + end != size:
        raise _damaged(path, f'it has {size:,} bytes, not {8 + length + end:,}')
    arrays = {}
    for name, (dtype, shape, (start, stop)) in entries.items():
        # Of an array without values nothing can be mapped.
        values = data[:0] if start == stop else memoryview(data)[8 + length :][start:stop]
        arrays[name] = np.frombuffer(values, dtype).reshape(shape)
    return arrays, {str(key): str(value) for key, value in metadata.items()}


def in_memory(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Copies mapped arrays into memory, where no change of the file can reach them.

    Raises:
      UserError: see `check_memory`.
    """
    check_memory(arrays, path)
    return {name: array.copy() for name, array in arrays.items()}


def check_memory(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Raises UserError if arrays of a file are larger than what is free of memory."""
    size, free = sum(array.nbytes for array in arrays.values()), free_memory()
    if size > free:
        raise UserError(
            f'{path} holds {size / 1e9:,.1f} GB of weights, and {free / 1e9:,.1f} GB of memory are '
            'free.'
        )


def free_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system does not say."""
    path = Path('/proc/meminfo')
    found = re.search(r'MemAvailable: *(\d+) kB', path.read_text() if path.exists() else '')
    return 1024 * int(found[1]) if found else math.inf


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """dtype, shape, and the bytes from where to where, of an array."""
    fields: Any = entry if isinstance(entry, dict) else {}
    kind, shape, place = (fields.get(key) for key in ('dtype', 'shape', 'data_offsets'))
    if not _sizes(shape) or not _sizes(place) or len(place) != 2:
        raise _damaged(path, f"its header says nothing usable about '{shown(name)}'")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise UserError(f"{path}: '{shown(name)}' is of type {shown(kind)}, unknown here.")
    dtype = np.dtype(_DTYPES[kind])
    if len(shape) > 32 or math.prod(shape) * dtype.itemsize != place[1] - place[0]:
        raise _damaged(path, f"'{shown(name)}' is {shown(shape)} in {shown(place)}")
    return dtype, tuple(shape), (place[0], place[1])


def _sizes(value: Any) -> bool:
    """Whether something is a list of sizes."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f'{path} is damaged, or writing it was interrupted: {why}. Export it again.')
