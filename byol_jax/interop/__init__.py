"""Exported encoders, and conversion from and to other projects' weights."""

from typing import TYPE_CHECKING

from byol_jax.lazy import lazy

if TYPE_CHECKING:
    from byol_jax.interop.encoder import Encoder as Encoder
    from byol_jax.interop.encoder import make_encoder as make_encoder
    from byol_jax.interop.export import load_encoder as load_encoder
    from byol_jax.interop.export import save_encoder as save_encoder
    from byol_jax.interop.torchvision import load_torchvision as load_torchvision
    from byol_jax.interop.torchvision import save_torchvision as save_torchvision

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        'encoder': ('Encoder', 'make_encoder'),
        'export': ('load_encoder', 'save_encoder'),
        'torchvision': ('load_torchvision', 'save_torchvision'),
    },
)
