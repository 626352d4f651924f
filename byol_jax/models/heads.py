"""The projector g and the predictor q (paper, Appendix F)."""

from __future__ import annotations

import flax.linen as nn
import jax

from byol_jax.models.layers import batch_norm


class MLP(nn.Module):
    """Linear (bias) -> BatchNorm -> ReLU -> Linear (no bias), for the projector and the predictor.

    Attributes:
      hidden_size: width of the hidden layer; 4096 in the paper, Appendix F.
      output_size: width of the output; 256 in the paper, Appendix F.
      axis_name: mapped axis over which batch statistics are averaged; None for one device.
    """

    hidden_size: int = 4096
    output_size: int = 256
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float [B, D] -> float [B, output_size]."""
        x = nn.Dense(self.hidden_size, name='linear1')(x)
        x = batch_norm(self.axis_name, 'bn')(x, use_running_average=not train)
        x = nn.relu(x)
        return nn.Dense(self.output_size, use_bias=False, name='linear2')(x)
