"""Whole runs of main.py with the views made on the accelerator."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, process_environment
from feeds import WITHOUT_TENSORFLOW
from PIL import Image
from whole_runs import (
    SAMPLE,
    assert_same_state,
    difference,
    final_state,
    finish,
    start_two,
    wait_for,
)

# Runs main.py where TensorFlow is not installed.
MAIN_WITHOUT = (
    WITHOUT_TENSORFLOW
    + """
import runpy

sys.argv[0] = 'main.py'
sys.path.insert(0, '.')
runpy.run_path('main.py', run_name='__main__')
"""
)


@pytest.fixture(scope='module')
def array_flags(tmp_path_factory) -> tuple[str, ...]:
    """A run on an array of four kinds of noise, completely on the accelerator."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 4
    colours = rng.integers(60, 200, (4, 1, 1, 3))
    images = np.clip(colours[labels] + rng.normal(0, 40, (64, 40, 36, 3)), 0, 255)
    path = tmp_path_factory.mktemp('array') / 'array.npz'
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    tiny = [flag for flag in TINY if '.tile_' not in flag]
    return (
        '--config=configs/cifar10.py',
        '--config.encoder.name=resnet',
        *tiny,
        '--config.data.source=array',
        f'--config.data.path={path}',
        '--config.data.held_out_fraction=0.25',
        '--config.views.on=accelerator',
        '--config.accumulate_steps=2',
    )


def command(*flags: str, devices: int = 1, tensorflow: bool = True):
    """The command that starts main.py, and its environment."""
    main = ['main.py'] if tensorflow else ['-c', MAIN_WITHOUT]
    return {
        'args': [sys.executable, *main, *flags],
        'cwd': ROOT,
        'env': process_environment(devices),
        'text': True,
    }


def run(workdir, *flags: str, **options) -> str:
    result = subprocess.run(
        **command(*flags, f'--workdir={workdir}', **options),
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ''
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(('kind', 'devices'), [('array', 2), ('pictures', 1)])
def test_killed_run_goes_on_bit_for_bit(tmp_path, array_flags, kind, devices):
    """A run killed half-way and started again ends as an uninterrupted one, with views made on the
    accelerator; with an array, TensorFlow is not installed.
    """
    flags = array_flags
    if kind == 'pictures':
        flags = (SAMPLE, *TINY, '--config.views.on=accelerator')
    options = {'devices': devices, 'tensorflow': kind == 'pictures'}
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    run(whole, *flags, **options)
    for name in ('views.png', 'report.html', 'encoder/encoder.json'):
        assert (whole / name).exists()
    with Image.open(whole / 'views.png') as picture:
        assert picture.size[0] > 200
    process = subprocess.Popen(
        **command(*flags, f'--workdir={killed}', **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for(killed / 'checkpoints' / '4', process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert 'going on from the checkpoint of step' in run(killed, *flags, **options)
    assert_same_state(final_state(killed), final_state(whole))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trains_as_on_the_cpu(tmp_path, array_flags):
    """The place where views are made changes a run only by rounding: the losses differ by less
    than a thousandth on one device, on two, and with the views made on the CPU.
    """
    # With two devices, accumulation makes other microbatches, with other batch statistics.
    whole = [flag for flag in array_flags if 'accumulate' not in flag]
    losses = {}
    for name, options in {'one': {}, 'two': {'devices': 2}, 'cpu': {}}.items():
        flags = [f for f in whole if name != 'cpu' or '.views.on' not in f]
        run(tmp_path / name, *flags, **options)
        lines = (tmp_path / name / 'metrics.jsonl').read_text().splitlines()
        losses[name] = [json.loads(line)['loss'] for line in lines]
    assert losses['two'] == pytest.approx(losses['one'], rel=1e-3)
    assert losses['cpu'] == pytest.approx(losses['one'], rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_as_one(tmp_path, array_flags):
    """Two processes, each with the array on its device, end with the weights of one with two."""
    flags = [flag for flag in array_flags if '.data.' in flag or '.views.on' in flag]
    flags.append('--config.data.tile_size=0')
    run(tmp_path / 'one', SAMPLE, *TINY, *flags, devices=2)
    outputs = finish(start_two(tmp_path / 'two', *flags))
    assert 'trained 8 steps' in outputs[0], outputs
    assert difference(final_state(tmp_path / 'one'), final_state(tmp_path / 'two')) < 1e-4
