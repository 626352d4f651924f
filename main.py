"""Command line of byol_jax: python main.py --config=configs/div2k.py[:ARG] [--mode=MODE]."""

from __future__ import annotations

import errno
import shlex
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from byol_jax.cli import checked_flags, load_config
from byol_jax.errors import UserError

MODES = ('train', 'views', 'summary', 'evaluate', 'embed', 'export')

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, which is executed, with an optional :ARG.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where to write; by default runs/<config name>.')
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    config = load_config(_CONFIG)
    workdir = Path(_WORKDIR.value or f'runs/{config.name}')
    # Imported late: a wrong flag is answered without waiting for TensorFlow.
    from byol_jax.train.loop import Interrupted
    from byol_jax.train.modes import MODES as RUN

    try:
        RUN[_MODE.value](config, workdir, shlex.join(['python', *sys.argv]))
    except Interrupted as stop:
        print(f'stopped by {stop}; the same command goes on from here', flush=True)
        sys.exit(128 + stop.signal_number)


if __name__ == '__main__':
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
