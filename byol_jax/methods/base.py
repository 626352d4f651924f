"""`Method`, the contract between what is learned and the code that trains, monitors and exports."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from byol_jax.errors import UserError
from byol_jax.models.heads import MLP
from byol_jax.models.tap import TappedEncoder
from byol_jax.names import Registry

METHODS = Registry(
    'method', 'method.name', {'byol': 'byol_jax.methods.byol:Byol'}, kwargs_key='method.kwargs'
)

Tree = Any
Batch = Mapping[str, jax.Array]


class LossScale(NamedTuple):
    """The range of a method's loss; used by alarms, charts and the verdict on a run.

    Attributes:
      lowest: the loss of a perfect fit.
      chance: the loss of unrelated outputs.
      highest: the largest possible loss; inf if there is no limit.
    """

    lowest: float
    chance: float
    highest: float


class Outputs(NamedTuple):
    """What a forward pass returns besides the loss.

    Attributes:
      stats: statistics of the online network after the pass, by part.
      target_stats: statistics of the target network after the pass, by its parts.
      features: float [V, B, size] by name, for V views. Every method has 'representation'. The
        monitors measure it and, if there are any, 'projection', 'prediction' and 'target'.
      metrics: the method's own scalars by name; they are averaged over microbatches and devices,
        and logged.
    """

    stats: Tree
    target_stats: Tree
    features: Mapping[str, jax.Array]
    metrics: Mapping[str, jax.Array] = {}


class Method(abc.ABC):
    """Networks and a loss.

    Parameters and statistics are dicts by part. The part 'encoder' is what is exported; other parts
    are up to the method. The target network is a moving average of `target_parts`.

    Attributes:
      encoder: the tapped encoder.
      mean: mean of the RGB channels, in [0, 1]; subtracted from the views.
      std: standard deviation of the RGB channels, above 0; the views are divided by it.
      dtype: compute dtype; parameters, statistics and losses stay float32.
      views: names of the views that `loss` takes from a batch.
      target_parts: parts that have a moving average; () for a method without a target.
      loss_scale: range of the loss.
    """

    encoder: TappedEncoder
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: Any

    views: tuple[str, ...] = ('view1', 'view2')
    target_parts: tuple[str, ...] = ('encoder', 'projector')
    loss_scale: LossScale

    @abc.abstractmethod
    def init(self, rng: jax.Array, image_size: int) -> tuple[Tree, Tree]:
        """Initialises the online network.

        Args:
          rng: a key.
          image_size: side of the views, pixels.

        Returns:
          Parameters and statistics, each a dict by part.
        """

    @abc.abstractmethod
    def loss(
        self,
        params: Tree,
        target_params: Tree,
        stats: Tree,
        target_stats: Tree,
        batch: Batch,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Outputs]:
        """The loss of a batch, differentiable in `params`.

        Args:
          params: parameters of the online network, by part.
          target_params: parameters of the target network, by its parts.
          stats: statistics of the online network, by part.
          target_stats: statistics of the target network, by its parts.
          batch: arrays by name. Each view is uint8 [B, S, S, 3]. The input may also give 'v/box' of
            view 'v', float32 [B, 4] (top, left, height, width as fractions of the picture), and
            'v/mirrored', bool [B].
          rng: a key for random numbers of the networks (such as dropout); None if they draw none.

        Returns:
          The mean loss over the batch, float32 [], and the other outputs of the pass.
        """

    def represent(
        self,
        params: Tree,
        stats: Tree,
        images: jax.Array,
        train: bool = False,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        """The representation of images.

        Args:
          params: parameters of the online network, by part.
          stats: statistics of the online network, by part.
          images: uint8 [B, H, W, 3].
          train: whether to use and update batch statistics, and to apply dropout.
          rng: a key, for encoders that draw random numbers in training.

        Returns:
          Features, float [B, D], and the encoder's statistics, updated if `train`.
        """
        variables = {'params': self._cast(params['encoder']), **stats['encoder']}
        return self.encoder.apply(variables, self.normalize(images), train, rng)

    def project(self, params: Tree, stats: Tree, images: jax.Array) -> jax.Array:
        """The features that LiDAR measures, in inference mode: uint8 [B, H, W, 3] -> float [B, P].

        The representation, unless a subclass has a projection.
        """
        return self.represent(params, stats, images)[0].astype(jnp.float32)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Normalises uint8 [B, H, W, 3] by `mean` and `std`, in the compute dtype."""
        x = images.astype(jnp.float32) / 255
        x = (x - jnp.array(self.mean)) / jnp.array(self.std)
        return x.astype(self.dtype)

    def feature_size(self, image_size: int) -> int:
        """D, the size of the representation for views of `image_size` pixels."""
        images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
        variables = jax.eval_shape(self.encoder.init, jax.random.key(0), images)
        return self.encoder.feature_shape(variables, images)[-1]

    def untrained(self) -> frozenset[str]:
        """Paths of the parameters that get no gradient, such as 'encoder/head/kernel'."""
        return frozenset(
            f'encoder/{path.removeprefix("params/")}'
            for path in self.encoder.behind | self.encoder.frozen
            if path.startswith('params/')
        )

    def _cast(self, params: Tree) -> Tree:
        """Casts float parameters to the compute dtype; their gradients are still float32."""
        return jax.tree.map(
            lambda p: p.astype(self.dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params
        )


def build_method(
    name: str,
    kwargs: Mapping[str, Any],
    *,
    encoder: TappedEncoder,
    projector: MLP,
    predictor: MLP,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
) -> Method:
    """Builds a method.

    Its constructor gets `kwargs`, and those of the other arguments that it has parameters for.

    Args:
      name: one of METHODS, or 'package.module:Class' of a subclass of `Method`.
      kwargs: the method's own arguments.
      encoder: the tapped encoder, from `models.tap.tap`.
      projector: a head with the sizes of config.projector.
      predictor: a head with the sizes of config.predictor.
      mean: as in `Method`.
      std: as in `Method`.
      dtype: as in `Method`.
      axis_name: name of the mapped device axis, for methods that build their own networks.

    Raises:
      UserError: there is no such method, or it does not take these arguments.
    """
    kind = METHODS.find(name)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UserError(f"method.name='{name}' is not a subclass of byol_jax.methods.base.Method.")
    ours = {
        'encoder': encoder,
        'projector': projector,
        'predictor': predictor,
        'mean': mean,
        'std': std,
        'dtype': dtype,
        'axis_name': axis_name,
    }
    METHODS.check_kwargs(name, kind, kwargs, given=ours)
    parameters = inspect.signature(kind).parameters
    given = {key: value for key, value in ours.items() if key in parameters}
    if not given and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise UserError(
            f"method.name='{name}': its constructor takes **kwargs and names none of "
            f'{", ".join(ours)}, so it would get none of them. Name those that it needs, or make '
            'the class a frozen dataclass like Byol.'
        )
    method: Method = METHODS.build(name, kwargs, **given)
    return method


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Scales the rows of [B, P] to length 1; rows with a squared length below epsilon stay near 0.

    Epsilon is that of DeepMind's byol/utils/helpers.py, l2_normalize.
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), epsilon))
