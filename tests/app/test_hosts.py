"""Several processes on one machine, joined over localhost, train as one."""

from __future__ import annotations

import json
import signal
import time

import pytest
from conftest import TINY
from whole_runs import (
    SAMPLE,
    assert_same_state,
    difference,
    final_state,
    finish,
    make_damaged_folder,
    start_two,
    wait_for,
)

from byol_jax.app import hosts
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
    assert_same_state(final_state(workdir), final_state(two_processes[0]))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize('killed', [0, 1])
@pytest.mark.parametrize('when', ['compiling', 'training'])
def test_one_killed_ends_the_other(two_processes, tmp_path, killed, when):
    """The other ends within seconds with one line of ours, and the same commands go on to the
    same bits."""
    workdir = tmp_path / 'w'
    processes = start_two(workdir)
    # views.png is drawn just before the first step is compiled.
    wait_for(workdir / ('views.png' if when == 'compiling' else 'checkpoints/4'), processes[0])
    processes[killed].kill()
    killed_at = time.monotonic()
    processes[1 - killed].wait(timeout=60)
    assert time.monotonic() - killed_at < 20
    outputs = finish(processes)
    assert processes[1 - killed].returncode == 1, outputs
    lines = outputs[1 - killed].splitlines()
    assert lines[-1].startswith(f'error: process {killed} of 2 (')
    assert 'is gone' in lines[-1]
    for text in ('Traceback', 'Check failure', 'Fatal Python error', 'coordination service'):
        assert text not in outputs[1 - killed]
    processes = start_two(workdir)
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert_same_state(final_state(workdir), final_state(two_processes[0]))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('index', [0, 1])
def test_signal_to_one_stops_both(tmp_path, index, number):
    """Both stop at the same step after a checkpoint, and the same commands go on."""
    workdir = tmp_path / 'w'
    flags = ('--config.total_steps=400', '--config.checkpoint.every_steps=400')
    processes = start_two(workdir, *flags)
    wait_for(workdir / 'tensorboard', processes[0])
    while 'step' not in (workdir / 'metrics.jsonl').read_text():
        assert processes[0].poll() is None
        time.sleep(0.05)
    processes[index].send_signal(number)
    outputs = finish(processes)
    assert all(p.returncode in (128 + number, 128 + signal.SIGTERM) for p in processes), outputs
    assert 'and the state is saved' in outputs[0]
    assert 'error' not in outputs[0] + outputs[1]
    (saved,) = (int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit())
    assert 2 <= saved < 400


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_another_seed_in_one_is_refused(tmp_path):
    """Both say which key differs, before anything is compiled or written."""
    processes = start_two(tmp_path / 'w', each=((), ('--config.seed=3',)))
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [1, 1], outputs
    for output in outputs:
        assert 'seed=0 for process 0, but 3 for process 1' in output
        assert 'Traceback' not in output
    assert not (tmp_path / 'w').exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_error_ends_both(tmp_path):
    """An error in both processes ends both with a message from each, and without a hang."""
    processes = start_two(tmp_path / 'w', '--config.batch_size=7')
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [1, 1], outputs
    for output in outputs:
        assert 'batch_size=7' in output


def test_half_given_flags_are_refused():
    """A coordinator without count and index is refused with the whole set named."""
    with pytest.raises(UserError, match='--process_index'):
        join_hosts('localhost:1', None, None)


@pytest.mark.parametrize(
    ('others', 'words'),
    [
        ([{'seed': 0, 'a.b': 1.5}, {'seed': 3, 'a.b': 1.5}], ['seed=0 for process 0, but 3 for']),
        ([{'seed': 0}, {'seed': 0, 'new': True}], ['new=nothing for process 0, but True for']),
        ([{'seed': 0}, {'seed': 0}, {'seed': 1}], ['but 1 for process 2']),
        ([dict.fromkeys('abcde', 0), dict.fromkeys('abcde', 1)], ['a=0', 'c=0', '(and 2 more)']),
    ],
)
def test_configs_that_differ(monkeypatch, others, words):
    """The keys that differ are named, with both values."""
    monkeypatch.setattr(hosts, 'gather_texts', lambda text: [json.dumps(each) for each in others])
    with pytest.raises(UserError) as caught:
        hosts.check_same_values(others[0])
    for word in words:
        assert word in str(caught.value)


def test_configs_that_are_the_same(monkeypatch):
    """Values that JSON writes otherwise, such as tuples, are no difference."""
    monkeypatch.setattr(hosts, 'gather_texts', lambda text: [text, text])
    hosts.check_same_values({'views.mean': (0.5, 0.5, 0.5), 'data.path': None, 'name': 'é'})


def test_workdir_that_one_does_not_see(monkeypatch, tmp_path):
    """It is named, with the process; a file that comes late is waited for."""
    monkeypatch.setattr(hosts, '_SHARED_SECONDS', 0.2)
    monkeypatch.setattr(hosts, 'gather_texts', lambda text: ['seen', text])
    with pytest.raises(UserError, match=r'Process 1 of 2 does not see .*config\.json'):
        hosts.check_shared(tmp_path / 'config.json')
    (tmp_path / 'config.json').touch()
    hosts.check_shared(tmp_path / 'config.json')


def test_modes_of_one_process_refuse_several(monkeypatch):
    """A mode that runs in one process says so under a launcher of several."""
    hosts.refuse_several('evaluate')
    monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '4')
    monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_SIZE', '4')
    monkeypatch.setenv('OMPI_COMM_WORLD_RANK', '1')
    with pytest.raises(UserError, match='--mode=evaluate runs in one process, and 4 were started'):
        hosts.refuse_several('evaluate')


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
    assert [p.returncode for p in processes] == [1, 1], outputs
    assert sum(f'{damaged.name} cannot be decoded' in output for output in outputs) == 1
    assert sum('ended with an error or a signal of its own' in each for each in outputs) == 1
    assert not any('Traceback' in output for output in outputs)
