"""Runs of main.py in separate processes, their results, and their data."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from conftest import ROOT, TINY, process_environment
from PIL import Image

SAMPLE = '--config=configs/div2k.py:sample'


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """All leaves of the newest checkpoint: parameters, target, statistics and optimizer."""
    import orbax.checkpoint as ocp

    steps = [int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()]
    folder = workdir / 'checkpoints' / str(max(steps)) / 'state'
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder.absolute())
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_same_state(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Checks that two states, from `final_state`, are equal bit for bit."""
    assert actual.keys() == expected.keys()
    for key, leaf in expected.items():
        np.testing.assert_array_equal(leaf, actual[key], err_msg=key)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 200) -> None:
    """Waits until a run has made a file; if it does not, ends it and raises with its output."""
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    if not path.exists():
        status = process.poll()
        # Ended and read, so that no open pipe is reported in a later test.
        process.kill()
        output, _ = process.communicate(timeout=60)
        assert status is None, f'the run ended too soon, with {status}: {output}'
        raise AssertionError(f'{path} did not appear: {output}')


def start(
    workdir: Path, *more: str, devices: int = 1, compiling: str = 'shared'
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, 'main.py', SAMPLE, *TINY, *more, f'--workdir={workdir}'],
        cwd=ROOT,
        env=process_environment(devices, compiling),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def make_damaged_folder(folder: Path) -> Path:
    """Makes 40 pictures, of which the 30th of the first epoch is cut off; returns that one."""
    from byol_jax.input.stream import epoch_order

    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(folder / f'{i:02}.png')
    # With batches of 8, the fourth step needs it.
    damaged = folder / f'{epoch_order(0, 0, 40)[29]:02}.png'
    damaged.write_bytes(damaged.read_bytes()[:200])
    return damaged


def start_two(
    workdir: Path, *more: str, each: tuple[tuple[str, ...], ...] = ((), ())
) -> list[subprocess.Popen]:
    """Starts two processes of one simulated device each, with flags of all and flags of each."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    return [
        subprocess.Popen(
            [
                sys.executable,
                'main.py',
                SAMPLE,
                *TINY,
                *more,
                f'--workdir={workdir}',
                f'--coordinator=localhost:{port}',
                '--process_count=2',
                f'--process_index={index}',
                *each[index],
            ],
            cwd=ROOT,
            # If they shared one, a process would read what the other is writing.
            env=process_environment(1, 'alone'),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Waits for both processes, with a time limit, and returns what they printed."""
    try:
        return [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest relative difference of a leaf, by its norm."""
    assert a.keys() == b.keys()
    return max(
        float(np.linalg.norm(np.asarray(a[k], float) - b[k]) / (np.linalg.norm(b[k]) + 1e-12))
        for k in a
    )


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def release_locks() -> None:
    """Releases the locks, as the end of a process does."""
    from byol_jax.app import lock

    while lock._locks:
        lock.release_lock(next(iter(lock._locks)))
