"""Loads and saves ResNet weights under torchvision's names: one encoder for JAX and PyTorch.

timm's plain ResNets (`resnet18`, `resnet50`, ..) have the same names. Kernels are HWIO in Flax and
OIHW in PyTorch. Two things are in no file and are assumed to be as in torchvision: BatchNorm's
epsilon is 1e-5, and a bottleneck has its stride in the 3x3 convolution.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from byol_jax.errors import UserError
from byol_jax.files import parse_json, write_whole
from byol_jax.interop.encoder import Encoder, make_encoder
from byol_jax.interop.state_dict import Weights, read_state_dict
from byol_jax.interop.which_resnet import Say, find_architecture, get_weight, no_say, plain_names
from byol_jax.models.bounds import declared_network
from byol_jax.models.network import path_name
from byol_jax.models.resnet import ResNet
from byol_jax.settings import Views, checked_value

# torchvision/transforms/_presets.py, ImageClassification.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Image sizes in pixels: ImageNet's usual crop, and that of CIFAR for the stem for small images.
_IMAGE_SIZE, _SMALL_IMAGE_SIZE = 224, 32
# So many weights may be odd while the network is still built to name the first of them.
_SPARE = 100
# Key of the file's metadata under which `save_torchvision` keeps what does not fit a state dict.
_METADATA = 'byol_jax'
# What is kept there of the views it was trained on.
_OF_VIEWS = ('image_size', 'antialias', 'mean', 'std')

_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}
_LAYERS = {'shortcut_conv': 'downsample.0', 'shortcut_bn': 'downsample.1'}


def load_torchvision(path: str | Path, say: Say = no_say) -> Encoder:
    """Loads a ResNet saved under torchvision's names.

    The network is found from names and shapes: ResNet-18, -34, -50, -101, -152, -200 or any other
    number of blocks, any width, the 7x7 stem or the 3x3 one for small images. `fc.*` is dropped.
    The network may lie under prefixes of DataParallel, Lightning, MoCo and SimCLR ('module.',
    'model.', 'encoder.', 'encoder_q.', 'base_encoder.', 'backbone.' and any of these in a row);
    what lies elsewhere is left out. The features are those after the average pooling and equal
    PyTorch's up to float32 rounding.

    BatchNorm's running_var is used unchanged. PyTorch accumulates it from the unbiased batch
    variance (over n - 1), this package from the biased one (over n). A loaded encoder is frozen, so
    this makes no difference; further training starts from a slightly different estimate.

    Args:
      path: a .safetensors; or a .pth, .pth.tar, .pt or .ckpt with a state dict, or a dict with one
        under 'state_dict' or 'model', read by PyTorch's weights-only loading.
      say: gets a line if the network lies under a prefix, or something is left out.

    Returns:
      The encoder, with float32 arrays. Its image size is 224 pixels (32 with the small stem) and
      its mean and std are ImageNet's, unless `save_torchvision` wrote others to the file.

    Raises:
      UserError: the file cannot be read, a .pth needs PyTorch and it is not installed, or the
        weights belong to another network; names the first weight that is unknown, missing or of
        the wrong shape.
    """
    path = Path(path).expanduser()
    weights, metadata = read_state_dict(path)
    weights = plain_names(weights, path, say)
    name, kwargs = find_architecture(weights, path)
    size = _SMALL_IMAGE_SIZE if kwargs.get('small_images') else _IMAGE_SIZE
    description: dict[str, Any] = {'image_size': size, 'mean': _MEAN, 'std': _STD, 'step': 0}
    description |= _description(metadata, path)
    variables: dict[str, Any] = {}
    expected = _expected(name, kwargs, weights, path)
    for torch_name, (ours, shape) in expected.items():
        array = get_weight(weights, torch_name, path)
        if array.shape != shape:
            raise UserError(
                f"{path}: '{torch_name}' has the shape {list(array.shape)}; in a {name} of width "
                f'{kwargs.get("width", 1)} it has {list(shape)}.'
            )
        *parents, leaf = ours.split('/')
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
        # A copy in C order, because a view would keep the whole file in memory.
        node[leaf] = np.array(_hwio(array), np.float32, order='C')
    for torch_name in weights:
        if torch_name not in expected and not torch_name.endswith('.num_batches_tracked'):
            raise UserError(f"{path}: '{torch_name}' has no place in a {name}.")
    return make_encoder(
        name=name, kwargs=kwargs, hidden_layer='avgpool', variables=variables, **description
    )


def save_torchvision(encoder: Encoder, path: str | Path) -> None:
    """Writes a ResNet's weights under torchvision's names, for PyTorch to load without this code.

        model = torchvision.models.resnet50()
        model.load_state_dict(safetensors.torch.load_file(path), strict=False)  # lacks fc.* only

    running_var is written unchanged (a biased estimate), so that `model.eval()` normalises as the
    encoder does. num_batches_tracked, which PyTorch uses only with momentum=None, is the step of
    the encoder. Image size, mean, std and step go to the file's metadata, where `load_torchvision`
    finds them. A classification `head` is left out.

    Args:
      encoder: a ResNet of this package, for example from `load_encoder`.
      path: .safetensors file to write. An existing file is replaced, and the folder is created if
        necessary.

    Raises:
      UserError: the encoder is no ResNet or not one that torchvision has, it is tapped before its
        last block, or the path does not end in .safetensors.
    """
    path = Path(path).expanduser()
    if path.suffix != '.safetensors' or path.is_dir():
        raise UserError(f'{path}: torchvision weights are written to a file named *.safetensors.')
    _check_expressible(encoder)
    step = encoder.description['step']
    tensors: Weights = {}
    for key, leaf in jax.tree.leaves_with_path(encoder.variables):
        ours = path_name(key)
        if ours.startswith('params/head/'):
            continue
        name = _torch_name(ours)
        # Safetensors writes the memory of an array as it is, so it must be in C order.
        tensors[name] = np.ascontiguousarray(_oihw(np.asarray(leaf, np.float32)))
        if name.endswith('.running_var'):
            counter = name.removesuffix('running_var') + 'num_batches_tracked'
            tensors[counter] = np.array(step, np.int64)
    about = encoder.description
    kept = {key: about[key] for key in ('step', *_OF_VIEWS) if key in about}
    # PyTorch's loaders expect 'format'.
    data = safetensors.numpy.save(tensors, {'format': 'pt', _METADATA: json.dumps(kept)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_bytes(data))


def _check_expressible(encoder: Encoder) -> None:
    module, tap = encoder.network, encoder.description['hidden_layer']
    if type(module) is not ResNet:
        raise UserError(
            f"'{encoder.description['name']}' is no ResNet of byol_jax.models.resnet: torchvision "
            'has no names for its weights.'
        )
    free = {'parent', 'name', 'axis_name', 'zero_init_residual', 'num_classes'}
    free |= {'stage_sizes', 'bottleneck', 'width', 'small_images'}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        value = tuple(value) if isinstance(value, list) else value
        if field.name not in free and value != field.default:
            raise UserError(
                f"torchvision's ResNet has no {field.name}={value!r}, only "
                f'{field.name}={field.default!r}: this encoder cannot be saved for it.'
            )
    if len(module.stage_sizes) != 4:
        raise UserError(
            f"torchvision's ResNet has 4 stages; this one has {len(module.stage_sizes)}."
        )
    if tap not in ('avgpool', 'stage4', f'stage4/block{module.stage_sizes[3]}'):
        raise UserError(
            f"The encoder is tapped at '{tap}', so its features are not the input of torchvision's "
            'fc, and the layers behind the tap are not trained.'
        )


def _torch_name(path: str) -> str:
    """'params/stage1/block1/bn1/scale' -> 'layer1.0.bn1.weight'."""
    _, *layers, leaf = path.split('/')
    names = []
    for layer in layers:
        if layer.startswith('block'):
            names.append(str(int(layer.removeprefix('block')) - 1))
        else:
            names.append(_LAYERS.get(layer, layer.replace('stage', 'layer')))
    return '.'.join([*names, _LEAVES[leaf]])


def _oihw(array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


def _hwio(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _expected(
    name: str, kwargs: Mapping[str, Any], weights: Weights, path: Path
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """torchvision's name -> (our path, torchvision's shape), in the order stem, stages."""

    def shape_of(ours: str) -> tuple[int, ...] | None:
        found = weights.get(_torch_name(ours))
        return None if found is None else _hwio(found).shape

    where = f'{path}: its weights are not those of a {name}'
    _, shapes = declared_network(
        name, kwargs, _SMALL_IMAGE_SIZE, shape_of, len(weights), where, spare=_SPARE
    )
    expected = {}
    for key, leaf in jax.tree.leaves_with_path(shapes):
        shape = tuple(leaf.shape[i] for i in (3, 2, 0, 1)) if leaf.ndim == 4 else leaf.shape
        expected[_torch_name(path_name(key))] = (path_name(key), shape)
    numbers = {name: [int(n) for n in re.findall(r'\d+', name)] for name in expected}
    return {
        name: expected[name]
        for name in sorted(expected, key=lambda n: (n.startswith('layer'), numbers[n], n))
    }


def _description(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The metadata that `save_torchvision` wrote; {} if another program wrote the file."""
    if _METADATA not in metadata:
        return {}
    try:
        # Older files have no 'antialias'.
        kept = {'antialias': True, **parse_json(metadata[_METADATA], _METADATA)}
        found = {key: checked_value(Views, key, kept[key], key) for key in _OF_VIEWS}
        return {'step': int(kept['step']), **found}
    except (ValueError, KeyError, TypeError, OverflowError, UserError) as error:
        raise UserError(f"{path}: its metadata '{_METADATA}' is damaged: {error}") from error
