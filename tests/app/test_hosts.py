"""Several processes on one machine, joined over localhost, train as one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import TINY
from whole_runs import (
    SAMPLE,
    difference,
    final_state,
    finish,
    make_damaged_folder,
    start_two,
    wait_for,
)

from byol_jax.app.hosts import join_hosts
from byol_jax.errors import UserError


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """A whole run of two processes: (workdir, what each printed)."""
    workdir = tmp_path_factory.mktemp('hosts') / 'w'
    processes = start_two(workdir)
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [0, 0], outputs
    return workdir, outputs


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_same_weights_as_one_process(two_processes, tmp_path, main_py):
    """Two processes with a device each train to the weights of one process with two devices."""
    one = tmp_path / 'w'
    assert main_py(SAMPLE, *TINY, f'--workdir={one}', devices=2).returncode == 0
    assert difference(final_state(two_processes[0]), final_state(one)) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_only_process_0_speaks_and_writes(two_processes):
    """Each step is logged once, and the second process prints nothing of its own."""
    workdir, (first, second) = two_processes
    steps = [json.loads(x)['step'] for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert steps == [2, 4, 6, 8]
    assert 'step 8/8' in first
    assert 'step' not in second
    assert len(list((workdir / 'tensorboard').iterdir())) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_run_of_two_goes_on(two_processes, tmp_path):
    """Two processes killed half-way and started again end bit for bit as uninterrupted ones."""
    workdir = tmp_path / 'w'
    processes = start_two(workdir)
    wait_for(workdir / 'checkpoints' / '4', processes[0])
    for process in processes:
        process.kill()
    finish(processes)
    processes = start_two(workdir)
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert 'going on from the checkpoint of step' in outputs[0]
    expected, actual = final_state(two_processes[0]), final_state(workdir)
    for key, leaf in expected.items():
        np.testing.assert_array_equal(leaf, actual[key], err_msg=key)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_error_ends_both(tmp_path):
    """An error in both processes ends both with a message from each, and without a hang."""
    processes = start_two(tmp_path / 'w', '--config.batch_size=7')
    outputs = finish(processes)
    assert all(p.returncode not in (0, None) for p in processes)
    assert 'batch_size=7' in outputs[0]


def test_half_given_flags_are_refused():
    """A coordinator without count and index is refused; the message names all three flags."""
    with pytest.raises(UserError, match='--process_index'):
        join_hosts('localhost:1', None, None)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_damaged_picture_ends_both(tmp_path):
    """If no file may be bad, the first one ends both processes; the one that read it names it."""
    folder = tmp_path / 'pictures'
    damaged = make_damaged_folder(folder)
    processes = start_two(
        tmp_path / 'w',
        '--config.data.source=folder',
        '--config.data.tile_size=0',
        '--config.data.held_out_fraction=0.0',
        '--config.data.max_bad_fraction=0.0',
        f'--config.data.path={folder}',
    )
    outputs = finish(processes)
    assert all(p.returncode not in (0, None) for p in processes), outputs
    assert sum(f'{damaged.name} cannot be decoded' in output for output in outputs) == 1
