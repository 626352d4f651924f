"""Records are read whatever has happened to their file, and none is lost without a word."""

from __future__ import annotations

import json

import pytest

from byol_jax.app.alarm_log import AlarmLog
from byol_jax.app.metrics import MetricsLog
from byol_jax.app.records import alarms_log, gap_words, gaps, metrics_log, read_metrics


def line(step, loss=1.0, **more):
    return json.dumps({'step': step, 'epoch': step / 10, 'loss': loss} | more).encode() + b'\n'


WHOLE = [line(step) for step in (2, 4, 6, 8)]


@pytest.mark.parametrize(
    ('lines', 'steps', 'damaged', 'repeated'),
    [
        (WHOLE, [2, 4, 6, 8], 0, 0),
        ([], [], 0, 0),
        ([b'\n'], [], 1, 0),
        ([WHOLE[0], b'{"step": 4, "lo\n', *WHOLE[2:]], [2, 6, 8], 1, 0),
        ([WHOLE[0], b'\xff\xfe\x00\n', b'[1]\n', b'null\n', *WHOLE[2:]], [2, 6, 8], 3, 0),
        ([b'{"step": true, "loss": 1}\n', b'{"step": -1, "loss": 1}\n'], [], 2, 0),
        ([b'{"step": 4.5, "loss": 1}\n', b'{"loss": 1}\n', b'{"step": 2}\n'], [], 3, 0),
        ([line(2, loss='1'), line(4, loss=[]), line(6, loss=None)], [], 3, 0),
        ([line(2, loss=10**400), b'[' * 100_000 + b'\n', line(4)], [4], 2, 0),
        ([*WHOLE, *WHOLE], [2, 4, 6, 8], 0, 4),
        ([WHOLE[2], WHOLE[0], WHOLE[3], WHOLE[1]], [2, 4, 6, 8], 0, 0),
        ([WHOLE[0].replace(b'\n', b'\r\n'), WHOLE[1]], [2, 4], 0, 0),
        # A kill cuts the last line off; one without its end is whole if it is an object.
        ([*WHOLE[:3], WHOLE[3][:-9]], [2, 4, 6], 0, 0),
        ([*WHOLE[:3], WHOLE[3][:-1]], [2, 4, 6, 8], 0, 0),
    ],
)
def test_what_is_read(tmp_path, lines, steps, damaged, repeated):
    """Sound records in their order, each step once; what is none is counted."""
    (tmp_path / 'metrics.jsonl').write_bytes(b''.join(lines))
    log = metrics_log(tmp_path)
    assert [record['step'] for record in log.records] == steps
    assert (log.damaged, log.repeated) == (damaged, repeated)


def test_of_two_records_of_a_step_the_last_counts(tmp_path):
    """A run that was killed and has gone on has measured it again."""
    (tmp_path / 'metrics.jsonl').write_bytes(line(2, 3.0) + line(4) + line(2, 5.0))
    assert [record['loss'] for record in read_metrics(tmp_path)] == [5.0, 1.0]


def test_no_file_and_no_file_at_all(tmp_path):
    """Nothing there is no record; a folder in its place is said."""
    assert metrics_log(tmp_path).wrong == ''
    (tmp_path / 'metrics.jsonl').mkdir()
    assert metrics_log(tmp_path).records == []
    assert metrics_log(tmp_path).wrong == 'it is a folder, not a file'


def test_a_run_keeps_the_damaged_file(tmp_path, capsys):
    """It goes on with the sound records; the file as it was is kept, and it is said, once."""
    path = tmp_path / 'metrics.jsonl'
    damaged = WHOLE[0] + b'\x00\x01\n' + WHOLE[2] + WHOLE[2]
    path.write_bytes(damaged)
    for _ in range(2):
        log = MetricsLog(tmp_path, start_step=6, tensorboard=False)
        log.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert '1 damaged line(s) left out, 1 repeated line(s) counted once' in said[0]
    assert path.read_bytes() == WHOLE[0] + WHOLE[2]
    assert (tmp_path / 'metrics.jsonl.damaged').read_bytes() == damaged


ALARM = {'step': 4, 'name': 'a', 'severity': 'watch', 'evidence': '', 'cause': '', 'remedy': ''}


def test_alarms_are_read_alike(tmp_path, capsys):
    """A line is an alarm with all that it has, or damage; the same line twice is one."""
    lines = [
        ALARM,
        ALARM,
        ALARM | {'severity': 'over', 'step': 6},
        ALARM | {'severity': 'loud'},
        ALARM | {'name': 5},
        {'step': 4, 'name': 'a'},
        ALARM | {'more': 1},
    ]
    text = ''.join(json.dumps(each) + '\n' for each in lines)
    (tmp_path / 'alarms.jsonl').write_text(text)
    log = alarms_log(tmp_path)
    assert log.records == [lines[0], lines[2]]
    assert (log.damaged, log.repeated) == (4, 1)
    AlarmLog(tmp_path, None, start_step=8)
    assert '4 damaged line(s) left out' in capsys.readouterr().out
    assert alarms_log(tmp_path).wrong == ''
    assert alarms_log(tmp_path).records == log.records
    assert (tmp_path / 'alarms.jsonl.damaged').read_text() == text


@pytest.mark.parametrize(
    ('steps', 'every', 'last', 'expected'),
    [
        ([10, 20, 30], 10, 30, []),
        ([10, 20, 30], 10, 35, []),
        ([10, 20, 30], 10, 40, [(31, 40)]),
        ([20, 30, 60], 10, 60, [(1, 19), (31, 59)]),
        ([], 10, 9, []),
        ([], 10, 25, [(1, 25)]),
        # log.every_steps was 30 for a while.
        ([10, 20, 50, 80, 110, 140, 150], 10, 150, []),
        # Stopped at 37, and logged there.
        ([10, 20, 30, 37, 40], 10, 40, []),
    ],
)
def test_gaps(steps, every, last, expected):
    """Stretches without a record that should have one, at the beginning and the end too."""
    assert gaps(steps, every, last) == expected


def test_gaps_in_words(tmp_path):
    """A line that names the first few; none for none."""
    assert gap_words(tmp_path, []) == ''
    words = gap_words(tmp_path / 'm', [(1, 19), (31, 59)])
    assert words == f'{tmp_path / "m"} has no record of steps 1 to 19, 31 to 59'
    assert gap_words(tmp_path, [(i, i) for i in range(9)]).endswith('4 to 4 and 4 more')
