"""The networks of a config, their first state, and the way out of a state again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from byol_jax.interop.encoder import Encoder, make_encoder
from byol_jax.methods.byol import Byol
from byol_jax.models.mlp import MLP
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder
from byol_jax.training import optimizers as optim
from byol_jax.training.state import TrainState
from byol_jax.training.step import AXIS

Tree = Any


def build_byol(config: Any) -> Byol:
    """Builds the networks and checks that the encoder fits its tap and the size of the views.

    Raises:
      UserError: it does not; says what there is instead.
    """
    size, options = config.views.image_size, config.encoder
    encoder = TappedEncoder(
        build_encoder(options.name, dict(options.kwargs), AXIS),
        options.hidden_layer,
        pool=options.pool,
        axis_name=AXIS,
    )
    shape = (2, size, size, 3)
    encoder.check(shape)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
    encoder = dataclasses.replace(
        encoder,
        behind=encoder.find_behind(variables, images),
        frozen=encoder.find_frozen(tuple(options.frozen), variables),
    )
    output = config.projector.output_size
    return Byol(
        encoder=encoder,
        projector=MLP(config.projector.hidden_size, output, AXIS),
        predictor=MLP(config.predictor.hidden_size, output, AXIS),
        mean=tuple(config.views.mean),
        std=tuple(config.views.std),
        dtype=jnp.dtype(config.precision),
    )


def adapted_params(byol: Byol, params: Tree) -> Tree:
    """Which of the online parameters decay and are adapted (`optim.adapted_params`)."""
    untrained = frozenset(
        f'encoder/{path.removeprefix("params/")}'
        for path in byol.encoder.behind | byol.encoder.frozen
        if path.startswith('params/')
    )
    return optim.adapted_params(params, untrained)


def build_optimizer(
    config: Any, adapted: Tree, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The config's optimizer, for parameters laid out like `adapted`."""
    return optim.make_optimizer(config.optimizer, schedule, adapted, config.encoder.freeze_steps)


def online_encoder(config: Any, state: TrainState) -> Encoder:
    """The online encoder of a state, as it is exported."""
    return make_encoder(
        name=config.encoder.name,
        kwargs=dict(config.encoder.kwargs),
        hidden_layer=config.encoder.hidden_layer,
        pool=config.encoder.pool,
        variables={'params': state.online_params['encoder'], **state.online_stats['encoder']},
        image_size=config.views.image_size,
        mean=tuple(config.views.mean),
        std=tuple(config.views.std),
        step=int(state.step),
    )
