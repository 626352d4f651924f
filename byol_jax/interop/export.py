"""Saves and loads exported encoders: encoder.json and encoder.safetensors, no pickle, no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from byol_jax.errors import UserError
from byol_jax.files import write_whole
from byol_jax.interop.encoder import FORMAT, Encoder, check_description, weights_sha256
from byol_jax.models.network import path_name
from byol_jax.models.nnx_network import NnxNetwork
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder

# Dtypes by their names in safetensors files.
_DTYPES: dict[str, Any] = {
    'BOOL': np.bool_,
    'BF16': jnp.bfloat16,
    **{f'F{bits}': f'float{bits}' for bits in (16, 32, 64)},
    **{f'I{bits}': f'int{bits}' for bits in (8, 16, 32, 64)},
    **{f'U{bits}': f'uint{bits}' for bits in (8, 16, 32, 64)},
    'C64': np.complex64,
}

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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Safetensors writes the memory of an array as it is, so it must be in C order.
    flat = {
        path_name(path): np.asarray(leaf, order='C')
        for path, leaf in jax.tree.leaves_with_path(encoder.variables)
    }
    weights = safetensors.numpy.save(flat)
    described = {**encoder.description, 'weights_sha256': encoder.weights_sha256}
    description = json.dumps(described, indent=2, sort_keys=True) + '\n'
    write_whole(folder / _WEIGHTS, lambda partial: partial.write_bytes(weights))
    write_whole(folder / _DESCRIPTION, lambda partial: partial.write_text(description))


def load_encoder(path: str | Path) -> Encoder:
    """Loads an exported encoder; needs neither TensorFlow nor the config of the run.

    If the encoder is a class of the user's own ('package.module:Class'), its module is imported.
    Nothing but a Linen or NNX module class is ever called.

    Args:
      path: the folder that training wrote, such as 'runs/div2k/encoder'.

    Raises:
      UserError: the folder holds no exported encoder, it is damaged, or its class cannot be
        imported here.
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
    flat = _read_weights(folder / _WEIGHTS)
    if weights_sha256(flat) != description['weights_sha256']:
        raise UserError(
            f'{folder / _WEIGHTS} is damaged, or writing it was interrupted: the digest of its '
            f'weights is not the one in {_DESCRIPTION}. Export it again.'
        )
    try:
        network = build_encoder(description['name'], description['kwargs'])
    except UserError as error:
        versions = ', '.join(f'{name} {v}' for name, v in description['versions'].items())
        raise UserError(
            f'{folder} is an encoder of a class that cannot be built here. {error} It was '
            f'exported with {versions}.'
        ) from error
    return Encoder(network, _arrange(network, description, flat, str(folder)), description)


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name."""
    try:
        # Not by safetensors.numpy.load, which does not know bfloat16.
        return {
            name: np.frombuffer(entry['data'], _DTYPES[entry['dtype']]).reshape(entry['shape'])
            for name, entry in safetensors.deserialize(path.read_bytes())
        }
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} is damaged, or writing it was interrupted ({error}). Export it again.'
        ) from error


def _arrange(
    network: nn.Module | NnxNetwork,
    description: Mapping[str, Any],
    flat: Mapping[str, np.ndarray],
    where: str,
) -> Any:
    """Arranges arrays by flat name as the variables of a network.

    The structure comes from the network, because names of layers may contain a '/'.

    Raises:
      UserError: the arrays are not those of the network; names the first difference.
    """
    size = description['image_size']
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    tapped = TappedEncoder(network, description['hidden_layer'], description['pool'])
    expected = jax.eval_shape(tapped.init, jax.random.key(0), images)
    named, structure = jax.tree.flatten_with_path(expected)
    wanted = {path_name(path): (leaf.shape, str(leaf.dtype)) for path, leaf in named}
    found = {name: (array.shape, str(array.dtype)) for name, array in flat.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{where} does not fit the encoder '{description['name']}': '{name}' should be "
                f'{wanted.get(name, "absent")} and is {found.get(name, "absent")}.'
            )
    variables = jax.tree.unflatten(structure, [flat[path_name(path)] for path, _ in named])
    try:
        jax.eval_shape(lambda v, x: tapped.apply(v, x, train=False)[0], variables, images)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{where} is damaged: its encoder has no layer '{description['hidden_layer']}' that "
            f"can be pooled by '{description['pool']}'."
        ) from error
    return variables


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'{path} is damaged: {error}') from error
    if not isinstance(description, dict):
        raise UserError(f'{path} is damaged: it holds a {type(description).__name__}.')
    if description.get('format') != FORMAT:
        raise UserError(f"{path} is of format '{description.get('format')}', not '{FORMAT}'.")
    missing = sorted(_KINDS.keys() - description.keys())
    if missing:
        raise UserError(f'{path} is damaged: it lacks {", ".join(missing)}.')
    for key, kind in _KINDS.items():
        value = description[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path} is damaged: its '{key}' is {value!r}.")
    check_description(description, f'{path} is damaged: encoder')
    return description
