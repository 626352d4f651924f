"""metrics.jsonl and TensorBoard events: the same scalars, one record a logged step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorboardX
from PIL import Image

from byol_jax.files import write_whole


class MetricsLog:
    """Appends records to `workdir/metrics.jsonl` and, if asked, TensorBoard events."""

    def __init__(self, workdir: Path, *, start_step: int, tensorboard: bool):
        """Args:
        workdir: must exist.
        start_step: the step the run goes on from; later records, written by a run that was
          killed before its next checkpoint, are taken out so that no step is there twice.
        tensorboard: write events to `workdir/tensorboard` too.
        """
        self._path = workdir / 'metrics.jsonl'
        kept = [r for r in read_metrics(workdir) if r['step'] <= start_step]
        text = ''.join(json.dumps(r) + '\n' for r in kept)
        write_whole(self._path, lambda partial: partial.write_text(text))
        self._events = None
        if tensorboard:
            # purge_step hides what an earlier, killed run logged beyond this step.
            self._events = tensorboardX.SummaryWriter(
                str(workdir / 'tensorboard'), purge_step=start_step + 1
            )

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record; it must have a 'step'. Values are numbers."""
        with self._path.open('a') as file:
            file.write(json.dumps(dict(record)) + '\n')
        if self._events is not None:
            for name, value in record.items():
                if name != 'step':
                    self._events.add_scalar(name, value, record['step'])
            self._events.flush()

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Adds a picture of a step to the events, if there are any.

        Args:
          name: of the picture, the same at every step.
          image: of any size, RGB.
          step: at which it was made.
        """
        if self._events is not None:
            self._events.add_image(name, np.asarray(image.convert('RGB')), step, dataformats='HWC')
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of `workdir/metrics.jsonl`; a last line cut off by a kill is left out."""
    path = workdir / 'metrics.jsonl'
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith('\n'):
            records.append(json.loads(line))
    return records
