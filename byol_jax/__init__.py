"""BYOL (Bootstrap Your Own Latent, arXiv:2006.07733) for any Flax image encoder."""

from byol_jax.errors import UserError
from byol_jax.interop.encoder import Encoder
from byol_jax.interop.export import load_encoder

__all__ = ['Encoder', 'UserError', 'load_encoder']
__version__ = '0.1.0'
