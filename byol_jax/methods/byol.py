"""The method: online and target networks, their loss and the moving average between them.

Symbols are those of the paper (arXiv:2006.07733, Section 3): encoder f, projector g, predictor q,
online parameters theta, target parameters xi, representation y, projection z, prediction q(z).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from byol_jax.models.mlp import MLP
from byol_jax.models.tap import TappedEncoder

Tree = Any


class Features(NamedTuple):
    """What the networks make of a batch: float [2, B, size], view 1 and view 2.

    Attributes:
      representation: y, of the online network.
      projection: z = g(y). prediction: q(z).
      target: z', the target network's projection of the same view.
    """

    representation: jax.Array
    projection: jax.Array
    prediction: jax.Array
    target: jax.Array


@dataclasses.dataclass(frozen=True)
class Byol:
    """The three networks and how images reach them.

    Attributes:
      encoder: f, any network tapped at its representation.
      projector: g.
      predictor: q, part of the online network only.
      mean, std: of the RGB channels in [0, 1], for normalisation on the device.
      dtype: compute type; parameters, statistics and losses stay float32.
    """

    encoder: TappedEncoder
    projector: MLP
    predictor: MLP
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: Any = jnp.float32

    def init(self, rng: jax.Array, image_size: int) -> tuple[Tree, Tree]:
        """Returns the online parameters and batch statistics, each a dict by part.

        The parts are 'encoder', 'projector' and 'predictor'. The target network starts as a copy
        of the first two.
        """
        images = jnp.zeros((2, image_size, image_size, 3), jnp.float32)
        encoder_rng, projector_rng, predictor_rng = jax.random.split(rng, 3)
        encoder = jax.jit(self.encoder.init)(encoder_rng, images)
        shape = self._representation(encoder, images)
        y = jnp.zeros(shape.shape, jnp.float32)
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

    def feature_size(self, image_size: int) -> int:
        """Size of the representation, D."""
        images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
        variables = jax.eval_shape(self.encoder.init, jax.random.key(0), images)
        return int(self._representation(variables, images).shape[-1])

    def _representation(self, variables: Any, images: Any) -> Any:
        return jax.eval_shape(
            lambda v, x: self.encoder.apply(v, x, train=False)[0], variables, images
        )

    def normalize(self, images: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> zero-mean, unit-variance values in the compute type."""
        x = images.astype(jnp.float32) / 255
        x = (x - jnp.array(self.mean)) / jnp.array(self.std)
        return x.astype(self.dtype)

    def represent(
        self,
        params: Tree,
        stats: Tree,
        images: jax.Array,
        train: bool,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        """The representation y = f(images): uint8 [B, H, W, 3] -> float [B, D], and f's stats."""
        variables = {'params': self._cast(params['encoder']), **stats['encoder']}
        return self.encoder.apply(variables, self.normalize(images), train, rng)

    def project(self, params: Tree, stats: Tree, images: jax.Array) -> jax.Array:
        """The online projection z in inference mode: uint8 [B, H, W, 3] -> float32 [B, P]."""
        y, _ = self.represent(params, stats, images, train=False)
        variables = {'params': self._cast(params['projector']), **stats['projector']}
        projection: Any = self.projector.apply(variables, y, train=False)
        return projection.astype(jnp.float32)

    def online(
        self, params: Tree, stats: Tree, images: jax.Array, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """The online network on one view, in training mode: y -> z = g(y) -> q(z).

        Args:
          params, stats: theta and its batch statistics.
          images: uint8 [B, H, W, 3].
          rng: a key for what the encoder draws (dropout, stochastic depth); None if nothing.

        Returns:
          Prediction q(z) and projection z, float32 [B, P], and the updated stats.
        """
        _, projection, prediction, stats = self._online(params, stats, images, rng)
        return prediction, projection, stats

    def target(
        self, params: Tree, stats: Tree, images: jax.Array, rng: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        """The target network on one view, in training mode: y' -> z' = g(y').

        Args:
          params, stats: xi and its batch statistics.
          images: uint8 [B, H, W, 3].
          rng: as for `online`; the target draws for itself.

        Returns:
          Projection z', float32 [B, P], and the updated stats.
        """
        _, projection, stats = self._project(params, stats, images, rng)
        return projection.astype(jnp.float32), stats

    def loss(
        self,
        online_params: Tree,
        target_params: Tree,
        online_stats: Tree,
        target_stats: Tree,
        view1: jax.Array,
        view2: jax.Array,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Tree, Tree, jax.Array]]:
        """The symmetric loss (paper, Equation 2 and the sentence after it).

        Each batch normalisation sees one view at a time: four forward passes, the second view's
        statistics following the first's, as in DeepMind's byol/byol_experiment.py.

        Args:
          view1, view2: uint8 [B, H, W, 3].
          rng: a key, of which each of the four passes gets one of its own; None as for `online`.

        Returns:
          The loss, float32 in [0, 8], and (online stats, target stats, online projections of
          both views [2B, P]).
        """
        loss, (online_stats, target_stats, features) = self.loss_and_features(
            online_params, target_params, online_stats, target_stats, view1, view2, rng
        )
        projections = jnp.concatenate(list(features.projection))
        return loss, (online_stats, target_stats, projections)

    def loss_and_features(
        self,
        online_params: Tree,
        target_params: Tree,
        online_stats: Tree,
        target_stats: Tree,
        view1: jax.Array,
        view2: jax.Array,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Tree, Tree, Features]]:
        """As `loss`, with all features of both views in the projections' place."""
        rngs = [None] * 4 if rng is None else list(jax.random.split(rng, 4))
        y1, projection1, prediction1, online_stats = self._online(
            online_params, online_stats, view1, rngs[0]
        )
        y2, projection2, prediction2, online_stats = self._online(
            online_params, online_stats, view2, rngs[1]
        )
        target1, target_stats = self.target(target_params, target_stats, view1, rngs[2])
        target2, target_stats = self.target(target_params, target_stats, view2, rngs[3])
        per_example = regression_loss(
            prediction1, jax.lax.stop_gradient(target2)
        ) + regression_loss(prediction2, jax.lax.stop_gradient(target1))
        features = Features(
            representation=jnp.stack([y1, y2]),
            projection=jnp.stack([projection1, projection2]),
            prediction=jnp.stack([prediction1, prediction2]),
            target=jnp.stack([target1, target2]),
        )
        return jnp.mean(per_example), (online_stats, target_stats, features)

    def _online(
        self, params: Tree, stats: Tree, images: jax.Array, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, Tree]:
        """Representation, projection, prediction (both float32) and the updated stats."""
        y, projection, stats = self._project(params, stats, images, rng)
        prediction, predictor_stats = self._head(
            self.predictor, params['predictor'], stats['predictor'], projection
        )
        stats = {**stats, 'predictor': predictor_stats}
        return y, projection.astype(jnp.float32), prediction.astype(jnp.float32), stats

    def _project(
        self, params: Tree, stats: Tree, images: jax.Array, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """Representation, projection and the updated stats."""
        y, encoder_stats = self.represent(params, stats, images, True, rng)
        z, projector_stats = self._head(self.projector, params['projector'], stats['projector'], y)
        return y, z, {**stats, 'encoder': encoder_stats, 'projector': projector_stats}

    def _head(self, module: MLP, params: Tree, stats: Tree, x: jax.Array) -> Any:
        """(output, updated stats) of the projector or predictor in training mode."""
        variables = {'params': self._cast(params), **stats}
        return module.apply(variables, x, train=True, mutable=list(stats))

    def _cast(self, params: Tree) -> Tree:
        """Float parameters in the compute type; their gradients come back in float32."""
        return jax.tree.map(
            lambda p: p.astype(self.dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params
        )


def regression_loss(prediction: jax.Array, projection: jax.Array) -> jax.Array:
    """|| unit(q) - unit(z') ||^2 = 2 - 2 cos(q, z') per row: [B, P] x 2 -> [B], in [0, 4].

    Paper, Equation 2.
    """
    return jnp.sum((l2_normalize(prediction) - l2_normalize(projection)) ** 2, axis=-1)


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Rows of [B, P] at length 1; a row whose squared length is below epsilon stays near 0.

    Epsilon: DeepMind byol/utils/helpers.py, l2_normalize.
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), epsilon))


def target_tau(step: jax.Array | int, total_steps: int, base_ema: float) -> jax.Array:
    """tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2, from tau_base up to 1 (paper, Section 3.2).

    Args:
      step: k, optimizer steps made before this one. total_steps: K. base_ema: tau_base.
    """
    return 1 - (1 - base_ema) * (jnp.cos(jnp.pi * step / total_steps) + 1) / 2


def update_target(target_params: Tree, online_params: Tree, tau: jax.Array) -> Tree:
    """xi <- tau xi + (1 - tau) theta for every leaf of the target (paper, Equation 1)."""
    online = {part: online_params[part] for part in target_params}
    return jax.tree.map(lambda xi, theta: xi + (1 - tau) * (theta - xi), target_params, online)


def feature_std(projections: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Mean over channels of the std of unit-length projections [B, P]: near 1/sqrt(P) if healthy.

    It goes to 0 when all images are given the same projection (collapse). Definition: SimSiam,
    arXiv:2011.10566, Section 4.1.
    """
    z = l2_normalize(projections)
    mean, square = jnp.mean(z, axis=0), jnp.mean(z**2, axis=0)
    if axis_name is not None:
        mean, square = jax.lax.pmean((mean, square), axis_name)
    return jnp.mean(jnp.sqrt(jnp.maximum(square - mean**2, 0)))
