"""Config -> everything a run needs, all of it checked before anything is compiled or written."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from byol_jax.app.data import build_data
from byol_jax.app.networks import adapted_params, build_byol, build_optimizer
from byol_jax.app.plan import Plan, make_plan
from byol_jax.app.pretrained import start_from
from byol_jax.methods.byol import Byol
from byol_jax.settings import Settings
from byol_jax.sources.data import Data
from byol_jax.training import optimizers as optim
from byol_jax.training.online_probe import labels_of_probe, start_probe
from byol_jax.training.state import TrainState, init_state
from byol_jax.views.recipes import config_views
from byol_jax.views.view import View


class Training(NamedTuple):
    """What optimises the networks.

    Attributes:
      optimizer, schedule: and its learning rate.
      excluded: which parameters do not decay, for a person to read.
      origin: where the encoder's first weights are from, for a person; '' if they are random.
      initial: the state before the first step.
    """

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    excluded: str
    origin: str
    initial: TrainState


class Run(NamedTuple):
    """A config brought to life.

    Attributes:
      config: the resolved config.
      data: pictures to train on and held-out ones.
      plan: derived numbers.
      byol: the networks.
      training: their optimizer and initial state.
      views: of each example, by name.
    """

    config: Any
    data: Data
    plan: Plan
    byol: Byol
    training: Training
    views: dict[str, View]


def build_run(config: Any) -> Run:
    """Builds all parts of a run.

    Raises:
      UserError: something in the config cannot be used.
    """
    config = Settings.of(config)
    views = config_views(config.views, config.data.pair_keys)
    data = build_data(config)
    plan = make_plan(config, len(data.train), jax.device_count(), jax.process_count())
    byol = build_byol(config)
    training = build_training(config, plan, byol)
    labels = labels_of_probe(config, data.train)
    if labels:
        probe = jax.device_get(start_probe(byol.feature_size(config.views.image_size), labels))
        training = training._replace(initial=training.initial._replace(online_probe=probe))
    return Run(config, data, plan, byol, training, views)


def build_training(config: Any, plan: Plan, byol: Byol) -> Training:
    """Initialises the networks, or loads their first weights, and builds their optimizer."""
    params, stats = byol.init(jax.random.key(config.seed), config.views.image_size)
    origin = ''
    if config.encoder.init_from:
        params, stats, origin = start_from(config.encoder.init_from, byol, params, stats)
    adapted = adapted_params(byol, params)
    schedule = optim.learning_rate_schedule(plan.learning_rate, plan.warmup_steps, plan.total_steps)
    optimizer = build_optimizer(config, adapted, schedule)
    return Training(
        optimizer=optimizer,
        schedule=schedule,
        excluded=optim.describe_excluded(params, adapted, config.optimizer.name),
        origin=origin,
        # On the host: it is needed again for the table at the end, and would fill a device.
        initial=jax.device_get(init_state(optimizer, params, stats)),
    )
