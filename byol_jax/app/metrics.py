"""metrics.jsonl, TensorBoard and W&B: one record of scalars per logged step, the same in each."""

from __future__ import annotations

import functools
import json
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from byol_jax.app.events import lost_events
from byol_jax.app.hosts import say
from byol_jax.app.left_out import tried
from byol_jax.app.records import Log, gap_words, gaps, keep_damaged, metrics_log
from byol_jax.app.side_files import SideFile
from byol_jax.app.weights_and_biases import WandbWriter
from byol_jax.files import set_aside


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
        every: int = 0,
        tensorboard: bool,
        wandb_config: Mapping[str, Any] | None = None,
    ):
        """Opens the log of a run that starts or resumes.

        Args:
          workdir: folder of the run; must exist.
          start_step: the step the run resumes from. Later records, which a killed run wrote after
            its last checkpoint, are removed, so that no step appears twice.
          every: steps between two records, if it is to be said which are missing.
          tensorboard: whether to write events to `workdir/tensorboard` too.
          wandb_config: the resolved config, to log to Weights & Biases too; None for no W&B.
        """
        self._file = SideFile(workdir / 'metrics.jsonl')
        log = metrics_log(workdir)
        keep_damaged(log)
        kept = [r for r in log.records if r['step'] <= start_step]
        if start_step == 0 and log.records:
            _keep_all(log)
        self._file.rewrite(b''.join(map(as_line, kept)))
        missing = gaps([r['step'] for r in kept], every, start_step) if every else []
        if missing:
            say(gap_words(self._file.path, missing))
        self._writers: dict[str, Writer] = {}
        if tensorboard:
            self._open('TensorBoard', lambda: TensorBoardWriter(workdir, start_step, kept))
        if wandb_config is not None:
            self._open(
                'Weights & Biases', lambda: WandbWriter(workdir, start_step, kept, wandb_config)
            )

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record: numbers by name, among them 'step'."""
        self._file.append(as_line(record))
        self._each(lambda writer: writer.write(record))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Passes a picture to the writers.

        Args:
          name: name of the picture, the same at every step.
          image: RGB, any size.
          step: number of optimizer steps when it was made.
        """
        self._each(lambda writer: writer.picture(name, image, step))

    def close(self) -> None:
        """Flushes everything to disk."""
        self._file.append(b'')
        self._each(lambda writer: writer.close())

    def _open(self, name: str, make: Callable[[], Writer]) -> None:
        tried(name, lambda: self._writers.setdefault(name, make()))

    def _each(self, call: Callable[[Writer], None]) -> None:
        self._writers = {
            name: writer
            for name, writer in self._writers.items()
            if tried(name, functools.partial(call, writer))
        }


class TensorBoardWriter:
    """Writes scalars and pictures as TensorBoard events to `workdir/tensorboard`.

    tensorboardX's own writer has a thread, which a full disk ends, and then waits for it for ever.
    """

    def __init__(self, workdir: Path, start_step: int, records: Sequence[Mapping[str, Any]] = ()):
        """Opens a new event file.

        Args:
          workdir: folder of the run; must exist.
          start_step: the step the run resumes from.
          records: up to there; if events of some are gone, all are written again.
        """
        # Imported late, because reading metrics does not need it.
        from tensorboardX import record_writer, summary
        from tensorboardX.proto import event_pb2, summary_pb2

        self._checksum = record_writer.masked_crc32c
        self._summary, self._values, self._event = summary, summary_pb2.Summary, event_pb2.Event
        lost = lost_events(workdir / 'tensorboard', records)
        name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}'
        self._file = SideFile(workdir / 'tensorboard' / name)
        # Hides what a killed run logged after this step.
        begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(start_step + 1, file_version='brain.Event:2')
        self._write(start_step + 1, session_log=begun)
        for record in lost:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes a record, as `MetricsLog.write` does."""
        scalars = (
            self._summary.scalar(name, value) for name, value in record.items() if name != 'step'
        )
        values = [value for scalar in scalars for value in scalar.value]
        self._write(record['step'], summary=self._values(value=values))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Takes a picture, as `MetricsLog.picture` does."""
        pixels = np.asarray(image.convert('RGB'))
        self._write(step, summary=self._summary.image(name, pixels, dataformats='HWC'))

    def close(self) -> None:
        """Flushes everything to disk."""
        self._file.append(b'')

    def _write(self, step: int, **content: Any) -> None:
        """Appends an event as a TFRecord: length, its checksum, content, its checksum."""
        data = self._event(wall_time=time.time(), step=step, **content).SerializeToString()
        length = struct.pack('<Q', len(data))
        parts = (length, self._masked(length), data, self._masked(data))
        self._file.append(b''.join(parts))

    def _masked(self, data: bytes) -> bytes:
        return struct.pack('<I', self._checksum(data))


def _keep_all(log: Log) -> None:
    """Keeps the records of a run that starts again from its first step, and says so."""
    words = f'there is no checkpoint: the run starts again from its first step; {log.path}'
    try:
        say(f'{words} as it was, {len(log.records):,} record(s), is {set_aside(log.path).name}')
    except OSError as error:
        say(f'{words} cannot be kept: {error.strerror or error}')


def as_line(record: Mapping[str, Any]) -> bytes:
    """A line of metrics.jsonl or alarms.jsonl."""
    return f'{json.dumps(dict(record))}\n'.encode()
