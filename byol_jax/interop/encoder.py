"""The pretrained encoder: a callable from images to features."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from byol_jax.errors import UserError
from byol_jax.models.network import path_name
from byol_jax.models.nnx_network import NnxNetwork
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder
from byol_jax.settings import Views, checked_value
from byol_jax.values import plain_value

FORMAT = 'byol_jax encoder 2'


_COMPILED: dict[Any, Any] = {}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A pretrained encoder: `features = encoder(images)`.

    Attributes:
      network: a Linen module, or the recipe of an NNX module.
      variables: the network's variables by collection: 'params' and, for most, 'batch_stats'.
      description: the content of encoder.json.
    """

    network: nn.Module | NnxNetwork
    variables: Mapping[str, Any]
    description: Mapping[str, Any]

    def __call__(self, images: Any) -> np.ndarray:
        """Computes features, deterministically and with frozen batch normalisation.

        Args:
          images: uint8 [B, H, W, 3], RGB. The best size is the one of training,
            `description['image_size']`; networks that pool take any size.

        Returns:
          float32 [B, D].

        Raises:
          UserError: the images are not uint8 [B, H, W, 3].
        """
        _check_images(images)
        return np.asarray(self.compiled(self.variables, images))

    @functools.cached_property
    def module(self) -> nn.Module | nnx.Module:
        """The Flax network itself, for fine-tuning.

        Either a Linen module, to be applied to `variables`, or an NNX module that holds a copy of
        them. Training the NNX module does not change what `encoder(images)` returns.
        """
        if isinstance(self.network, NnxNetwork):
            return self.network.build(self.variables)
        return self.network

    @functools.cached_property
    def weights_sha256(self) -> str:
        """The hexadecimal sha256 of all weights: names, dtypes, shapes and bytes, sorted by name.

        It depends on the weights only, not on the export, the machine or the package version.
        """
        return weights_sha256(self.variables)

    def apply(
        self,
        variables: Mapping[str, Any],
        images: jax.Array,
        train: bool = False,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Computes features from any variables, differentiably, for fine-tuning.

        Args:
          variables: variables like `self.variables`.
          images: uint8 [B, H, W, 3]; normalised here as in pretraining.
          train: whether to use batch statistics and dropout.
          rng: a key, for networks that draw random numbers in training.

        Returns:
          Features, float32 [B, D], and the collections other than 'params', updated if `train`.
        """
        _check_images(images)
        features, state = self._tapped.apply(
            variables, _normalise(images, self._normalisation), train, rng
        )
        return features.astype(jnp.float32), dict(state)

    def behind(self) -> frozenset[str]:
        """Paths of the variables behind the tap, such as 'params/head/kernel'.

        The features do not depend on them.
        """
        size = self.description['image_size']
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        return self._tapped.find_behind(self.variables, images)

    @property
    def compiled(self) -> Any:
        """The jitted function `(variables, images) -> features` behind a call, without checks.

        Equal networks share it, so loading an encoder again does not compile again. If `variables`
        are on a device already, a call does not copy them there.
        """
        about = self.description
        architecture = ('name', 'kwargs', 'hidden_layer', 'pool', 'mean', 'std')
        # The key is text, because modules may not be hashable, and 1, 1.0 and True are equal but
        # may build different networks.
        made_by: Any = type(self.network)
        if isinstance(self.network, NnxNetwork):
            made_by = self.network.constructor
        key = (made_by, json.dumps([about[name] for name in architecture]))
        if key not in _COMPILED:
            tapped, normalisation = self._tapped, self._normalisation

            @jax.jit
            def features(variables: Any, images: jax.Array) -> jax.Array:
                x = _normalise(images, normalisation)
                return tapped.apply(variables, x, train=False)[0].astype(jnp.float32)

            _COMPILED[key] = features
        return _COMPILED[key]

    @property
    def _tapped(self) -> TappedEncoder:
        about = self.description
        return TappedEncoder(self.network, about['hidden_layer'], about['pool'])

    @property
    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(self.description['mean']), tuple(self.description['std'])


def _normalise(images: jax.Array, normalisation: Any) -> jax.Array:
    mean, std = normalisation
    return (jnp.asarray(images).astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


def _check_images(images: Any) -> None:
    shape, dtype = np.shape(images), getattr(images, 'dtype', type(images).__name__)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise UserError(
            f'The encoder takes uint8 images [B, H, W, 3], values 0 to 255; given: {dtype} '
            f'{list(shape)}.'
        )


def make_encoder(
    *,
    name: str,
    kwargs: Mapping[str, Any],
    hidden_layer: str,
    pool: str = 'mean',
    variables: Any,
    image_size: int,
    antialias: bool = True,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    step: int,
) -> Encoder:
    """Builds an Encoder from a network's name, arguments and variables.

    Args:
      name: name of the network, as in encoder.name.
      kwargs: arguments of its constructor, as in encoder.kwargs.
      hidden_layer: layer whose output is the representation, as in encoder.hidden_layer.
      pool: how a layer of tokens is pooled, as in encoder.pool.
      variables: 'params' and the other collections; copied to the host.
      image_size: side of the views that it was trained on, pixels.
      antialias: whether the views were smoothed as they were shrunk; see `views.crop.crop_resize`.
      mean: mean of the RGB channels, in [0, 1], that images are normalised with.
      std: standard deviation of the RGB channels, likewise.
      step: number of optimizer steps that it was trained for.
    """
    kwargs = plain_value(kwargs, 'encoder.kwargs')
    network = build_encoder(name, kwargs)
    variables = jax.tree.map(np.asarray, jax.device_get(dict(variables)))
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    tapped = TappedEncoder(network, hidden_layer, pool)
    features = jax.eval_shape(lambda v, x: tapped.apply(v, x, train=False)[0], variables, images)
    description = {
        'format': FORMAT,
        'name': name,
        'kwargs': dict(kwargs),
        'hidden_layer': hidden_layer,
        'pool': pool,
        'image_size': image_size,
        'antialias': antialias,
        'mean': list(mean),
        'std': list(std),
        'feature_size': features.shape[-1],
        'step': step,
        'versions': {'jax': jax.__version__, 'flax': flax.__version__, **_provider(name)},
    }
    check_description(description, 'views')
    return Encoder(network, variables, description)


def check_description(description: Mapping[str, Any], where: str) -> None:
    """Checks values of encoder.json, where it is written and where it is read, as a config's.

    Args:
      description: has 'mean', 'std', 'image_size' and 'kwargs'.
      where: what the message begins with.

    Raises:
      UserError: one is of another type, not finite or out of range.
    """
    # Older files have no 'antialias'.
    for name in {'mean', 'std', 'image_size', 'antialias'} & description.keys():
        checked_value(Views, name, description[name], f'{where}.{name}')
    plain_value(description['kwargs'], f'{where}.kwargs')


def _provider(name: str) -> dict[str, str]:
    """The installed distribution that the user's own class comes from, with its version."""
    top = name.partition(':')[0].partition('.')[0]
    found = importlib.metadata.packages_distributions().get(top, []) if ':' in name else []
    return {distribution: importlib.metadata.version(distribution) for distribution in found}


def weights_sha256(variables: Any) -> str:
    """The hexadecimal sha256 of named arrays, independent of the layout of any file.

    Raises:
      UserError: two variables have the same name.
    """
    digest = hashlib.sha256()
    named = jax.tree.leaves_with_path(variables)
    leaves = {path_name(path): np.asarray(leaf) for path, leaf in named}
    if len(leaves) != len(named):
        raise UserError(
            'Two variables of the encoder have the same name, so it cannot be exported.'
        )
    for name in sorted(leaves):
        leaf = np.asarray(leaves[name], order='C')
        digest.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        # Without a copy: it may be mapped from a file larger than memory.
        digest.update(leaf.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
