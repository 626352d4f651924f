"""Measures the cost of the monitors against a training step without them.

    python benchmarks/monitors.py --config=configs/div2k.py:sample [--steps=100]

Two runs from the same state take turns, step by step, and alternate in going first. One has the
bare step. The other's step returns features, which are fetched, measured and judged after every
`log.every_steps` steps, as in the training loop. Prints one JSON object:
  step_seconds     medians of the bare step and of the step that returns features
  step_ratio       ratio of the two steps of a turn: median, and quartiles
  host_seconds     fetching, measuring and judging at a logged step: median, and largest
  host_share       host_seconds over the time of log.every_steps bare steps; should be below 0.01
  lidar_seconds    LiDAR for the first time (makes the views and compiles), and again
  lidar_share      the second of these over the time of log.lidar_every_steps bare steps
The pictures are random; the input pipeline is not measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from byol_jax.app.build import Run, build_run, step_of
from byol_jax.app.cli import checked_flags, load_config
from byol_jax.app.hooks import Event
from byol_jax.app.monitors import Alarms, Lidar, Monitors
from byol_jax.cores import usable_cores
from byol_jax.errors import UserError
from byol_jax.input.stream import Stream
from byol_jax.training.step import pmap_step, replicate, shard_batch

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file with an optional :ARG.')
_STEPS = flags.DEFINE_integer('steps', 100, 'Timed steps of each of the two.', lower_bound=4)


class Side:
    """A run with its own state, with monitors if it has a workdir."""

    def __init__(self, run: Run, batch: Any, workdir: Path | None):
        count = run.plan.monitored if workdir else 0
        step = step_of(run.config, run.plan, run.method, run.training, count)
        self._step = pmap_step(step, monitored=bool(count))
        self._run, self._batch, self._made = run, batch, 0
        self.state = replicate(run.training.initial)
        # LiDAR is measured separately.
        self._hooks = (Monitors(), Alarms()) if workdir else ()
        for hook in self._hooks:
            hook.start(run._replace(workdir=workdir), run.training.initial)
        self.host: list[float] = []

    def step(self) -> float:
        """Makes a step, and monitors it if it is logged; returns the seconds of the step alone."""
        start = time.perf_counter()
        self.state, metrics, *features = self._step(self.state, self._batch)
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - start
        self._made += 1
        if self._hooks and self._made % self._run.plan.log_steps == 0:
            begun = time.perf_counter()
            event = Event(self._run, self._made, self.state, features[0])
            event.add(values)
            for hook in self._hooks:
                event.add(hook.measure(event))
                hook.logged(event)
            self.host.append(time.perf_counter() - begun)
        return seconds


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    config = load_config(_CONFIG)
    run = build_run(config)
    size, rng = config.views.image_size, np.random.default_rng(0)
    batch = shard_batch(
        {
            view: rng.integers(0, 256, (run.plan.batch_size, size, size, 3), np.uint8)
            for view in ('view1', 'view2')
        },
        run.plan.device_count,
    )
    with tempfile.TemporaryDirectory() as folder:
        bare, watched = Side(run, batch, None), Side(run, batch, Path(folder))
        # Warm up: the first step compiles, and the first measurement is slow.
        for _ in range(run.plan.log_steps):
            bare.step(), watched.step()
        watched.host.clear()
        times: dict[Side, list[float]] = {bare: [], watched: []}
        for turn in range(_STEPS.value):
            for side in (bare, watched) if turn % 2 else (watched, bare):
                times[side].append(side.step())
    if not watched.host:
        raise UserError(f'--steps={_STEPS.value} is below log.every_steps={run.plan.log_steps}.')
    ratios = [w / b for w, b in zip(times[watched], times[bare], strict=True)]
    lidar, seconds = (
        Lidar(run.method, Stream(run.data.train, run.views, config.seed), usable_cores()),
        [],
    )
    for _ in range(2):
        begun = time.perf_counter()
        lidar(watched.state)
        seconds.append(time.perf_counter() - begun)
    step = statistics.median(times[bare])
    every = config.log.lidar_every_steps
    result = {
        'device': f'{run.plan.device_count} x {jax.devices()[0].device_kind}',
        'batch_size': run.plan.batch_size,
        'log_every_steps': run.plan.log_steps,
        'step_seconds': [step, statistics.median(times[watched])],
        'step_ratio': statistics.median(ratios),
        'step_ratio_quartiles': statistics.quantiles(ratios, n=4)[::2],
        'host_seconds': [statistics.median(watched.host), max(watched.host)],
        'host_share': statistics.median(watched.host) / (step * run.plan.log_steps),
        'lidar_seconds': seconds,
        'lidar_share': seconds[1] / (step * every) if every else None,
    }
    print(json.dumps(result, indent=2))


if __name__ == '__main__':
    try:
        app.run(main, flags_parser=checked_flags)
    except UserError as error:
        sys.exit(f'error: {error}')
