"""Signals that ask a run to stop: which, when, and how often."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from byol_jax.app import signals as module
from byol_jax.app.signals import Interrupted, stop_signals

STOPPING = ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2']


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def held(*names: str, then=lambda signals: None) -> None:
    """A run gets signals while it makes steps."""
    with stop_signals() as signals, signals.held():
        for name in names:
            send(name)
        then(signals)


@pytest.fixture(autouse=True)
def handlers():
    """Pytest's own handlers as they were."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in STOPPING}
    yield
    after = {name: signal.getsignal(getattr(signal, name)) for name in STOPPING}
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)
    assert after == before


@pytest.mark.parametrize('name', STOPPING)
def test_the_first_while_steps_are_made(name, capfd):
    """It is noted and said; the run saves its state, and the end says which signal it was."""
    received = []
    with pytest.raises(Interrupted) as caught:
        held(name, then=lambda signals: received.extend(signals.received))
    assert received == [getattr(signal, name)]
    assert capfd.readouterr().out == f'\n{name}: saving after this step ...\n'
    assert str(caught.value) == f'{name}, and the state is saved.'
    assert caught.value.signal_number == getattr(signal, name)


@pytest.mark.parametrize('name', STOPPING)
def test_the_first_before_or_after_the_steps(name):
    """There is nothing to wait for: it ends the run where it is."""
    with stop_signals() as signals:
        with pytest.raises(Interrupted, match=f'{name}, and the last checkpoint is kept'):
            send(name)
        # While the run ends, another one does not break into it.
        send(name)
        assert len(signals.received) == 2


@pytest.mark.parametrize(
    'names', [('SIGTERM', 'SIGTERM'), ('SIGTERM', 'SIGHUP'), ('SIGUSR1', 'SIGTERM', 'SIGTERM')]
)
def test_twice_does_not_cost_the_state(names, capfd):
    """Schedulers send it twice, or another one after it: what the first saves is waited for."""
    with pytest.raises(Interrupted) as caught:
        held(*names)
    assert str(caught.value) == f'{names[0]}, and the state is saved.'
    assert capfd.readouterr().out.count('a third') == len(names) - 1


@pytest.mark.parametrize('name', STOPPING)
def test_a_third_time_ends_the_process(name, monkeypatch):
    """Then a person means it: the signal does what it does to any process."""
    number, killed = getattr(signal, name), []

    def once_more(signals):
        monkeypatch.setattr(module.os, 'kill', lambda *what: killed.append(what))
        signals.note(number, None)
        killed.append(signal.getsignal(number))

    with pytest.raises(Interrupted):
        held(name, name, then=once_more)
    assert killed == [(os.getpid(), number), signal.SIG_DFL]


def test_errors_are_not_hidden():
    """An error that ends the steps is what the run ends with, also after a signal."""
    with pytest.raises(ZeroDivisionError):
        held('SIGTERM', then=lambda signals: 1 / 0)


def test_what_is_ignored_stays_so(capfd):
    """`nohup` ignores SIGHUP, and the run outlives its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals() as signals, signals.held():
        send('SIGHUP')
        assert signals.received == []
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_handlers_of_the_user_stay(capfd):
    """A program that uses the library may have its own use for SIGUSR1."""
    got = []
    signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    with stop_signals() as signals, signals.held():
        send('SIGUSR1')
    assert got == [signal.SIGUSR1]
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_in_a_thread():
    """Python allows handlers in the main thread only: a run in another one does without."""
    found = []

    def run():
        with stop_signals() as signals, signals.held():
            found.append(signals.received)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[]]


def test_of_several_processes(monkeypatch, capfd):
    """JAX hears SIGTERM alone, and has all stop at the same step: others are passed on to it."""
    monkeypatch.setattr(module.jax, 'process_count', lambda: 2)
    passed_on = []
    monkeypatch.setattr(module.os, 'kill', lambda *what: passed_on.append(what))
    received = []

    def then(signals):
        signal.raise_signal(signal.SIGUSR1)
        received.extend(signals.received)

    held(then=then)
    assert passed_on == [(os.getpid(), signal.SIGTERM)]
    assert received == [signal.SIGUSR1]


def test_closed_output(monkeypatch):
    """A signal that comes while nobody listens any more is handled all the same."""
    read, write = os.pipe()
    os.close(read)
    real = os.write
    monkeypatch.setattr('byol_jax.app.output.os.write', lambda fd, data: real(write, data))
    with pytest.raises(Interrupted):
        held('SIGTERM')
    os.close(write)


def test_the_troubleshooting_page_names_them():
    """Each signal that stops a run is on the page that says what to do."""
    page = (Path(__file__).parents[2] / 'docs' / 'troubleshooting.md').read_text()
    assert [name for name in STOPPING if name not in page] == []
