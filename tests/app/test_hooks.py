"""Hooks: order, failures, the record, and a run that the user's own hook watches and stops."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from conftest import TINY
from whole_runs import SAMPLE, assert_same_state, final_state

from byol_jax.app import hooks as hooks_module
from byol_jax.app import loop
from byol_jax.app.hooks import Event, Hook, Hooks, own_hooks
from byol_jax.app.introduction import shortened
from byol_jax.app.signals import Interrupted
from byol_jax.errors import UserError
from byol_jax.names import Named

PLAN = SimpleNamespace(total_steps=100, batch_size=8, epoch=lambda step: step / 10)
RUN = SimpleNamespace(plan=PLAN)


class Told(Hook):
    """Records what it is told, and fails where it is asked to."""

    def __init__(self, name: str, calls: list, fails: str = '', measures=None):
        self.name, self.calls, self.fails, self.measures = name, calls, fails, measures or {}

    def _note(self, what: str, *more):
        self.calls.append((what, self.name, *more))
        if what == self.fails:
            raise ZeroDivisionError('of all\nthings')

    def start(self, run, state):
        self._note('start')

    def measure(self, event):
        self._note('measure', set(event.record))
        return self.measures

    def logged(self, event):
        self._note('logged', set(event.record))

    def checkpoint(self, event):
        self._note('checkpoint')

    def finish(self, event):
        self._note('finish')

    def fail(self, error):
        self._note('fail')

    def close(self):
        self._note('close')


class NoHook:
    pass


class Needed(Told):
    optional = False


def whole(hooks: Hooks, steps: int = 1) -> None:
    with hooks as told:
        told.start(RUN, None)
        for step in range(1, steps + 1):
            event = Event(RUN, step, None)
            event.add({'loss': 1.0})
            told.log(event)
            told.checkpoint(event)
        told.finish(event)


def test_order():
    """Each phase is told to all hooks, in order, before the next one begins; a hook sees the
    metrics of those before it, and all see the complete record.
    """
    calls = []
    whole(Hooks([Told('a', calls, measures={'x': 1}), Told('b', calls, measures={'y': 2})]))
    known = {'step', 'epoch', 'loss'}
    assert calls == [
        ('start', 'a'),
        ('start', 'b'),
        ('measure', 'a', known),
        ('measure', 'b', known | {'x'}),
        ('logged', 'a', known | {'x', 'y'}),
        ('logged', 'b', known | {'x', 'y'}),
        ('checkpoint', 'a'),
        ('checkpoint', 'b'),
        ('finish', 'a'),
        ('finish', 'b'),
        ('close', 'a'),
        ('close', 'b'),
    ]


@pytest.mark.parametrize('phase', ['start', 'measure', 'logged', 'checkpoint', 'finish', 'close'])
def test_a_failing_optional_hook_is_left_out(phase, capsys):
    """One line names the hook, the error and the place; a started hook is closed, and the others
    continue.
    """
    calls = []
    whole(Hooks([Told('bad', calls, phase), Told('good', calls)]), steps=3)
    line = capsys.readouterr().out
    assert line.startswith('hook test_hooks:Told failed and is left out from now on: ')
    assert 'ZeroDivisionError: of all things (test_hooks.py:' in line
    assert line.count('\n') == 1
    bad = [what for what, name, *_ in calls if name == 'bad']
    assert bad.count(phase) == 1
    left = bad[bad.index(phase) + 1 :]
    assert left == ([] if phase in ('start', 'close') else ['close'])
    assert [what for what, name, *_ in calls if name == 'good'] == [
        'start',
        *['measure', 'logged', 'checkpoint'] * 3,
        'finish',
        'close',
    ]


def test_a_hook_that_fails_again_when_it_is_closed(capsys):
    """Both errors are said, and the run continues."""

    class Broken(Told):
        def close(self):
            raise OSError('no space')

    whole(Hooks([Broken('bad', [], 'logged')]), steps=2)
    first, second = capsys.readouterr().out.splitlines()
    assert 'ZeroDivisionError' in first
    assert 'OSError: no space' in second


def test_a_needed_hook_ends_the_run():
    """Its error ends the run; all started hooks are told of it, and closed."""
    calls = []
    hooks = Hooks([Told('a', calls), Needed('b', calls, 'start'), Told('c', calls)])
    with pytest.raises(ZeroDivisionError):
        whole(hooks)
    assert [(what, name) for what, name in calls] == [
        ('start', 'a'),
        ('start', 'b'),
        ('fail', 'a'),
        ('close', 'a'),
    ]


@pytest.mark.parametrize('error', [UserError('full'), Interrupted(15, saved=True), ValueError()])
@pytest.mark.parametrize('fails', ['fail', 'close'])
def test_the_reason_for_the_end_stays(error, fails, capsys):
    """What fails while a run ends is said; the run ends with the error that it ended with."""
    calls = []

    def run():
        with Hooks([Needed('a', calls, fails), Told('b', calls, fails)]) as told:
            told.start(RUN, None)
            raise error

    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error
    assert sorted(call[:2] for call in calls if call[0] != 'start') == [
        (phase, name) for phase in ('close', 'fail') for name in ('a', 'b')
    ]
    assert capsys.readouterr().out.count('ZeroDivisionError: of all things') == 2


def test_all_are_closed_though_one_cannot_be():
    """If a required hook cannot be closed, the others are closed all the same."""
    calls = []
    told = Hooks([Needed('a', calls, 'close'), Told('b', calls)])
    told.start(RUN, None)
    with pytest.raises(ZeroDivisionError):
        told.close()
    assert calls[-2:] == [('close', 'a'), ('close', 'b')]


@pytest.mark.parametrize(
    ('measures', 'words'),
    [
        ({'loss': 1.0}, "'loss' is in the record already"),
        ({'x': math.nan}, "'x' is nan"),
        ({'x': 'high'}, 'could not convert string to float'),
    ],
)
def test_what_a_hook_measures_is_checked(measures, words, capsys):
    """A hook can neither overwrite a metric of the record nor add a value that is not a number."""
    told, calls = [], []
    hook = Told('bad', calls, measures=measures)
    after = Told('good', told)
    whole(Hooks([hook, after]))
    assert words in capsys.readouterr().out
    assert told[2] == ('logged', 'good', {'step', 'epoch', 'loss'})


def test_the_record_cannot_be_changed():
    """A hook's view of the record is read-only."""
    event = Event(RUN, 3, None)
    with pytest.raises(TypeError):
        event.record['loss'] = 0.0
    assert event.record == {'step': 3, 'epoch': 0.3}


def test_only_process_0_calls_the_others(monkeypatch):
    """In other processes, only hooks that are required everywhere are called."""
    monkeypatch.setattr(hooks_module, 'is_main', lambda: False)
    calls = []

    class Everywhere(Told):
        everywhere = True

    whole(Hooks([Told('a', calls), Everywhere('b', calls)]))
    assert {name for _, name, *_ in calls} == {'b'}


def test_stopping():
    """The first reason counts, an error overrides it, and at the last step neither does."""
    event = Event(RUN, 3, None)
    event.stop('good\nenough')
    event.stop('another')
    assert event.reason == 'good enough'
    event.stop(error=UserError('bad'))
    event.stop('late')
    assert (str(event.error), event.reason) == ('bad', '')
    last = Event(RUN, 100, None)
    last.stop('late', UserError('late'))
    assert (last.error, last.reason) == (None, '')


@pytest.mark.parametrize(('reason', 'error'), [('enough', ''), ('', 'bad'), ('', '')])
def test_all_processes_stop_for_what_process_0_asks(monkeypatch, reason, error):
    """Only process 0 calls the user's hooks; the others receive its reason or error."""
    said = iter([reason, error])
    monkeypatch.setattr(loop, 'told_by_main', lambda own: next(said))
    event = Event(RUN, 3, None)
    loop._agree(event)
    assert (event.reason, str(event.error or '')) == (reason, error)


@pytest.mark.parametrize(
    ('named', 'words'),
    [
        (Named('nobody'), "hooks='nobody' is not a known hook"),
        (Named('test_hooks:Nobody'), "has no 'Nobody'"),
        (Named('test_hooks:Told', {'nam': 1}), "takes no argument 'nam'. Did you mean 'name'?"),
        (Named('test_hooks:NoHook'), 'makes a NoHook, not a byol_jax.Hook'),
    ],
)
def test_a_hook_that_cannot_be_made(named, words):
    """One line says what is wrong with the name or the arguments."""
    with pytest.raises(UserError) as caught:
        own_hooks((named,))
    assert words in str(caught.value)
    assert '\n' not in str(caught.value)


def test_a_long_table_of_layers_is_shortened():
    """More than 60 lines are cut to the head, the tapped layer's neighbourhood, and the sums."""
    rows = [f'layer{i}' for i in range(80)]
    rows[2] += '  <- tapped: the representation'
    text = shortened('\n'.join(['head', *rows, '', 'sums', 'more sums']))
    assert text.split('\n') == [
        'head',
        *rows[:8],
        '... 72 layers',
        '',
        'sums',
        'more sums',
    ]
    rows[2], rows[40] = 'layer2', 'layer40  <- tapped: the representation'
    lines = shortened('\n'.join(['head', *rows, '', 'sums'])).split('\n')
    assert lines[:3] == ['head', '... 35 layers', 'layer35']
    assert lines[-4:] == ['layer45', '... 34 layers', '', 'sums']
    short = '\n'.join(['head', *rows[:50], '', 'sums'])
    assert shortened(short) == short


# Whole runs.

OWN = '''
from byol_jax import Hook


class Stop(Hook):
    """Stops a run at a step, if it has not gone on from there."""

    def __init__(self, at):
        self.at = at

    def start(self, run, state):
        self.begun = int(state.step)
        self.notes = (run.workdir / 'notes.txt').open('a')
        print('begun at', self.begun, file=self.notes)

    def measure(self, event):
        assert event.features['projection'].shape[0] == 2
        assert event.encoder.description['step'] == event.step
        return {'twice_the_loss': 2 * event.record['loss']}

    def logged(self, event):
        if event.step >= self.at > self.begun:
            event.stop(f'rankme_projection is {event.record["rankme_projection"]:.0f}')

    def checkpoint(self, event):
        print('saved', event.step, file=self.notes)

    def finish(self, event):
        results = event.run.workdir / 'results.json'
        print('finished', event.step, results.exists(), file=self.notes)

    def close(self):
        self.notes.close()


class Broken(Hook):
    def logged(self, event):
        raise RuntimeError('no such thing')


class NeededBroken(Broken):
    optional = False
'''


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """A folder with the module own_hooks_of_tests."""
    folder = tmp_path_factory.mktemp('own')
    (folder / 'own_hooks_of_tests.py').write_text(OWN)
    return folder


def steps_of(workdir):
    records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [record['step'] for record in records], records


@pytest.fixture(scope='module')
def plain(main_py, tmp_path_factory):
    """A run without own hooks: (workdir, what it printed, its last state)."""
    workdir = tmp_path_factory.mktemp('plain') / 'w'
    result = main_py(SAMPLE, *TINY, f'--workdir={workdir}')
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout, final_state(workdir)


def test_own_hook_stops_a_run_that_then_goes_on(own, plain, tmp_path, main_py):
    """The stopped run ends properly, with checkpoint, encoder and report; the same command
    continues, and ends bit for bit as a run without hooks.
    """
    workdir = tmp_path / 'w'
    flags = (
        SAMPLE,
        *TINY,
        "--config.hooks=(('own_hooks_of_tests:Stop',{'at':3}),)",
        '--config.checkpoint.every_steps=100',
        f'--workdir={workdir}',
    )
    result = main_py(*flags, PYTHONPATH=str(own))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ''
    assert 'stopped at step 4 by a hook: rankme_projection is' in result.stdout
    assert 'trained 4 steps' in result.stdout
    steps, records = steps_of(workdir)
    assert steps == [2, 4]
    assert records[1]['twice_the_loss'] == 2 * records[1]['loss']
    assert json.loads((workdir / 'encoder' / 'encoder.json').read_text())['step'] == 4
    report = (workdir / 'report.html').read_text()
    assert 'Stopped by a hook at step 4 of 8 (' in report
    assert 'rankme_projection is' in report
    assert json.loads((workdir / 'results.json').read_text())['results'][1]['name'] == (
        'trained 4 steps'
    )
    result = main_py(*flags, PYTHONPATH=str(own))
    assert result.returncode == 0, result.stderr
    assert 'going on from the checkpoint of step 4' in result.stdout
    assert steps_of(workdir)[0] == [2, 4, 6, 8]
    assert 'Finished: all 8 steps' in (workdir / 'report.html').read_text()
    assert (workdir / 'notes.txt').read_text().splitlines() == [
        'begun at 0',
        'saved 4',
        'finished 4 True',
        'begun at 4',
        'saved 8',
        'finished 8 True',
    ]
    assert_same_state(final_state(workdir), plain[2])


@pytest.mark.slow
def test_a_broken_hook_does_not_end_a_run(own, plain, tmp_path, main_py):
    """Its error is said once, and the weights are those of a run without it; a required hook's
    error ends the run, and the report says so.
    """
    hook = '--config.hooks=own_hooks_of_tests:Broken'
    workdir = tmp_path / 'w'
    result = main_py(SAMPLE, *TINY, hook, f'--workdir={workdir}', PYTHONPATH=str(own))
    assert result.returncode == 0, result.stderr
    line = (
        'hook own_hooks_of_tests:Broken failed and is left out from now on: RuntimeError: no such '
        'thing (own_hooks_of_tests.py:'
    )
    assert result.stdout.count(line) == 1
    assert_same_state(final_state(workdir), plain[2])
    hook = '--config.hooks=own_hooks_of_tests:NeededBroken'
    workdir = tmp_path / 'needed'
    result = main_py(SAMPLE, *TINY, hook, f'--workdir={workdir}', PYTHONPATH=str(own))
    assert result.returncode != 0
    assert 'RuntimeError: no such thing' in result.stderr
    assert steps_of(workdir)[0] == [2]
    assert 'Stopped: RuntimeError: no such thing' in (workdir / 'report.html').read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_stop_together(own, tmp_path, monkeypatch):
    """A hook in process 0 stops both processes at the same step, with a saved state."""
    from whole_runs import finish, start_two

    monkeypatch.setenv('PYTHONPATH', str(own))
    hook = "--config.hooks=(('own_hooks_of_tests:Stop',{'at':3}),)"
    processes = start_two(tmp_path / 'w', hook)
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert 'stopped at step 4 by a hook' in outputs[0]
    assert 'trained 4 steps' in outputs[0]
    assert (tmp_path / 'w' / 'checkpoints' / '4').exists()
    assert not (tmp_path / 'w' / 'checkpoints' / '6').exists()


def test_layers_are_written(plain):
    """The table with the tapped layer marked is printed and written when training starts."""
    workdir, printed, _ = plain
    table = (workdir / 'layers.txt').read_text()
    assert table in printed + '\n'
    (tapped,) = (line for line in table.splitlines() if '<- tapped' in line)
    assert tapped.split()[0] == 'avgpool'
