"""The exported encoder: `encoder.json` and `encoder.safetensors`, no pickle and no code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from byol_jax.errors import UserError
from byol_jax.files import write_whole
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder, path_name

FORMAT = 'byol_jax encoder 1'
_KEYS = {'name', 'kwargs', 'hidden_layer', 'image_size', 'mean', 'std', 'feature_size', 'sha256'}
_DESCRIPTION, _WEIGHTS = 'encoder.json', 'encoder.safetensors'


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A pretrained encoder: `features = encoder(images)`.

    Attributes:
      module: the Flax network, for fine-tuning.
      variables: its variables: 'params' and, for most, 'batch_stats'.
      description: the contents of encoder.json.
    """

    module: nn.Module
    variables: Mapping[str, Any]
    description: Mapping[str, Any]

    def __call__(self, images: Any) -> np.ndarray:
        """uint8 [B, H, W, 3] -> float32 [B, D], deterministic, batch normalisation frozen.

        Pictures of the size trained on, `description['image_size']`, give the best features;
        networks that pool take any size.

        Raises:
          UserError: the images are not uint8 [B, H, W, 3].
        """
        shape, dtype = np.shape(images), getattr(images, 'dtype', type(images).__name__)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise UserError(
                f'encoder(images) takes uint8 images [B, H, W, 3], values 0 to 255; given '
                f'{dtype} {list(shape)}.'
            )
        return np.asarray(self._features(self.variables, images))

    @property
    def _features(self) -> Any:
        return _compiled(
            self.module,
            self.description['hidden_layer'],
            tuple(self.description['mean']),
            tuple(self.description['std']),
        )


_COMPILED: dict[Any, Any] = {}


def _compiled(module: nn.Module, hidden_layer: str, mean: Any, std: Any) -> Any:
    """The jitted features function; one for equal networks, however often they are loaded."""
    key = (module, hidden_layer, mean, std)
    if key not in _COMPILED:
        tapped = TappedEncoder(module, hidden_layer)

        @jax.jit
        def features(variables: Any, images: jax.Array) -> jax.Array:
            x = (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)
            return tapped.apply(variables, x, train=False)[0].astype(jnp.float32)

        _COMPILED[key] = features
    return _COMPILED[key]


def make_encoder(
    *,
    name: str,
    kwargs: Mapping[str, Any],
    hidden_layer: str,
    variables: Any,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    step: int,
) -> Encoder:
    """Builds an Encoder from a network's name and arguments and its variables.

    Args:
      name, kwargs, hidden_layer: as in the config's `encoder`.
      variables: 'params' and the other collections; copied to the host.
      image_size: side of the views it was trained on, pixels.
      mean, std: of the RGB channels in [0, 1] it was trained with.
      step: optimizer steps it was trained for.
    """
    module = build_encoder(name, kwargs)
    variables = jax.tree.map(np.asarray, jax.device_get(dict(variables)))
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    tapped = TappedEncoder(module, hidden_layer)
    features = jax.eval_shape(lambda v, x: tapped.apply(v, x, False)[0], variables, images)
    description = {
        'format': FORMAT,
        'name': name,
        'kwargs': dict(kwargs),
        'hidden_layer': hidden_layer,
        'image_size': image_size,
        'mean': list(mean),
        'std': list(std),
        'feature_size': features.shape[-1],
        'step': step,
        'versions': {'jax': jax.__version__, 'flax': flax.__version__},
    }
    return Encoder(module, variables, description)


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
    described = {**encoder.description, 'sha256': hashlib.sha256(weights).hexdigest()}
    description = json.dumps(described, indent=2, sort_keys=True) + '\n'
    write_whole(folder / _WEIGHTS, lambda partial: partial.write_bytes(weights))
    write_whole(folder / _DESCRIPTION, lambda partial: partial.write_text(description))


def load_encoder(path: str | Path) -> Encoder:
    """Loads an exported encoder; needs neither TensorFlow nor the training configuration.

    An encoder of a class of the user's own ('package.module:Class') imports that module, as any
    import would; nothing but a Linen module class is ever called.

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
    weights = (folder / _WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != description['sha256']:
        raise UserError(
            f'{folder / _WEIGHTS} is damaged, or writing it was interrupted: its sha256 is not the '
            f'one in {_DESCRIPTION}. Export it again.'
        )
    module = build_encoder(description['name'], description['kwargs'])
    variables: dict[str, Any] = {}
    for name, array in safetensors.numpy.load(weights).items():
        *parents, leaf = name.split('/')
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    check_variables(module, description, variables, str(folder))
    return Encoder(module, variables, description)


def check_variables(
    module: nn.Module, description: Mapping[str, Any], variables: Any, where: str
) -> None:
    """Raises UserError if variables are not those of a network, naming the first that is odd.

    Args:
      module: the network. description: whose hidden layer and image size are used.
      variables: to check. where: they come from, for the message.
    """
    size = description['image_size']
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    tapped = TappedEncoder(module, description['hidden_layer'])
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
