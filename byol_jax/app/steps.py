"""Runs training steps on the batches of the feed, and measures the wait for input."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import jax

from byol_jax.app.bad_files import BadFilesLog
from byol_jax.app.build import Run, step_of
from byol_jax.app.hosts import say
from byol_jax.app.progress import Stopwatch, duration
from byol_jax.app.saving import check_finite
from byol_jax.input.feed import open_feed
from byol_jax.training.online_probe import without_unlabelled
from byol_jax.training.state import TrainState
from byol_jax.training.step import pmap_feed, shard_batch


class Steps:
    """Runs one training step after the other, at most two at a time on the devices.

    Attributes:
      watch: measures speed and input wait from the second step on, because the first one compiles;
        None before that.
    """

    def __init__(self, run: Run, start_step: int, bad_files: BadFilesLog):
        """Opens the feed; runs no step yet.

        Args:
          run: the run.
          start_step: number of steps made before.
          bad_files: the hook that gets the pictures that cannot be read.

        Raises:
          UserError: see `open_feed`.
        """
        plan, config = run.plan, run.config
        self._plan, self._step = plan, start_step
        self._feed = open_feed(
            run.data.train,
            run.views,
            batch_size=plan.batch_size,
            seed=config.seed,
            start_step=start_step,
            stop_step=plan.total_steps,
            on=config.views.on,
            labels=run.training.initial.online_probe is not None,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            bad_files=bad_files.bad_files,
        )
        self._batches = bad_files.watch(self._feed.batches)
        step = step_of(config, plan, run.method, run.training, plan.monitored)
        self._step_fn = pmap_feed(step, self._feed, monitored=True)
        self._devices = jax.local_device_count()
        # Simulated devices on a CPU of few cores can deadlock with two steps under way.
        self._most = 1 if jax.default_backend() == 'cpu' else 2
        self._under_way: deque[tuple[int, Any]] = deque()
        self._metrics: dict[str, float] = {}
        self.watch: Stopwatch | None = None

    def make(self, state: TrainState) -> tuple[TrainState, Any]:
        """Starts the next step without waiting for it to finish.

        Args:
          state: the state before the step; its memory may be reused, so do not use it afterwards.

        Returns:
          The state after the step, and its features. Both may still be being computed.

        Raises:
          UserError: there is no batch, because too many pictures cannot be read.
          NonFinite: the metrics of an earlier step are not finite.
        """
        while len(self._under_way) >= self._most:
            self._settle_oldest()
        waiting = time.perf_counter()
        batch = next(self._batches)
        if self.watch is None:
            say('compiling the training step ...')
        elif not self._busy():
            self.watch.waited(time.perf_counter() - waiting)
        state, metrics, features = self._step_fn(state, shard_batch(batch, self._devices))
        self._step += 1
        self._under_way.append((self._step, metrics))
        if self.watch is None:
            self.settle()
            say(f'compiled in {duration(time.perf_counter() - waiting)}')
            self.watch = Stopwatch(self._plan, self._step)
        return state, features

    def settle(self) -> dict[str, float]:
        """Waits for the steps under way and returns the metrics of the last one, by name.

        Raises:
          NonFinite: the metrics of one of them are not finite.
        """
        while self._under_way:
            self._settle_oldest()
        return self._metrics

    def close(self) -> None:
        """Ends the feed's threads, which would keep the process alive after an error."""
        self._feed.batches.close()

    def _settle_oldest(self) -> None:
        step, metrics = self._under_way.popleft()
        host = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._metrics = without_unlabelled(host)
        check_finite(step, self._metrics)

    def _busy(self) -> bool:
        """Whether the devices still work on a step, so that waiting for a batch costs no time."""
        return bool(self._under_way) and not self._under_way[-1][1]['loss'].is_ready()
