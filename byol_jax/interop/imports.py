"""Encoders trained elsewhere: which loader reads which file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from byol_jax.errors import UserError, did_you_mean
from byol_jax.interop.deepmind import load_deepmind
from byol_jax.interop.encoder import Encoder
from byol_jax.interop.export import save_encoder
from byol_jax.interop.torchvision import load_torchvision

# PREFIX of --from=PREFIX:FILE -> loader.
LOADERS: Mapping[str, Callable[[str], Encoder]] = {
    'deepmind': load_deepmind,
    'torchvision': load_torchvision,
}


def load_from(source: str) -> Encoder:
    """Loads an encoder from 'PREFIX:FILE', with PREFIX a key of LOADERS.

    Raises:
      UserError: there is no such prefix, or its loader refuses the file.
    """
    prefix, colon, file = source.partition(':')
    if prefix not in LOADERS or not file:
        known = ', '.join(f'{name}:FILE' for name in LOADERS)
        hint = '' if prefix in LOADERS or not colon else did_you_mean(prefix, LOADERS)
        raise UserError(f'--from={source} cannot be used.{hint} There are: {known}.')
    return LOADERS[prefix](file)


def export_from(source: str, mode: str, workdir: str | None) -> None:
    """--mode=export --from=PREFIX:FILE: writes workdir/encoder.

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
