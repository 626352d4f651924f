"""report.html of a run, from its workdir: while it is under way, when it stops, and at its end."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from PIL import Image

from byol_jax.app.hosts import is_main, say
from byol_jax.app.metrics import read_metrics
from byol_jax.app.progress import Stopwatch, duration
from byol_jax.app.report.alarm import Alarm, History, facts_of
from byol_jax.app.report.alarm_log import read_alarms, summary
from byol_jax.app.report.curves import curves_section
from byol_jax.app.report.page import (
    again_section,
    facts_section,
    progress_section,
    views_section,
    write_page,
)
from byol_jax.app.report.pictures import data_uri
from byol_jax.app.report.results import evaluation_section
from byol_jax.app.report.verdict import verdict, verdict_box
from byol_jax.app.setup import Run

# While the run is under way it is written once a minute, or, where that takes more than 1 % of the
# time (a metrics.jsonl of many thousand records), less often.
_SECONDS = 60.0
_SHARE = 0.01


class RunReport:
    """Writes the report; process 0 alone does. That it cannot be written is said, and no error.

    All that changes is read from the workdir, so a run that goes on continues its report too.
    """

    def __init__(self, run: Run, workdir: Path, command: str):
        """Args:
        run: to report on. workdir: of the run.
        command: that started it.
        """
        self._run, self._workdir, self._command = run, workdir, command
        self._facts = facts_of(run.config, run.plan)
        self._config = run.config.plain
        self._views = ''
        self._found: Sequence[str] = ()
        self._started = time.perf_counter()
        self._due = 0.0
        self._failed = False

    def begin(self, step: int) -> None:
        """Writes the page of a run that goes on from a step, before its next one is compiled."""
        self._write(step, f'Starting at step {step:,} of {self._run.plan.total_steps:,}.')
        # The first record is worth a page of its own.
        self._due = 0.0

    def update(self, step: int, watch: Stopwatch) -> None:
        """Writes the page if it is due; the time that takes is none of the steps'.

        Args:
          step: made, its record in metrics.jsonl. watch: of the run.
        """
        now = time.perf_counter()
        if now < self._due or not is_main():
            return
        total = self._run.plan.total_steps
        left = f', {duration(watch.seconds_left)} left' if watch.seconds_left else ''
        self._write(
            step,
            f'Under way: step {step:,} of {total:,} ({step / total:.0%}), epoch '
            f'{self._run.plan.epoch(step):.1f}{left}.',
        )
        watch.paused(time.perf_counter() - now)

    def show(self, found: Sequence[str]) -> None:
        """Has the pages from now on show what the encoder makes of pictures: HTML sections."""
        self._found = found
        self._due = 0.0

    def stopped(self, why: str) -> None:
        """Writes the page of a run that ends before its last step."""
        records = read_metrics(self._workdir) if is_main() else []
        self._write(records[-1]['step'] if records else 0, f'Stopped: {why}')

    def evaluating(self) -> None:
        """Writes the page of a run that has made its last step, and is measured now."""
        self._write(self._run.plan.total_steps, 'All steps are done; the encoder is measured now.')

    def finished(self, results: str, found: Sequence[str], bad_files: int) -> None:
        """Writes the page of a run that has ended.

        Args:
          results: the section on what was measured. found: those on what the encoder makes of
            pictures.
          bad_files: how many there were.
        """
        total = self._run.plan.total_steps
        words = f'Finished: all {total:,} steps ({self._run.plan.epoch(total):.1f} epochs).'
        self.show(found)
        self._write(total, words, results, bad_files)

    def _write(
        self, step: int, words: str, results: str = '', bad_files: int | None = None
    ) -> None:
        if not is_main():
            return
        began = time.perf_counter()
        try:
            self._write_sections(step, words, results, bad_files)
        except OSError as error:
            if not self._failed:
                say(f'report.html could not be written, the run goes on without: {error}')
            self._failed = True
        else:
            self._failed = False
        now = time.perf_counter()
        self._due = now + max(_SECONDS, (now - began) / _SHARE)

    def _write_sections(self, step: int, words: str, results: str, bad_files: int | None) -> None:
        workdir, facts = self._workdir, self._facts
        records = read_metrics(workdir)
        alarms = [Alarm(**line) for line in read_alarms(workdir)]
        if bad_files is None:
            bad_files = records[-1].get('bad_files', 0) if records else 0
        if not self._views:
            with Image.open(workdir / 'views.png') as picture:
                self._views = data_uri(picture)
        when = time.strftime('%Y-%m-%d %H:%M:%S')
        if not results:
            words += (
                f' Written at {when}; reload this page for what came since. A run under way writes '
                'it about once a minute. If the run was killed, the same command goes on.'
            )
        write_page(
            workdir / 'report.html',
            f'BYOL: {self._run.config.name}',
            [
                progress_section(step, self._run.plan.total_steps, words),
                verdict_box(verdict(records, alarms, facts)),
                results,
                evaluation_section(workdir, records),
                facts_section(self._summary(bad_files, records)),
                curves_section(records, facts, alarms),
                views_section(self._views),
                *self._found,
                again_section(self._command, self._config),
            ],
        )

    def _summary(self, bad_files: int, records: History) -> dict[str, str]:
        run, plan = self._run, self._run.plan
        versions = ', '.join(
            f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'flax', 'optax')
        )
        small = len(run.data.small)
        return {
            'Encoder': f'{run.config.encoder.name}, tapped at {run.config.encoder.hidden_layer}',
            **({'Start': run.training.origin} if run.training.origin else {}),
            'Training examples': f'{plan.examples:,} ({len(run.data.held_out):,} held out)',
            **({'Left out': f'{small:,} pictures smaller than a tile'} if small else {}),
            'Bad files': f'{bad_files:,}, named in bad_files.txt' if bad_files else 'none',
            'Alarms': summary(self._workdir),
            'Steps': f'{plan.total_steps:,} of {plan.batch_size} pairs '
            f'({plan.epoch(plan.total_steps):.1f} epochs)',
            **_speed(records),
            'Time of this start': duration(time.perf_counter() - self._started),
            'Devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
            'Versions': f'Python {platform.python_version()}, {versions}',
        }


def _speed(records: History) -> dict[str, str]:
    """The throughput, where the last record has it."""
    if not records or 'images_per_second' not in records[-1]:
        return {}
    last = records[-1]
    return {
        'Throughput': f'{last["images_per_second"]:,.0f} pairs of views a second, '
        f'input wait {last["input_wait_fraction"]:.0%}'
    }
