"""ResNets (He et al. 2015, v1 with the stride in the 3x3 convolution) as Linen modules.

Every layer has its own name, so any of them can be tapped: `conv1`, `bn1`, `maxpool`, `stage1` ..
`stage4`, inside a stage `block1`, `block2`, .., and `avgpool`.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from byol_jax.models.convolution import quick_convolution
from byol_jax.models.layers import batch_norm

_he_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'truncated_normal')


def _conv(
    features: int, kernel: int, stride: int, name: str, train: bool, same: bool = False
) -> nn.Conv:
    pad = (kernel - 1) // 2
    # Only in training: features of a frozen encoder keep forward- and reverse-mode derivatives.
    quick = train and jax.default_backend() == 'cpu'
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding='SAME' if same else [(pad, pad), (pad, pad)],
        use_bias=False,
        kernel_init=_he_normal,
        conv_general_dilated=quick_convolution if quick else None,
        name=name,
    )


class MaxPool(nn.Module):
    """3x3 max pooling with stride 2; a module, so it can be tapped."""

    same_padding: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [B, H, W, C] -> float [B, ceil(H/2), ceil(W/2), C]."""
        padding = 'SAME' if self.same_padding else [(1, 1), (1, 1)]
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)


class AvgPool(nn.Module):
    """Mean over height and width; a module, so it can be tapped."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [B, H, W, C] -> float [B, C]."""
        return jnp.mean(x, axis=(1, 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    channels: int
    stride: int
    zero_init_residual: bool
    axis_name: str | None
    same_padding: bool = False
    project: bool = False

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        frozen = not train
        out = _conv(self.channels, 3, self.stride, 'conv1', train, self.same_padding)(x)
        out = nn.relu(batch_norm(self.axis_name, 'bn1')(out, use_running_average=frozen))
        out = _conv(self.channels, 3, 1, 'conv2', train)(out)
        out = batch_norm(self.axis_name, 'bn2', self.zero_init_residual)(
            out, use_running_average=frozen
        )
        shortcut = _shortcut(x, out, self.stride, self.project, train, self.axis_name)
        return nn.relu(out + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, and a shortcut."""

    channels: int
    stride: int
    zero_init_residual: bool
    axis_name: str | None
    same_padding: bool = False
    project: bool = False

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        frozen = not train
        out = _conv(self.channels, 1, 1, 'conv1', train)(x)
        out = nn.relu(batch_norm(self.axis_name, 'bn1')(out, use_running_average=frozen))
        out = _conv(self.channels, 3, self.stride, 'conv2', train, self.same_padding)(out)
        out = nn.relu(batch_norm(self.axis_name, 'bn2')(out, use_running_average=frozen))
        out = _conv(self.channels * self.expansion, 1, 1, 'conv3', train)(out)
        out = batch_norm(self.axis_name, 'bn3', self.zero_init_residual)(
            out, use_running_average=frozen
        )
        shortcut = _shortcut(x, out, self.stride, self.project, train, self.axis_name)
        return nn.relu(out + shortcut)


def _shortcut(
    x: jax.Array, out: jax.Array, stride: int, project: bool, train: bool, axis_name: str | None
) -> jax.Array:
    if x.shape == out.shape and not project:
        return x
    x = _conv(out.shape[-1], 1, stride, 'shortcut_conv', train)(x)
    return batch_norm(axis_name, 'shortcut_bn')(x, use_running_average=not train)


class Stage(nn.Module):
    """Blocks of one width; the first may halve height and width."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: int
    channels: int
    stride: int
    zero_init_residual: bool
    axis_name: str | None
    same_padding: bool = False
    project: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.blocks):
            x = self.block(
                self.channels,
                self.stride if i == 0 else 1,
                self.zero_init_residual,
                self.axis_name,
                self.same_padding,
                self.project and i == 0,
                name=f'block{i + 1}',
            )(x, train)
        return x


class ResNet(nn.Module):
    """A ResNet; the names in `byol_jax.models.registry` have the paper's sizes.

    Attributes:
      stage_sizes: number of blocks in each stage.
      bottleneck: whether blocks have three convolutions (ResNet-50 and deeper) instead of two.
      channels: base width of each stage, before `width` and the bottleneck's factor of 4.
      strides: stride of each stage's first block.
      stem_channels: width of the first convolution, before `width`.
      width: factor of every number of channels (1, 2 and 4 in the paper); may be a fraction.
      small_images: whether the stem is a 3x3 convolution with stride 1 and no pooling, for images
        of CIFAR's size (SimCLR, arXiv:2002.05709, Appendix B.9), instead of 7x7 with stride 2 and
        max pooling.
      zero_init_residual: whether the last BatchNorm scale of each block starts at 0, so that the
        block starts as the identity. DeepMind's code does this; the paper's own results were made
        without it, which is slightly better for very large networks (its byol/README.md, on batch
        normalization).
      same_padding: whether strided convolutions and the pooling are padded as in TensorFlow and
        Haiku ('SAME': the odd pixel goes right and below) instead of equally on both sides;
        DeepMind's networks do this.
      project_every_stage: whether the shortcut of every stage's first block has a convolution, even
        if shapes agree, as in DeepMind's ResNet-18 and -34 (byol/utils/networks.py,
        use_projection).
      num_classes: size of a linear `head` after `avgpool`; 0 for none.
      axis_name: mapped axis over which batch statistics are averaged; None for one device.
    """

    stage_sizes: Sequence[int]
    bottleneck: bool = False
    channels: Sequence[int] = (64, 128, 256, 512)
    strides: Sequence[int] = (1, 2, 2, 2)
    stem_channels: int = 64
    width: float = 1
    small_images: bool = False
    zero_init_residual: bool = True
    num_classes: int = 0
    axis_name: str | None = None
    same_padding: bool = False
    project_every_stage: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalised float [B, H, W, 3] -> float [B, D], or [B, num_classes] with a head."""
        kernel, stride = (3, 1) if self.small_images else (7, 2)
        stem = round(self.stem_channels * self.width)
        x = _conv(stem, kernel, stride, 'conv1', train, self.same_padding)(x)
        x = nn.relu(batch_norm(self.axis_name, 'bn1')(x, use_running_average=not train))
        if not self.small_images:
            x = MaxPool(self.same_padding, name='maxpool')(x)
        for i, blocks in enumerate(self.stage_sizes):
            x = Stage(
                Bottleneck if self.bottleneck else BasicBlock,
                blocks,
                round(self.channels[i] * self.width),
                self.strides[i],
                self.zero_init_residual,
                self.axis_name,
                self.same_padding,
                self.project_every_stage,
                name=f'stage{i + 1}',
            )(x, train)
        x = AvgPool(name='avgpool')(x)
        if self.num_classes:
            x = nn.Dense(self.num_classes, name='head')(x)
        return x
