"""What `import byol_jax` offers, and that it imports nothing before it is used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from conftest import ROOT, process_environment

import byol_jax

PACKAGES = ('evaluation', 'input', 'interop', 'methods', 'models', 'sources', 'training', 'views')

# The names of the contract (docs/library.md).
CONTRACT = (
    *('pretrain', 'load_encoder', 'Byol', 'init_state', 'make_train_step', 'pmap_step'),
    *('view_batches', 'lars', 'target_tau', 'Hook', 'UserError'),
)


@pytest.mark.parametrize('name', ['', *PACKAGES])
def test_every_public_name_is_there(name):
    """Each name of `__all__` can be imported from its module."""
    package = importlib.import_module(f'byol_jax.{name}' if name else 'byol_jax')
    assert package.__all__ == dir(package)
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match='nothing_like_it'):
        _ = package.nothing_like_it


def test_the_contract():
    assert set(CONTRACT) <= set(byol_jax.__all__)


def test_importing_costs_nothing():
    """Without TensorFlow everything but the pipeline works; importing the package is light."""
    code = """
import sys

sys.modules['tensorflow'] = None
import byol_jax

assert 'jax' not in sys.modules and 'numpy' not in sys.modules
for name in byol_jax.__all__:
    if name not in ('view_batches', 'pretrain', 'Pretrained', 'Hook', 'Event'):
        getattr(byol_jax, name)
assert 'orbax' not in sys.modules and 'absl' not in sys.modules.get('byol_jax').__dict__
"""
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT,
        env=process_environment(1),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
