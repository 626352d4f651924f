"""What is learned: the contract between a method and all that trains, watches and exports it."""

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
    """Where a method's loss lies; alarms, charts and the verdict on a run read it.

    Attributes:
      lowest: the loss of a perfect fit.
      chance: the loss of outputs that have nothing to do with each other.
      highest: the largest loss there can be; inf if there is no limit.
    """

    lowest: float
    chance: float
    highest: float


class Outputs(NamedTuple):
    """What a pass gives besides the loss.

    Attributes:
      stats: statistics of the online network after the pass, by part.
      target_stats: the same of the target network, by its parts.
      features: float [V, B, size] of V views, by name. 'representation' is there in any method. The
        monitors measure it and, where they are there, 'projection', 'prediction' and 'target'.
      metrics: scalars of the method's own, by name; they are averaged over microbatches and
        devices, and are logged.
    """

    stats: Tree
    target_stats: Tree
    features: Mapping[str, jax.Array]
    metrics: Mapping[str, jax.Array] = {}


class Method(abc.ABC):
    """Networks and a loss.

    Parameters and statistics are dicts by part. The part 'encoder' holds what is exported; the
    other parts are the method's business. The target is a moving average of `target_parts`.

    Attributes:
      encoder: the tapped encoder.
      mean: of the RGB channels in [0, 1], subtracted from the views.
      std: of the RGB channels, which the views are divided by.
      dtype: compute type; parameters, statistics and losses stay float32.
      views: the views of a batch that `loss` takes.
      target_parts: the parts that have a moving average; () for a method without a target.
      loss_scale: where the loss lies.
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
          params: of the online network, by part.
          target_params: of the target network, by its parts.
          stats: of the online network, by part.
          target_stats: of the target network, by its parts.
          batch: arrays by name: the views, uint8 [B, S, S, 3]; of view 'v' also 'v/box', float32
            [B, 4] (top, left, height and width as fractions of the picture), and 'v/mirrored',
            bool [B], where the input gives them.
          rng: a key for what the networks draw in training; None if they draw nothing.

        Returns:
          The mean over the batch, float32 [], and what comes with it.
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
          params: by part.
          stats: by part.
          images: uint8 [B, H, W, 3].
          train: use and update batch statistics, drop what is to be dropped.
          rng: a key, for encoders that draw in training.

        Returns:
          Features, float [B, D], and the encoder's statistics, updated when `train`.
        """
        variables = {'params': self._cast(params['encoder']), **stats['encoder']}
        return self.encoder.apply(variables, self.normalize(images), train, rng)

    def project(self, params: Tree, stats: Tree, images: jax.Array) -> jax.Array:
        """What LiDAR measures, in inference mode: uint8 [B, H, W, 3] -> float32 [B, P]."""
        return self.represent(params, stats, images)[0].astype(jnp.float32)

    def normalize(self, images: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> zero-mean, unit-variance values in the compute type."""
        x = images.astype(jnp.float32) / 255
        x = (x - jnp.array(self.mean)) / jnp.array(self.std)
        return x.astype(self.dtype)

    def feature_size(self, image_size: int) -> int:
        """Size of the representation, D, of views of `image_size` pixels."""
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
        """Float parameters in the compute type; their gradients come back in float32."""
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
    """Builds a method; its constructor is given those of our arguments that it names.

    Args:
      name: one of METHODS, or 'package.module:Class' of a subclass of `Method`.
      kwargs: the method's own arguments.
      encoder: from `models.tap.tap`.
      projector: a head of the projector's sizes.
      predictor: a head of the predictor's sizes.
      mean: as in `Method`.
      std: as in `Method`.
      dtype: as in `Method`.
      axis_name: mapped axis of the devices, for methods that build networks of their own.

    Raises:
      UserError: there is no such method, or it does not take these arguments.
    """
    kind = METHODS.find(name)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UserError(
            f"method.name='{name}' is no class derived from byol_jax.methods.base.Method."
        )
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
            f'{", ".join(ours)}, so it would be given none. Name those that it needs, or make the '
            'class a frozen dataclass, as Byol is.'
        )
    method: Method = METHODS.build(name, kwargs, **given)
    return method


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Rows of [B, P] at length 1; a row whose squared length is below epsilon stays near 0.

    Epsilon: DeepMind byol/utils/helpers.py, l2_normalize.
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), epsilon))
