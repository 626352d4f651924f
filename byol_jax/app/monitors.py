"""The hooks for monitors, LiDAR and alarms: each goes on if another one fails."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from threadpoolctl import ThreadpoolController

from byol_jax.app.alarm_log import AlarmLog
from byol_jax.app.alarms import facts_of_run, non_finite
from byol_jax.app.build import Run
from byol_jax.app.hooks import Event, Hook
from byol_jax.app.hosts import say
from byol_jax.app.saving import NonFinite
from byol_jax.cores import usable_cores
from byol_jax.errors import UserError
from byol_jax.evaluation.monitors import lidar, measure
from byol_jax.input.stream import Stream
from byol_jax.methods.base import Method
from byol_jax.training.state import TrainState

# Number of LiDAR's pictures, and of views of each. arXiv:2312.04000 takes about 1,000 and 50, which
# would cost as much as many training steps. With 100 pictures LiDAR is at most 99.
LIDAR_PICTURES, LIDAR_VIEWS = 100, 10


class Monitors(Hook):
    """Measures the monitors on the networks' features."""

    def start(self, run: Run, state: TrainState) -> None:
        self._blas = ThreadpoolController()

    def measure(self, event: Event) -> Mapping[str, float]:
        """Returns the monitors by name (`evaluation.monitors.measure`)."""
        # Threads of BLAS compete with those of the input pipeline: 9 ms became up to 240 ms.
        with self._blas.limit(limits=1):
            return measure(event.features)


class LidarMonitor(Hook):
    """Measures LiDAR every log.lidar_every_steps steps; 0: never."""

    def start(self, run: Run, state: TrainState) -> None:
        """Prepares it, and makes no views yet.

        Raises:
          UserError: there is one picture, and LiDAR compares pictures.
        """
        self._every_steps = run.config.log.lidar_every_steps
        if self._every_steps and len(run.data.train) < 2:
            raise UserError('it compares pictures, and the data has one.')
        self._lidar = Lidar(
            run.method,
            Stream(run.data.train, run.views, run.config.seed),
            run.config.data.workers or usable_cores(),
        )

    def measure(self, event: Event) -> Mapping[str, float]:
        """Returns 'lidar' if it is due."""
        if not self._every_steps or event.step % self._every_steps:
            return {}
        return {'lidar': self._lidar(event.state)}


class Alarms(Hook):
    """Raises and clears alarms by each record."""

    def start(self, run: Run, state: TrainState) -> None:
        """Reads the records and alarms up to `state.step`, and prints the alarms that stand."""
        self._facts = facts_of_run(run)
        self._log = AlarmLog(run.workdir, self._facts, int(state.step))
        self._saved = int(state.step)
        if self._log.still_raised():
            say(self._log.still_raised())
        for line in self._log.begin():
            say(line)

    def logged(self, event: Event) -> None:
        """Prints and writes the alarms that the record raises or clears."""
        for line in self._log.judge(event.record):
            say(line)

    def checkpoint(self, event: Event) -> None:
        self._saved = event.step

    def fail(self, error: BaseException) -> None:
        """Prints and writes an alarm if the run ended because a value was not finite."""
        if isinstance(error, NonFinite):
            say(self._log.add(non_finite(error.step, error.values, self._facts, self._saved)))


class Lidar:
    """LiDAR of the online projections in inference mode, always over the same views."""

    def __init__(self, method: Method, stream: Stream, workers: int):
        """Makes no views yet.

        Args:
          method: the networks.
          stream: the training stream, whose first pictures are used.
          workers: number of pictures whose views are made in parallel.
        """
        self._stream, self._workers = stream, workers
        self._views: np.ndarray | None = None
        self._project = jax.jit(method.project)

    def __call__(self, state: TrainState) -> float:
        """LiDAR of a state: from 1 to min(number of pictures - 1, P).

        The first call makes the views, which are kept: 1,000 of them, 150 MB at 224 pixels.
        """
        if self._views is None:
            self._views = lidar_views(self._stream, self._workers)
        # The copy on one device, because nothing here may wait for other processes.
        own = jax.tree.map(
            lambda x: x.addressable_data(0), (state.online_params, state.online_stats)
        )
        projections = [np.asarray(self._project(*own, views)) for views in self._views]
        return lidar(np.stack(projections, axis=1))


def lidar_views(stream: Stream, workers: int) -> np.ndarray:
    """Makes LiDAR's views of the first pictures of the stream.

    Views 2k and 2k + 1 of a picture are the views 1 and 2 that training draws in epoch k. Both
    show the same picture, even where training takes its second view from a partner picture.

    Args:
      stream: the training stream.
      workers: number of pictures whose views are made in parallel.

    Returns:
      uint8 [views, pictures, S, S, 3].
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
