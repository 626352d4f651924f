"""glibc is told to return large blocks of memory, unless the user has told it otherwise."""

from __future__ import annotations

import ctypes
import types

import pytest

from byol_jax.app.memory import keep_memory_steady

# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@pytest.mark.parametrize('given', ['', '65536'])
def test_what_glibc_is_told(monkeypatch, given):
    told = {}
    library = types.SimpleNamespace(mallopt=told.__setitem__)
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: library)
    monkeypatch.delenv('MALLOC_MMAP_THRESHOLD_', raising=False)
    if given:
        monkeypatch.setenv('MALLOC_MMAP_THRESHOLD_', given)
    keep_memory_steady()
    assert told == ({} if given else {M_MMAP_THRESHOLD: 2**20, M_TRIM_THRESHOLD: 2**20})


def test_other_libraries(monkeypatch):
    """Where there is no mallopt, nothing is done."""
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: types.SimpleNamespace())
    keep_memory_steady()
