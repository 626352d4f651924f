"""Checkpoints on disk; the only file that knows Orbax."""

from __future__ import annotations

import errno
import gc
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from byol_jax.app.hosts import is_main, say, wait_for_all
from byol_jax.errors import UserError
from byol_jax.files import Damaged, read_object, set_aside, unused_name
from byol_jax.models.network import path_name
from byol_jax.training.state import TrainState

Tree = Any

# Saved as a separate item, because a run may resume without a probe or with a new one.
_PROBE = 'online_probe'

# What Orbax writes about a checkpoint as a whole.
_METADATA = '_CHECKPOINT_METADATA'

# Orbax raises one of these for a damaged or missing file, depending on the file.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError)

# How long a thread of a failed write or read is waited for.
_ORBAX_SECONDS = 10.0
# Without a word for so long it is over.
_SILENCE_SECONDS = 0.3


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

        Raises:
          UserError: there is something else in place of the folder.
        """
        self._folder = (workdir / 'checkpoints').absolute()
        self._keep = keep
        self._read_only = read_only
        if os.path.lexists(self._folder) and not self._folder.is_dir():
            raise UserError(
                f'{self._folder} is no folder. Move it away, or give another --workdir.'
            )
        if not read_only:
            if is_main():
                self._set_odd_aside()
            wait_for_all('odd checkpoints set aside')
        self._open()

    def _open(self) -> None:
        # It would warn of what reading only changes.
        with _quiet_orbax() if self._read_only else nullcontext():
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                cleanup_tmp_directories=not self._read_only,
                read_only=self._read_only,
                # So that a failed write is reported by `save` itself.
                enable_async_checkpointing=False,
            )
            self._manager = ocp.CheckpointManager(
                self._spelled(), options=options, item_names=('state', _PROBE, 'digests')
            )

    def _spelled(self) -> Path:
        """The folder under a name that TensorStore can be given: it takes UTF-8 alone."""
        try:
            str(self._folder).encode()
        except UnicodeEncodeError:
            place = tempfile.mkdtemp(prefix='byol_jax-')
            # What a link leads to stays.
            weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            link = Path(place) / 'checkpoints'
            link.symlink_to(self._folder)
            return link
        return self._folder

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
        reason = self._write(
            step,
            ocp.args.Composite(
                state=ocp.args.StandardSave(networks),
                digests=ocp.args.JsonSave(digests(host)),
                **more,
            ),
        )
        if reason:
            free = shutil.disk_usage(self._folder).free
            self._remove_partial()
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(host))
            raise UserError(
                f'The checkpoint of step {step} ({size / 1e6:.1f} MB) could not be written to '
                f'{self._folder}, where {free / 1e6:.1f} MB are free: {reason}\n'
                'Older checkpoints are untouched. Make room and start the same command again: it '
                f'goes on from step {self.newest()}.'
            )

    def _write(self, step: int, args: Any) -> str:
        """Writes a checkpoint; returns why it could not be written, or ''."""
        reason = ''
        with _quiet_orbax() as answers:
            try:
                self._manager.save(step, args=args, force=True)
                self._manager.wait_until_finished()
            # RuntimeError: of an event loop that another part of the failed write has closed.
            except (OSError, ValueError, RuntimeError) as error:
                # The error itself would keep what is under way from being collected.
                reason = _reason(error)
            if reason:
                _wait_for_orbax(answers)
        return reason

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
            with _quiet_orbax() as answers:
                state, damage = self._load(step, like)
                if damage is not None:
                    _wait_for_orbax(answers)
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
        """Ends Orbax, and removes what a failed write has left."""
        self._manager.close()
        self._remove_partial()

    def _load(self, step: int, like: TrainState) -> tuple[Any, str | None]:
        """Loads one checkpoint.

        Returns:
          (state, None), or (None, a description of the damage).

        Raises:
          UserError: the checkpoint belongs to another network, or the disk cannot be read.
        """
        # Opening a pipe would wait for ever.
        for path in (self._folder / str(step)).rglob('*'):
            if not path.is_file() and not path.is_dir():
                return None, f'{path.relative_to(self._folder)} is neither a file nor a folder'
        try:
            expected = self._restore(step, digests=ocp.args.JsonRestore())['digests']
            _check_digests(expected)
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

    def _remove_partial(self) -> None:
        """Makes room for what the run still writes before it ends."""
        if is_main() and not self._read_only:
            for folder in self._folder.glob('*.orbax-checkpoint-tmp*'):
                shutil.rmtree(folder, ignore_errors=True)

    def _set_aside(self, step: int) -> None:
        self._manager.close()
        wait_for_all('damaged checkpoint closed')
        if is_main():
            self._rename(step)
        wait_for_all('damaged checkpoint set aside')
        self._open()

    def _set_odd_aside(self) -> None:
        """Names and moves aside what Orbax stumbles over when it opens the folder."""
        for path in sorted(self._folder.glob('*')):
            if not path.name.isdigit():
                continue
            if not path.is_dir():
                say(f'checkpoint {path.name} is damaged: it is not a folder')
                self._rename(int(path.name))
                continue
            try:
                read_object(path / _METADATA)
            except Damaged as error:
                # The state can be read without it.
                say(f'{error} It is kept as {set_aside(path / _METADATA).name}')

    def _rename(self, step: int) -> None:
        (self._folder / str(step)).rename(unused_name(self._folder / f'damaged-{step}'))


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


def _check_digests(content: Any) -> None:
    """Raises ValueError if what was restored is not what `digests` makes."""
    kinds = {'dtype': str, 'shape': list, 'sha256': str}
    for leaf in content.values() if isinstance(content, Mapping) else (None,):
        if not isinstance(leaf, Mapping) or any(
            not isinstance(leaf.get(name), kind) for name, kind in kinds.items()
        ):
            raise ValueError('its digests are not what byol_jax writes there')


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
def _quiet_orbax() -> Iterator[list[None]]:
    """Mutes the tracebacks of a failed write or read: of logs, and of what nobody can catch.

    Errors still raise. Yields a list that has as many elements as there were of the latter.
    """
    answers: list[None] = []
    logs = [logging.getLogger(name) for name in ('absl', 'asyncio')]
    before, hook = [log.level for log in logs], sys.unraisablehook
    for log in logs:
        # Not `disabled`, which absl's logger does not look at.
        log.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: answers.append(None)
    try:
        yield answers
    finally:
        sys.unraisablehook = hook
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


def _wait_for_orbax(answers: list[None]) -> None:
    """Returns when all parts of a failed write or read have ended: some speak after the first.

    Args:
      answers: grows while TensorStore answers, from its threads, to event loops that are closed.
    """
    for thread in threading.enumerate():
        if type(thread).__module__.startswith('orbax.'):
            # Its own `join` raises its error.
            threading.Thread.join(thread, _ORBAX_SECONDS)
    # Tasks that nobody awaits speak when they are collected.
    gc.collect()
    end, count = time.monotonic() + _ORBAX_SECONDS, -1
    while count != len(answers) and time.monotonic() < end:
        count = len(answers)
        time.sleep(_SILENCE_SECONDS)


def _reason(error: BaseException) -> str:
    """The operating system's error within TensorStore's long message, else the first line."""
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS):
        if os.strerror(number) in str(error):
            return f'{os.strerror(number)}.'
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
