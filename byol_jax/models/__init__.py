"""Networks: encoders, heads, and the tap that makes any layer the representation."""

from typing import TYPE_CHECKING

from byol_jax.lazy import lazy

if TYPE_CHECKING:
    from byol_jax.models.convnext import ConvNeXt as ConvNeXt
    from byol_jax.models.heads import MLP as MLP
    from byol_jax.models.registry import build_encoder as build_encoder
    from byol_jax.models.resnet import ResNet as ResNet
    from byol_jax.models.tap import TappedEncoder as TappedEncoder
    from byol_jax.models.vit import ViT as ViT

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        'convnext': ('ConvNeXt',),
        'heads': ('MLP',),
        'registry': ('build_encoder',),
        'resnet': ('ResNet',),
        'tap': ('TappedEncoder',),
        'vit': ('ViT',),
    },
)
