"""Label-free measures of a batch, for inside of a jitted or pmapped step; see `spectrum`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from byol_jax.methods.byol import l2_normalize, regression_loss


def alignment(view1: jax.Array, view2: jax.Array, axis_name: str | None = None) -> jax.Array:
    """`spectrum.alignment` at alpha = 2: float [B, P] twice -> a float32 scalar, in [0, 4].

    Args:
      view1, view2: row by row the same picture, of any length.
      axis_name: of the devices over which B is spread, to average over all of them; or None.
    """
    mean = jnp.mean(regression_loss(view1.astype(jnp.float32), view2.astype(jnp.float32)))
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)


def background_cosine(features: jax.Array, axis_name: str | None = None) -> jax.Array:
    """`spectrum.background_cosine`: float [B, P] -> a float32 scalar, in [-1 / (N - 1), 1].

    Args:
      features: of N = B pictures on one device, or of N in all; N at least 2.
      axis_name: as for `alignment`. Pairs on different devices count too, though only one sum of
        features, [P], travels between them.
    """
    z = l2_normalize(features.astype(jnp.float32))
    total, squares, count = jnp.sum(z, axis=0), jnp.sum(z**2), len(z)
    if axis_name is not None:
        total, squares, count = jax.lax.psum((total, squares, count), axis_name)
    return (jnp.sum(total**2) - squares) / (count * (count - 1))
