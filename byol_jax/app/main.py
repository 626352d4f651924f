"""The command line: its flags, and which mode they ask for."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from byol_jax.app.cli import checked_flags, load_config
from byol_jax.errors import UserError

MODES = ('train', 'views', 'summary', 'evaluate', 'embed', 'export', 'compare')

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'A recipe by name, or a config file, which is executed; with an optional :ARG.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where to write; by default runs/<config name>.')
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')
_FROM = flags.DEFINE_string(
    'from', None, 'With --mode=export: weights made elsewhere, PREFIX:FILE.'
)
_ENCODER = flags.DEFINE_string(
    'encoder', None, 'Folder of an exported encoder; by default <workdir>/encoder.'
)
_OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'File to write: embeddings (.npz or .parquet), evaluation (.json) or comparison (.html).',
)
_WORKDIRS = flags.DEFINE_string('workdirs', None, 'With --mode=compare: the runs, as A,B[,C...].')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0 of several.')
_PROCESS_COUNT = flags.DEFINE_integer('process_count', None, 'Processes of the run.')
_PROCESS_INDEX = flags.DEFINE_integer('process_index', None, 'This process, from 0.')

# Flags that only some modes take.
_ONLY_WITH = (
    (_ENCODER, ('evaluate', 'embed')),
    (_OUTPUT, ('evaluate', 'embed', 'compare')),
    (_WORKDIRS, ('compare',)),
)
# Flags that a comparison has no use for.
_NOT_WITH_COMPARE = (_CONFIG, _WORKDIR, _FROM, _COORDINATOR, _PROCESS_COUNT, _PROCESS_INDEX)


def run() -> None:
    """Does what the command line asks for, and exits."""
    # `byol-jax` finds networks and configs in the current folder, as `python -m byol_jax` does.
    if os.getcwd() not in sys.path and '' not in sys.path:
        sys.path.append(os.getcwd())
    # Else --help would leave them out: it shows the flags of the file that Python was given.
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    try:
        app.run(main, flags_parser=checked_flags)
    except UserError as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        # A full or read-only disk; anything else is a defect and deserves its traceback.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        sys.exit(f'error: {error.filename or "the workdir"}: {error.strerror}')
    except KeyboardInterrupt:
        sys.exit('interrupted')


def _command() -> str:
    """The command line as it was typed, without the folders that Python puts before it."""
    if Path(sys.argv[0]).stem == 'byol-jax':
        return shlex.join(['byol-jax', *sys.orig_argv[2:]])
    return shlex.join(['python', *sys.orig_argv[1:]])


def _optional_path(flag: Any) -> Path | None:
    # A shell leaves a ~ behind --flag= as it is.
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
        # Needs no config, TensorFlow or device.
        from byol_jax.app.report.compare import compare

        compare(_WORKDIRS.value, _optional_path(_OUTPUT))
        return
    if _FROM.value is not None:
        # Needs neither a config nor TensorFlow.
        from byol_jax.app.export import export_from

        export_from(_FROM.value, _MODE.value, _WORKDIR.value)
        return
    config = load_config(_CONFIG)
    workdir = Path(_WORKDIR.value or f'runs/{config.name}')
    # Imported late: a wrong flag is answered without waiting for all that training needs.
    from byol_jax.app.hosts import join_hosts, leave, say
    from byol_jax.app.modes import MODES as RUN
    from byol_jax.app.modes import Request
    from byol_jax.app.signals import Interrupted

    join_hosts(_COORDINATOR.value, _PROCESS_COUNT.value, _PROCESS_INDEX.value)
    try:
        request = Request(
            config, workdir, _command(), _optional_path(_ENCODER), _optional_path(_OUTPUT)
        )
        RUN[_MODE.value](request)
    except Interrupted as stop:
        say(f'stopped by {stop} The same command goes on from here.')
        leave(128 + stop.signal_number)
    except UserError as error:
        leave(f'error: {error}')
