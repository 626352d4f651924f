"""The training run, from a config to an exported encoder and a report.

Order of a run: open and check everything; claim the workdir; draw the views; fill data.cache;
resume or start; then for each step: wait for the step before, take a batch, run the step, log,
checkpoint; at the end: last checkpoint, encoder, before/after table, report.
"""

from __future__ import annotations

import json
import signal
import time
from collections import deque
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from byol_jax.app.bad_files import BadFilesLog
from byol_jax.app.build import Run, build_run, memory_named, online_encoder, step_of
from byol_jax.app.checkpoints import Checkpoints
from byol_jax.app.hosts import (
    check_same_everywhere,
    is_main,
    part,
    say,
    stop_together,
    wait_for_all,
)
from byol_jax.app.metrics import MetricsLog
from byol_jax.app.monitors import Monitors, NonFinite, check_finite
from byol_jax.app.periodic import Periodic, neighbours_of
from byol_jax.app.picture_cache import fill_cache
from byol_jax.app.progress import Stopwatch, duration, progress_line
from byol_jax.app.report.illustrations import show_evaluations
from byol_jax.app.report.pictures import draw_views
from byol_jax.app.report.run_report import RunReport, finish_report
from byol_jax.app.signals import Interrupted, stop_signals
from byol_jax.app.weights_and_biases import check_wandb
from byol_jax.app.workdir import claim_workdir, fingerprint
from byol_jax.errors import UserError
from byol_jax.input.feed import open_feed
from byol_jax.interop.export import save_encoder
from byol_jax.settings import Settings
from byol_jax.training.online_probe import too_many_labels, without_unlabelled
from byol_jax.training.state import TrainState
from byol_jax.training.step import pmap_feed, replicate, shard_batch


def train(config: Any, workdir: Path, command: str) -> None:
    """Trains, or goes on training, until the config's last step; then evaluates and reports.

    Args:
      config: a resolved config.
      workdir: where everything is written.
      command: that started the run, for the report and command.txt.

    Raises:
      UserError: something cannot be used, too many pictures cannot be read, or the loss is not
        finite.
      Interrupted: by SIGTERM or Ctrl-C, after a checkpoint.
    """
    if config.log.wandb:
        check_wandb()
    config = Settings.of(config)
    run = build_run(config)
    run.data.check_labels()
    report = RunReport(run, workdir, command)
    bad_log = BadFilesLog(run.data, config, workdir)
    data = fingerprint(run.data)
    check_same_everywhere(json.dumps(data), 'The data')
    if is_main():
        claim_workdir(workdir, config, data, command)
        bad_log.open()
        # What cannot be read here is counted when it comes in training.
        draw_views(run, workdir)
    wait_for_all('workdir claimed')
    _introduce(run, workdir)
    fill_cache(run.data, config)
    wait_for_all('pictures decoded')
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    restored = checkpoints.restore(run.training.initial)
    state = run.training.initial
    if restored is not None:
        state = restored[1]
        say(f'going on from the checkpoint of step {restored[0]}')
    log = None
    if is_main():
        log = MetricsLog(
            workdir,
            start_step=int(state.step),
            tensorboard=config.log.tensorboard,
            wandb_config=config.plain if config.log.wandb else None,
        )
        with Image.open(workdir / 'views.png') as views:
            log.picture('views', views, int(state.step))
    monitors = Monitors(run, workdir, int(state.step))
    with closing(log) if log is not None else nullcontext():
        try:
            with memory_named(config):
                state = _fit(run, replicate(state), checkpoints, log, bad_log, monitors, report)
        except (UserError, Interrupted) as error:
            if isinstance(error, NonFinite):
                monitors.stopped(error, checkpoints.newest())
            report.stopped(str(error))
            raise
        finally:
            # Closing waits for the other processes, which after an error may never come.
            if jax.process_count() == 1:
                checkpoints.close()
            bad_log.close()
        part()
        if log is not None:
            _finish(run, state, workdir, bad_log, report, log)


def _introduce(run: Run, workdir: Path) -> None:
    plan, data = run.plan, run.data
    tested = '' if data.test is None else f', {len(data.test.train):,} in the test set'
    say(
        f'{plan.examples:,} training examples, {len(data.held_out):,} held out{tested}; '
        f'{plan.total_steps:,} steps of {plan.batch_size} pairs '
        f'({plan.epoch(plan.total_steps):.1f} epochs) on {plan.device_count} '
        f'{jax.devices()[0].device_kind} device(s)\n'
        f'{run.training.excluded}'
    )
    too_many = too_many_labels(data.train) if run.config.evaluate.online_probe else ''
    for line in (*data.left_out(), too_many):
        if line:
            say(line)
    if run.training.origin:
        say(run.training.origin)
    if plan.freeze_steps:
        say(f'projector and predictor train alone for the first {plan.freeze_steps:,} steps')
    say(f'view pairs: {workdir / "views.png"}')


def _fit(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    log: MetricsLog | None,
    bad_log: BadFilesLog,
    monitors: Monitors,
    report: RunReport,
) -> TrainState:
    """Runs the remaining steps."""
    plan, config = run.plan, run.config
    start = int(state.step)
    if start >= plan.total_steps:
        say(f'all {plan.total_steps} steps are done')
        return state
    report.begin(start)
    bad_files = bad_log.bad_files
    periodic = Periodic(run)
    feed = open_feed(
        run.data.train,
        run.views,
        batch_size=plan.batch_size,
        seed=config.seed,
        start_step=start,
        stop_step=plan.total_steps,
        on=config.views.on,
        labels=run.training.initial.online_probe is not None,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        bad_files=bad_files,
    )
    step_fn = pmap_feed(
        step_of(config, plan, run.method, run.training, plan.monitored),
        feed,
        monitored=True,
    )
    devices = jax.local_device_count()
    # Simulated devices on few cores can deadlock with two steps under way.
    most_under_way = 1 if jax.default_backend() == 'cpu' else 2
    under_way: deque[tuple[int, Any]] = deque()
    watch: Stopwatch | None = None
    record: dict[str, float] = {}
    say('compiling the training step ...')
    # Left open, its threads would keep the process from ending after an error.
    with closing(feed.batches), stop_signals() as stop:
        for step in range(start + 1, plan.total_steps + 1):
            while len(under_way) >= most_under_way:
                _settle(under_way)
            waiting = time.perf_counter()
            try:
                batch = next(feed.batches)
            except UserError:
                # What is trained so far is sound: it must not be lost to damaged pictures.
                record = _settle_all(under_way) or record
                # Alone: the other processes are in their next step and would not join in saving.
                alone = jax.process_count() == 1
                if alone and step - 1 not in (start, checkpoints.newest()):
                    monitors.check_state(state, record)
                    checkpoints.save(step - 1, state)
                raise
            bad_log.note()
            if watch is not None and not _busy(under_way):
                watch.waited(time.perf_counter() - waiting)
            state, metrics, features = step_fn(state, shard_batch(batch, devices))
            under_way.append((step, metrics))
            if watch is None:
                record = _settle(under_way)
                say(f'compiled in {duration(time.perf_counter() - waiting)}')
                # Speed is counted from the second step on; the first one compiles.
                watch = Stopwatch(plan, step)
            last = step == plan.total_steps
            too_many = False
            if step % plan.log_steps == 0 or last:
                record = _settle_all(under_way) or record
                bad_log.note_all()
                values = record | monitors.measure(step, record, features, state)
                values |= {'bad_files': len(bad_files)} | periodic(step, state, watch)
                monitors.judge(_log(run, log, watch, step, values))
                _show(run, log, report, periodic, step, watch)
                report.update(step, watch)
                # Of several processes only now does each know what all have found.
                too_many = not last and bad_files.too_many()
            stopping = not last and (too_many or stop_together(step, asked=bool(stop)))
            if step % plan.checkpoint_steps == 0 or last or stopping:
                record = _settle_all(under_way) or record
                monitors.check_state(state, record)
                checkpoints.save(step, state)
            if too_many:
                bad_files.check()
            if stopping:
                raise Interrupted(stop[0] if stop else signal.SIGTERM)
    return state


def _settle(under_way: deque[tuple[int, Any]]) -> dict[str, float]:
    """Waits for the oldest step under way and returns its metrics."""
    step, metrics = under_way.popleft()
    values = without_unlabelled({n: float(value) for n, value in jax.device_get(metrics).items()})
    check_finite(step, values)
    return values


def _busy(under_way: deque[tuple[int, Any]]) -> bool:
    """Whether the devices still have a step to work on, so that they wait for no input."""
    return bool(under_way) and not under_way[-1][1]['loss'].is_ready()


def _settle_all(under_way: deque[tuple[int, Any]]) -> dict[str, float]:
    values: dict[str, float] = {}
    while under_way:
        values = _settle(under_way)
    return values


def _log(
    run: Run, log: MetricsLog | None, watch: Stopwatch, step: int, values: dict[str, float]
) -> dict[str, float]:
    """Writes and says what is known of a step; returns the record."""
    record = {'step': step, 'epoch': run.plan.epoch(step), **values, **watch.lap(step)}
    if log is not None:
        log.write(record)
    say(progress_line(run.plan, step, record, watch.seconds_left))
    return record


def _show(
    run: Run,
    log: MetricsLog | None,
    report: RunReport,
    periodic: Periodic,
    step: int,
    watch: Stopwatch,
) -> None:
    """Has the report show what was just found of pictures, if anything was; the end does better."""
    found, periodic.found = periodic.found, None
    if found is None or log is None or step == run.plan.total_steps:
        return
    began = time.perf_counter()
    name = f'step {step:,}'
    report.show(show_evaluations({name: found}, run, log, step, with_umap=False))
    watch.paused(time.perf_counter() - began)


def _finish(
    run: Run,
    state: TrainState,
    workdir: Path,
    bad_log: BadFilesLog,
    report: RunReport,
    log: MetricsLog,
) -> None:
    report.evaluating()
    trained = online_encoder(run.config, run.method, state)
    save_encoder(trained, workdir / 'encoder')
    say('comparing the encoder before and after training ...')
    try:
        untrained = online_encoder(run.config, run.method, run.training.initial)
        before = neighbours_of(untrained, run.data, run.config)
        after = neighbours_of(trained, run.data, run.config)
        # Those of held-out pictures are found only here.
        bad_log.bad_files.add(before.bad + after.bad)
        bad_log.close()
        text = finish_report(run, workdir, report, log, before, after, len(bad_log.bad_files))
    except UserError as error:
        why = (
            f'Training is done and the encoder is in {workdir / "encoder"}, but it could not be '
            f'evaluated: {error} Then give the same command again for the report.'
        )
        report.stopped(why)
        raise UserError(why) from error
    say(
        f'\n{text}\n\nencoder: {workdir / "encoder"} (weights sha256 {trained.weights_sha256})\n'
        f'report:  {workdir / "report.html"}'
    )
