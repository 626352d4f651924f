"""BYOL: an online network predicts the projection of another view by its own moving average.

Symbols are those of the paper (arXiv:2006.07733, Section 3): encoder f, projector g, predictor q,
online parameters theta, target parameters xi, representation y, projection z, prediction q(z).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from byol_jax.errors import UserError
from byol_jax.methods.base import Batch, LossScale, Method, Outputs, Tree, l2_normalize
from byol_jax.models.heads import MLP
from byol_jax.models.tap import TappedEncoder


class Online(NamedTuple):
    """Outputs of the online network for a view.

    Attributes:
      representation: y = f(images), float [B, D].
      projection: z = g(y), float32 [B, P].
      prediction: q(z), float32 [B, P].
    """

    representation: jax.Array
    projection: jax.Array
    prediction: jax.Array


@dataclasses.dataclass(frozen=True)
class Byol(Method):
    """BYOL's encoder, projector and predictor, and its loss.

    A subclass with another `distance`, and the `loss_scale` that goes with it, is another method.

    Attributes:
      encoder: f, any network, tapped at its representation.
      projector: g.
      predictor: q; only the online network has one.
      mean: as in `Method`.
      std: as in `Method`.
      dtype: as in `Method`.
    """

    encoder: TappedEncoder
    projector: MLP
    predictor: MLP
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: Any = jnp.float32

    views = ('view1', 'view2')
    target_parts = ('encoder', 'projector')
    # The sum of two distances in [0, 4]. At chance vectors are orthogonal, at a distance of 2.
    loss_scale = LossScale(lowest=0.0, chance=4.0, highest=8.0)

    def distance(self, prediction: jax.Array, projection: jax.Array) -> jax.Array:
        """The distance of a prediction from the target's projection (paper, Equation 2).

        Args:
          prediction: q(z), float32 [B, P], not normalised.
          projection: z', float32 [B, P], not normalised and without a gradient.

        Returns:
          [B], the distance of each row.
        """
        return regression_loss(prediction, projection)

    def loss(
        self,
        params: Tree,
        target_params: Tree,
        stats: Tree,
        target_stats: Tree,
        batch: Batch,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Outputs]:
        """The symmetric loss (paper, Equation 2 and the sentence after it), in [0, 8].

        Each batch normalisation sees one view at a time: there are four forward passes, and running
        statistics are updated by view 1, then by view 2, as in DeepMind's byol/byol_experiment.py.
        Each pass has its own key.
        """
        view1, view2 = batch['view1'], batch['view2']
        rngs = [None] * 4 if rng is None else list(jax.random.split(rng, 4))
        online1, stats = self.online(params, stats, view1, rngs[0])
        online2, stats = self.online(params, stats, view2, rngs[1])
        target1, target_stats = self.target(target_params, target_stats, view1, rngs[2])
        target2, target_stats = self.target(target_params, target_stats, view2, rngs[3])
        per_example = self.distance(
            online1.prediction, jax.lax.stop_gradient(target2)
        ) + self.distance(online2.prediction, jax.lax.stop_gradient(target1))
        if per_example.shape != view1.shape[:1]:
            raise UserError(
                f'{type(self).__name__}.distance gives {list(per_example.shape)} for a batch of '
                f'{len(view1)}: it must give one number per row, [B]. The mean is taken afterwards.'
            )
        features = {
            'representation': jnp.stack([online1.representation, online2.representation]),
            'projection': jnp.stack([online1.projection, online2.projection]),
            'prediction': jnp.stack([online1.prediction, online2.prediction]),
            'target': jnp.stack([target1, target2]),
        }
        return jnp.mean(per_example), Outputs(stats, target_stats, features)

    def online(
        self, params: Tree, stats: Tree, images: jax.Array, rng: jax.Array | None = None
    ) -> tuple[Online, Tree]:
        """Applies the online network to one view, in training mode: y -> z = g(y) -> q(z).

        Args:
          params: theta, by part.
          stats: its batch statistics, by part.
          images: uint8 [B, H, W, 3].
          rng: a key for random numbers of the encoder (dropout, stochastic depth); None if it draws
            none.

        Returns:
          The outputs for the view, and the updated stats.
        """
        y, z, stats = self._project(params, stats, images, rng)
        prediction, predictor_stats = self._head(
            self.predictor, params['predictor'], stats['predictor'], z
        )
        made = Online(y, z.astype(jnp.float32), prediction.astype(jnp.float32))
        return made, {**stats, 'predictor': predictor_stats}

    def target(
        self, params: Tree, stats: Tree, images: jax.Array, rng: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        """Applies the target network to one view, in training mode: y' -> z' = g(y').

        Args:
          params: xi, by part.
          stats: its batch statistics, by part.
          images: uint8 [B, H, W, 3].
          rng: as for `online`, but another key.

        Returns:
          The projection z', float32 [B, P], and the updated stats.
        """
        _, projection, stats = self._project(params, stats, images, rng)
        return projection.astype(jnp.float32), stats

    def project(self, params: Tree, stats: Tree, images: jax.Array) -> jax.Array:
        """The online projection z in inference mode: uint8 [B, H, W, 3] -> float32 [B, P]."""
        y, _ = self.represent(params, stats, images)
        variables = {'params': self._cast(params['projector']), **stats['projector']}
        projection: Any = self.projector.apply(variables, y, train=False)
        return projection.astype(jnp.float32)

    def init(self, rng: jax.Array, image_size: int) -> tuple[Tree, Tree]:
        """Initialises the parts 'encoder', 'projector' and 'predictor' of the online network.

        The target network starts as a copy of the first two (`training.state.init_state`).
        """
        images = jnp.zeros((2, image_size, image_size, 3), jnp.float32)
        encoder_rng, projector_rng, predictor_rng = jax.random.split(rng, 3)
        encoder = jax.jit(self.encoder.init)(encoder_rng, images)
        y = jnp.zeros(self.encoder.feature_shape(encoder, images), jnp.float32)
        z = jnp.zeros((2, self.projector.output_size), jnp.float32)
        variables = {
            'encoder': encoder,
            'projector': self.projector.init(projector_rng, y, train=False),
            'predictor': self.predictor.init(predictor_rng, z, train=False),
        }
        params = {part: tree['params'] for part, tree in variables.items()}
        stats = {
            part: {name: value for name, value in tree.items() if name != 'params'}
            for part, tree in variables.items()
        }
        return params, stats

    def _project(
        self, params: Tree, stats: Tree, images: jax.Array, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """The representation, the projection and the updated stats."""
        y, encoder_stats = self.represent(params, stats, images, True, rng)
        z, projector_stats = self._head(self.projector, params['projector'], stats['projector'], y)
        return y, z, {**stats, 'encoder': encoder_stats, 'projector': projector_stats}

    def _head(self, module: MLP, params: Tree, stats: Tree, x: jax.Array) -> Any:
        """(output, updated stats) of the projector or predictor in training mode."""
        variables = {'params': self._cast(params), **stats}
        return module.apply(variables, x, train=True, mutable=list(stats))


def regression_loss(prediction: jax.Array, projection: jax.Array) -> jax.Array:
    """|| unit(q) - unit(z') ||^2 = 2 - 2 cos(q, z') per row (paper, Equation 2).

    Args:
      prediction: q(z), float [B, P].
      projection: z', float [B, P].

    Returns:
      [B], in [0, 4].
    """
    return jnp.sum((l2_normalize(prediction) - l2_normalize(projection)) ** 2, axis=-1)
