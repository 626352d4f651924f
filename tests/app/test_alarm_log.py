"""alarms.jsonl and the verdict: what is said when, and what a resumed run writes."""

from __future__ import annotations

import json

import pytest
from records import FACTS, LATE, alarm, facts, healthy, record, sample_config

from byol_jax.app.alarm_log import (
    COLLAPSED,
    EARLY,
    HEALTHY,
    STOPPED,
    WATCHED,
    WRONG,
    AlarmLog,
    read_alarms,
    summary,
    verdict,
)
from byol_jax.app.alarms import WATCH, Alarm, pixel_alarms
from byol_jax.app.metrics import MetricsLog
from byol_jax.app.report.page import render
from byol_jax.app.report.run_report import Report
from byol_jax.input.pixels import Finding
from byol_jax.methods.base import LossScale

# A run of the default config; features have 128 channels, as in `healthy`.
STORY_FACTS = facts(sample_config())


def judge_all(workdir, history, start_step=0):
    """Writes records and judges them, as a run does; returns the lines said."""
    metrics = MetricsLog(workdir, start_step=start_step, tensorboard=False)
    log, lines = AlarmLog(workdir, STORY_FACTS, start_step), []
    for each in history:
        metrics.write(each)
        lines += log.judge(each)
    return lines


def story():
    """Three records each of a healthy, half collapsed, collapsed, and again healthy run."""
    shares = (0.8, 0.4, 0.1, 0.8)
    return [
        healthy(10 * (i + 1), feature_std=shares[i // 3] / 128**0.5) for i in range(3 * len(shares))
    ]


def test_alarms_are_said_once(tmp_path):
    """One line says that an alarm is raised, gets worse or is over; none is said in between."""
    lines = judge_all(tmp_path, story())
    assert [line.split(':')[0] for line in lines] == [
        'WATCH at step 50',
        'ALARM at step 80',
        'Over at step 100',
    ]
    written = read_alarms(tmp_path)
    assert [(a['step'], a['severity']) for a in written] == [
        (50, 'watch'),
        (80, 'alarm'),
        (100, 'over'),
    ]
    assert {'step', 'name', 'severity', 'evidence', 'cause', 'remedy'} == set(written[0])
    assert summary(tmp_path).startswith('collapse (alarm, step 80); ')


@pytest.mark.parametrize('killed_at', [30, 60, 70, 90, 110])
def test_a_resumed_run_writes_the_same_alarms(tmp_path, killed_at):
    """A run killed after any record and resumed from an earlier checkpoint has the same files."""
    whole, again = tmp_path / 'whole', tmp_path / 'again'
    whole.mkdir()
    again.mkdir()
    history = story()
    judge_all(whole, history)
    judge_all(again, [r for r in history if r['step'] <= killed_at])
    checkpoint = killed_at - 20
    before = AlarmLog(again, STORY_FACTS, checkpoint).still_raised()
    standing_then = {50 <= checkpoint < 80: 'watch', 80 <= checkpoint < 100: 'alarm'}.get(True)
    assert before.startswith(f'still raised from before: collapse ({standing_then})') or (
        standing_then is None and before == ''
    )
    judge_all(again, [r for r in history if r['step'] > checkpoint], start_step=checkpoint)
    assert read_alarms(again) == read_alarms(whole)


def test_without_alarms_there_is_no_file(tmp_path):
    """Neither a healthy run leaves alarms.jsonl, nor one whose alarms come after its checkpoint."""
    assert judge_all(tmp_path, [healthy(10 * n) for n in range(1, 7)]) == []
    assert not (tmp_path / 'alarms.jsonl').exists()
    assert summary(tmp_path) == 'none'
    (tmp_path / 'alarms.jsonl').write_text(json.dumps({'step': 99, 'name': 'x', 'severity': WATCH}))
    AlarmLog(tmp_path, STORY_FACTS, start_step=60)
    assert not (tmp_path / 'alarms.jsonl').exists()


@pytest.mark.parametrize(
    ('records', 'alarms', 'state'),
    [
        ([], [], EARLY),
        ([record(5), record(10)], [], EARLY),
        ([record(100)], [], EARLY),
        ([record(s) for s in LATE], [], HEALTHY),
        ([record(s) for s in LATE], [alarm('input_bound', 'watch')], WATCHED),
        ([record(s) for s in LATE], [alarm('learning_rate', 'alarm')], WATCHED),
        ([record(s) for s in LATE], [alarm('collapse', 'watch')], WATCHED),
        ([record(s) for s in LATE], [alarm('collapse', 'alarm')], COLLAPSED),
        ([record(s) for s in LATE], [alarm('trivial_loss', 'alarm')], COLLAPSED),
        (
            [record(s) for s in LATE],
            [alarm('collapse', 'alarm'), alarm('collapse', 'watch', 120)],
            WATCHED,
        ),
        (
            [record(s) for s in LATE],
            [alarm('collapse', 'alarm'), alarm('collapse', 'over', 120)],
            HEALTHY,
        ),
        (
            [record(s) for s in LATE],
            [alarm('collapse', 'alarm'), alarm('non_finite', 'alarm', 130)],
            STOPPED,
        ),
        ([record(10)], [alarm('non_finite', 'alarm', 12)], STOPPED),
        ([record(s, share=0.6) for s in LATE], [], WATCHED),
        ([record(s, share=0.6) for s in (20, 30)], [], HEALTHY),
    ],
    ids=[
        'nothing-logged',
        'before-step-20',
        'one-record',
        'no-alarm',
        'a-watch',
        'an-alarm-but-no-collapse',
        'collapse-as-a-watch',
        'collapse',
        'trivial-loss',
        'collapse-became-a-watch',
        'collapse-is-over',
        'not-finite',
        'not-finite-early',
        'low-std-without-alarm',
        'low-std-in-the-warm-up',
    ],
)
def test_verdict(records, alarms, state):
    """Each verdict follows from the alarms that stand and the last records, and gives reasons."""
    found = verdict(records, alarms, FACTS)
    assert found.state == state
    assert bool(found.reasons) == (state in (WATCHED, COLLAPSED, STOPPED))
    text = render('report.html', report=Report(verdict=found))
    assert state in text
    for reason in found.reasons:
        assert 'What to do' in text
        assert reason.name in text
    if records:
        assert f'At step {records[-1]["step"]}' in text


def test_verdict_names_evidence_and_remedy():
    """The box has the alarms' words, escaped, the worst first, and the alarms that are over."""
    alarms = [
        alarm('input_bound', 'watch', 100),
        alarm('weight_decay', 'watch', 100),
        alarm('collapse', 'alarm', 150),
        alarm('weight_decay', 'over', 160),
    ]
    found = verdict([record(s) for s in LATE], alarms, FACTS)
    assert [reason.name for reason in found.reasons] == ['collapse', 'input_bound']
    text = render('report.html', report=Report(verdict=found))
    assert 'seen &amp; measured' in text
    assert 'do &lt;this&gt;' in text
    assert 'now cleared: weight_decay' in text
    assert 'since step 150' in text


def test_verdict_measures_now():
    """An old alarm has the last record's numbers in its reason, and since when it stands."""
    late = [record(step, input_wait_fraction=0.5) for step in LATE]
    (reason,) = verdict(late, [alarm('input_bound', 'watch', 40)], FACTS).reasons
    assert 'no batch for 50% of the time' in reason.evidence
    assert (reason.step, reason.severity) == (40, 'watch')


def test_verdict_of_another_method():
    """The scale of the loss is the method's, and monitors that it lacks are left out."""
    bare = [{'step': step, 'loss': -0.5} for step in LATE]
    found = verdict(bare, [], FACTS._replace(loss_scale=LossScale(-1, 0, 1)))
    assert found.state == HEALTHY
    assert found.measured == 'At step 190: loss -0.5 (lowest -1, chance 0).'


def test_odd_pixels_are_said_before_the_first_record_and_stand(tmp_path):
    """Once, in alarms.jsonl from step 0 on; the verdict is 'wrong input', also of a resumed run."""
    dark = Finding('dark_pictures', True, 'the largest value is 16 of 255', '12 bits', 'scale them')
    known = STORY_FACTS._replace(pixels=pixel_alarms([dark]))
    metrics = MetricsLog(tmp_path, start_step=0, tensorboard=False)
    log = AlarmLog(tmp_path, known, 0)
    (line,) = log.begin()
    assert line.startswith('ALARM at step 0: dark_pictures: the largest value is 16 of 255. ')
    (raised,) = alarms = [Alarm(**each) for each in read_alarms(tmp_path)]
    before = verdict([], alarms, known)
    assert (before.state, before.reasons) == (WRONG, (raised,))
    history = [healthy(10 * (i + 1)) for i in range(6)]
    for each in history:
        metrics.write(each)
        assert log.judge(each) == []
    found = verdict(history, alarms, known)
    assert (found.state, found.reasons) == (WRONG, (raised,))
    assert verdict(history, [], STORY_FACTS).state == HEALTHY
    assert 'The first pictures or views cannot be what was meant' in render(
        'report.html', report=Report(verdict=found)
    )
    again = AlarmLog(tmp_path, known, 60)
    assert again.begin() == []
    assert again.still_raised().startswith('still raised from before: dark_pictures (alarm)')
    assert len(read_alarms(tmp_path)) == 1
