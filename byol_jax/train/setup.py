"""Config -> everything a run needs, all of it checked before anything is compiled or written."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from byol_jax import optim
from byol_jax.byol import Byol
from byol_jax.data.sources.build import Data, build_data
from byol_jax.interop.export import Encoder, make_encoder
from byol_jax.models.mlp import MLP
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder
from byol_jax.plan import Plan, check_ranges, make_plan
from byol_jax.train.state import TrainState, init_state
from byol_jax.train.step import AXIS


class Training(NamedTuple):
    """What optimises the networks.

    Attributes:
      optimizer, schedule: LARS and its learning rate.
      excluded: which parameters LARS leaves alone, for a person to read.
      initial: the state before the first step.
    """

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    excluded: str
    initial: TrainState


class Run(NamedTuple):
    """A config brought to life.

    Attributes:
      config: the resolved config.
      data: pictures to train on and held-out ones.
      plan: derived numbers.
      byol: the networks.
      training: their optimizer and initial state.
    """

    config: Any
    data: Data
    plan: Plan
    byol: Byol
    training: Training


def build_run(config: Any) -> Run:
    """Builds all parts of a run.

    Raises:
      UserError: something in the config cannot be used.
    """
    check_ranges(config)
    data = build_data(config)
    plan = make_plan(config, len(data.train), jax.device_count(), jax.process_count())
    byol = build_byol(config)
    return Run(config, data, plan, byol, build_training(config, plan, byol))


def build_byol(config: Any) -> Byol:
    """Builds the networks and checks that the encoder fits its tap and the size of the views."""
    size = config.views.image_size
    encoder = TappedEncoder(
        build_encoder(config.encoder.name, config.encoder.kwargs, AXIS), config.encoder.hidden_layer
    )
    shape = (2, size, size, 3)
    encoder.check(shape)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
    encoder = dataclasses.replace(encoder, behind=encoder.find_behind(variables, images))
    output = config.projector.output_size
    return Byol(
        encoder=encoder,
        projector=MLP(config.projector.hidden_size, output, AXIS),
        predictor=MLP(config.predictor.hidden_size, output, AXIS),
        mean=tuple(config.views.mean),
        std=tuple(config.views.std),
        dtype=jnp.dtype(config.precision),
    )


def build_training(config: Any, plan: Plan, byol: Byol) -> Training:
    """Initialises the networks and builds their optimizer."""
    params, stats = byol.init(jax.random.key(config.seed), config.views.image_size)
    behind = frozenset(
        f'encoder/{path.removeprefix("params/")}'
        for path in byol.encoder.behind
        if path.startswith('params/')
    )
    adapted = optim.adapted_params(params, behind)
    schedule = optim.learning_rate_schedule(plan.learning_rate, plan.warmup_steps, plan.total_steps)
    optimizer = optim.lars(
        schedule,
        adapted,
        weight_decay=config.optimizer.weight_decay,
        momentum=config.optimizer.momentum,
        trust_coefficient=config.optimizer.trust_coefficient,
    )
    return Training(
        optimizer=optimizer,
        schedule=schedule,
        excluded=optim.describe_excluded(params, adapted),
        # On the host: it is needed again for the table at the end, and would fill a device.
        initial=jax.device_get(init_state(optimizer, params, stats)),
    )


def online_encoder(config: Any, state: TrainState) -> Encoder:
    """The online encoder of a state, as it is exported."""
    return make_encoder(
        name=config.encoder.name,
        kwargs=config.encoder.kwargs.to_dict(),
        hidden_layer=config.encoder.hidden_layer,
        variables={'params': state.online_params['encoder'], **state.online_stats['encoder']},
        image_size=config.views.image_size,
        mean=tuple(config.views.mean),
        std=tuple(config.views.std),
        step=int(state.step),
    )
