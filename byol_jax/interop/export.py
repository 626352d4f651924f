"""The exported encoder: `encoder.json` and `encoder.safetensors`, no pickle and no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from byol_jax.errors import UserError
from byol_jax.files import write_whole
from byol_jax.interop.encoder import FORMAT, Encoder, weights_sha256
from byol_jax.models.network import path_name
from byol_jax.models.nnx_network import NnxNetwork
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder

_KEYS = {
    'name',
    'kwargs',
    'hidden_layer',
    'pool',
    'image_size',
    'mean',
    'std',
    'feature_size',
    'weights_sha256',
    'versions',
}
_DESCRIPTION, _WEIGHTS = 'encoder.json', 'encoder.safetensors'


def save_encoder(encoder: Encoder, folder: str | Path) -> None:
    """Writes encoder.json and encoder.safetensors into `folder`; each is replaced as a whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Safetensors writes an array's memory as it lies, so it must lie in C order.
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
    """Loads an exported encoder; needs neither TensorFlow nor the training configuration.

    An encoder of a class of the user's own ('package.module:Class') imports that module, as any
    import would; nothing but a Linen or NNX module class is ever called.

    Args:
      path: the folder that training wrote, such as 'runs/div2k/encoder'.

    Raises:
      UserError: the folder holds no exported encoder, it is damaged, or it is of a class that
        cannot be imported here.
    """
    folder = Path(path).expanduser()
    for name in (_DESCRIPTION, _WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f'{folder} holds no exported encoder: {name} is missing. A training run writes '
                'it to <workdir>/encoder at its end, --mode=export at any time.'
            )
    description = _read_description(folder / _DESCRIPTION)
    variables = _read_weights(folder / _WEIGHTS)
    if weights_sha256(variables) != description['weights_sha256']:
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
    check_variables(network, description, variables, str(folder))
    return Encoder(network, variables, description)


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        flat = safetensors.numpy.load(path.read_bytes())
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} is damaged, or writing it was interrupted ({error}). Export it again.'
        ) from error
    variables: dict[str, Any] = {}
    for name, array in flat.items():
        *parents, leaf = name.split('/')
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return variables


def check_variables(
    network: nn.Module | NnxNetwork, description: Mapping[str, Any], variables: Any, where: str
) -> None:
    """Raises UserError if variables are not those of a network, naming the first that is odd.

    Args:
      network: the network. description: whose hidden layer and image size are used.
      variables: to check. where: they come from, for the message.
    """
    size = description['image_size']
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    tapped = TappedEncoder(network, description['hidden_layer'])
    expected = jax.eval_shape(tapped.init, jax.random.key(0), images)
    wanted = {path_name(p): (v.shape, str(v.dtype)) for p, v in jax.tree.leaves_with_path(expected)}
    found = {path_name(p): (v.shape, str(v.dtype)) for p, v in jax.tree.leaves_with_path(variables)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{where} does not fit the encoder '{description['name']}': '{name}' should be "
                f'{wanted.get(name, "absent")} and is {found.get(name, "absent")}.'
            )


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'{path} is damaged: {error}') from error
    if not isinstance(description, dict):
        raise UserError(f'{path} is damaged: it holds a {type(description).__name__}.')
    if description.get('format') != FORMAT:
        raise UserError(f"{path} is of format '{description.get('format')}', not '{FORMAT}'.")
    missing = sorted(_KEYS - description.keys())
    if missing:
        raise UserError(f'{path} is damaged: it lacks {", ".join(missing)}.')
    return description
