"""BYOL (Bootstrap Your Own Latent, arXiv:2006.07733) for any Flax image encoder."""

from byol_jax.errors import UserError
from byol_jax.interop.export import Encoder, load_encoder

__all__ = ['Encoder', 'UserError', 'load_encoder']
__version__ = '0.1.0'
