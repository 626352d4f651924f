"""What an alarm is, and the facts of a run that alarms are judged by."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from byol_jax.app.plan import Plan

# A record of metrics.jsonl, and all of a run so far, oldest first.
Record = Mapping[str, Any]
History = Sequence[Record]

WATCH, ALARM = 'watch', 'alarm'


class Alarm(NamedTuple):
    """Something that goes wrong.

    Attributes:
      step: of the record it was seen in.
      name: of the alarm, one word for programs.
      severity: 'watch' (may be on purpose, or pass) or 'alarm' (the run is not worth its time).
      evidence: what was measured.
      cause: the likely one. remedy: what to do, with the config keys.
    """

    step: int
    name: str
    severity: str
    evidence: str
    cause: str
    remedy: str

    def line(self) -> str:
        """One line for the log."""
        return (
            f'{self.severity.upper()} at step {self.step}: {self.name}: {self.evidence}. '
            f'Likely cause: {self.cause}. What to do: {self.remedy}.'
        )


class Facts(NamedTuple):
    """What of the config the alarms need.

    Attributes:
      batch_size: examples an optimizer step. passes: accumulate_steps.
      device_count: devices of all processes.
      projection_size: P. monitored_rows: of features that RankMe is taken of.
      warmup_steps: of the learning rate.
      base_learning_rate, weight_decay, base_ema: of the config.
      workers: examples prepared in parallel. cores: of this host.
      tile_size, cache_gib, image_size, views_on: of the config.
    """

    batch_size: int
    passes: int
    device_count: int
    projection_size: int
    monitored_rows: int
    warmup_steps: int
    base_learning_rate: float
    weight_decay: float
    base_ema: float
    workers: int
    cores: int
    tile_size: int
    cache_gib: float
    image_size: int
    views_on: str


def facts_of(config: Any, plan: Plan) -> Facts:
    """The facts of a run on this host."""
    cores = os.cpu_count() or 1
    return Facts(
        batch_size=plan.batch_size,
        passes=plan.accumulate_steps,
        device_count=plan.device_count,
        projection_size=config.projector.output_size,
        monitored_rows=plan.monitored_rows,
        warmup_steps=plan.warmup_steps,
        base_learning_rate=config.optimizer.base_learning_rate,
        weight_decay=config.optimizer.weight_decay,
        base_ema=config.target.tau_base,
        workers=config.data.workers or cores,
        cores=cores,
        tile_size=config.data.tile_size,
        cache_gib=config.data.cache_gib,
        image_size=config.views.image_size,
        views_on=config.views.on,
    )
