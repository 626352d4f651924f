"""Checkpoints on disk; the only file that knows Orbax."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from byol_jax.app.hosts import is_main, say, wait_for_all
from byol_jax.errors import UserError
from byol_jax.models.network import path_name
from byol_jax.training.state import TrainState

Tree = Any

# Saved as a separate item, because a run may resume without a probe or with a new one.
_PROBE = 'online_probe'

# Orbax raises one of these for a damaged or missing file, depending on the file.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError)


class Checkpoints:
    """The checkpoints of one workdir: `checkpoints/<step>/`, each with digests of its leaves.

    A checkpoint is either complete or absent: it is written under another name and renamed at the
    end.
    """

    def __init__(self, workdir: Path, keep: int, read_only: bool = False):
        """Opens `workdir/checkpoints`, creating the folder if necessary.

        Args:
          workdir: the workdir of the run.
          keep: number of checkpoints to keep; older ones are deleted.
          read_only: whether to leave the folder unchanged, because a run may be writing there.
        """
        self._folder = (workdir / 'checkpoints').absolute()
        self._keep = keep
        self._read_only = read_only
        self._open()

    def _open(self) -> None:
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                cleanup_tmp_directories=not self._read_only,
                read_only=self._read_only,
                # So that a failed write is reported by `save` itself.
                enable_async_checkpointing=False,
            ),
            item_names=('state', _PROBE, 'digests'),
        )

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int:
        """The newest step that has a checkpoint; 0 if there is none."""
        return max(self.steps(), default=0)

    def encoder_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the newest checkpoint's online encoder, by names such as 'params/conv1/kernel'.

        From its digests alone; empty if these cannot be read.
        """
        if not self.steps():
            return {}
        try:
            saved = self._restore(self.newest(), digests=ocp.args.JsonRestore())['digests']
            shapes = {name: tuple(map(int, leaf['shape'])) for name, leaf in saved.items()}
        except (OSError, *_UNREADABLE):
            return {}
        params, stats = 'online_params/encoder/', 'online_stats/encoder/'
        found = {
            f'params/{name.removeprefix(params)}': shape
            for name, shape in shapes.items()
            if name.startswith(params)
        }
        return found | {
            name.removeprefix(stats): shape
            for name, shape in shapes.items()
            if name.startswith(stats)
        }

    def save(self, step: int, state: TrainState) -> None:
        """Writes a checkpoint and returns once it is on disk.

        Args:
          step: number of optimizer steps made.
          state: the state after that step.

        Raises:
          UserError: it cannot be written, for example because the disk is full. Older checkpoints
            are kept.
        """
        host = jax.tree.map(np.asarray, jax.device_get(state))
        networks = host._asdict()
        probe = networks.pop(_PROBE)
        more = {} if probe is None else {_PROBE: ocp.args.StandardSave(probe)}
        try:
            with _quiet_orbax():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(networks),
                        digests=ocp.args.JsonSave(digests(host)),
                        **more,
                    ),
                    force=True,
                )
                self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            free = shutil.disk_usage(self._folder).free
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(host))
            raise UserError(
                f'The checkpoint of step {step} ({size / 1e6:.0f} MB) could not be written to '
                f'{self._folder}, where {free / 1e6:.0f} MB are free: {_reason(error)}\n'
                'Older checkpoints are untouched. Make room and start the same command again: it '
                f'goes on from step {self.newest()}.'
            ) from error

    def restore(self, like: TrainState) -> tuple[int, TrainState] | None:
        """Loads the newest good checkpoint.

        Damaged checkpoints are named in the log and moved to `checkpoints/damaged-<step>`.

        Args:
          like: a state of the same structure, shapes and dtypes. If the checkpoint has no matching
            online probe, the probe of `like` is used and a line says so.

        Returns:
          (step, state as NumPy arrays), or None if there is no checkpoint.

        Raises:
          UserError: there are checkpoints, but none is good.
        """
        for step in reversed(self.steps()):
            state, damage = self._load(step, like)
            if damage is None:
                return step, state
            say(f'checkpoint {step} is damaged: {damage}')
            if not self._read_only:
                self._set_aside(step)
        damaged = sorted(path.name for path in self._folder.glob('damaged-*'))
        if not damaged and not self.steps():
            return None
        raise UserError(
            f'All checkpoints in {self._folder} are damaged. Kept there: '
            f'{", ".join(damaged) or self.steps()}. To start from scratch, give another --workdir.'
        )

    def close(self) -> None:
        self._manager.close()

    def _load(self, step: int, like: TrainState) -> tuple[Any, str | None]:
        """Loads one checkpoint.

        Returns:
          (state, None), or (None, a description of the damage).

        Raises:
          UserError: the checkpoint belongs to another network, or the disk cannot be read.
        """
        try:
            expected = self._restore(step, digests=ocp.args.JsonRestore())['digests']
            networks = like._asdict()
            probe = networks.pop(_PROBE)
            _check_same_network(expected, networks, self._folder / str(step))
            state = {**self._restore_like('state', step, networks), _PROBE: None}
            saved = {k: leaf for k, leaf in expected.items() if k.startswith(f'{_PROBE}/')}
            if probe is not None and _first_other(saved, {_PROBE: probe}) is None:
                state[_PROBE] = self._restore_like(_PROBE, step, probe)
        except FileNotFoundError as error:
            return None, _first_line(error)
        except OSError as error:
            raise UserError(f'{self._folder / str(step)} cannot be read: {error}') from error
        except _UNREADABLE as error:
            return None, f'{type(error).__name__}: {_first_line(error)}'
        for name, found in digests(state).items():
            if found != expected[name]:
                return None, f"the sha256 of '{name}' is not the one it was saved with"
        if probe is not None and state[_PROBE] is None:
            was = 'is of other labels' if saved else 'has none'
            say(f'the online probe begins anew: that of checkpoint {step} {was}')
            state[_PROBE] = probe
        return TrainState(**state), None

    def _restore(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _restore_like(self, item: str, step: int, like: Tree) -> Tree:
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        return self._restore(step, **{item: ocp.args.StandardRestore(abstract)})[item]

    def _set_aside(self, step: int) -> None:
        self._manager.close()
        wait_for_all('damaged checkpoint closed')
        if is_main():
            self._rename(step)
        wait_for_all('damaged checkpoint set aside')
        self._open()

    def _rename(self, step: int) -> None:
        target = self._folder / f'damaged-{step}'
        number = 1
        while target.exists():
            number += 1
            target = self._folder / f'damaged-{step}-{number}'
        (self._folder / str(step)).rename(target)


def digests(state: Tree) -> dict[str, dict[str, Any]]:
    """The 'dtype', 'shape' and 'sha256' of the bytes of each leaf, by its path."""
    result = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        array = np.asarray(leaf, order='C')
        result[path_name(path)] = {
            'dtype': str(array.dtype),
            'shape': list(array.shape),
            'sha256': hashlib.sha256(array.tobytes()).hexdigest(),
        }
    return result


def _check_same_network(saved: Mapping[str, Any], like: Tree, folder: Path) -> None:
    """Raises UserError if a checkpoint's leaves differ from those of `like`; names the first."""
    networks = {name: x for name, x in saved.items() if not name.startswith(f'{_PROBE}/')}
    other = _first_other(networks, like)
    if other is not None:
        name, found, wanted = other
        raise UserError(
            f"{folder} belongs to another network: '{name}' is {found} there and {wanted} in this "
            'config. Nothing was changed.'
        )


def _first_other(saved: Mapping[str, Any], like: Tree) -> tuple[str, Any, Any] | None:
    """The first leaf that differs in dtype or shape: (path, saved, that of `like`), or None."""
    wanted = {
        path_name(path): (str(leaf.dtype), list(leaf.shape))
        for path, leaf in jax.tree.leaves_with_path(like)
    }
    found = {name: (leaf['dtype'], leaf['shape']) for name, leaf in saved.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            return name, found.get(name, 'absent'), wanted.get(name, 'absent')
    return None


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Mutes Orbax's log, which prints a traceback for each failed write. Errors still raise."""
    log = logging.getLogger('absl')
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _reason(error: BaseException) -> str:
    """The operating system's error within TensorStore's long message, else the first line."""
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS):
        if os.strerror(number) in str(error):
            return f'{os.strerror(number)}.'
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
