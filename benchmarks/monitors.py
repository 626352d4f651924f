"""Measures what the monitors cost, beside a training step without them.

    python benchmarks/monitors.py --config=configs/div2k.py:sample [--steps=100]

Two runs from the same state take turns step by step: one whose features are handed out, and, after
every `log.every_steps` of its steps, fetched, measured and judged, as in the training loop, and one
with the bare step. Which goes first alternates. Prints one JSON object:
  step_seconds     median, bare and with features handed out
  step_ratio       of the two steps of a turn: median, with its quartiles
  host_seconds     fetching, measuring and judging at a log line: median, and largest
  host_share       that over the time between two log lines without monitors; the aim is below 0.01
  lidar_seconds    the first time (making the views, compiling) and again
  lidar_share      the latter over the time between two of them, log.lidar_every_steps
Pictures are random; the input pipeline is not measured here.
"""

from __future__ import annotations

import dataclasses
import json
import os
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
from byol_jax.app.monitors import Lidar, Monitors
from byol_jax.errors import UserError
from byol_jax.input.stream import Stream
from byol_jax.training.step import pmap_step, replicate, shard_batch

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file with an optional :ARG.')
_STEPS = flags.DEFINE_integer('steps', 100, 'Timed steps of each of the two.', lower_bound=4)


class Side:
    """A run with its own state; watched by the monitors or not."""

    def __init__(self, run: Run, batch: Any, workdir: Path | None):
        count = run.plan.monitored if workdir else 0
        step = step_of(run.config, run.plan, run.method, run.training, count)
        self._step = pmap_step(step, monitored=bool(count))
        self._run, self._batch, self._made = run, batch, 0
        self.state = replicate(run.training.initial)
        self._monitors = Monitors() if workdir else None
        if self._monitors is not None:
            # LiDAR is measured by itself.
            log = dataclasses.replace(run.config.log, lidar_every_steps=0)
            config = dataclasses.replace(run.config, log=log)
            watched = run._replace(config=config, workdir=workdir)
            self._monitors.start(watched, run.training.initial)
        self.host: list[float] = []

    def step(self) -> float:
        """Makes a step and, if it is due, looks at it; seconds of the step alone."""
        start = time.perf_counter()
        self.state, metrics, *features = self._step(self.state, self._batch)
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - start
        self._made += 1
        if self._monitors is not None and self._made % self._run.plan.log_steps == 0:
            begun = time.perf_counter()
            event = Event(self._run, self._made, self.state, features[0])
            event.add(values)
            event.add(self._monitors.measure(event))
            self._monitors.logged(event)
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
        # The first step compiles, and the first look is of a cold host.
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
        Lidar(run.method, Stream(run.data.train, run.views, config.seed), os.cpu_count() or 1),
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
