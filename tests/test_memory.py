"""A process that trains on the CPU keeps the memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from conftest import ROOT

HELD_AFTERWARDS = """
import sys
import numpy as np
from byol_jax.train.memory import keep_freed_memory

def pages():
    return int(open('/proc/self/statm').read().split()[1])

if sys.argv[1] == 'keep':
    assert keep_freed_memory()
before = pages()
rows = [np.ones(2**24, np.uint8) for _ in range(12)]
del rows
print((pages() - before) * 4096 / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library')
@pytest.mark.timeout(60)
@pytest.mark.parametrize(('what', 'least', 'most'), [('keep', 180, 210), ('return', 0, 60)])
def test_freed_memory(what, least, most):
    """Of 192 MiB freed it all stays with the process that keeps memory, and little otherwise."""
    done = subprocess.run(
        [sys.executable, '-c', HELD_AFTERWARDS, what],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert least <= float(done.stdout) <= most
