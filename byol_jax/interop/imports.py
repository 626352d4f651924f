"""Loads encoders of other projects by the prefix in PREFIX:FILE."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from byol_jax.errors import UserError, did_you_mean
from byol_jax.interop.deepmind import load_deepmind
from byol_jax.interop.encoder import Encoder
from byol_jax.interop.torchvision import load_torchvision

# Loaders by the PREFIX of --from=PREFIX:FILE.
LOADERS: Mapping[str, Callable[[str], Encoder]] = {
    'deepmind': load_deepmind,
    'torchvision': load_torchvision,
}


def load_from(source: str) -> Encoder:
    """Loads an encoder from 'PREFIX:FILE', where PREFIX is a key of LOADERS.

    Raises:
      UserError: there is no such prefix, or its loader cannot read the file.
    """
    prefix, colon, file = source.partition(':')
    if prefix not in LOADERS or not file:
        known = ', '.join(f'{name}:FILE' for name in LOADERS)
        hint = '' if prefix in LOADERS or not colon else did_you_mean(prefix, LOADERS)
        raise UserError(f'--from={source} cannot be used.{hint} Known are: {known}.')
    return LOADERS[prefix](file)
