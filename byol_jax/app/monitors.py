"""The monitors of a run: what is measured when, LiDAR, and the alarms."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from threadpoolctl import ThreadpoolController

from byol_jax.app.alarm_log import AlarmLog
from byol_jax.app.alarms import facts_of, non_finite
from byol_jax.app.build import Run
from byol_jax.app.hooks import Event, Hook
from byol_jax.app.hosts import say
from byol_jax.app.saving import NonFinite
from byol_jax.evaluation.monitors import lidar, measure
from byol_jax.input.stream import Stream
from byol_jax.methods.base import Method
from byol_jax.training.state import TrainState

# LiDAR's pictures and views of each. arXiv:2312.04000 takes about 1,000 and 50, which cost as much
# as many training steps; with 100 the rank is at most 99.
LIDAR_PICTURES, LIDAR_VIEWS = 100, 10


class Monitors(Hook):
    """Measures what the networks put out, and judges each record by the alarms."""

    def start(self, run: Run, state: TrainState) -> None:
        """Goes on from the records and alarms up to `state.step`, and says which alarms stand."""
        self._every_steps = run.config.log.lidar_every_steps
        self._facts = facts_of(run.config, run.plan, run.method.loss_scale)
        self._log = AlarmLog(run.workdir, self._facts, int(state.step))
        self._lidar = Lidar(
            run.method,
            Stream(run.data.train, run.views, run.config.seed),
            run.config.data.workers or os.cpu_count() or 1,
        )
        self._blas = ThreadpoolController()
        self._saved = int(state.step)
        if self._log.still_raised():
            say(self._log.still_raised())

    def measure(self, event: Event) -> Mapping[str, float]:
        """The monitors by name (`evaluation.monitors.measure`), and LiDAR if it is due."""
        # Threads of BLAS would fight with the input pipeline's: 9 ms became 240 ms at times.
        with self._blas.limit(limits=1):
            measures = measure(event.features)
        if self._every_steps and event.step % self._every_steps == 0:
            measures['lidar'] = self._lidar(event.state)
        return measures

    def logged(self, event: Event) -> None:
        """Prints and writes which alarms the record raises or clears."""
        for line in self._log.judge(event.record):
            say(line)

    def checkpoint(self, event: Event) -> None:
        self._saved = event.step

    def fail(self, error: Exception) -> None:
        """Prints and writes an alarm if something was not finite."""
        if isinstance(error, NonFinite):
            say(self._log.add(non_finite(error.step, error.values, self._facts, self._saved)))


class Lidar:
    """LiDAR of the online projections, in inference mode, over the same views every time."""

    def __init__(self, method: Method, stream: Stream, workers: int):
        """Makes nothing yet.

        Args:
          method: the networks.
          stream: of the run.
          workers: pictures whose views are made in parallel.
        """
        self._stream, self._workers = stream, workers
        self._views: np.ndarray | None = None
        self._project = jax.jit(method.project)

    def __call__(self, state: TrainState) -> float:
        """LiDAR of a state: 1 to the number of pictures less 1, or P if that is less.

        The views are made by the first call and kept: 1,000 of them, 150 MB at 224 pixels.
        """
        if self._views is None:
            self._views = lidar_views(self._stream, self._workers)
        # One device's copy: nothing here may wait for other processes.
        own = jax.tree.map(
            lambda x: x.addressable_data(0), (state.online_params, state.online_stats)
        )
        projections = [np.asarray(self._project(*own, views)) for views in self._views]
        return lidar(np.stack(projections, axis=1))


def lidar_views(stream: Stream, workers: int) -> np.ndarray:
    """Training views of the first pictures of the stream: uint8 [views, pictures, S, S, 3].

    Views 2 k and 2 k + 1 of a picture are its views 1 and 2 of epoch k, but of one picture where
    training takes a partner for the second.
    """
    count = min(LIDAR_PICTURES, len(stream.source))
    kinds = list(stream.views.values())
    epochs = np.arange(-(-LIDAR_VIEWS // len(kinds)))

    def of_picture(position: int) -> list[np.ndarray]:
        _, example = stream.example(position)
        pictures = stream.load(position).pictures
        examples = np.full(len(epochs), example)
        made = []
        for number, (view, picture) in enumerate(zip(kinds, pictures, strict=True), 1):
            steps = view.steps(view.draw(stream.seed, number, epochs, examples))
            made.append([view.make(picture, each) for each in steps])
        return [view for of_epoch in zip(*made, strict=True) for view in of_epoch][:LIDAR_VIEWS]

    with ThreadPoolExecutor(workers) as pool:
        made = list(pool.map(of_picture, range(count)))
    return np.stack([np.stack(views) for views in zip(*made, strict=True)])
