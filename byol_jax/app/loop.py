"""The loop of a run: a step, and what is due after it."""

from __future__ import annotations

import signal
from contextlib import closing

import jax

from byol_jax.app.bad_files import BadFilesLog
from byol_jax.app.build import Run
from byol_jax.app.hooks import Event, Hooks
from byol_jax.app.hosts import agree_to_end, say, stop_together, told_by_main
from byol_jax.app.saving import NonFinite
from byol_jax.app.signals import Interrupted, StopSignals
from byol_jax.app.steps import Steps
from byol_jax.errors import UserError
from byol_jax.training.state import TrainState


def fit(
    run: Run, state: TrainState, hooks: Hooks, bad_files: BadFilesLog, signals: StopSignals
) -> Event:
    """Runs the remaining steps and returns the event of the last one.

    Args:
      run: the run.
      state: the state to go on from, replicated over the devices. Its memory is reused.
      hooks: the run's hooks, started.
      bad_files: counts the pictures that cannot be read.
      signals: signals of this process.

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
