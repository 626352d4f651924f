"""The hooks that write every logged step: to metrics.jsonl, to the terminal and to report.html."""

from __future__ import annotations

from contextlib import suppress

from PIL import Image

from byol_jax.app.build import Run
from byol_jax.app.hooks import Event, Hook
from byol_jax.app.hosts import say
from byol_jax.app.metrics import MetricsLog
from byol_jax.app.progress import progress_line
from byol_jax.app.report.run_report import RunReport
from byol_jax.app.signals import Interrupted
from byol_jax.app.workdir import steps_between_records
from byol_jax.errors import UserError
from byol_jax.training.state import TrainState


class Metrics(Hook):
    """Writes each record to the metrics log and prints a line of progress.

    Attributes:
      log: the metrics log, which other hooks pass pictures to; set by `start`.
    """

    optional = False

    def start(self, run: Run, state: TrainState) -> None:
        """Opens the log, removes records after `state.step`, and logs views.png."""
        log, step = run.config.log, int(state.step)
        self.log = MetricsLog(
            run.workdir,
            start_step=step,
            every=max(log.every_steps, steps_between_records(run.workdir)),
            tensorboard=log.tensorboard,
            wandb_config=run.config.plain if log.wandb else None,
        )
        # Not there or not whole, if it could not be drawn; that is said where it is drawn.
        with suppress(OSError), Image.open(run.workdir / 'views.png') as views:
            views.load()
            self.log.picture('views', views, step)

    def logged(self, event: Event) -> None:
        self.log.write(event.record)
        say(progress_line(event.run.plan, event.step, event.record, event.watch.seconds_left))

    def close(self) -> None:
        self.log.close()


class Report(Hook):
    """Writes report.html during the run, and when the run ends early."""

    def __init__(self, pages: RunReport):
        """Writes nothing yet.

        Args:
          pages: the report of the run.
        """
        self._pages = pages

    def start(self, run: Run, state: TrainState) -> None:
        if state.step < run.plan.total_steps:
            self._pages.begin(int(state.step))

    def logged(self, event: Event) -> None:
        self._pages.update(event.step, event.watch)

    def finish(self, event: Event) -> None:
        self._pages.evaluating(event.step, event.reason)

    def fail(self, error: BaseException) -> None:
        told = isinstance(error, UserError | Interrupted)
        self._pages.stopped(str(error) if told else f'{type(error).__name__}: {error}')
