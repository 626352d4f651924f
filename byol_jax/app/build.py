"""Builds the parts of a run from its config, and checks them before anything is compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from byol_jax.app import hosts
from byol_jax.app.checkpoints import Checkpoints
from byol_jax.app.data import build_data
from byol_jax.app.plan import Plan, make_plan
from byol_jax.app.workdir import config_of_run, read_begun
from byol_jax.errors import UserError, did_you_mean
from byol_jax.evaluation.protocols import build_protocols
from byol_jax.input.pixels import Finding
from byol_jax.interop.encoder import Encoder, make_encoder
from byol_jax.interop.export import load_encoder
from byol_jax.interop.imports import LOADERS, is_elsewhere, load_from
from byol_jax.interop.which_resnet import Say
from byol_jax.methods.base import Method, build_method
from byol_jax.models.bounds import declared_network
from byol_jax.models.heads import MLP
from byol_jax.models.network import path_name
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import tap
from byol_jax.names import check_word
from byol_jax.settings import Settings
from byol_jax.sources.base import Source
from byol_jax.sources.data import Data
from byol_jax.training.online_probe import labels_of_probe, start_probe
from byol_jax.training.optimizers import (
    MOST_OF_ADAM,
    build_optimizer,
    decay_mask,
    describe_excluded,
    steps_by_rate,
)
from byol_jax.training.schedules import learning_rate_schedule
from byol_jax.training.state import TrainState, init_state
from byol_jax.training.step import AXIS, make_train_step
from byol_jax.views.recipes import config_views
from byol_jax.views.view import View

Tree = Any


class Training(NamedTuple):
    """The optimizer and the initial state.

    Attributes:
      optimizer: optimizer of the online network's parameters.
      schedule: learning rate by optimizer step.
      excluded: a line on the parameters that are excluded from weight decay.
      origin: a line on the source of the encoder's pretrained weights; '' if they are random.
      known: whether `initial` is how the run started; else it holds random weights.
      initial: the state before the first step, on the host.
    """

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    excluded: str
    origin: str
    initial: TrainState
    known: bool = True


class Run(NamedTuple):
    """All parts of a run, built from its config.

    Attributes:
      config: the run's settings.
      data: the training and held-out pictures.
      plan: numbers derived from the config.
      method: the networks and their loss.
      training: the optimizer and the initial state.
      views: the views of each example, by name.
      workdir: folder that a training run writes to; unused (the current folder) otherwise.
      pixels: what is odd about its first pictures and views; looked for when a run is trained.
    """

    config: Settings
    data: Data
    plan: Plan
    method: Method
    training: Training
    views: dict[str, View]
    workdir: Path = Path()
    pixels: tuple[Finding, ...] = ()

    @property
    def initial_norm(self) -> float:
        """Norm of all online parameters before the first step."""
        leaves = jax.tree.leaves(self.training.initial.online_params)
        return math.sqrt(sum(float(np.vdot(x, x)) for x in leaves))


class First(NamedTuple):
    """The weights that an encoder starts from.

    Attributes:
      encoder: that has them; None: the run has started from them, and they are nowhere any more.
      source: where they are from, as it was given (encoder.init_from).
    """

    encoder: Encoder | None
    source: str


def build_run(config: Any, source: Source | None = None, first: First | None = None) -> Run:
    """Builds all parts of a run.

    Args:
      config: whatever `Settings.of` takes.
      source: the training pictures, instead of those that the config names.
      first: the weights to start from, instead of those that the config names.

    Raises:
      UserError: a value of the config cannot be used.
    """
    config = Settings.of(config)
    # Only for its errors, before slow work: data may take long to open, and networks to trace.
    optimizer_of(config, {}, lambda step: 0.0)
    build_protocols(config.evaluate)
    views = config_views(config.views, config.data.pair_keys)
    data = build_data(config, source)
    plan = make_plan(config, len(data.train), jax.device_count(), jax.process_count())
    method = method_of(config)
    missing = [view for view in method.views if view not in views]
    if missing:
        raise UserError(
            f"method.name='{config.method.name}' needs a view '{missing[0]}'. The config has: "
            f'{", ".join(views)}.'
        )
    training = build_training(config, plan, method, first)
    labels = labels_of_probe(data.train) if config.evaluate.online_probe else 0
    if labels:
        probe = jax.device_get(start_probe(method.feature_size(config.views.image_size), labels))
        training = training._replace(initial=training.initial._replace(online_probe=probe))
    return Run(config, data, plan, method, training, views)


def check_rate(config: Settings, plan: Plan, params: Tree, mask: Tree) -> None:
    """Checks that an optimizer like Adam does not get a learning rate that is meant for LARS.

    Args:
      config: the run's settings.
      plan: the run's plan.
      params: parameters of the online network.
      mask: bools like the parameters, True for those that decay (`decay_mask`).

    Raises:
      UserError: it does; the message says which values to give.
    """
    options, rate = config.optimizer, plan.learning_rate
    if rate <= MOST_OF_ADAM or options.name == 'lars':
        return
    at_rate_1 = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(options, weight_decay=0.0),
        encoder=dataclasses.replace(config.encoder, freeze_steps=0),
    )
    if not steps_by_rate(optimizer_of(at_rate_1, mask, lambda step: 1.0), params):
        return
    raise UserError(
        f'optimizer.name={options.name} moves every weight by about the learning rate itself, and '
        f'that is {rate:g} at its peak (optimizer.base_learning_rate='
        f'{options.base_learning_rate:g} x batch_size={config.batch_size} / 256), a rate for LARS. '
        f'It must be at most {MOST_OF_ADAM:g}: for adamw give a base_learning_rate of 1.5e-4 and '
        'a weight_decay of 0.1, as configs/imagenet_vit.py; small networks take more, 4e-3 on the '
        'sample.'
    )


def method_of(config: Settings) -> Method:
    """Builds the networks, and checks that the encoder has the tapped layer and takes the views.

    Raises:
      UserError: the encoder, head or method cannot be built; the message says what exists.
    """
    options = config.encoder
    output = config.projector.output_size
    return build_method(
        config.method.name,
        config.method.kwargs,
        encoder=tap(
            build_encoder(options.name, options.kwargs, AXIS),
            options.hidden_layer,
            image_size=config.views.image_size,
            pool=options.pool,
            axis_name=AXIS,
            frozen=options.frozen,
        ),
        projector=MLP(config.projector.hidden_size, output, AXIS),
        predictor=MLP(config.predictor.hidden_size, output, AXIS),
        mean=config.views.mean,
        std=config.views.std,
        dtype=jnp.dtype(config.precision),
        axis_name=AXIS,
    )


def optimizer_of(config: Settings, mask: Tree, schedule: optax.Schedule) -> Any:
    """Builds the config's optimizer.

    Args:
      config: the run's settings.
      mask: bools like the parameters, True for those that decay (`decay_mask`).
      schedule: learning rate by optimizer step.
    """
    options = config.optimizer
    return build_optimizer(
        options.name,
        options.kwargs,
        learning_rate=schedule,
        weight_decay=options.weight_decay,
        decay_mask=mask,
        freeze_steps=config.encoder.freeze_steps,
    )


def build_training(
    config: Settings, plan: Plan, method: Method, first: First | None = None
) -> Training:
    """Initialises the networks, loads pretrained weights if asked, and builds the optimizer.

    Args:
      config: the run's settings.
      plan: the run's plan.
      method: the run's method.
      first: the weights to start from, instead of those that the config names.
    """
    params, stats = method.init(jax.random.key(config.seed), config.views.image_size)
    origin, source = '', config.encoder.init_from
    if first is None and source:
        first = First(find_encoder(source, config.modules), source)
    if first is not None:
        origin = f'encoder started from {first.source}, which is not there any more'
    if first is not None and first.encoder is not None:
        params, stats, origin = start_from(
            first.source, method, params, stats, encoder=first.encoder
        )
    mask = decay_mask(params, method.untrained())
    check_rate(config, plan, params, mask)
    schedule = learning_rate_schedule(plan.learning_rate, plan.warmup_steps, plan.total_steps)
    optimizer = optimizer_of(config, mask, schedule)
    return Training(
        optimizer=optimizer,
        schedule=schedule,
        excluded=describe_excluded(params, mask, config.optimizer.name),
        origin=origin,
        known=first is None or first.encoder is not None,
        # On the host, because it is needed again for the before/after table and would occupy
        # memory of a device all the time.
        initial=jax.device_get(init_state(method, optimizer, params, stats)),
    )


def step_of(
    config: Settings, plan: Plan, method: Method, training: Training, monitored: int = 0
) -> Callable[..., Any]:
    """The pure training step of a run (`make_train_step`).

    Args:
      config: the run's settings.
      plan: the run's plan.
      method: the run's method.
      training: the run's optimizer and initial state.
      monitored: examples of each microbatch whose features the step returns; 0 for none.
    """
    return make_train_step(
        method,
        training.optimizer,
        total_steps=plan.total_steps,
        tau_base=config.target.tau_base,
        seed=config.seed,
        schedule=training.schedule,
        accumulate_steps=plan.accumulate_steps,
        freeze_steps=plan.freeze_steps,
        monitored=monitored,
    )


def online_encoder(config: Settings, method: Method, state: TrainState) -> Encoder:
    """The online encoder of a state, as it would be exported."""
    return make_encoder(
        name=config.encoder.name,
        kwargs=config.encoder.kwargs,
        hidden_layer=method.encoder.hidden_layer,
        pool=config.encoder.pool,
        variables={'params': state.online_params['encoder'], **state.online_stats['encoder']},
        image_size=config.views.image_size,
        antialias=config_views(config.views, config.data.pair_keys)['view1'].antialias,
        mean=config.views.mean,
        std=config.views.std,
        step=int(state.step),
    )


def open_encoder(source: str, allow: Collection[str] = (), say: Say = hosts.say) -> Encoder:
    """Loads the encoder that --encoder names.

    Args:
      source: the folder of an exported encoder, or PREFIX:FILE with a prefix of
        `interop.imports.LOADERS`.
      allow: as in `load_encoder`.
      say: gets a line on what was found in a file of another project.

    Raises:
      UserError: nothing can be loaded from there.
    """
    return load_from(source, say) if is_elsewhere(source) else load_encoder(source, allow)


def find_encoder(source: str, allow: Collection[str] = (), say: Say = hosts.say) -> Encoder:
    """Loads the encoder that `encoder.init_from` names.

    Args:
      source: one of: the folder of an exported encoder; a workdir, of which `encoder/` is loaded
        or, if the run has not finished, the newest good checkpoint; PREFIX:FILE with a prefix of
        `interop.imports.LOADERS`.
      allow: as in `load_encoder`.
      say: as for `open_encoder`.

    Raises:
      UserError: it does not exist, is none of these, or is damaged.
    """
    if is_elsewhere(source):
        return load_from(source, say)
    path = Path(source).expanduser()
    if (path / 'encoder.json').is_file():
        return load_encoder(path, allow)
    if (path / 'encoder' / 'encoder.json').is_file():
        return load_encoder(path / 'encoder', allow)
    if (path / 'checkpoints').is_dir() and read_begun(path) is not None:
        return encoder_of_run(path, allow)
    if path.is_file():
        ways = ', '.join(f'{name}:{source}' for name in LOADERS)
        raise UserError(f'encoder.init_from={source} is a file: give its kind too, {ways}.')
    if path.is_dir():
        raise UserError(
            f'encoder.init_from={source} is neither an exported encoder (encoder.json) nor a '
            'workdir (encoder/ or checkpoints/).'
        )
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    raise UserError(f'encoder.init_from={source} does not exist.{did_you_mean(path.name, beside)}')


def encoder_of_run(workdir: Path, allow: Collection[str] = ()) -> Encoder:
    """The online encoder of the newest good checkpoint of a workdir, which is not changed.

    Args:
      workdir: of the run.
      allow: as in `load_encoder`, of the classes that its config.json names.

    Raises:
      UserError: there is no checkpoint, or none that is undamaged.
    """
    if not (workdir / 'checkpoints').is_dir() or read_begun(workdir) is None:
        raise UserError(f'{workdir} holds no checkpoints of a run.')
    config, path = config_of_run(workdir), workdir / 'config.json'
    for key, name in (
        ('encoder.name', config.encoder.name),
        ('method.name', config.method.name),
        ('optimizer.name', config.optimizer.name),
    ):
        check_word(name, allow, f'{path}: {key}')
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, read_only=True)
    with closing(checkpoints):
        shapes = checkpoints.encoder_shapes()
        if shapes:
            # For its errors: what fits its weights can be traced as a whole.
            declared_network(
                config.encoder.name,
                config.encoder.kwargs,
                config.views.image_size,
                shapes.get,
                len(shapes),
                f'{workdir / "checkpoints"} does not fit {path}',
            )
        method = method_of(config)
        restored = checkpoints.restore(jax.eval_shape(lambda: _state_of(config, method)))
    if restored is None:
        raise UserError(f'{workdir / "checkpoints"} is empty: the run has saved nothing yet.')
    return online_encoder(config, method, restored[1])


def _state_of(config: Settings, method: Method) -> TrainState:
    """An initial state of a run, for its structure."""
    params, stats = method.init(jax.random.key(0), config.views.image_size)
    mask = decay_mask(params, method.untrained())
    optimizer = optimizer_of(config, mask, lambda step: 0.0)
    return init_state(method, optimizer, params, stats)


def start_from(
    source: str,
    method: Method,
    params: Tree,
    stats: Tree,
    allow: Collection[str] = (),
    encoder: Encoder | None = None,
) -> tuple[Tree, Tree, str]:
    """Puts pretrained weights into an encoder.

    Parameters behind the tap of either network may differ. For example, a classification head of
    another size keeps its initial weights.

    Args:
      source: what to load, see `find_encoder`.
      method: the networks.
      params: initial parameters, from `method.init`.
      stats: initial statistics, from `method.init`.
      allow: as in `load_encoder`.
      encoder: what was loaded from `source` already.

    Returns:
      `params` and `stats` with those of the encoder replaced, and a line on their source.

    Raises:
      UserError: the weights cannot be loaded or belong to another network; names the first array
        that is missing, unknown or of another shape.
    """
    encoder = encoder or find_encoder(source, allow)
    given = _by_path(encoder.variables)
    variables = {'params': params['encoder'], **stats['encoder']}
    behind_there = encoder.behind()
    odd = sorted(given.keys() - _by_path(variables).keys() - behind_there)
    about = encoder.description
    built = f'{about["name"]} with {dict(about["kwargs"]) or "no arguments"}'

    def refuse(name: str, there: Any, here: Any) -> UserError:
        return UserError(
            f"encoder.init_from={source}: '{name}' is {there} there and {here} in this encoder. "
            f'These weights belong to {built}: set encoder.name and encoder.kwargs to match.'
        )

    def choose(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        found = given.get(name)
        if found is not None and found.shape == leaf.shape:
            return jnp.asarray(found, leaf.dtype)
        if name in method.encoder.behind:
            return leaf
        raise refuse(name, 'absent' if found is None else list(found.shape), list(leaf.shape))

    if odd:
        raise refuse(odd[0], list(given[odd[0]].shape), 'absent')
    chosen = jax.tree_util.tree_map_with_path(choose, variables)
    note = (
        f'encoder starts from {source} (step {about["step"]:,}, weights '
        f'{encoder.weights_sha256[:12]})'
    )
    if (tuple(about['mean']), tuple(about['std'])) != (method.mean, method.std):
        note += (
            f'; it was trained with views.mean={tuple(about["mean"])} and '
            f'views.std={tuple(about["std"])}, this run uses others'
        )
    new_stats = {name: tree for name, tree in chosen.items() if name != 'params'}
    return {**params, 'encoder': chosen['params']}, {**stats, 'encoder': new_stats}, note


def _by_path(tree: Tree) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
