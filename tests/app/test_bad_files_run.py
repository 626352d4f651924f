"""Whole runs of main.py with bad pictures."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from pictures import png_that_declares
from PIL import Image
from whole_runs import (
    SAMPLE,
    assert_same_state,
    difference,
    final_state,
    finish,
    records,
    start,
    start_two,
    wait_for,
)

# How each of these pictures is damaged; the other 35 are sound.
BAD = {
    3: lambda path: path.write_bytes(path.read_bytes()[:2000]),
    8: lambda path: path.write_bytes(b''),
    21: lambda path: path.write_text('no picture'),
    22: lambda path: path.write_bytes(png_that_declares(60_000, 60_000)),
    30: lambda path: (path.unlink(), path.symlink_to('nowhere')),
}


def make_folder(folder: Path, bad=BAD) -> tuple[str, ...]:
    """Makes 40 pictures, damages some, and returns the flags of a run on them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / f'{i:02}.png'
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(path)
        if i in bad:
            bad[i](path)
    return (
        '--config.data.source=folder',
        f'--config.data.path={folder}',
        '--config.data.tile_size=0',
        '--config.data.held_out_fraction=0.0',
    )


def bad_files(workdir: Path) -> list[str]:
    """Names of the files that bad_files.txt lists, in its order."""
    return [
        Path(line.split('\t')[0]).name
        for line in (workdir / 'bad_files.txt').read_text().splitlines()
    ]


@pytest.fixture(scope='module')
def run(main_py, tmp_path_factory):
    """A whole run with five bad pictures of 40: (folder of all, flags, completed process)."""
    place = tmp_path_factory.mktemp('bad')
    flags = (*make_folder(place / 'pictures'), '--config.data.max_bad_fraction=0.2')
    result = main_py(SAMPLE, *TINY, *flags, f'--workdir={place / "w"}')
    assert result.returncode == 0, result.stderr
    return place, flags, result


def test_bad_files_are_told_in_every_place(run):
    """Bad files are named in the log as they are found, in bad_files.txt and in the report, and
    counted in metrics.jsonl."""
    place, _, result = run
    assert bad_files(place / 'w') == [f'{i:02}.png' for i in BAD]
    said = [line for line in result.stdout.splitlines() if line.startswith('bad file: ')]
    assert sorted(Path(line.split(' ')[2]).name for line in said) == bad_files(place / 'w')
    assert result.stderr == ''
    counts = [record['bad_files'] for record in records(place / 'w')]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    assert '5, named in bad_files.txt' in (place / 'w' / 'report.html').read_text()


@pytest.mark.slow
def test_killed_run_goes_on_among_bad_files(run, tmp_path, main_py):
    """A run with bad files, killed half-way and started again, ends bit for bit as an
    uninterrupted one, and lists each file once.
    """
    place, flags, _ = run
    process = start(tmp_path / 'w', *flags)
    wait_for(tmp_path / 'w' / 'checkpoints' / '4', process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    result = main_py(SAMPLE, *TINY, *flags, f'--workdir={tmp_path / "w"}')
    assert result.returncode == 0, result.stderr
    assert 'still cannot be read' in result.stdout
    assert_same_state(final_state(tmp_path / 'w'), final_state(place / 'w'))
    assert (tmp_path / 'w' / 'bad_files.txt').read_text() == (
        place / 'w' / 'bad_files.txt'
    ).read_text()


@pytest.mark.slow
def test_pictures_vanish_during_training(tmp_path, main_py):
    """Without one picture a run continues; without all of them it stops and has saved its state."""
    flags = (*make_folder(tmp_path / 'pictures', {}), '--config.data.max_bad_fraction=0.05')
    long = (*flags, '--config.total_steps=100000', '--config.checkpoint.every_steps=100000')
    process = start(tmp_path / 'w', *long)
    wait_for(tmp_path / 'w' / 'tensorboard', process)
    while not (tmp_path / 'w' / 'metrics.jsonl').read_text():
        assert process.poll() is None
        time.sleep(0.05)
    (tmp_path / 'pictures' / '17.png').unlink()
    wait_for(tmp_path / 'w' / 'bad_files.txt', process)
    step = records(tmp_path / 'w')[-1]['step']
    while records(tmp_path / 'w')[-1]['step'] < step + 20:
        assert process.poll() is None
        time.sleep(0.05)
    assert bad_files(tmp_path / 'w') == ['17.png']
    shutil.move(tmp_path / 'pictures', tmp_path / 'elsewhere')
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    error = next(line for line in output.splitlines() if line.startswith('error: '))
    assert 'cannot be read' in error
    assert 'Traceback' not in output
    saved = [int(p.name) for p in (tmp_path / 'w' / 'checkpoints').iterdir() if p.name.isdigit()]
    assert max(saved) >= step + 20
    assert len(bad_files(tmp_path / 'w')) > 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_replace_alike(run, tmp_path, main_py):
    """Two processes train with bad files to the weights of one, and list what both found."""
    place, flags, _ = run
    processes = start_two(tmp_path / 'two', *flags)
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [0, 0], outputs
    result = main_py(SAMPLE, *TINY, *flags, f'--workdir={tmp_path / "one"}', devices=2)
    assert result.returncode == 0, result.stderr
    assert difference(final_state(tmp_path / 'two'), final_state(tmp_path / 'one')) < 1e-6
    assert bad_files(tmp_path / 'two') == bad_files(place / 'w')
    assert records(tmp_path / 'two')[-1]['bad_files'] == 5
    assert outputs[0].count('bad file: ') == 5
    assert 'bad file' not in outputs[1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_stop_together_at_the_limit(run, tmp_path):
    """With too many bad files, counted over both, both end at a logged step with a saved state."""
    _, flags, _ = run
    limit = '--config.data.max_bad_fraction=0.1'
    processes = start_two(tmp_path / 'w', *flags, limit, '--config.checkpoint.every_steps=100')
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [1, 1], outputs
    for output in outputs:
        assert 'error: 5 of 40 training pictures cannot be read' in output
        assert 'Traceback' not in output
    saved = [int(p.name) for p in (tmp_path / 'w' / 'checkpoints').iterdir() if p.name.isdigit()]
    assert saved in ([2], [4], [6])
    assert bad_files(tmp_path / 'w') == [f'{i:02}.png' for i in BAD]
