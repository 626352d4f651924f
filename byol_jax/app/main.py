"""The command line: defines the flags and runs the mode that they select."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from byol_jax.app.cli import checked_flags, load_config
from byol_jax.app.output import keep_output, open_standard_files
from byol_jax.errors import UserError

MODES = ('train', 'views', 'summary', 'evaluate', 'embed', 'export', 'compare')

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Name of a recipe, or a config file (executed as Python), optionally with :ARG.'
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder to write to; runs/<config name> by default.'
)
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')
_FROM = flags.DEFINE_string(
    'from', None, 'With --mode=export: weights of another project, as PREFIX:FILE.'
)
_ENCODER = flags.DEFINE_string(
    'encoder',
    None,
    'Exported encoder: a folder, or PREFIX:FILE as for --from; <workdir>/encoder by default.',
)
_OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'File to write: embeddings (.npz or .parquet), evaluation (.json) or comparison (.html).',
)
_WORKDIRS = flags.DEFINE_string('workdirs', None, 'With --mode=compare: workdirs, as A,B[,C...].')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0.')
_PROCESS_COUNT = flags.DEFINE_integer('process_count', None, 'Number of processes.')
_PROCESS_INDEX = flags.DEFINE_integer('process_index', None, 'Number of this process, from 0.')

# Errors of a disk that is full, read-only, damaged or gone.
_OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO),
)

# Flags that only some modes accept.
_ONLY_WITH = (
    (_ENCODER, ('evaluate', 'embed')),
    (_OUTPUT, ('evaluate', 'embed', 'compare')),
    (_WORKDIRS, ('compare',)),
    (_COORDINATOR, ('train',)),
    (_PROCESS_COUNT, ('train',)),
    (_PROCESS_INDEX, ('train',)),
)
# Flags that --mode=compare rejects.
_NOT_WITH_COMPARE = (_CONFIG, _WORKDIR, _FROM)


def run() -> None:
    """Runs the mode that the command line selects, and exits."""
    open_standard_files()
    keep_output()
    # So that `byol-jax` finds networks and configs in the current folder, like `python -m`.
    if os.getcwd() not in sys.path and '' not in sys.path:
        sys.path.append(os.getcwd())
    # --help shows only the flags of the script that Python started; add ours to it.
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    try:
        with _disk_named():
            app.run(main, flags_parser=checked_flags)
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('interrupted')


@contextmanager
def _disk_named() -> Iterator[None]:
    """Makes a fault of the disk an error that a user can read, instead of a traceback.

    Raises:
      UserError: for an OSError of the disk. Any other OSError is a bug, and stays one.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise UserError(f'{error.filename or "the workdir"}: {error.strerror}') from error


def _command() -> str:
    """The command line as typed, without the path of the Python interpreter."""
    if Path(sys.argv[0]).stem == 'byol-jax':
        return shlex.join(['byol-jax', *sys.orig_argv[2:]])
    return shlex.join(['python', *sys.orig_argv[1:]])


def _optional_path(flag: Any) -> Path | None:
    # Shells do not expand a ~ that follows --flag=.
    return None if flag.value is None else Path(flag.value).expanduser()


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    for flag, modes in _ONLY_WITH:
        if flag.value is not None and _MODE.value not in modes:
            right = ' and '.join(f'--mode={mode}' for mode in modes)
            raise UserError(
                f'--{flag.name}={flag.value} goes with {right}, not with --mode={_MODE.value}.'
            )
    if _MODE.value == 'compare':
        for flag in _NOT_WITH_COMPARE:
            if flag.value is not None:
                raise UserError(
                    f'--{flag.name} does not go with --mode=compare, which reads the runs that '
                    '--workdirs=A,B names and nothing else.'
                )
        # A comparison needs neither a config nor TensorFlow nor a device.
        from byol_jax.app.report.compare import compare

        compare(_WORKDIRS.value, _optional_path(_OUTPUT))
        return
    if _FROM.value is not None:
        # A conversion needs neither a config nor TensorFlow.
        from byol_jax.app.devices import check_devices
        from byol_jax.app.export import export_from

        check_devices()
        export_from(_FROM.value, _MODE.value, _WORKDIR.value)
        return
    config = load_config(_CONFIG)
    workdir = _optional_path(_WORKDIR) or Path(f'runs/{config.name}')
    # Imported late, so that a wrong flag is reported before the slow imports of training.
    import jax

    from byol_jax.app.data import single_threaded_opencv
    from byol_jax.app.devices import check_devices
    from byol_jax.app.hosts import join_hosts, leave, refuse_several, say
    from byol_jax.app.memory import check_batches
    from byol_jax.app.modes import MODES as RUN
    from byol_jax.app.modes import Request
    from byol_jax.app.signals import Interrupted

    try:
        if _MODE.value == 'train':
            join_hosts(_COORDINATOR.value, _PROCESS_COUNT.value, _PROCESS_INDEX.value)
        else:
            refuse_several(_MODE.value)
        check_devices()
        check_batches(config, jax.process_count())
        request = Request(config, workdir, _command(), _ENCODER.value, _optional_path(_OUTPUT))
        with _disk_named(), single_threaded_opencv():
            RUN[_MODE.value](request)
    except Interrupted as stop:
        say(f'stopped by {stop} The same command goes on from here.')
        leave(128 + stop.signal_number)
    except UserError as error:
        leave(f'error: {error}')
    except KeyboardInterrupt:
        leave('interrupted')
