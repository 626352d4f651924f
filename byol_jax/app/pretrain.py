"""`byol_jax.pretrain`: a whole run from Python."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_jax import settings
from byol_jax.app.data import single_threaded_opencv
from byol_jax.app.recipes import check_optimizer, load_recipe
from byol_jax.app.records import read_metrics
from byol_jax.app.train import train
from byol_jax.errors import UserError
from byol_jax.files import read_object
from byol_jax.interop.encoder import Encoder
from byol_jax.interop.export import load_encoder
from byol_jax.settings import Settings
from byol_jax.sources.array import Array
from byol_jax.sources.base import Source
from byol_jax.sources.data import GIVEN
from byol_jax.sources.folder import Files


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The result of a finished run.

    Attributes:
      encoder: the online encoder: uint8 [B, H, W, 3] -> float32 [B, D].
      workdir: folder of the run, with config.json, metrics.jsonl, checkpoints and so on.
      metrics: the records of metrics.jsonl, oldest first.
      results: the before/after table, as in results.json; {} if there is none.
      report: path of report.html.
    """

    encoder: Encoder
    workdir: Path
    metrics: list[dict[str, Any]]
    results: dict[str, Any]
    report: Path


def pretrain(
    data: str | Path | Source | np.ndarray | Sequence[str | Path],
    *,
    encoder: str | type | None = None,
    workdir: str | Path | None = None,
    recipe: str = 'folder',
    epochs: float | None = None,
    steps: int | None = None,
    **overrides: Any,
) -> Pretrained:
    """Trains an encoder on unlabelled pictures, as main.py does.

    It prints what main.py prints. The same call with the same workdir resumes from the newest
    checkpoint; if the run has finished, it returns the result without training.

    Args:
      data: a folder of image files (or whatever the recipe's source takes as data.path); a
        `Source`; an RGB array, uint8 [N, H, W, 3]; or a list of image files.
      encoder: name of a built-in encoder, 'package.module:Class', or the Flax class itself; None
        for the recipe's encoder ('resnet50' for 'folder').
      workdir: folder that everything is written to; None for runs/<name of the recipe>.
      recipe: the config to start from, as for --config: 'folder', 'cifar10:200', or a file.
      epochs: length of the run in passes over the data; None for the recipe's.
      steps: length of the run in optimizer steps, instead of epochs.
      **overrides: any other config keys, with '__' instead of dots: `views__image_size=96`.

    Returns:
      The encoder, the metrics and the paths of the run.

    Raises:
      UserError: the data, the config or the workdir cannot be used, or the loss is not finite.
      Interrupted: a signal stopped the run (a `KeyboardInterrupt`).
    """
    given = dict(locals())
    given.update(given.pop('overrides'))
    path, source = _source_of(data)
    changes = {key.replace('__', '.'): value for key, value in overrides.items()}
    if encoder is not None:
        changes['encoder.name'] = encoder if isinstance(encoder, str) else _name_of(encoder)
    changes |= {} if epochs is None else {'total_epochs': epochs}
    changes |= {} if steps is None else {'total_steps': steps}
    if path is not None:
        changes['data.path'] = path
    elif source is not None:
        changes |= {'data.source': GIVEN, 'data.path': None}
    base = load_recipe(recipe)
    _check_keys(base, changes)
    recipe_values = settings.plain(base)
    config = Settings.of(settings.changed(recipe_values, changes))
    check_optimizer(settings.flatten(recipe_values), config, changes)
    place = Path(workdir or f'runs/{config.name}').expanduser()
    with single_threaded_opencv():
        train(config, place, _call(given), source)
    return Pretrained(
        load_encoder(place / 'encoder', config.modules),
        place,
        read_metrics(place),
        read_object(place / 'results.json') or {},
        place / 'report.html',
    )


def _source_of(data: Any) -> tuple[str | None, Source | None]:
    """(data.path, None) for data that the recipe's source opens, or (None, a source)."""
    if isinstance(data, str | Path):
        return str(data), None
    if isinstance(data, Source):
        return None, data
    if isinstance(data, np.ndarray):
        return None, Array.of(data)
    if isinstance(data, Sequence) and all(isinstance(each, str | Path) for each in data):
        return None, Files(data)
    raise UserError(
        f'data is a {type(data).__name__}: give a folder, a byol_jax.sources.Source, an array, '
        'uint8 [N, H, W, 3], or a list of image files.'
    )


def _name_of(encoder: Any) -> str:
    """'package.module:Class' for a class.

    Raises:
      UserError: it is no class, or cannot be imported by that name.
    """
    module, name = getattr(encoder, '__module__', None), getattr(encoder, '__qualname__', '')
    if not inspect.isclass(encoder) or not name.isidentifier() or module == '__main__':
        raise UserError(
            f'encoder={encoder!r} must be a name, or a class at the top level of an importable '
            'module, because the exported encoder refers to it by name. Put the class into a file '
            'of its own, and give its arguments as encoder__kwargs={...}.'
        )
    return f'{module}:{name}'


def _check_keys(recipe: Any, changes: dict[str, Any]) -> None:
    """Raises UserError if a key is a whole section. Unknown keys are found later."""
    flat = settings.flatten(settings.plain(recipe))
    for key in changes:
        if key not in flat and key in settings.keys(recipe) and not key.endswith('.kwargs'):
            raise UserError(
                f"'{key}' is a section of the config: give its keys, such as "
                f'{key}__{next(iter(settings.plain(recipe)[key]))}=...'
            )


def _call(given: dict[str, Any]) -> str:
    """The call of `pretrain` as a line of Python, for the report and command.txt."""
    defaults = inspect.signature(pretrain).parameters
    data = given.pop('data')
    words = [repr(data) if isinstance(data, str | Path) else f'<{type(data).__name__}>']
    words += [
        f'{key}={value!r}'
        for key, value in given.items()
        if key not in defaults or value != defaults[key].default
    ]
    return f'byol_jax.pretrain({", ".join(words)})'
