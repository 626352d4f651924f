"""Imports TensorFlow without its start-up messages, and without letting it use the GPU."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# Log errors only. TensorFlow ignores this for what it logs while it is imported.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


@contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Hides what native code writes to stderr, and shows it if the block fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        original = os.dup(2)
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            os.dup2(original, 2)
            os.close(original)
            if failed:
                held.seek(0)
                sys.stderr.write(held.read().decode(errors='replace'))


with _held_back_stderr():
    import tensorflow as tf

    # TensorFlow would otherwise reserve the GPU memory that JAX needs.
    tf.config.set_visible_devices([], 'GPU')

__all__ = ['tf']
