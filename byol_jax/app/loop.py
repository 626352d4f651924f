"""The training run, from a config to an exported encoder and a report."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from byol_jax import __version__, settings
from byol_jax.app.bad_files import BadFilesLog
from byol_jax.app.build import Run, build_run
from byol_jax.app.checkpoints import Checkpoints
from byol_jax.app.claim import claimed
from byol_jax.app.devices import check_devices
from byol_jax.app.hooks import Event, Hook, Hooks, own_hooks
from byol_jax.app.hosts import (
    agree_to_end,
    check_same_values,
    is_main,
    part,
    say,
    stop_together,
    told_by_main,
    wait_for_all,
)
from byol_jax.app.introduction import Layers, Views, first_look, introduce
from byol_jax.app.memory import check_batches, keep_memory_steady, training_memory
from byol_jax.app.monitors import Alarms, LidarMonitor, Monitors
from byol_jax.app.output import lasting_output
from byol_jax.app.periodic import BeforeAfter, Periodic
from byol_jax.app.picture_cache import fill_cache
from byol_jax.app.report.run_report import RunReport
from byol_jax.app.reporting import Metrics, Report
from byol_jax.app.saving import NonFinite, Saving
from byol_jax.app.signals import Interrupted, StopSignals, stop_signals
from byol_jax.app.start import first_weights
from byol_jax.app.steps import Steps
from byol_jax.app.weights_and_biases import check_wandb
from byol_jax.app.workdir import check_apart
from byol_jax.errors import UserError
from byol_jax.interop.export import save_encoder
from byol_jax.settings import Settings
from byol_jax.sources.base import Source
from byol_jax.training.state import TrainState
from byol_jax.training.step import replicate


def train(
    config: Any, workdir: str | Path, command: str = '', source: Source | None = None
) -> None:
    """Trains up to the last step or until a hook stops the run, then exports and reports.

    A workdir that has checkpoints is continued from the newest good one.

    Args:
      config: whatever `Settings.of` takes.
      workdir: the folder that everything is written to.
      command: the command line that started the run, for the report and command.txt.
      source: the training pictures, instead of those that the config names.

    Raises:
      UserError: the config, the data or the workdir cannot be used, too many pictures cannot be
        read, or the loss is not finite.
      Interrupted: a signal stopped the run, after it saved a checkpoint.
    """
    keep_memory_steady()
    check_devices()
    with lasting_output(), stop_signals() as signals:
        _train(Settings.of(config), Path(workdir), command, source, signals)


def _train(
    config: Settings, workdir: Path, command: str, source: Source | None, signals: StopSignals
) -> None:
    versions = {'version of JAX': jax.__version__, 'version of byol_jax': __version__}
    check_same_values(versions | settings.flatten(config.plain))
    check_batches(config, jax.process_count(), held=config.data.prefetch + 1)
    if config.log.wandb:
        check_wandb()
    own = own_hooks(config.hooks)
    check_apart(workdir, config.data)
    first = first_weights(config.encoder.init_from, workdir, config.modules)
    run = build_run(config, source, first)._replace(workdir=workdir)
    run.data.check_labels()
    bad_files = BadFilesLog(run.data, config, workdir)
    with claimed(run, first, command):
        introduce(run)
        run = run._replace(pixels=first_look(run))
        checkpoints = Checkpoints(workdir, config.checkpoint.keep)
        state = _restored(run, checkpoints)
        with Hooks([*_hooks(run, command, checkpoints, bad_files), *own]) as hooks:
            hooks.start(run, state)
            fill_cache(run.data, config)
            wait_for_all('pictures decoded')
            with training_memory(config):
                end = _fit(run, replicate(state), hooks, bad_files, signals)
            part()
            if is_main():
                _finish(end, hooks)


def _hooks(run: Run, command: str, checkpoints: Checkpoints, bad_files: BadFilesLog) -> list[Hook]:
    """The built-in hooks, in the order in which they are called."""
    report, metrics = RunReport(run, run.workdir, command), Metrics()
    return [
        Layers(),
        Views(),
        # A record is written first, then judged by the alarms, then shown in the report.
        metrics,
        # Before the monitors: values that are not finite end the run and are never measured.
        Saving(checkpoints),
        Monitors(),
        LidarMonitor(),
        Alarms(),
        bad_files,
        Periodic(report, metrics),
        Report(report),
        BeforeAfter(report, metrics, bad_files),
    ]


def _restored(run: Run, checkpoints: Checkpoints) -> TrainState:
    """The state of the newest good checkpoint, or the initial one."""
    restored = checkpoints.restore(run.training.initial)
    if restored is None:
        return run.training.initial
    say(f'going on from the checkpoint of step {restored[0]}')
    return restored[1]


def _fit(
    run: Run, state: TrainState, hooks: Hooks, bad_files: BadFilesLog, signals: StopSignals
) -> Event:
    """Runs the remaining steps and returns the event of the last one.

    Raises:
      UserError: too many pictures cannot be read, or a hook ended the run with an error.
      NonFinite: the metrics of a step are not finite.
      Interrupted: a signal stopped the run, after a checkpoint.
    """
    plan = run.plan
    start = saved = int(state.step)
    event = Event(run, start, state)
    if event.last:
        say(f'all {plan.total_steps} steps are done')
        return event
    with closing(Steps(run, start, bad_files)) as steps, signals.held():
        for step in range(start + 1, plan.total_steps + 1):
            try:
                state, features = steps.make(state)
            except NonFinite:
                raise
            except UserError:
                # Too many pictures cannot be read, but the steps so far are sound: save them. With
                # several processes that is not possible, because the others have already begun
                # their next step and do not take part in saving.
                if jax.process_count() == 1 and step - 1 > saved:
                    event.add(steps.settle())
                    hooks.checkpoint(event)
                raise
            event = Event(run, step, state, features, steps.watch)
            if step % plan.log_steps == 0 or event.last:
                event.add(steps.settle())
                hooks.log(event)
                _agree(event)
            stopped = bool(event.error or event.reason)
            if not stopped and not event.last:
                stopped = stop_together(step, asked=bool(signals.received))
            if plan.saves(step) or stopped:
                event.add(steps.settle())
                hooks.checkpoint(event)
                saved = step
            if event.error:
                agree_to_end()
                raise event.error
            if event.reason:
                say(f'stopped at step {step:,} by a hook: {event.reason}')
                break
            if stopped:
                agree_to_end()
                raise Interrupted(*(signals.received[:1] or [signal.SIGTERM]), saved=True)
    return event


def _agree(event: Event) -> None:
    """Tells all processes whether a hook of process 0 asked to stop, so that all stop together."""
    event.reason = told_by_main(event.reason)
    error = told_by_main(str(event.error) if event.error else '')
    if error and event.error is None:
        event.error = UserError(error)


def _finish(end: Event, hooks: Hooks) -> None:
    """Exports the encoder, then calls `finish` of every hook."""
    folder = end.run.workdir / 'encoder'
    save_encoder(end.encoder, folder)
    hooks.finish(end)
    say(
        f'encoder: {folder} (weights sha256 {end.encoder.weights_sha256})\n'
        f'report:  {end.run.workdir / "report.html"}'
    )
