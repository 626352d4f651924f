"""BYOL in JAX: python -m byol_jax --config=div2k[:ARG] [--workdir=DIR] [--mode=MODE]."""

from __future__ import annotations

import sys


def run() -> None:
    """Does what the command line asks for; main.py, `byol-jax` and this module call it."""
    try:
        from byol_jax.app.main import run
    except ModuleNotFoundError as error:
        sys.exit(
            f'error: {error.name} is not installed. Training needs more than loading an encoder: '
            "pip install 'byol_jax[train]', or -r requirements-cpu.txt in a checkout."
        )
    run()


if __name__ == '__main__':
    run()
