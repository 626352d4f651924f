"""Test set-up: four simulated CPU devices, quiet TensorFlow, shared compilations, tiny configs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Compiling is most of the work of many tests; without optimisations XLA takes half the time.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
_QUICK_FLAGS = [f'--{name}={str(value).lower()}' for name, value in QUICK.items()]

# JAX and TensorFlow read these when they are first imported, which is after this file.
os.environ['XLA_FLAGS'] = ' '.join(['--xla_force_host_platform_device_count=4', *_QUICK_FLAGS])
os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

# Processes that tests start compile the same few programs; the first leaves them here for the
# others. The folder belongs to this test process, because JAX writes to it without a lock.
_PROGRAMS = tempfile.TemporaryDirectory(prefix='byol_jax_tests-')

# A run of main.py that takes a few seconds, compilation included.
TINY = (
    '--config.total_steps=8',
    '--config.warmup_steps=2',
    '--config.batch_size=8',
    '--config.views.image_size=32',
    '--config.encoder.kwargs.stage_sizes=(1,)',
    '--config.encoder.kwargs.width=0.125',
    '--config.projector.hidden_size=16',
    '--config.projector.output_size=8',
    '--config.predictor.hidden_size=16',
    '--config.data.tile_stride=0',
    '--config.data.tile_size=128',
    '--config.log.every_steps=2',
    '--config.checkpoint.every_steps=2',
)


# The slowest files begin first, so that two workers end together (`--no-loadscope-reorder`).
_LONGEST = (
    'test_device_run.py',
    'test_run.py',
    'test_hosts.py',
    'test_tutorial.py',
    'test_hooks.py',
    'test_own.py',
    'test_train.py',
    'test_bad_files_run.py',
    'test_any_run.py',
    'test_periodic.py',
    'test_torchvision.py',
    'test_deepmind.py',
    'test_step.py',
    'test_online_probe.py',
    'test_convolution.py',
    'test_optim.py',
    'test_examples.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope='session')
def main_py() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs main.py as a user would, in its own process, with a time limit."""

    def run(
        *arguments: str,
        devices: int = 1,
        compiling: str = 'shared',
        timeout: float = 240,
        **environment: str,
    ):
        return subprocess.run(
            [sys.executable, 'main.py', *arguments],
            cwd=ROOT,
            env=process_environment(devices, compiling) | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def div2k_folder(tmp_path) -> Path:
    """DIV2K's official folders, with three training pictures and one for validation."""
    from pictures import write_div2k

    return write_div2k(tmp_path / 'DIV2K')


def process_environment(devices: int, compiling: str = 'shared') -> dict[str, str]:
    """The environment of a process with this many simulated CPU devices.

    Compiling is half of a tiny run's work.

    Args:
      devices: number of simulated devices.
      compiling: 'shared': without optimisations, and only programs that no other such process has
        compiled; 'alone': without optimisations, all programs; 'optimised': all programs, as for a
        user.
    """
    flags = [f'--xla_force_host_platform_device_count={devices}']
    if compiling != 'optimised':
        flags += _QUICK_FLAGS
    shared = {
        'JAX_COMPILATION_CACHE_DIR': _PROGRAMS.name,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    return {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': ' '.join(flags),
        **(shared if compiling == 'shared' else {}),
    }
