"""Vision transformers (arXiv:2010.11929) with the positions and initial values of MoCo v3.

MoCo v3 is arXiv:2104.02057 and facebookresearch/moco-v3, vits.py. Every layer has its own name, so
any of them can be tapped: `patch_embed`, `block1`, `block2`, .., inside a block `norm1`,
`attention`, `norm2` and `mlp`, and `norm`, whose output is all tokens.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from byol_jax.models.layers import DropPathRates, drop_path, dropout, layer_norm

# The longest wavelength of the fixed positions is about 2 pi times this, in patches (vits.py).
TEMPERATURE = 10_000.0

# Uniform within sqrt(6 / (inputs + outputs)), with all values of a patch as inputs. Flax's
# xavier_uniform would multiply the outputs by the number of pixels.
_patch_uniform = nn.initializers.variance_scaling(
    1.0, 'fan_avg', 'uniform', in_axis=(0, 1, 2), out_axis=3
)


def sincos_position(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed 2-D positions of a grid of patches, in row-major order (vits.py, temperature 10000).

    The four quarters of the channels are the sine and the cosine of row x f, and the sine and the
    cosine of column x f, with frequencies f = 10000^(-k / (width / 4)) for k = 0 .. width / 4 - 1.

    Args:
      rows: number of rows of patches.
      columns: number of columns of patches.
      width: number of channels, divisible by 4.

    Returns:
      float64 [rows * columns, width] in [-1, 1].

    Raises:
      ValueError: `width` is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f'width={width} must be divisible by 4 for fixed 2-D positions.')
    frequencies = TEMPERATURE ** (-np.arange(width // 4) / (width // 4))
    row = np.repeat(np.arange(rows), columns)[:, None] * frequencies
    column = np.tile(np.arange(columns), rows)[:, None] * frequencies
    return np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1)


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.xavier_uniform(), name=name)


class Attention(nn.Module):
    """Multi-head self-attention.

    Attributes:
      heads: number of heads, with D / heads channels each.
      dropout: probability of zeroing a value of the output in training, in [0, 1].
    """

    heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float [B, N, D] -> float [B, N, D].

        Raises:
          ValueError: D is not divisible by `heads`.
        """
        batch, tokens, width = x.shape
        if width % self.heads:
            raise ValueError(f'width={width} is not divisible by heads={self.heads}.')
        split = (batch, tokens, self.heads, width // self.heads)
        # Three matrices instead of one, since the initial range depends on a matrix's size.
        query, key, value = (_dense(width, n)(x).reshape(split) for n in ('query', 'key', 'value'))
        scores = jnp.einsum('bqhd,bkhd->bhqk', query * split[-1] ** -0.5, key)
        # At least float32: a bfloat16 sum over hundreds of tokens would lose the small weights.
        wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        weights = nn.softmax(wide, axis=-1).astype(scores.dtype)
        mixed = jnp.einsum('bhqk,bkhd->bqhd', weights, value).reshape(x.shape)
        return dropout(_dense(width, 'out')(mixed), self.dropout, train, 'drop')


class FeedForward(nn.Module):
    """Linear, exact GELU and Linear, for each token separately.

    Attributes:
      hidden_size: width of the hidden layer.
      dropout: probability of zeroing a value after either linear layer in training, in [0, 1].
    """

    hidden_size: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float [B, N, D] -> float [B, N, D]."""
        width = x.shape[-1]
        x = nn.gelu(_dense(self.hidden_size, 'linear1')(x), approximate=False)
        x = dropout(x, self.dropout, train, 'drop1')
        return dropout(_dense(width, 'linear2')(x), self.dropout, train, 'drop2')


class TransformerBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)): pre-norm, as in arXiv:2010.11929, Figure 1.

    Attributes:
      heads: number of heads of the attention.
      hidden_size: hidden width of the feed-forward part.
      dropout: dropout's probability in both parts, in [0, 1].
      drop_path: probability of dropping either residual branch of an example in training.
    """

    heads: int
    hidden_size: int
    dropout: float = 0.0
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float [B, N, D] -> float [B, N, D]."""
        branch = layer_norm('norm1')(x)
        branch = Attention(self.heads, self.dropout, name='attention')(branch, train)
        x = x + drop_path(branch, self.drop_path, train, 'drop_path1')
        branch = layer_norm('norm2')(x)
        branch = FeedForward(self.hidden_size, self.dropout, name='mlp')(branch, train)
        return x + drop_path(branch, self.drop_path, train, 'drop_path2')


class ViT(nn.Module):
    """A vision transformer; the default has DeiT-S's size.

    DeiT's sizes (arXiv:2012.12877, Table 1), with depth 12 and patches of 16 pixels: Ti has width
    192 and 3 heads, S 384 and 6, B 768 and 12. MoCo v3's ViT-S has 12 heads (vits.py, vit_small).

    The initial values are those of vits.py: linear layers are Xavier-uniform, with query, key and
    value as separate matrices; the patch projection is uniform in the same way; biases are 0; the
    class token is normal with a standard deviation of 1e-6.

    Attributes:
      width: channels of a token, D; divisible by 4 unless the positions are learned.
      depth: number of blocks.
      heads: number of heads of each block's attention; must divide `width`.
      patch_size: side of a patch, pixels; must divide the image's height and width.
      mlp_ratio: hidden width of a block's feed-forward part over `width`; 4 in all sources.
      class_token: whether a learned token precedes those of the patches. The network's output is
        then this token; otherwise it is the mean of all tokens.
      num_classes: size of a linear `head` on that output; 0 for none.
      dropout: probability of zeroing a value in training, after the positions are added and after
        every linear layer but query, key and value (arXiv:2010.11929, Appendix B.1).
      drop_path: stochastic depth's rate of the last block, rising linearly from 0 at the first.
      learned_position: whether positions are learned, that of the class token too, as in
        arXiv:2010.11929 and DeiT. The parameter `pos_embed` then has the image size of `init`, and
        other numbers of patches are refused; it starts normal with a standard deviation of 0.02.
        Otherwise positions are `sincos_position` of any grid, and 0 for the class token.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch_size: int = 16
    mlp_ratio: float = 4
    class_token: bool = True
    num_classes: int = 0
    dropout: float = 0.0
    drop_path: float = 0.0
    learned_position: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalised float [B, H, W, 3] -> float [B, width], or [B, num_classes] with a head.

        In training, rates above 0 draw from the 'dropout' stream of random numbers.

        Raises:
          ValueError: the image size does not fit `patch_size` or the learned positions, or `heads`
            does not divide `width`.
        """
        batch, height, width = x.shape[:3]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f'the image size {height}x{width} is not divisible by patch_size={self.patch_size}.'
            )
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(
            self.width,
            patch,
            strides=patch,
            padding='VALID',
            kernel_init=_patch_uniform,
            name='patch_embed',
        )(x)
        rows, columns = x.shape[1:3]
        x = x.reshape(batch, rows * columns, self.width)
        if self.class_token:
            token = self.param('cls_token', nn.initializers.normal(1e-6), (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, self.width)), x], axis=1)
        x = x + self._positions(rows, columns).astype(x.dtype)
        x = dropout(x, self.dropout, train, 'drop')
        for i, rate in enumerate(DropPathRates(self.drop_path, self.depth)):
            x = TransformerBlock(
                self.heads,
                round(self.mlp_ratio * self.width),
                self.dropout,
                rate,
                name=f'block{i + 1}',
            )(x, train)
        x = layer_norm('norm')(x)
        x = x[:, 0] if self.class_token else jnp.mean(x, axis=1)
        return _dense(self.num_classes, 'head')(x) if self.num_classes else x

    def _positions(self, rows: int, columns: int) -> jax.Array:
        """The positions that are added to the tokens, [1, N, D]; that of the class token first."""
        extra = int(self.class_token)
        if not self.learned_position:
            table = sincos_position(rows, columns, self.width)
            return jnp.asarray(np.pad(table, ((extra, 0), (0, 0)))[None])
        shape = (1, rows * columns + extra, self.width)
        if self.has_variable('params', 'pos_embed'):
            learned = self.get_variable('params', 'pos_embed').shape[1] - extra
            if learned != rows * columns:
                raise ValueError(
                    f'the positions were learned for {learned} patches, not for {rows}x{columns}: '
                    'use images of that size, or learned_position=False.'
                )
        return self.param('pos_embed', nn.initializers.normal(0.02), shape)
