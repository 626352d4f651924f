"""--mode=export --from: converts weights of another project; needs no config and no TensorFlow."""

from __future__ import annotations

from pathlib import Path

from byol_jax.errors import UserError
from byol_jax.interop.export import save_encoder
from byol_jax.interop.imports import load_from


def export_from(source: str, mode: str, workdir: str | None) -> None:
    """Converts weights and writes them to workdir/encoder.

    Args:
      source: 'PREFIX:FILE', see `interop.imports.LOADERS`.
      mode: value of --mode.
      workdir: value of --workdir, or None.

    Raises:
      UserError: the mode is not 'export', there is no workdir, or `load_from` fails.
    """
    if mode != 'export':
        raise UserError(f'--from={source} goes with --mode=export, not with --mode={mode}.')
    if workdir is None:
        raise UserError(f'--from={source} needs --workdir=DIR, where it writes DIR/encoder.')
    encoder = load_from(source, print)
    folder = Path(workdir).expanduser() / 'encoder'
    save_encoder(encoder, folder)
    about = encoder.description
    print(f'{about["name"]}, {about["feature_size"]} features, step {about["step"]}: {folder}')
