"""Saves and loads exported encoders: encoder.json and encoder.safetensors, no pickle, no code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from byol_jax.errors import UserError, shown
from byol_jax.files import (
    SEAL,
    Damaged,
    read_object,
    seal_holds,
    sealed,
    write_object,
    write_whole,
)
from byol_jax.interop.encoder import FORMAT, Encoder, check_description, weights_sha256
from byol_jax.interop.weights_file import in_memory, map_safetensors
from byol_jax.models.bounds import CannotBuild, declared_network, misfit
from byol_jax.models.network import path_name
from byol_jax.models.nnx_network import NnxNetwork
from byol_jax.models.tap import TappedEncoder
from byol_jax.names import check_word

# The keys that encoder.json must have, and the types of their values.
_KINDS: dict[str, type] = {
    'name': str,
    'kwargs': dict,
    'hidden_layer': str,
    'pool': str,
    'image_size': int,
    'mean': list,
    'std': list,
    'feature_size': int,
    'weights_sha256': str,
    'versions': dict,
}
# Keys that encoder.json may have besides.
_NOT_IN_ALL = {'format', 'step', 'antialias', SEAL}
_AGAIN = 'Export it again.'
_DESCRIPTION, _WEIGHTS = 'encoder.json', 'encoder.safetensors'


def save_encoder(encoder: Encoder, folder: str | Path) -> None:
    """Writes encoder.json and encoder.safetensors to a folder, replacing older ones.

    Args:
      encoder: the encoder to export.
      folder: folder to write to; created if necessary.

    Raises:
      UserError: two variables of the encoder have the same name.
      OSError: the files cannot be written.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    # Safetensors writes the memory of an array as it is, so it must be in C order.
    flat = {
        path_name(path): np.asarray(leaf, order='C')
        for path, leaf in jax.tree.leaves_with_path(encoder.variables)
    }
    weights = safetensors.numpy.save(flat)
    described = {**encoder.description, 'weights_sha256': encoder.weights_sha256}
    write_whole(folder / _WEIGHTS, lambda partial: partial.write_bytes(weights))
    write_object(folder / _DESCRIPTION, sealed(described))


def load_encoder(path: str | Path, allow: Collection[str] = ()) -> Encoder:
    """Loads an exported encoder; needs neither TensorFlow nor the training configuration.

    The folder may be from anyone. No word in it makes this program import or call anything but a
    module class that is built in, is of a module imported already, or is of one in `allow`; and
    building the network and checking it take no more than its weights account for.

    Args:
      path: the folder that training wrote, such as 'runs/div2k/encoder'.
      allow: modules and packages whose classes the encoder may be of, such as ('my_networks',). Of
        a class 'my_networks:Net' that module is then imported.

    Raises:
      UserError: the folder holds no exported encoder, it is damaged, or it is of a class that is
        not allowed or cannot be built here.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f'{folder}: there is no such folder.')
    if (folder / 'encoder' / _DESCRIPTION).is_file() and not (folder / _DESCRIPTION).is_file():
        raise UserError(f'{folder} is the workdir of a run: its encoder is {folder / "encoder"}.')
    for name in (_DESCRIPTION, _WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f'{folder} holds no exported encoder: {name} is missing. A training run writes '
                'it to <workdir>/encoder at its end, --mode=export at any time.'
            )
    description = _read_description(folder / _DESCRIPTION)
    check_word(description['name'], allow, f'{folder / _DESCRIPTION}: name')
    flat, _ = map_safetensors(folder / _WEIGHTS)
    network, structure, names = _build(description, flat, folder)
    if weights_sha256(flat) != description['weights_sha256']:
        raise UserError(
            f'{folder / _WEIGHTS} is damaged, or writing it was interrupted: the digest of its '
            f'weights is not the one in {_DESCRIPTION}. Export it again.'
        )
    weights = in_memory(flat, folder / _WEIGHTS)
    return Encoder(
        network, jax.tree.unflatten(structure, [weights[name] for name in names]), description
    )


def _build(
    description: Mapping[str, Any], flat: Mapping[str, np.ndarray], folder: Path
) -> tuple[nn.Module | NnxNetwork, Any, list[str]]:
    """The network that encoder.json describes, if the weights are its own.

    Args:
      description: of encoder.json.
      flat: the weights by name.
      folder: of both, for messages.

    Returns:
      The network; the structure of its variables and the names of their leaves. (A name of the
      network's own may hold a '/', so the network says where the arrays go.)

    Raises:
      UserError: it cannot be built, or the arrays are not its own; names the first that is odd.
    """
    name, size = description['name'], description['image_size']
    where = f"{folder} does not fit '{shown(name)}'"

    def shape_of(path: str) -> tuple[int, ...] | None:
        return flat[path].shape if path in flat else None

    try:
        network, variables = declared_network(
            name, description['kwargs'], size, shape_of, len(flat), where
        )
    except CannotBuild as error:
        versions = ', '.join(f'{each} {v}' for each, v in description['versions'].items())
        raise UserError(
            f'{folder} is an encoder of a class that cannot be built here. {error} It was '
            f'exported with {shown(versions)}.'
        ) from error
    named, structure = jax.tree.flatten_with_path(variables)
    _check_same(named, flat, where)
    tapped = TappedEncoder(network, description['hidden_layer'], description['pool'])
    try:
        features = tapped.feature_shape(
            variables, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{folder} is damaged: its encoder has no layer '"
            f"{shown(description['hidden_layer'])}' that can be pooled by "
            f"'{shown(description['pool'])}'."
        ) from error
    if features[-1] != description['feature_size']:
        raise UserError(
            f"{folder} is damaged: its 'feature_size' is {shown(description['feature_size'])}, and "
            f"the layer '{shown(description['hidden_layer'])}' has {features[-1]}."
        )
    return network, structure, [path_name(path) for path, _ in named]


def _check_same(named: Any, flat: Mapping[str, np.ndarray], where: str) -> None:
    """Raises UserError if arrays are not those of a network, by path, shape and type."""
    wanted = {path_name(path): (leaf.shape, str(leaf.dtype)) for path, leaf in named}
    found = {name: (array.shape, str(array.dtype)) for name, array in flat.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(misfit(where, name, wanted.get(name), found.get(name)))


def _read_description(path: Path) -> dict[str, Any]:
    description = read_object(path)
    if description is None:
        raise UserError(f'{path} is missing.')
    if description.get('format') != FORMAT:
        raise UserError(
            f"{path} is of format '{shown(description.get('format'))}', not '{FORMAT}'."
        )
    missing = sorted(_KINDS.keys() - description.keys())
    if missing:
        raise Damaged(path, f'it lacks {", ".join(missing)}', _AGAIN)
    for key, kind in _KINDS.items():
        value = description[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Damaged(path, f"its '{key}' is {shown(value)}")
    check_description(description, f'{path} is damaged: encoder')
    unknown = sorted(description.keys() - _KINDS.keys() - _NOT_IN_ALL)
    # Encoders exported by older versions have no seal, and the keys that are known.
    if not seal_holds(description) if SEAL in description else unknown:
        what = 'the digest in it is not that of the rest'
        if SEAL not in description:
            what = f"it has no digest, and a key '{shown(unknown[0])}'"
        raise Damaged(path, what, _AGAIN)
    return {key: value for key, value in description.items() if key != SEAL}
