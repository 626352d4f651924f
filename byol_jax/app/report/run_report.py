"""Writes report.html from the workdir: during the run, when it stops early, and at its end."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from PIL import Image

from byol_jax.app.alarm_log import Verdict, summary, verdict
from byol_jax.app.alarms import Alarm, History, facts_of_run
from byol_jax.app.build import Run
from byol_jax.app.hooks import Event
from byol_jax.app.hosts import is_main
from byol_jax.app.left_out import tried
from byol_jax.app.metrics import MetricsLog
from byol_jax.app.progress import Stopwatch, duration
from byol_jax.app.records import read_alarms, read_metrics
from byol_jax.app.report.curves import Group, draw_curves
from byol_jax.app.report.files import is_evaluation
from byol_jax.app.report.illustrations import Illustrations, show_evaluations
from byol_jax.app.report.page import data_uri, page_bytes
from byol_jax.app.side_files import SideFile
from byol_jax.evaluation.table import Evaluation, describe
from byol_jax.files import Damaged, read_object

# Seconds between two reports during the run, and the largest share of the time that writing them
# may take. With many thousand records, reports are written less often.
_SECONDS = 60.0
_SHARE = 0.01

# Prefixes of the names of metrics that are shares of pictures; these are shown in percent.
_SHARES = ('knn_', 'linear', 'probe', 'ridge', 'recall_', 'online_probe_accuracy')

# Tables of metrics that are measured during training: prefixes of the names, and title. Each table
# has its own last step.
_DURING_TRAINING = (
    (('knn_', 'recall_'), 'During training'),
    (('online_probe_accuracy',), 'The online probe'),
)


class Result(NamedTuple):
    """A row of the before/after table.

    Attributes:
      name: name of the encoder.
      accuracy: nearest-neighbour accuracy, in [0, 1]; None if not measured.
      feature_std: std of the unit-length features, mean over channels.
    """

    name: str
    accuracy: float | None
    feature_std: float

    @property
    def accuracy_words(self) -> str:
        return 'not measured' if self.accuracy is None else f'{self.accuracy:.1%}'


class MetricTable(NamedTuple):
    """Metrics of one evaluation as text. If there are no rows, the note says why."""

    rows: Sequence[tuple[str, str]]
    note: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What templates/report.html shows. Sections without content are left out.

    Attributes:
      title: heading of the page.
      words: a line on how far the run is.
      step: number of steps made.
      total_steps: number of steps of the whole run.
      verdict: verdict on the run.
      results: the before/after table.
      protocol: how `results` were measured.
      evaluations: tables of other evaluations.
      facts: facts about the run: label -> text.
      curves: curves of the metrics; empty if nothing is logged yet, None to leave the section out.
      shaded: whether alarms are marked on the curves.
      views: views.png as a data: URI.
      shown: illustrations of the encoder.
      command: the command line that started the run.
      config: the resolved config as JSON.
    """

    title: str = ''
    words: str = ''
    step: int = 0
    total_steps: int = 0
    verdict: Verdict | None = None
    results: Sequence[Result] = ()
    protocol: str = ''
    evaluations: Sequence[MetricTable] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    curves: Sequence[Group] | None = None
    shaded: bool = False
    views: str = ''
    shown: Illustrations | None = None
    command: str = ''
    config: str = ''


class RunReport:
    """Writes the report, in process 0 only. A failure to write is printed, and the run goes on.

    Everything that changes is read from the workdir, so a resumed run continues its report.
    """

    def __init__(self, run: Run, workdir: Path, command: str):
        """Writes nothing yet.

        Args:
          run: the run.
          workdir: the workdir of the run.
          command: the command line that started it.
        """
        self._run, self._workdir, self._command = run, workdir, command
        self._facts = facts_of_run(run)
        self._views = ''
        self._shown: Illustrations | None = None
        self._started = time.perf_counter()
        self._due = 0.0
        self._file = SideFile(workdir / 'report.html')

    def begin(self, step: int) -> None:
        """Writes the page of a run that starts at a step, before that step is compiled."""
        self._write(step, f'Starting at step {step:,} of {self._run.plan.total_steps:,}.')
        # So that the first record is shown at once.
        self._due = 0.0

    def update(self, step: int, watch: Stopwatch) -> None:
        """Writes the page if it is due, and leaves that time out of the measured speed.

        Args:
          step: the last step in metrics.jsonl.
          watch: the run's stopwatch.
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

    def show(self, shown: Illustrations | None) -> None:
        """Sets the illustrations that pages show from now on, if any."""
        self._shown = shown
        self._due = 0.0

    def stopped(self, why: str) -> None:
        """Writes the page of a run that an error or a signal ended early."""
        records = read_metrics(self._workdir) if is_main() else []
        self._write(records[-1]['step'] if records else 0, f'Stopped: {why}')

    def evaluating(self, step: int, why: str) -> None:
        """Writes the page of a run that has made its last step, before its encoder is evaluated.

        Args:
          step: the last step.
          why: why a hook stopped the run; '' if all steps are done.
        """
        ended = f'Stopped by a hook: {why}.' if why else 'All steps are done.'
        self._write(step, f'{ended} The encoder is being evaluated.')

    def finished(
        self,
        step: int,
        why: str,
        results: Sequence[Result],
        protocol: str,
        shown: Illustrations | None,
        bad_files: int,
    ) -> None:
        """Writes the final page.

        Args:
          step: the last step.
          why: why a hook stopped the run; '' if all steps are done.
          results: the before/after table.
          protocol: how `results` were measured.
          shown: illustrations of the encoders; None if they failed.
          bad_files: number of files that could not be read.
        """
        total, epochs = self._run.plan.total_steps, self._run.plan.epoch(step)
        words = f'Finished: all {total:,} steps ({epochs:.1f} epochs).'
        if why:
            words = (
                f'Stopped by a hook at step {step:,} of {total:,} ({epochs:.1f} epochs): {why}. '
                'The same command resumes from there.'
            )
        self.show(shown)
        self._write(step, words, results, protocol, bad_files)

    def _write(
        self,
        step: int,
        words: str,
        results: Sequence[Result] = (),
        protocol: str = '',
        bad_files: int | None = None,
    ) -> None:
        if not is_main():
            return
        began = time.perf_counter()
        report = self._report(step, words, results, protocol, bad_files)
        page = page_bytes('report.html', report=report)
        self._file.replace(lambda partial: partial.write_bytes(page))
        now = time.perf_counter()
        self._due = now + max(_SECONDS, (now - began) / _SHARE)

    def _report(
        self,
        step: int,
        words: str,
        results: Sequence[Result],
        protocol: str,
        bad_files: int | None,
    ) -> Report:
        workdir, config = self._workdir, self._run.config
        records = read_metrics(workdir)
        alarms = [Alarm(**line) for line in read_alarms(workdir)]
        if bad_files is None:
            bad_files = records[-1].get('bad_files', 0) if records else 0
        # Not there or not whole, if it could not be drawn; that is said where it is drawn.
        with suppress(OSError):
            if not self._views:
                with Image.open(workdir / 'views.png') as picture:
                    self._views = data_uri(picture)
        if not results:
            words += (
                f' Written at {time.strftime("%Y-%m-%d %H:%M:%S")}. The run rewrites this page '
                'about once a minute; reload it to see what is new. If the run was killed, the '
                'same command resumes it.'
            )
        return Report(
            title=f'{config.name}: training report',
            words=words,
            step=step,
            total_steps=self._run.plan.total_steps,
            verdict=verdict(records, alarms, self._facts),
            results=results,
            protocol=protocol,
            evaluations=evaluation_tables(workdir, records),
            facts=self._summary(bad_files, records),
            curves=draw_curves(records, self._facts, alarms),
            shaded=bool(alarms),
            views=self._views,
            shown=self._shown,
            command=self._command,
            config=json.dumps(config.plain, indent=2, sort_keys=True),
        )

    def _summary(self, bad_files: int, records: History) -> dict[str, str]:
        run, plan = self._run, self._run.plan
        versions = ', '.join(
            f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'flax', 'optax')
        )
        small = len(run.data.small)
        return {
            'Method': run.config.method.name,
            'Encoder': f'{run.config.encoder.name}, tapped at {run.method.encoder.hidden_layer}',
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


def finish_report(
    end: Event,
    report: RunReport,
    log: MetricsLog,
    before: Evaluation | None,
    after: Evaluation,
    bad_files: int,
) -> str:
    """Writes the final report.html and results.json.

    Args:
      end: the last step of the run.
      report: the report of the run.
      log: the metrics log that gets the pictures.
      before: evaluation of the initial encoder; None if that is nowhere any more.
      after: evaluation of the trained encoder.
      bad_files: number of files that could not be read.

    Returns:
      The before/after table as text for the terminal.
    """
    run = end.run
    first = 'as loaded' if run.training.origin else 'randomly initialised'
    last = f'trained {end.step:,} steps'
    measured = {last: after} if before is None else {first: before, last: after}
    results = [Result(name, found.accuracy, found.feature_std) for name, found in measured.items()]
    alike = ' Both encoders are measured alike.' if before is not None else ''
    protocol = f'{describe(after, run.config.evaluate)}{alike}'
    write_results(run.workdir, results, protocol)
    shown: Illustrations | None = None

    def draw() -> None:
        nonlocal shown
        shown = show_evaluations(measured, run, log, end.step, with_umap=True)

    def write() -> None:
        report.finished(end.step, end.reason, results, protocol, shown, bad_files)

    # The table is there already: neither of them may cost it.
    tried('the illustrations of the report', draw)
    tried('report.html', write)
    return f'{_results_text(results)}\n{protocol}'


def write_results(workdir: Path, results: Sequence[Result], protocol: str) -> None:
    """Writes the before/after table to `workdir/results.json`.

    Args:
      workdir: the workdir of the run.
      results: rows of the table; the initial encoder comes first.
      protocol: a sentence on how they were measured.
    """
    content = {'protocol': protocol, 'results': [result._asdict() for result in results]}
    text = json.dumps(content, indent=2) + '\n'
    SideFile(workdir / 'results.json').replace(lambda partial: partial.write_text(text))


def _results_text(results: Sequence[Result]) -> str:
    """The before/after table as text for the terminal."""
    width = max(len(r.name) for r in results)
    lines = [f'{"encoder":<{width}}  nearest-neighbour accuracy  feature std']
    for r in results:
        lines.append(f'{r.name:<{width}}  {r.accuracy_words:>26}  {r.feature_std:>11.4f}')
    return '\n'.join(lines)


def evaluation_tables(workdir: Path, records: History) -> list[MetricTable]:
    """The tables of evaluation.json and of the last evaluation during training, if they exist.

    An evaluation.json that --mode=evaluate did not write gets a note instead of rows.

    Args:
      workdir: the workdir of the run.
      records: records of metrics.jsonl, oldest first.
    """
    tables = []
    path = workdir / 'evaluation.json'
    try:
        evaluation = read_object(path)
        if evaluation is not None and not is_evaluation(evaluation):
            raise Damaged(path, 'its metrics are no numbers by name')
        if evaluation is not None:
            tables.append(_of_file(evaluation))
    except Damaged as damage:
        note = f'evaluation.json is not what --mode=evaluate writes: {damage.what}.'
        tables.append(MetricTable((), note))
    for begins, what in _DURING_TRAINING:
        measured = [r for r in records if any(name.startswith(begins) for name in r)]
        if measured:
            last = measured[-1]
            metrics = {name: value for name, value in last.items() if name.startswith(begins)}
            tables.append(MetricTable(_rows(metrics), f'{what}, last at step {last["step"]:,}.'))
    return tables


def _of_file(evaluation: Mapping[str, Any]) -> MetricTable:
    sha256 = str(evaluation.get('weights_sha256', ''))[:12]
    of = f'evaluation.json: {evaluation.get("encoder", "")}, step {evaluation.get("step", 0):,}'
    note = f'{of}{f", weights {sha256}..." if sha256 else ""}.'
    return MetricTable(_rows(evaluation['metrics'], evaluation.get('shown', {})), note)


def _rows(
    metrics: Mapping[str, float], shown: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """Names and values as text; `shown` has the format that a protocol asked for, by metric."""
    formats = {name: '.1%' if name.startswith(_SHARES) else '.4g' for name in metrics}
    formats |= shown or {}
    return [(name, _formatted(value, formats[name])) for name, value in metrics.items()]


def _formatted(value: float, form: str) -> str:
    try:
        return f'{value:{form}}'
    except ValueError:
        # A format of a protocol of the user's own, or of a damaged file.
        return f'{value:.4g}'


def _speed(records: History) -> dict[str, str]:
    """The throughput, if the last record has it."""
    if not records or not {'images_per_second', 'input_wait_fraction'} <= records[-1].keys():
        return {}
    last = records[-1]
    return {
        'Throughput': f'{last["images_per_second"]:,.0f} pairs of views a second, '
        f'input wait {last["input_wait_fraction"]:.0%}'
    }
