"""Scalars and pictures in TensorBoard and Weights & Biases, also after a kill and a resume."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from full_disk import no_room_beyond
from PIL import Image

from byol_jax.app import weights_and_biases
from byol_jax.app.events import steps_without_events
from byol_jax.app.metrics import MetricsLog
from byol_jax.app.records import read_metrics
from byol_jax.errors import UserError

CONFIG = {'name': 'tiny', 'optimizer': {'momentum': 0.9}}
PICTURE = Image.fromarray(np.full((5, 7, 3), 200, np.uint8))


def record(step):
    return {'step': step, 'epoch': step / 10, 'loss': 4 / step}


def open_log(workdir, start_step, wandb=True):
    config = CONFIG if wandb else None
    return MetricsLog(workdir, start_step=start_step, tensorboard=not wandb, wandb_config=config)


def events(workdir):
    """The values of the only file of events, by name and step; its checksums must fit."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    (path,) = (workdir / 'tensorboard').iterdir()
    data, found, position = path.read_bytes(), {}, 0
    while position < len(data):
        # TFRecord: length, its checksum, content, its checksum.
        length, checksum = struct.unpack_from('<QI', data, position)
        content = data[position + 12 : position + 12 + length]
        assert checksum == masked_crc32c(data[position : position + 8])
        assert struct.unpack_from('<I', data, position + 12 + length)[0] == masked_crc32c(content)
        event = Event.FromString(content)
        found |= {(value.tag, event.step): value for value in event.summary.value}
        position += 16 + length
    return found


def test_tensorboard_has_scalars_and_pictures(tmp_path):
    """TensorBoard's events hold every value of a record and the pictures, to the pixel."""
    log = open_log(tmp_path, 0, wandb=False)
    log.write(record(2))
    log.picture('views', PICTURE, 2)
    log.close()
    found = events(tmp_path)
    assert found['loss', 2].simple_value == 2
    assert found['epoch', 2].simple_value == pytest.approx(0.2)
    assert (found['views', 2].image.width, found['views', 2].image.height) == (7, 5)
    assert ('step', 2) not in found


def test_full_disk(tmp_path, capsys):
    """Each file that cannot be written is said once and written when there is room; nothing hangs.

    What is read back then is what was written, with no half record in between.
    """
    log = open_log(tmp_path, 0, wandb=False)
    log.write(record(2))
    with no_room_beyond(16):
        for step in range(4, 40, 2):
            log.write(record(step))
            log.picture('views', PICTURE, step)
        assert [r['step'] for r in read_metrics(tmp_path)] == [2]
        log.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    path = tmp_path / 'metrics.jsonl'
    assert said[0] == f'{path} cannot be written, the run goes on without it: File too large'
    assert '/tensorboard/events' in said[1]
    log.close()
    assert [r['step'] for r in read_metrics(tmp_path)] == list(range(2, 40, 2))
    assert {step for name, step in events(tmp_path) if name == 'loss'} == set(range(2, 40, 2))
    assert {step for name, step in events(tmp_path) if name == 'views'} == set(range(4, 40, 2))


def test_resumed_on_a_full_disk(tmp_path, capsys):
    """Records after the checkpoint are removed all the same, and no step comes twice."""
    log = open_log(tmp_path, 0, wandb=False)
    for step in (2, 4, 6):
        log.write(record(step))
    with no_room_beyond(0):
        log = open_log(tmp_path, 4, wandb=False)
        assert [r['step'] for r in read_metrics(tmp_path)] == [2, 4]
        log.write(record(6))
    log.close()
    assert [r['step'] for r in read_metrics(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize('fails', ['write', 'picture', 'close'])
def test_a_writer_that_fails_is_left_out(tmp_path, stand_in, capsys, fails):
    """Whatever a package raises is said once; records and the others go on."""
    stand_in()
    log = MetricsLog(tmp_path, start_step=0, tensorboard=True, wandb_config=CONFIG)

    def fail(*_):
        raise ConnectionError('no network')

    setattr(log._writers['Weights & Biases'], fails, fail)
    for step in (2, 4, 6):
        log.write(record(step))
        log.picture('views', PICTURE, step)
    log.close()
    said = capsys.readouterr().out
    assert said.startswith('Weights & Biases failed and is left out from now on: ConnectionError')
    assert said.count('\n') == 1
    assert [r['step'] for r in read_metrics(tmp_path)] == [2, 4, 6]
    assert {step for name, step in events(tmp_path) if name == 'views'} == {2, 4, 6}


class StandIn:
    """The part of W&B's package that is used; a run that is resumed online knows its next step."""

    Error = type('Error', (Exception,), {})
    Settings = staticmethod(dict)
    Image = staticmethod(lambda path: f'picture {os.path.basename(path)}')

    def __init__(self, next_step=0):
        self.next_step, self.logged, self.asked = next_step, [], []

    def init(self, **arguments):
        self.asked.append(arguments)
        return SimpleNamespace(
            step=self.next_step,
            log=lambda values, step: self.logged.append((step, values)),
            finish=lambda: self.logged.append('finished'),
        )


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces the package by a stand-in; call it for another process."""
    monkeypatch.setattr(weights_and_biases, 'check_wandb', lambda: None)
    for name in ('WANDB_MODE', 'WANDB_PROJECT', 'WANDB_NAME'):
        monkeypatch.delenv(name, raising=False)

    def put(next_step=0):
        package = StandIn(next_step)
        monkeypatch.setitem(sys.modules, 'wandb', package)
        return package

    return put


def logged(package):
    """(step, names) of what was logged, in order."""
    return [(entry[0], sorted(entry[1])) for entry in package.logged if entry != 'finished']


def test_offline_unless_asked(tmp_path, stand_in, monkeypatch):
    """A run is offline, with the config in its workdir, unless WANDB_MODE says otherwise."""
    package = stand_in()
    open_log(tmp_path, 0).close()
    (asked,) = package.asked
    assert asked['mode'] == 'offline'
    assert asked['config'] == CONFIG
    assert asked['dir'] == str(tmp_path)
    assert asked['resume'] == 'allow'
    assert package.logged == ['finished']
    monkeypatch.setenv('WANDB_MODE', 'online')
    open_log(tmp_path, 0).close()
    assert package.asked[1]['mode'] == 'online'
    assert package.asked[1]['id'] == asked['id']


def test_resumed_offline_run_is_whole(tmp_path, stand_in):
    """After a kill, the next start logs all records that still count, in order, once."""
    stand_in()
    log = open_log(tmp_path, 0)
    log.picture('views', PICTURE, 0)
    for step in (2, 4, 6):
        log.write(record(step))
        log.picture('set/map', PICTURE, step)
    # Killed here, at step 6; the checkpoint is of step 4.
    package = stand_in()
    log = open_log(tmp_path, 4)
    log.write(record(6))
    log.picture('set/map', PICTURE, 6)
    scalars = ['epoch', 'loss']
    assert logged(package) == [
        (0, ['views']),
        (2, scalars),
        (2, ['set/map']),
        (4, scalars),
        (4, ['set/map']),
        (6, scalars),
        (6, ['set/map']),
    ]
    assert package.logged[1] == (2, {'epoch': 0.2, 'loss': 2.0})
    assert [r['step'] for r in read_metrics(tmp_path)] == [2, 4, 6]


def test_resumed_online_run_gets_what_it_lacks(tmp_path, stand_in):
    """Online W&B keeps what it received before the kill, and receives none of it again."""
    stand_in()
    log = open_log(tmp_path, 0)
    for step in (2, 4, 6):
        log.write(record(step))
    # Step 6 never reached the server.
    package = stand_in(next_step=5)
    log = open_log(tmp_path, 2)
    for step in (4, 6, 8):
        log.write(record(step))
    assert [step for step, _ in logged(package)] == [6, 8]


def test_late_picture_keeps_the_order(tmp_path, stand_in):
    """A picture that comes after a later record is logged beside it; W&B would drop it."""
    package = stand_in()
    log = open_log(tmp_path, 0)
    log.write(record(4))
    log.picture('map', PICTURE, 2)
    assert [step for step, _ in logged(package)] == [4, 4]


@pytest.mark.parametrize('error', [StandIn.Error, ValueError])
def test_refusal_of_wandb(tmp_path, stand_in, error, capsys):
    """What W&B refuses (no key, an unknown mode) is said once with what to do, and ends nothing."""
    package = stand_in()

    def refuse(**arguments):
        raise error('No API key configured.')

    package.init = refuse
    log = open_log(tmp_path, 0)
    log.write(record(2))
    said = capsys.readouterr().out
    assert said.startswith('Weights & Biases failed and is left out from now on: ')
    assert 'No API key configured. Unset WANDB_MODE' in said
    assert said.count('\n') == 1
    assert [r['step'] for r in read_metrics(tmp_path)] == [2]


@pytest.mark.parametrize('spec', [None, SimpleNamespace(origin=None)], ids=['none', 'a folder'])
def test_not_installed(tmp_path, monkeypatch, spec):
    """Without the package, a run stops before it reads or writes; a folder does not count."""
    from byol_jax.app.train import train
    from configs import default

    monkeypatch.setattr(weights_and_biases.importlib.util, 'find_spec', lambda name: spec)
    config = default.get_config()
    config.log.wandb = True
    config.data.path = '/nowhere/at/all'
    with pytest.raises(UserError, match='pip install wandb'):
        train(config, tmp_path / 'w', '')
    assert not (tmp_path / 'w').exists()


def history(path):
    """The content of W&B's transaction log: the logged values by step, and the run's record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part = path.read_bytes(), 7, b''
    assert data.startswith(b':W&B')
    values, run = [], None
    while position + 7 <= len(data):
        # LevelDB's log has blocks of 32 KiB; a record is one piece or several.
        if (left := -position % 32768) and left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from('<IHB', data, position)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # A whole record, or its last piece.
            entry, part = Record.FromString(part), b''
            if entry.WhichOneof('record_type') == 'history':
                items = {'/'.join(i.nested_key) or i.key: i.value_json for i in entry.history.item}
                values.append((entry.history.step.num, items))
            elif entry.WhichOneof('record_type') == 'run':
                run = entry.run
    return values, run


KILLED = """
    import os, sys
    from pathlib import Path
    from byol_jax.app.events import steps_without_events
from byol_jax.app.metrics import MetricsLog
    log = MetricsLog(
        Path(sys.argv[1]), start_step=0, tensorboard=False, wandb_config={'name': 'tiny'}
    )
    for step in (2, 4, 6):
        log.write({'step': step, 'epoch': step / 10, 'loss': 4 / step})
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_real_wandb(tmp_path, monkeypatch):
    """W&B's own file has all scalars once, in order, after a kill, and the right picture."""
    pytest.importorskip('wandb')
    monkeypatch.delenv('WANDB_MODE', raising=False)
    code = textwrap.dedent(KILLED)
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)], cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == -9
    # In a separate process, because W&B leaves threads and files open.
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from PIL import Image
        from byol_jax.app.events import steps_without_events
from byol_jax.app.metrics import MetricsLog
        log = MetricsLog(
            Path(sys.argv[1]), start_step=4, tensorboard=False,
            wandb_config={'name': 'tiny', 'optimizer': {'momentum': 0.9}},
        )
        log.write({'step': 6, 'epoch': 0.6, 'loss': 0.5})
        log.picture('views', Image.new('RGB', (7, 5), 'red'), 6)
        log.close()
    """)
    subprocess.run([sys.executable, '-c', code, str(tmp_path)], cwd=ROOT, timeout=60, check=True)
    newest = (tmp_path / 'wandb' / 'latest-run').resolve()
    assert newest.name.startswith('offline-run-')
    (path,) = newest.glob('*.wandb')
    values, run = history(path)
    assert [step for step, _ in values] == [2, 4, 6]
    assert [json.loads(items['loss']) for _, items in values] == [2.0, 1.0, 0.5]
    assert [json.loads(items['epoch']) for _, items in values] == [0.2, 0.4, 0.6]
    picture = newest / 'files' / json.loads(values[-1][1]['views/path'])
    assert Image.open(picture).getpixel((6, 4)) == (255, 0, 0)
    assert run.run_id == (tmp_path / 'wandb' / 'byol_jax' / 'run_id').read_text().strip()
    assert (run.project, run.display_name) == ('byol_jax', tmp_path.name)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config['optimizer'] == {'momentum': 0.9}


def events_of(folder):
    """The steps whose scalars can be read."""
    return sorted(step for step in range(20) if steps_without_events(folder, [step]) == [])


GONE = {
    'folder': lambda folder, file: shutil.rmtree(folder),
    'file': lambda folder, file: file.unlink(),
    'half': lambda folder, file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    'empty': lambda folder, file: file.write_bytes(b''),
    'binary': lambda folder, file: file.write_bytes(b'\xff' * 900),
    'bit': lambda folder, file: flip(file, 200),
    'length': lambda folder, file: file.write_bytes(b'\x00' * 7 + b'\x7f' + file.read_bytes()[8:]),
}


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize('damage', GONE)
def test_lost_events_are_written_again(tmp_path, capsys, damage):
    """Whatever has happened to TensorBoard's files, a resumed run's events hold all its records;
    what was left is kept, and it is said."""
    folder = tmp_path / 'tensorboard'
    log = open_log(tmp_path, 0, wandb=False)
    for step in (2, 4, 6):
        log.write(record(step))
    log.close()
    # A name of its own: another start within the same second would have the same.
    (file,) = folder.iterdir()
    file = file.rename(folder / 'events.out.tfevents.1.host')
    whole = file.read_bytes()
    open_log(tmp_path, 6, wandb=False).close()
    assert capsys.readouterr().out == ''
    assert file.read_bytes() == whole
    for other in folder.iterdir():
        other.unlink()
    file.write_bytes(whole)
    GONE[damage](folder, file)
    open_log(tmp_path, 6, wandb=False).close()
    assert events_of(folder) == [2, 4, 6]
    assert 'of 3 records; they are written again' in capsys.readouterr().out
    assert (tmp_path / 'tensorboard.damaged').exists() == (damage not in ('folder', 'file'))
    open_log(tmp_path, 6, wandb=False).close()
    assert capsys.readouterr().out == ''


def test_missing_records_are_named(tmp_path, capsys):
    """A resumed run says of which steps there is no record."""
    lines = ''.join(json.dumps(record(step)) + '\n' for step in (2, 8))
    (tmp_path / 'metrics.jsonl').write_text(lines)
    MetricsLog(tmp_path, start_step=12, every=2, tensorboard=False).close()
    said = capsys.readouterr().out
    assert said == f'{tmp_path / "metrics.jsonl"} has no record of steps 3 to 7, 9 to 12\n'
