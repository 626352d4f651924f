"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545) as Linen modules.

Numbers that are not in the paper are from facebookresearch/ConvNeXt, models/convnext.py. Every
layer has its own name, so any of them can be tapped: `stem`, `stem_norm`, `stage1` .. `stage4`,
inside a stage `downsample_norm` and `downsample_conv` (not in the first), `block1`, `block2`, ..,
then `avgpool` and `norm`.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from byol_jax.models.layers import DropPathRates, drop_path, layer_norm
from byol_jax.models.resnet import AvgPool

# The paper's code truncates at +-2, which is 100 standard deviations of 0.02, so nothing is cut
# off. Flax's truncated normal would be cut off at 2 deviations.
_normal = nn.initializers.normal(0.02)


def _patches(features: int, side: int, name: str) -> nn.Conv:
    """A convolution of patches that do not overlap; incomplete patches at an edge are ignored."""
    window = (side, side)
    return nn.Conv(
        features, window, strides=window, padding='VALID', kernel_init=_normal, name=name
    )


class ConvNeXtBlock(nn.Module):
    """Residual: 7x7 depthwise convolution, LayerNorm, 1x1 to four times the width, GELU, 1x1 back.

    Attributes:
      drop_path: probability of dropping the residual branch of an example in training, in [0, 1).
      layer_scale: initial value of `gamma`, a factor for each channel of the branch; 0 for none.
    """

    drop_path: float = 0.0
    layer_scale: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float [B, H, W, C] -> float [B, H, W, C]."""
        channels = x.shape[-1]
        branch = nn.Conv(
            channels,
            (7, 7),
            padding=[(3, 3), (3, 3)],
            feature_group_count=channels,
            kernel_init=_normal,
            name='dwconv',
        )(x)
        branch = layer_norm('norm')(branch)
        branch = nn.Dense(4 * channels, kernel_init=_normal, name='pwconv1')(branch)
        branch = nn.gelu(branch, approximate=False)
        branch = nn.Dense(channels, kernel_init=_normal, name='pwconv2')(branch)
        if self.layer_scale:
            branch *= self.param('gamma', nn.initializers.constant(self.layer_scale), (channels,))
        return x + drop_path(branch, self.drop_path, train, 'drop_path')


class ConvNeXtStage(nn.Module):
    """Blocks of one width; every stage but the first begins by halving height and width.

    Attributes:
      channels: width of the stage.
      drop_path: stochastic depth's rate for each block, in [0, 1).
      layer_scale: initial value of the blocks' `gamma`; 0 for none.
      downsample: whether LayerNorm and a 2x2 convolution with stride 2 precede the blocks.
    """

    channels: int
    drop_path: Sequence[float]
    layer_scale: float
    downsample: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float [B, H, W, C] -> float [B, H', W', channels]."""
        if self.downsample:
            x = layer_norm('downsample_norm')(x)
            x = _patches(self.channels, 2, 'downsample_conv')(x)
        for i, rate in enumerate(self.drop_path):
            x = ConvNeXtBlock(rate, self.layer_scale, name=f'block{i + 1}')(x, train)
        return x


class ConvNeXt(nn.Module):
    """A ConvNeXt; the default is ConvNeXt-T (arXiv:2201.03545, Section 3; its code, convnext_tiny).

    All kernels start normal with a standard deviation of 0.02, all biases at 0.

    Attributes:
      depths: number of blocks in each stage.
      channels: width of each stage.
      drop_path: stochastic depth's rate of the last block, rising linearly from 0 at the first
        block of all, in [0, 1). ConvNeXt-T is trained with labels at 0.1 (the code's TRAINING.md).
      layer_scale: initial value of each block's `gamma`; 0 for none. 1e-6 in the paper's code.
      num_classes: size of a linear `head` after `norm`; 0 for none.
      small_images: whether the stem has 2x2 patches instead of 4x4, for images of 32 to 64 pixels:
        the last stage then has a 16th of the image's side instead of a 32nd, so 2x2 places of a
        32-pixel image. This is ours, and unmeasured; the paper has no such images.
    """

    depths: Sequence[int] = (3, 3, 9, 3)
    channels: Sequence[int] = (96, 192, 384, 768)
    drop_path: float = 0.0
    layer_scale: float = 1e-6
    num_classes: int = 0
    small_images: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalised float [B, H, W, 3] -> float [B, D], or [B, num_classes] with a head.

        In training, a `drop_path` above 0 draws from the 'dropout' stream of random numbers.

        Raises:
          ValueError: `depths` and `channels` differ in length.
        """
        if len(self.depths) != len(self.channels):
            raise ValueError(
                f'depths={tuple(self.depths)} and channels={tuple(self.channels)} must have the '
                'same length, one number for each stage.'
            )
        x = _patches(self.channels[0], 2 if self.small_images else 4, 'stem')(x)
        x = layer_norm('stem_norm')(x)
        rates = DropPathRates(self.drop_path, sum(self.depths))
        for i, (depth, channels) in enumerate(zip(self.depths, self.channels, strict=True)):
            x = ConvNeXtStage(
                channels, rates[:depth], self.layer_scale, downsample=i > 0, name=f'stage{i + 1}'
            )(x, train)
            rates = rates[depth:]
        x = AvgPool(name='avgpool')(x)
        x = layer_norm('norm')(x)
        if self.num_classes:
            x = nn.Dense(self.num_classes, kernel_init=_normal, name='head')(x)
        return x
