"""Loads encoders of other projects by the prefix in PREFIX:FILE."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from byol_jax.errors import UserError, did_you_mean
from byol_jax.interop.deepmind import load_deepmind
from byol_jax.interop.encoder import Encoder
from byol_jax.interop.torchvision import load_torchvision
from byol_jax.interop.which_resnet import Say, no_say

# Loaders by the PREFIX of --from=PREFIX:FILE.
LOADERS: Mapping[str, Callable[[str, Say], Encoder]] = {
    'deepmind': lambda file, say: load_deepmind(file),
    'torchvision': load_torchvision,
}


def is_elsewhere(source: str) -> bool:
    """Whether a source is PREFIX:FILE with a known prefix, and no path."""
    prefix, colon, _ = source.partition(':')
    return bool(colon) and prefix in LOADERS


def load_from(source: str, say: Say = no_say) -> Encoder:
    """Loads an encoder from 'PREFIX:FILE', where PREFIX is a key of LOADERS.

    Args:
      source: as above.
      say: gets a line on what was found where, if that is worth a line.

    Raises:
      UserError: there is no such prefix, or its loader cannot read the file.
    """
    prefix, colon, file = source.partition(':')
    if prefix not in LOADERS or not file:
        known = ', '.join(f'{name}:FILE' for name in LOADERS)
        hint = '' if prefix in LOADERS or not colon else did_you_mean(prefix, LOADERS)
        raise UserError(f'--from={source} cannot be used.{hint} Known are: {known}.')
    return LOADERS[prefix](file, say)
