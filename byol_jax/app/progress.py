"""The progress line: loss, speed, input wait and time left."""

from __future__ import annotations

import time
from collections.abc import Mapping

from byol_jax.app.plan import Plan


class Stopwatch:
    """Measures speed and input wait between two log lines.

    Attributes:
      seconds_left: estimated time to the end of the run; 0 before anything is measured.
    """

    def __init__(self, plan: Plan, step: int):
        """Starts measuring.

        Args:
          plan: plan of the run.
          step: number of optimizer steps made before.
        """
        self._plan = plan
        self._start = self._last = time.perf_counter()
        self._start_step = self._last_step = step
        self._waited = 0.0
        self.seconds_left = 0.0

    def waited(self, seconds: float) -> None:
        """Adds time that the devices waited for the input pipeline."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Leaves out time that the run spent on something other than steps."""
        self._start += seconds
        self._last += seconds

    def lap(self, step: int) -> dict[str, float]:
        """Returns the figures since the last lap and begins a new lap.

        Args:
          step: number of optimizer steps made.

        Returns:
          'images_per_second': examples (pairs) of the whole batch; 'input_wait_fraction': share of
          the time, 0 to 1, in which the devices had no batch. Empty if no step was made since.
        """
        now = time.perf_counter()
        elapsed, steps = max(now - self._last, 1e-9), step - self._last_step
        if not steps:
            return {}
        figures = {
            'images_per_second': steps * self._plan.batch_size / elapsed,
            'input_wait_fraction': min(1.0, self._waited / elapsed),
        }
        each = (now - self._start) / (step - self._start_step)
        self.seconds_left = (self._plan.total_steps - step) * each
        self._last, self._last_step, self._waited = now, step, 0.0
        return figures


def progress_line(plan: Plan, step: int, record: Mapping[str, float], seconds_left: float) -> str:
    """The progress line of a record; without speed if none has been measured yet."""
    line = (
        f'step {step:>{len(str(plan.total_steps))}}/{plan.total_steps}'
        f'  epoch {plan.epoch(step):.1f}'
        f'  loss {record["loss"]:.4f}'
        f'  feature std {record["feature_std"]:.4f}'
        f'  lr {record["learning_rate"]:.3g}'
    )
    if 'images_per_second' not in record:
        return line
    return (
        f'{line}  {record["images_per_second"]:.0f} images/s'
        f'  input wait {record["input_wait_fraction"]:.0%}'
        f'  {duration(seconds_left)} left'
    )


def duration(seconds: float) -> str:
    """Seconds as '48s', '3m20s' or '5h03m'."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m{seconds % 60:02d}s'
    return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'
