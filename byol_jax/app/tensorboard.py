"""TensorBoard events of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorboardX
from PIL import Image


class TensorBoardWriter:
    """Writes scalars and pictures to `workdir/tensorboard`."""

    def __init__(self, workdir: Path, start_step: int):
        """Args:
        workdir: must exist.
        start_step: the step the run goes on from.
        """
        # purge_step hides what an earlier, killed run logged beyond this step.
        self._events = tensorboardX.SummaryWriter(
            str(workdir / 'tensorboard'), purge_step=start_step + 1
        )

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != 'step':
                self._events.add_scalar(name, value, record['step'])
        self._events.flush()

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        self._events.add_image(name, np.asarray(image.convert('RGB')), step, dataformats='HWC')
        self._events.flush()

    def close(self) -> None:
        self._events.close()
