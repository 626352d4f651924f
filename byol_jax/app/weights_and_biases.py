"""Optional logging to Weights & Biases; offline by default: it writes to disk and sends nothing."""

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

from byol_jax.app.hosts import say
from byol_jax.errors import UserError
from byol_jax.files import Damaged, read_text, set_aside, write_whole

_PROJECT = 'byol_jax'
# How long the end of a run waits for W&B's server.
_FINISH_SECONDS = 300.0
_PICTURE = re.compile(r'(\d+)_(.+)\.png')


def check_wandb() -> None:
    """Raises UserError if the package wandb is not installed; does not import it."""
    spec = importlib.util.find_spec('wandb')
    # Without an origin it is a mere folder called wandb, such as W&B leaves behind.
    if spec is None or spec.origin is None:
        raise UserError(
            'log.wandb=True needs the package wandb, which is not installed. Run '
            '`pip install wandb`, or leave log.wandb out: metrics.jsonl and TensorBoard hold the '
            'same numbers.'
        )


class WandbWriter:
    """Writes scalars and pictures to a Weights & Biases run in `workdir/wandb`.

    It is offline unless the environment variable WANDB_MODE says otherwise. The id of the run is
    kept in `workdir/wandb/byol_jax`, so that every start of the run uses the same one.

    W&B accepts steps in ascending order only, cannot remove any, and loses what it has not written
    yet when the process is killed. So each start passes on the part of the run that W&B lacks.
    Online, that is what the server did not receive. Offline, W&B begins a new folder, which gets
    the whole run, so the newest folder (`workdir/wandb/latest-run`) is complete.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        history: Sequence[Mapping[str, Any]],
        config: Mapping[str, Any],
    ):
        """Starts W&B and passes on the records and pictures that it lacks.

        Args:
          workdir: folder of the run; must exist.
          start_step: the step the run resumes from.
          history: the records up to that step, oldest first.
          config: the resolved config, JSON values.

        Raises:
          UserError: the package is not installed, or W&B cannot start.
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
                settings=_settings(wandb),
            )
        except (wandb.Error, ValueError) as error:
            raise UserError(
                f'Weights & Biases cannot start: {error} Unset WANDB_MODE to write to '
                f'{workdir / "wandb"} alone, or leave log.wandb out.'
            ) from error
        # W&B has all steps before `run.step`, which is 0 in a new folder.
        self._held = self._last = self._run.step
        self._hand_over(history, start_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes a record, as `MetricsLog.write` does."""
        step = record['step']
        self._log({name: value for name, value in record.items() if name != 'step'}, step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Takes a picture, as `MetricsLog.picture` does, and keeps it on disk for a later start."""
        path = self._pictures / f'{step}_{quote(name, safe="")}.png'
        write_whole(path, lambda partial: image.save(partial, 'PNG'))
        self._log({name: self._wandb.Image(str(path))}, step)

    def close(self) -> None:
        """Returns once everything is on disk or sent."""
        self._run.finish()

    def _log(self, values: dict[str, Any], step: int) -> None:
        if step >= self._held:
            # A picture may arrive after a later record. W&B would drop it at its own, earlier step.
            self._last = max(self._last, step)
            self._run.log(values, step=self._last)

    def _hand_over(self, history: Sequence[Mapping[str, Any]], start_step: int) -> None:
        pictures: dict[int, list[tuple[str, Path]]] = {}
        for path in sorted(self._pictures.iterdir()):
            match = _PICTURE.fullmatch(path.name)
            if match and int(match[1]) <= start_step:
                pictures.setdefault(int(match[1]), []).append((unquote(match[2]), path))
            else:
                # Its step will be repeated, or a kill cut the file off.
                path.unlink()
        records = {record['step']: record for record in history}
        for step in sorted(records.keys() | pictures.keys()):
            if step in records:
                self.write(records[step])
            for name, path in pictures.get(step, ()):
                self._log({name: self._wandb.Image(str(path))}, step)


def _settings(wandb: Any) -> Any:
    """Keeps W&B from printing, from capturing the run's output, and from waiting for ever."""
    # Older versions know no limit.
    known = 'finish_timeout' in getattr(wandb.Settings, 'model_fields', {})
    limit = {'finish_timeout': _FINISH_SECONDS} if known else {}
    return wandb.Settings(console='off', silent=True, **limit)


def _run_id(path: Path) -> str:
    """The run id in a file; makes a new one if there is no file."""
    try:
        kept = (read_text(path) or '').strip()
    except Damaged as damage:
        kept = ''
        say(f'{damage} Weights & Biases gets a new run; kept: {set_aside(path).name}')
    if re.fullmatch(r'[\w-]{1,64}', kept):
        return kept
    run_id = uuid.uuid4().hex[:12]
    write_whole(path, lambda partial: partial.write_text(f'{run_id}\n'))
    return run_id
