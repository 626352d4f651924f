"""Whole runs in bad places: signals, output that is gone, full disks, names that are no text.

None may hang, end with a traceback, or cost a state; the weights are those of a run left alone.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, process_environment
from full_disk import no_room_beyond
from PIL import Image
from whole_runs import SAMPLE, records

from byol_jax.interop.export import load_encoder

pytestmark = pytest.mark.slow

# The shell that starts it sees to what is open.
SHELL = 'exec "$@"'


def begin(workdir: Path, *more: str, shell: str = SHELL, **options) -> subprocess.Popen:
    """Starts a tiny run; its output goes to files beside the workdir."""
    environment = process_environment(1) | options.pop('environment', {})
    command = [sys.executable, 'main.py', SAMPLE, *TINY, *more, f'--workdir={workdir}']
    with Path(f'{workdir}.out').open('w') as out, Path(f'{workdir}.err').open('w') as err:
        return subprocess.Popen(
            ['sh', '-c', shell, 'sh', *command],
            cwd=ROOT,
            env=environment,
            **{'stdout': out, 'stderr': err} | options,
        )


def said(workdir: Path) -> str:
    """What a run printed, without tracebacks."""
    out, err = (Path(f'{workdir}.{kind}').read_text() for kind in ('out', 'err'))
    assert 'Traceback' not in out + err, out + err
    assert err == '', err
    return out


@pytest.fixture(scope='module')
def sha256(tmp_path_factory):
    """The digest of the weights of a run left alone."""
    workdir = tmp_path_factory.mktemp('alone') / 'w'
    assert begin(workdir).wait(timeout=240) == 0
    return load_encoder(workdir / 'encoder').weights_sha256


def wait_for_step(workdir: Path, process: subprocess.Popen, seconds: float = 200) -> None:
    """Returns when a run has logged a step."""
    path, end = workdir / 'metrics.jsonl', time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size) and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.05)


LONG = ('--config.total_steps=100000', '--config.checkpoint.every_steps=90000')


@pytest.mark.parametrize(
    'names',
    [
        ('SIGINT',),
        ('SIGHUP',),
        ('SIGUSR1',),
        ('SIGUSR2',),
        ('SIGTERM', 'SIGTERM'),
        ('SIGUSR1', 'SIGTERM', 'SIGTERM'),
    ],
    ids='-'.join,
)
def test_signals(tmp_path, names):
    """The state is saved, one line says so, and the status tells the first signal."""
    workdir = tmp_path / 'w'
    process = begin(workdir, *LONG)
    wait_for_step(workdir, process)
    for name in names:
        process.send_signal(getattr(signal, name))
        time.sleep(0.01)
    assert process.wait(timeout=60) == 128 + getattr(signal, names[0])
    assert said(workdir).endswith(
        f'stopped by {names[0]}, and the state is saved. The same command goes on from here.\n'
    )
    (saved,) = (workdir / 'checkpoints').iterdir()
    assert int(saved.name) >= records(workdir)[-1]['step'] > 0


def test_a_lost_terminal(tmp_path):
    """The state is saved when the terminal of a run is gone, as that of a lost ssh session."""
    workdir = tmp_path / 'w'
    ours, its = pty.openpty()
    process = begin(workdir, *LONG, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    wait_for_step(workdir, process)
    os.close(ours)
    # Only a session's leader with a terminal of its own gets this from the system.
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    (saved,) = (workdir / 'checkpoints').iterdir()
    assert int(saved.name) > 0


@pytest.mark.parametrize(
    'shell',
    [
        '("$@"; echo $? > "$STATUS") | head -1',
        '("$@"; echo $? > "$STATUS") 2>&1 | head -1',
        '"$@" >&- 2>&- <&-; echo $? > "$STATUS"',
        '"$@" > /dev/full 2>&1; echo $? > "$STATUS"',
    ],
    ids=['head', 'both to head', 'closed', 'full'],
)
def test_output_that_is_gone(tmp_path, sha256, shell):
    """The run goes on to its end, as one that is heard."""
    workdir, status = tmp_path / 'w', tmp_path / 'status'
    process = begin(workdir, shell=shell, environment={'STATUS': str(status)})
    process.wait(timeout=240)
    assert status.read_text() == '0\n'
    assert load_encoder(workdir / 'encoder').weights_sha256 == sha256
    error = Path(f'{workdir}.err').read_text()
    assert error in ('', 'standard output cannot be written, it goes on without it: Broken pipe\n')


def test_files_that_cannot_grow(tmp_path, sha256):
    """TensorBoard and the report find no room: each is said once, and the run ends well."""
    workdir = tmp_path / 'w'
    with no_room_beyond(100_000):
        process = begin(workdir)
    assert process.wait(timeout=240) == 0
    lines = [line for line in said(workdir).splitlines() if 'the run goes on without it' in line]
    names = [Path(line.split(' cannot')[0]).name.split('.')[0] for line in lines]
    assert sorted(set(names)) == sorted(names)
    assert {'events', 'report'} <= set(names)
    assert load_encoder(workdir / 'encoder').weights_sha256 == sha256


@pytest.mark.parametrize('kib', [300, 600, 1000, 1500, 2000])
def test_a_full_disk(tmp_path, sha256, kib):
    """Wherever a run meets the end of a disk it ends in one error, and with room goes on."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={kib}k', 'none', str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip('needs the right to mount a disk')
    workdir = disk / 'w'
    try:
        # What it prints goes elsewhere.
        with (tmp_path / 'out').open('w') as out, (tmp_path / 'err').open('w') as err:
            process = begin(workdir, stdout=out, stderr=err)
            status = process.wait(timeout=120)
        error = (tmp_path / 'err').read_text()
        assert 'Traceback' not in error + (tmp_path / 'out').read_text()
        assert status == (1 if error else 0)
        assert error.count('error: ') == status
        subprocess.run(['mount', '-o', 'remount,size=20m', str(disk)], check=True)
        with (tmp_path / 'out').open('w') as out, (tmp_path / 'err').open('w') as err:
            assert begin(workdir, stdout=out, stderr=err).wait(timeout=240) == 0
        left = [path for path in workdir.rglob('*') if 'tmp' in path.name or 'partial' in path.name]
        assert left == []
        assert load_encoder(workdir / 'encoder').weights_sha256 == sha256
        steps = [record['step'] for record in records(workdir)]
        assert steps == sorted(set(steps))
    finally:
        subprocess.run(['umount', '-l', str(disk)], check=False)


@pytest.fixture(scope='module')
def latin(tmp_path_factory):
    """Folders and pictures whose names are no UTF-8, one of which is damaged."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path_factory.mktemp('latin')) + b'/donn\xe9es'))
    rng = np.random.default_rng(0)
    for label in (b'chat\xe9', b'chien\xf6'):
        part = folder / os.fsdecode(label)
        part.mkdir(parents=True)
        for number in range(24):
            path = part / os.fsdecode(b'photo\xe9%02d.png' % number)
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:300])
    return folder


def test_names_that_are_no_text(tmp_path, latin):
    """Data and workdir may be called as they like, on a terminal that knows ASCII alone."""
    workdir = tmp_path / os.fsdecode(b'caf\xe9')
    flags = (
        '--config.data.source=folder',
        f'--config.data.path={latin}',
        '--config.data.tile_size=0',
        '--config.data.max_bad_fraction=0.3',
        '--config.evaluate.every_epochs=1',
    )
    environment = {'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C'}
    for mode in ('train', 'export', 'evaluate', 'embed', 'views'):
        process = begin(workdir, *flags, f'--mode={mode}', environment=environment)
        assert process.wait(timeout=240) == 0, Path(f'{workdir}.err').read_text()
        printed = said(workdir)
        assert '\\udce9' in printed
        if mode == 'train':
            assert 'bad file: ' in printed
    assert os.fsencode(latin) in (workdir / 'command.txt').read_bytes()
