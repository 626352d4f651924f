"""Whatever has happened to a file of a workdir: no traceback, and nothing is lost without a word.

Every file of a run (rows) by every kind of damage (columns). A start of the run, up to its first
step, and a comparison read each.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from byol_jax.app.bad_files import BadFilesLog
from byol_jax.app.build import build_run
from byol_jax.app.checkpoints import Checkpoints
from byol_jax.app.claim import claimed
from byol_jax.app.events import steps_without_events
from byol_jax.app.hooks import Hooks
from byol_jax.app.records import alarms_log, read_metrics
from byol_jax.app.report.compare_tables import read_runs, tables
from byol_jax.app.train import _hooks, _restored, train
from byol_jax.errors import UserError
from byol_jax.settings import Settings, changed, plain
from configs import folder

STEPS = (2, 4, 6, 8)
ALARM = {
    'step': 4,
    'name': 'input_bound',
    'severity': 'watch',
    'evidence': 'seen',
    'cause': 'a cause',
    'remedy': 'do this',
}

FILES = (
    'config.json',
    'data.json',
    'identity.json',
    'command.txt',
    'layers.txt',
    'metrics.jsonl',
    'alarms.jsonl',
    'bad_files.txt',
    'views.png',
    'report.html',
    'results.json',
    'evaluation.json',
    '.lock',
    'tensorboard',
    'tensorboard/*',
    'encoder',
    'encoder/encoder.json',
    'checkpoints',
    'checkpoints/8',
    'checkpoints/8/digests/metadata',
    'checkpoints/8/_CHECKPOINT_METADATA',
    'checkpoints/8/state/_METADATA',
    'checkpoints/8/state/manifest.ocdbt',
)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def rewrite(change):
    """Damage to a file's bytes; a folder is left alone."""

    def damage(path):
        if path.is_file():
            path.write_bytes(change(path.read_bytes()))

    return damage


def replace(make):
    """Something else in the place of a file or folder."""

    def damage(path):
        remove(path)
        make(path)

    return damage


DAMAGE = {
    'missing': remove,
    'empty': rewrite(lambda data: b''),
    'half': rewrite(lambda data: data[: len(data) // 2]),
    'last byte gone': rewrite(lambda data: data[:-1]),
    'zeros': rewrite(lambda data: bytes(len(data))),
    'binary': rewrite(lambda data: bytes(range(256)) * 4),
    'a bit': rewrite(lambda data: data[:9] + bytes(x ^ 16 for x in data[9:10]) + data[10:]),
    'twice': rewrite(lambda data: data + data),
    'a list': rewrite(lambda data: b'[1, {"step": 2}]\n'),
    'an object': rewrite(lambda data: b'{"step": "x", "examples": [], "results": 3}\n'),
    'brackets': rewrite(lambda data: b'[' * 100_000),
    'utf-16': rewrite(lambda data: data.decode(errors='replace').encode('utf-16')),
    'other words': rewrite(lambda data: '\u2028{"\u00e4\ud7ff": 1}\x1b[2J\n'.encode() + data),
    'a folder': replace(lambda path: (path.mkdir(), (path / 'x').touch())),
    'a pipe': replace(os.mkfifo),
    'a link to nothing': replace(lambda path: path.symlink_to('nowhere')),
    'a link to itself': replace(lambda path: path.symlink_to(path.name)),
    'a link to a copy': lambda path: (
        path.rename(path.with_name(f'{path.name}-moved')),
        path.symlink_to(f'{path.name}-moved'),
    ),
}


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    pictures = tmp_path_factory.mktemp('pictures') / 'images.npz'
    np.savez(pictures, images=np.random.default_rng(0).integers(0, 256, (24, 20, 20, 3), np.uint8))
    changes = {
        'data.source': 'array',
        'data.path': str(pictures),
        'data.held_out_fraction': 0.25,
        'encoder.name': 'resnet',
        'encoder.kwargs': {'stage_sizes': (1,), 'width': 0.125},
        'total_steps': 8,
        'warmup_steps': 2,
        'batch_size': 8,
        'views.image_size': 16,
        'projector.hidden_size': 8,
        'projector.output_size': 4,
        'predictor.hidden_size': 8,
        'log.every_steps': 2,
        'checkpoint.every_steps': 4,
    }
    return Settings.of(changed(plain(folder.get_config()), changes))


@pytest.fixture(scope='module')
def run(config):
    return build_run(config)


@pytest.fixture(scope='module')
def whole(run, config, tmp_path_factory):
    """A workdir with all that a run leaves; its states are those of the first step."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    start(run, workdir)
    for step in STEPS:
        record = {'step': step, 'epoch': step / 2, 'loss': 4 / step, 'feature_std': 0.1}
        with (workdir / 'metrics.jsonl').open('a') as file:
            file.write(json.dumps(record) + '\n')
    (workdir / 'alarms.jsonl').write_text(json.dumps(ALARM) + '\n')
    rows = [{'name': name, 'accuracy': None, 'feature_std': 0.1} for name in ('a', 'b')]
    (workdir / 'results.json').write_text(json.dumps({'protocol': '', 'results': rows}))
    (workdir / 'evaluation.json').write_text(json.dumps({'step': 8, 'metrics': {'knn_20': 0.5}}))
    (workdir / 'encoder').mkdir()
    (workdir / 'encoder' / 'encoder.json').write_text('{}')
    checkpoints = Checkpoints(workdir, 3)
    for step in (4, 8):
        checkpoints.save(step, run.training.initial._replace(step=np.int32(step)))
    checkpoints.close()
    # Now that there are records, their events are written.
    shutil.rmtree(workdir / 'tensorboard')
    start(run, workdir)
    # A name of its own: another start within the same second would have the same.
    (events,) = (workdir / 'tensorboard').iterdir()
    events.rename(events.with_name('events.out.tfevents.1.host'))
    (workdir / 'bad_files.txt').write_text('a.png\tis empty\n')
    return workdir


def start(run, workdir) -> int:
    """A start of the run up to its first step; the step it goes on from."""
    run = run._replace(workdir=workdir)
    bad_files = BadFilesLog(run.data, run.config, workdir)
    with claimed(run, None, 'the command'):
        checkpoints = Checkpoints(workdir, run.config.checkpoint.keep)
        try:
            state = _restored(run, checkpoints)
            with Hooks(_hooks(run, 'the command', checkpoints, bad_files)) as hooks:
                hooks.start(run, state)
        finally:
            checkpoints.close()
    return int(state.step)


def damaged(whole, tmp_path, name, damage) -> Path | None:
    """A copy of the workdir with one damage; None where it makes none."""
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    (path,) = sorted(workdir.glob(name))[:1]
    before = path.read_bytes() if path.is_file() else None
    DAMAGE[damage](path)
    same = before is not None and path.is_file() and path.read_bytes() == before
    return None if same and not path.is_symlink() else workdir


def check(run, whole, workdir, name, capsys) -> None:
    """A comparison and a start: a line at most, and what is lost is said."""
    step = 0
    lines = []
    try:
        tables(read_runs([workdir, whole]))
    except UserError as error:
        lines += str(error).splitlines()
    capsys.readouterr()
    try:
        step = start(run, workdir)
    except UserError as error:
        lines += str(error).splitlines()
    said = capsys.readouterr().out
    assert all(len(line) < 600 for line in (*lines, *said.splitlines()))
    assert not any('Traceback' in line for line in (*lines, *said.splitlines()))
    if not step:
        # Refused, and nothing was made of the records; or there is no state, and they are kept.
        again = 'starts again from its first step' in said
        assert lines or again
        assert not again or (workdir / 'metrics.jsonl.damaged').exists()
        assert name.startswith(('checkpoints', 'config.json', 'identity.json'))
        return
    records = [record['step'] for record in read_metrics(workdir)]
    wanted = [each for each in STEPS if each <= step]
    if records != wanted:
        assert 'metrics.jsonl' in said, (records, said)
    if alarms_log(workdir).records != [ALARM]:
        assert name == 'alarms.jsonl'
        there = sorted(path.name for path in workdir.glob('alarms.jsonl*'))
        assert 'alarms.jsonl' in said or there == [], said
    assert steps_without_events(workdir / 'tensorboard', records) == []
    if name in ('config.json', 'data.json', 'identity.json'):
        assert json.loads((workdir / name).read_text()) == json.loads((whole / name).read_text())
    assert step in (4, 8)
    if step == 4:
        assert name.startswith('checkpoints')
        assert 'damaged' in said or not (workdir / 'checkpoints' / '8').exists()


@pytest.mark.parametrize(
    ('name', 'damage'),
    [
        ('metrics.jsonl', 'half'),
        ('metrics.jsonl', 'a folder'),
        ('alarms.jsonl', 'other words'),
        ('config.json', 'binary'),
        ('identity.json', 'a bit'),
        ('tensorboard', 'missing'),
        ('views.png', 'a folder'),
        ('.lock', 'a pipe'),
        ('checkpoints/8/digests/metadata', 'a list'),
    ],
)
def test_some_damage(run, whole, tmp_path, capsys, name, damage):
    """The kinds that once ended in a traceback, or lost records without a word."""
    workdir = damaged(whole, tmp_path, name, damage)
    assert workdir is not None
    check(run, whole, workdir, name, capsys)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize('name', FILES)
def test_every_damage(run, whole, tmp_path, capsys, name):
    """Every file by every kind of damage."""
    for number, damage in enumerate(DAMAGE):
        place = tmp_path / str(number)
        workdir = damaged(whole, place, name, damage)
        if workdir is not None:
            try:
                check(run, whole, workdir, name, capsys)
            except BaseException as error:
                error.add_note(f'{name}: {damage}')
                raise
        shutil.rmtree(place)


@pytest.mark.slow
def test_a_damaged_run_ends_as_a_sound_one(config, tmp_path):
    """A run whose small files are all damaged half-way ends with the weights of one that was not,
    and with its records."""
    sound, workdir = tmp_path / 'sound', tmp_path / 'damaged'
    train(config, sound)
    shutil.copytree(sound, workdir)
    shutil.rmtree(workdir / 'checkpoints' / '8')
    for name in ('config.json', 'data.json', 'command.txt', 'views.png', 'report.html'):
        DAMAGE['binary'](workdir / name)
    DAMAGE['a folder'](workdir / 'results.json')
    DAMAGE['missing'](workdir / 'tensorboard')
    DAMAGE['twice'](workdir / 'metrics.jsonl')
    train(config, workdir)
    for each in ('encoder/encoder.json', 'config.json', 'data.json', 'results.json'):
        assert (workdir / each).read_bytes() == (sound / each).read_bytes()
    assert [r['step'] for r in read_metrics(workdir)] == list(STEPS)
    assert [r['loss'] for r in read_metrics(workdir)] == [r['loss'] for r in read_metrics(sound)]
