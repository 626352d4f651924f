"""The monitors of a run: what is looked at and when, LiDAR, the alarms, and what is not finite."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import ThreadpoolController

from byol_jax.app.alarm_log import AlarmLog
from byol_jax.app.alarms import Record, facts_of, non_finite
from byol_jax.app.build import Run
from byol_jax.app.hosts import is_main, say
from byol_jax.errors import UserError
from byol_jax.evaluation.monitors import lidar, measure
from byol_jax.input.stream import Stream
from byol_jax.methods.base import Method
from byol_jax.models.network import path_name
from byol_jax.training.state import TrainState

# LiDAR's pictures and views of each. arXiv:2312.04000 takes about 1,000 and 50, which cost as much
# as many training steps; with 100 the rank is at most 99.
LIDAR_PICTURES, LIDAR_VIEWS = 100, 10


class NonFinite(UserError):
    """Something of a step is NaN or infinite: `values` are its metrics."""

    def __init__(self, step: int, values: Mapping[str, float], what: str = ''):
        """Args:
        step: whose. values: its metrics. what: else is not finite, if these are.
        """
        super().__init__(
            f'The loss of step {step} is {values["loss"]:.4g} (gradient norm '
            f'{values["gradient_norm"]:.3g}, learning rate {values["learning_rate"]:.3g})'
            f'{f", and {what} is not finite" if what else ""}. '
            'Training stopped, and nothing of this step is saved. Lower '
            'optimizer.base_learning_rate or lengthen the warm-up, in a new workdir.'
        )
        self.step, self.values = step, dict(values) | ({what: math.nan} if what else {})


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises NonFinite if a metric of a step is not."""
    if not all(map(math.isfinite, values.values())):
        raise NonFinite(step, values)


class Monitors:
    """Watches a run; process 0 alone does."""

    def __init__(self, run: Run, workdir: Path, start_step: int):
        """Args:
        run: to watch. workdir: of the run; its metrics.jsonl must end at `start_step`.
        start_step: the step the run goes on from.
        """
        self._run = run
        self._facts = facts_of(run.config, run.plan, run.method.loss_scale)
        self._log = AlarmLog(workdir, self._facts, start_step) if is_main() else None
        self._lidar = Lidar(
            run.method,
            Stream(run.data.train, run.views, run.config.seed),
            run.config.data.workers or os.cpu_count() or 1,
        )
        self._blas = ThreadpoolController()
        if self._log is not None and self._log.still_raised():
            say(self._log.still_raised())

    def measure(
        self,
        step: int,
        values: Mapping[str, float],
        features: Mapping[str, jax.Array],
        state: TrainState,
    ) -> dict[str, float]:
        """The monitors after a step, by name (`evaluate.monitors.measure`), and LiDAR if it is due.

        Args:
          step: made. values: its metrics. features: that it handed out. state: it left.

        Raises:
          NonFinite: there is one among the features.
        """
        if self._log is None:
            return {}
        host = on_host(features)
        for name, rows in host.items():
            if not np.isfinite(rows).all():
                raise NonFinite(step, values, f'the {name}')
        # Threads of BLAS would fight with the input pipeline's: 9 ms became 240 ms at times.
        with self._blas.limit(limits=1):
            measures = measure(host)
        every = self._run.config.log.lidar_every_steps
        if every and step % every == 0:
            measures['lidar'] = self._lidar(state)
        return measures

    def judge(self, record: Record) -> None:
        """Says and writes which alarms the next record of metrics.jsonl raises or clears."""
        if self._log is not None:
            for line in self._log.judge(record):
                say(line)

    def check_state(self, state: TrainState, values: Mapping[str, float]) -> None:
        """Checks a state before it is saved: a checkpoint that is no good must not replace others.

        Args:
          state: to be saved. values: metrics of the step it is of.

        Raises:
          NonFinite: a leaf is not finite that was so at the start (a mask may hold -inf).
        """
        for (path, leaf), finite in zip(
            jax.tree.leaves_with_path(state), self._finite_at_start, strict=True
        ):
            if finite:
                own = np.asarray(leaf.addressable_data(0), np.float32)
                if not np.isfinite(own).all():
                    raise NonFinite(int(state.step), values, path_name(path))

    @functools.cached_property
    def _finite_at_start(self) -> list[bool]:
        """Of each leaf of the state, whether it holds floats, all of them finite at the start."""
        return [
            bool(jnp.issubdtype(leaf.dtype, jnp.inexact) and np.isfinite(leaf).all())
            for leaf in jax.tree.leaves(self._run.training.initial)
        ]

    def stopped(self, error: NonFinite, saved: int) -> None:
        """Says and writes that a run stops; `saved` is the step of its newest checkpoint, or 0."""
        if self._log is not None:
            say(self._log.add(non_finite(error.step, error.values, self._facts, saved)))


def on_host(features: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """What a mapped step handed out, [devices, V, M, size] -> float32 [V, devices M, size].

    Of several processes each gets its own devices' examples.
    """
    found = {}
    for name, x in features.items():
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        rows = np.concatenate([np.asarray(shard.data, np.float32) for shard in shards])
        found[name] = np.moveaxis(rows, 0, 1).reshape(x.shape[1], -1, x.shape[-1])
    return found


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
