"""Weights & Biases, if asked for: by itself it writes to disk and sends nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from PIL import Image

from byol_jax.errors import UserError
from byol_jax.files import write_whole

_PROJECT = 'byol_jax'
_PICTURE = re.compile(r'(\d+)_(.+)\.png')


def check_wandb() -> None:
    """Raises UserError if the package is not installed; imports nothing."""
    spec = importlib.util.find_spec('wandb')
    # Without an origin it is no more than a folder of that name, such as W&B leaves behind.
    if spec is None or spec.origin is None:
        raise UserError(
            'log.wandb=True needs the package wandb, which is not installed. Run '
            '`pip install wandb`, or leave log.wandb out: metrics.jsonl and TensorBoard hold the '
            'same numbers.'
        )


class WandbWriter:
    """Writes scalars and pictures to a Weights & Biases run in `workdir/wandb`.

    It is offline unless the environment variable WANDB_MODE says otherwise. The id of the run is
    kept in `workdir/wandb/byol_jax`, so every start of the run has the same one.

    W&B takes steps in ascending order only, cannot take any back, and what it has not yet put on
    disk is lost with a killed process. So each start hands over all of the run that W&B does not
    hold already: online that is what came in since the process died, and offline, where W&B
    begins a new folder, all of it: the newest folder (`workdir/wandb/latest-run`) is the whole run.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        history: Sequence[Mapping[str, Any]],
        config: Mapping[str, Any],
    ):
        """Args:
        workdir: must exist.
        start_step: the step the run goes on from.
        history: the records up to it, oldest first.
        config: resolved, JSON values.

        Raises:
          UserError: the package is not installed, or WANDB_MODE=online and W&B refuses.
        """
        check_wandb()
        import wandb  # Not installed by default.

        self._wandb = wandb
        own = workdir / 'wandb' / 'byol_jax'
        self._pictures = own / 'pictures'
        self._pictures.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                id=_run_id(own / 'run_id'),
                resume='allow',
                mode=os.environ.get('WANDB_MODE', 'offline'),
                dir=str(workdir),
                project=os.environ.get('WANDB_PROJECT', _PROJECT),
                name=os.environ.get('WANDB_NAME', workdir.resolve().name),
                config=dict(config),
                # The run says itself what there is to say, and its output is not W&B's to catch.
                settings=wandb.Settings(console='off', silent=True),
            )
        except (wandb.Error, ValueError) as error:
            raise UserError(
                f'Weights & Biases cannot start: {error} Unset WANDB_MODE to write to '
                f'{workdir / "wandb"} alone, or leave log.wandb out.'
            ) from error
        # W&B holds what is before this step; nothing in a new folder.
        self._held = self._last = self._run.step
        self._hand_over(history, start_step)

    def write(self, record: Mapping[str, Any]) -> None:
        step = record['step']
        self._log({name: value for name, value in record.items() if name != 'step'}, step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        path = self._pictures / f'{step}_{quote(name, safe="")}.png'
        write_whole(path, lambda partial: image.save(partial, 'PNG'))
        self._log({name: self._wandb.Image(str(path))}, step)

    def close(self) -> None:
        self._run.finish()

    def _log(self, values: dict[str, Any], step: int) -> None:
        if step >= self._held:
            # A picture may take its time; one of an earlier step would be dropped.
            self._last = max(self._last, step)
            self._run.log(values, step=self._last)

    def _hand_over(self, history: Sequence[Mapping[str, Any]], start_step: int) -> None:
        pictures: dict[int, list[tuple[str, Path]]] = {}
        for path in sorted(self._pictures.iterdir()):
            match = _PICTURE.fullmatch(path.name)
            if match and int(match[1]) <= start_step:
                pictures.setdefault(int(match[1]), []).append((unquote(match[2]), path))
            else:
                # Of steps that come again, or cut off by a kill.
                path.unlink()
        records = {record['step']: record for record in history}
        for step in sorted(records.keys() | pictures.keys()):
            if step in records:
                self.write(records[step])
            for name, path in pictures.get(step, ()):
                self._log({name: self._wandb.Image(str(path))}, step)


def _run_id(path: Path) -> str:
    """The id kept in a file, which is made with a new one if it is not there."""
    if path.exists():
        return path.read_text().strip()
    run_id = uuid.uuid4().hex[:12]
    write_whole(path, lambda partial: partial.write_text(f'{run_id}\n'))
    return run_id
