"""metrics.jsonl, TensorBoard and W&B: one record of scalars per logged step, the same in each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from byol_jax.app.weights_and_biases import WandbWriter
from byol_jax.errors import UserError
from byol_jax.files import write_whole


class Writer(Protocol):
    """A further place that records and pictures are written to, besides metrics.jsonl."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes a record, as `MetricsLog.write` does."""

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Takes a picture, as `MetricsLog.picture` does."""

    def close(self) -> None:
        """Flushes everything to disk."""


class MetricsLog:
    """Appends records to `workdir/metrics.jsonl` and passes them and pictures to the writers."""

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        tensorboard: bool,
        wandb_config: Mapping[str, Any] | None = None,
    ):
        """Opens the log of a run that starts or resumes.

        Args:
          workdir: folder of the run; must exist.
          start_step: the step the run resumes from. Later records, which a killed run wrote after
            its last checkpoint, are removed, so that no step appears twice.
          tensorboard: whether to write events to `workdir/tensorboard` too.
          wandb_config: the resolved config, to log to Weights & Biases too; None for no W&B.
        """
        self._path = workdir / 'metrics.jsonl'
        kept = [r for r in read_metrics(workdir) if r['step'] <= start_step]
        text = ''.join(json.dumps(r) + '\n' for r in kept)
        write_whole(self._path, lambda partial: partial.write_text(text))
        self._writers: list[Writer] = []
        if tensorboard:
            self._writers.append(TensorBoardWriter(workdir, start_step))
        if wandb_config is not None:
            self._writers.append(WandbWriter(workdir, start_step, kept, wandb_config))

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record: numbers by name, among them 'step'."""
        with self._path.open('a') as file:
            file.write(json.dumps(dict(record)) + '\n')
        for writer in self._writers:
            writer.write(record)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Passes a picture to the writers.

        Args:
          name: name of the picture, the same at every step.
          image: RGB, any size.
          step: number of optimizer steps when it was made.
        """
        for writer in self._writers:
            writer.picture(name, image, step)

    def close(self) -> None:
        """Flushes everything to disk."""
        for writer in self._writers:
            writer.close()


class TensorBoardWriter:
    """Writes scalars and pictures as TensorBoard events to `workdir/tensorboard`."""

    def __init__(self, workdir: Path, start_step: int):
        """Opens a new event file.

        Args:
          workdir: folder of the run; must exist.
          start_step: the step the run resumes from.
        """
        # Imported late, because reading metrics does not need it.
        import tensorboardX

        # purge_step hides what a killed run logged after this step.
        self._events = tensorboardX.SummaryWriter(
            str(workdir / 'tensorboard'), purge_step=start_step + 1
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes a record, as `MetricsLog.write` does."""
        for name, value in record.items():
            if name != 'step':
                self._events.add_scalar(name, value, record['step'])
        self._events.flush()

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Takes a picture, as `MetricsLog.picture` does."""
        self._events.add_image(name, np.asarray(image.convert('RGB')), step, dataformats='HWC')
        self._events.flush()

    def close(self) -> None:
        """Flushes everything to disk."""
        self._events.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of `workdir/metrics.jsonl`, oldest first; empty if there is no such file."""
    return read_records(workdir / 'metrics.jsonl')


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads a file with one JSON object per line, each with an integer 'step'.

    A last line that a kill cut off, or that is still being written, is left out.

    Args:
      path: the file.

    Returns:
      The objects in order; empty if there is no such file.

    Raises:
      UserError: any other line is not such an object.
    """
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b'\n'):
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f'{path} is damaged: line {number} is not JSON ({error}).') from error
        if not isinstance(record, dict) or not isinstance(record.get('step'), int):
            raise UserError(f'{path} is damaged: line {number} is no record with a step.')
        records.append(record)
    return records
