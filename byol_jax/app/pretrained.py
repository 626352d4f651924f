"""Weights to start from: `encoder.init_from`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from byol_jax.app.checkpoints import Checkpoints
from byol_jax.app.networks import adapted_params, build_byol, build_optimizer, online_encoder
from byol_jax.app.workdir import config_of_run
from byol_jax.errors import UserError, did_you_mean
from byol_jax.interop.encoder import Encoder
from byol_jax.interop.export import load_encoder
from byol_jax.interop.imports import LOADERS, load_from
from byol_jax.methods.byol import Byol
from byol_jax.models.network import path_name
from byol_jax.training.state import TrainState, init_state

Tree = Any


def find_encoder(source: str) -> Encoder:
    """Loads the encoder that `encoder.init_from` names.

    Args:
      source: an exported encoder's folder; a workdir, whose `encoder/` is taken or, if the run has
        not ended, its newest good checkpoint; or PREFIX:FILE with a prefix of
        `interop.imports.LOADERS`.

    Raises:
      UserError: there is no such thing, or it is damaged.
    """
    prefix, colon, _ = source.partition(':')
    if colon and prefix in LOADERS:
        return load_from(source)
    path = Path(source).expanduser()
    if (path / 'encoder.json').is_file():
        return load_encoder(path)
    if (path / 'encoder' / 'encoder.json').is_file():
        return load_encoder(path / 'encoder')
    if (path / 'checkpoints').is_dir() and (path / 'config.json').is_file():
        return encoder_of_run(path)
    if path.is_file():
        ways = ', '.join(f'{name}:{source}' for name in LOADERS)
        raise UserError(f'encoder.init_from={source} is a file: say whose it is ({ways}).')
    if path.is_dir():
        raise UserError(
            f'encoder.init_from={source} is neither an exported encoder (encoder.json) nor a '
            'workdir (encoder/ or checkpoints/).'
        )
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    raise UserError(f'encoder.init_from={source} does not exist.{did_you_mean(path.name, beside)}')


def encoder_of_run(workdir: Path) -> Encoder:
    """The online encoder of a workdir's newest good checkpoint; changes nothing there.

    Raises:
      UserError: there is no checkpoint, or no good one.
    """
    if not (workdir / 'checkpoints').is_dir() or not (workdir / 'config.json').is_file():
        raise UserError(f'{workdir} holds no checkpoints of a run.')
    config = config_of_run(workdir)
    byol = build_byol(config)

    def state() -> TrainState:
        params, stats = byol.init(jax.random.key(0), config.views.image_size)
        adapted = adapted_params(byol, params)
        return init_state(build_optimizer(config, adapted, lambda step: 0.0), params, stats)

    checkpoints = Checkpoints(workdir, config.checkpoint.keep, read_only=True)
    restored = checkpoints.restore(jax.eval_shape(state))
    checkpoints.close()
    if restored is None:
        raise UserError(f'{workdir / "checkpoints"} is empty: the run has saved nothing yet.')
    return online_encoder(config, restored[1])


def start_from(source: str, byol: Byol, params: Tree, stats: Tree) -> tuple[Tree, Tree, str]:
    """Puts pretrained weights into an encoder.

    What lies behind the tap of either network need not agree: a classification head of another
    size stays as it was initialised.

    Args:
      source: see `find_encoder`.
      byol: the networks. params, stats: from `Byol.init`.

    Returns:
      params and stats with the encoder's replaced, and a sentence on where they are from.

    Raises:
      UserError: the weights cannot be loaded or are another network's; names the first that is
        missing, odd or of another shape.
    """
    encoder = find_encoder(source)
    given = _by_path(encoder.variables)
    variables = {'params': params['encoder'], **stats['encoder']}
    behind_there = encoder.behind()
    odd = sorted(given.keys() - _by_path(variables).keys() - behind_there)
    about = encoder.description
    built = f'{about["name"]} with {dict(about["kwargs"]) or "no arguments"}'

    def refuse(name: str, there: Any, here: Any) -> UserError:
        return UserError(
            f"encoder.init_from={source}: '{name}' is {there} there and {here} in this encoder. "
            f'Those weights are of {built}; set encoder.name and encoder.kwargs to fit.'
        )

    def choose(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        found = given.get(name)
        if found is not None and found.shape == leaf.shape:
            return jnp.asarray(found, leaf.dtype)
        if name in byol.encoder.behind:
            return leaf
        raise refuse(name, 'absent' if found is None else list(found.shape), list(leaf.shape))

    if odd:
        raise refuse(odd[0], list(given[odd[0]].shape), 'absent')
    chosen = jax.tree_util.tree_map_with_path(choose, variables)
    note = (
        f'encoder starts from {source} (step {about["step"]:,}, weights '
        f'{encoder.weights_sha256[:12]})'
    )
    if (tuple(about['mean']), tuple(about['std'])) != (byol.mean, byol.std):
        note += (
            f'; it was trained with views.mean={tuple(about["mean"])} and '
            f'views.std={tuple(about["std"])}, this run uses others'
        )
    new_stats = {name: tree for name, tree in chosen.items() if name != 'params'}
    return {**params, 'encoder': chosen['params']}, {**stats, 'encoder': new_stats}, note


def _by_path(tree: Tree) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
