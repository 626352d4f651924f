"""Progress of slow work: a bar on a terminal, lines elsewhere, nothing for quick work."""

from __future__ import annotations

import io
import logging
import time

import pytest

from byol_jax.app import progress_bars
from byol_jax.app.progress_bars import ProgressBars, progress_shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that `ProgressBars` reads, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(progress_bars.time, 'monotonic', lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(clock, capsys):
    """Every ten seconds, a line says how many of how many are done and the time that is left."""
    progress = ProgressBars()
    for done in range(1, 41):
        clock[0] += 1
        progress('sizes read', done, 1000)
    progress('files listed', 1, 0)
    clock[0] += 10
    progress('files listed', 20_000, 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith('sizes read: 11 of 1,000, ')
    assert [line.split(' of ')[0] for line in lines] == [
        'sizes read: 11',
        'sizes read: 21',
        'sizes read: 31',
        'files listed: 20,000',
    ]


def test_quick_work_shows_nothing(capsys):
    """Work that ends at once leaves no line."""
    progress = ProgressBars()
    for done in range(1, 101):
        progress('sizes read', done, 100)
    progress.close()
    assert capsys.readouterr().err == ''


def test_a_bar_on_a_terminal(monkeypatch):
    """A terminal shows a bar, which disappears at the end."""
    terminal = Terminal()
    monkeypatch.setattr(progress_bars.sys, 'stderr', terminal)
    monkeypatch.setattr(progress_bars, '_BAR_AFTER_SECONDS', 0)
    progress = ProgressBars()
    progress('sizes read', 1, 4)
    time.sleep(0.2)
    progress('sizes read', 3, 4)
    progress.close()
    shown = terminal.getvalue()
    assert 'sizes read' in shown
    assert '| 3/4 [' in shown
    assert shown.endswith('\r')


def test_the_other_processes_of_a_run_are_quiet(clock, capsys):
    """Only one process shows progress."""
    progress = ProgressBars(quiet=True)
    for done in range(1, 100):
        clock[0] += 100
        progress('sizes read', done, 100)
    assert capsys.readouterr().err == ''


def test_what_sources_log_is_shown(capsys):
    """Messages of the sources are lines on stderr meanwhile; logging is unchanged afterwards."""
    logger = logging.getLogger('byol_jax')
    before = logger.level, logger.propagate, list(logger.handlers)

    with progress_shown():
        logging.getLogger('byol_jax.sources.file_list').info('3 files of x')
    assert capsys.readouterr().err == '3 files of x\n'
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
