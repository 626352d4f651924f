"""--mode=export of weights made elsewhere: needs neither a config nor what training needs."""

from __future__ import annotations

from pathlib import Path

from byol_jax.errors import UserError
from byol_jax.interop.export import save_encoder
from byol_jax.interop.imports import load_from


def export_from(source: str, mode: str, workdir: str | None) -> None:
    """--mode=export --from=PREFIX:FILE: writes workdir/encoder.

    Args:
      source: 'PREFIX:FILE', see `interop.imports.LOADERS`.
      mode: that was asked for.
      workdir: to write to.

    Raises:
      UserError: another mode, no workdir, or what `load_from` raises.
    """
    if mode != 'export':
        raise UserError(f'--from={source} goes with --mode=export, not with --mode={mode}.')
    if workdir is None:
        raise UserError(f'--from={source} needs --workdir=DIR, where it writes DIR/encoder.')
    encoder = load_from(source)
    folder = Path(workdir) / 'encoder'
    save_encoder(encoder, folder)
    about = encoder.description
    print(f'{about["name"]}, {about["feature_size"]} features, step {about["step"]}: {folder}')
