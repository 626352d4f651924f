"""The training run, from a config to an exported encoder and a report."""

from __future__ import annotations

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
from byol_jax.app.hosts import check_same_values, is_main, part, say, wait_for_all
from byol_jax.app.introduction import Layers, Views, first_look, introduce
from byol_jax.app.loop import fit
from byol_jax.app.memory import check_batches, keep_memory_steady, training_memory
from byol_jax.app.monitors import Alarms, LidarMonitor, Monitors
from byol_jax.app.output import lasting_output
from byol_jax.app.periodic import BeforeAfter, Periodic
from byol_jax.app.picture_cache import fill_cache
from byol_jax.app.report.run_report import RunReport
from byol_jax.app.reporting import Metrics, Report
from byol_jax.app.saving import Saving
from byol_jax.app.signals import StopSignals, stop_signals
from byol_jax.app.start import first_weights
from byol_jax.app.weights_and_biases import check_wandb
from byol_jax.app.workdir import check_apart
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
        _train(Settings.of(config), Path(workdir).expanduser(), command, source, signals)


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
                end = fit(run, replicate(state), hooks, bad_files, signals)
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


def _finish(end: Event, hooks: Hooks) -> None:
    """Exports the encoder, then calls `finish` of every hook."""
    folder = end.run.workdir / 'encoder'
    save_encoder(end.encoder, folder)
    hooks.finish(end)
    say(
        f'encoder: {folder} (weights sha256 {end.encoder.weights_sha256})\n'
        f'report:  {end.run.workdir / "report.html"}'
    )
