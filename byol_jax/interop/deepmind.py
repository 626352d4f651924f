"""Loads DeepMind's BYOL checkpoints (github.com/google-deepmind/deepmind-research, byol/).

They are Haiku parameter trees: module path -> parameter name -> array. A path such as
'res_net50/~/block_group_0/~/block_0/~/conv_0' names a convolution of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from byol_jax.errors import UserError
from byol_jax.interop.encoder import Encoder, make_encoder
from byol_jax.interop.unpickle import Array, Record, read_pickle
from byol_jax.models.bounds import declared_network
from byol_jax.models.registry import ENCODERS

# byol/utils/dataset.py: normalize_images, and the size of the crops in pixels.
_MEAN, _STD, _IMAGE_SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224
# byol/utils/networks.py, ResNetTorso: number of groups, and at width 1 the channels of the stem and
# of each group's inner convolutions.
_GROUPS, _STEM, _CHANNELS = 4, 64, (64, 128, 256, 512)

# So many arrays may be missing while the network is still built to name the first of them.
_SPARE = 100

# Keys of the encoder's parameters and state: in a checkpoint of pretraining (the online network,
# which is the one to keep: paper, Section 3.1), and of linear evaluation.
_PLACES = (('online_params', 'online_state'), ('backbone_params', 'backbone_state'))

_Tree = Mapping[str, Mapping[str, Any]]


def load_deepmind(path: str | Path) -> Encoder:
    """Loads the encoder of a checkpoint of DeepMind's BYOL, such as `pretrain_res50x1.pkl`.

    The file need not be trusted: nothing in it is executed.

    Args:
      path: a file written by their `Checkpointer`, or a pickle of their experiment's state alone,
        or of a Haiku pair (parameters, state).

    Returns:
      The online encoder with its running batch statistics, tapped at `avgpool`: float32
      [B, 2048 * width] for networks with bottlenecks, [B, 512 * width] for those without.

    Raises:
      UserError: the file cannot be read, names anything but arrays and plain containers, has
        another layout, or holds another network than DeepMind's ResNet v1; the message says what
        is wrong.
    """
    data = read_pickle(path)
    try:
        params, state, step = _networks(data)
        root = _root(params)
        name, kwargs = _architecture(_below(params, root))
        variables = _variables(name, kwargs, _below(params, root), _below(state, root))
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    return make_encoder(
        name=name,
        kwargs=kwargs,
        hidden_layer='avgpool',
        variables=variables,
        image_size=_IMAGE_SIZE,
        # Their byol/utils/dataset.py resizes with TensorFlow's bicubic, without antialiasing.
        antialias=False,
        mean=_MEAN,
        std=_STD,
        step=step,
    )


def _networks(data: Any) -> tuple[_Tree, _Tree, int]:
    """The parameters, state and optimizer steps (0 if not known) of a checkpoint."""
    inner, step = data, 0
    if isinstance(data, dict) and 'experiment_state' in data:
        inner, step = data['experiment_state'], _integer(data.get('step', 0))
    named = inner.named() if isinstance(inner, Record) else inner
    pair: Any = inner
    if isinstance(named, dict):
        pair = next(((named[p], named[s]) for p, s in _PLACES if p in named and s in named), ())
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(t, dict) for t in pair):
        return pair[0], pair[1], step
    inside = 'its experiment_state is ' if inner is not data else 'it is '
    raise UserError(
        f'{inside}{_describe(inner)}. Expected: a dict with experiment_state, which has '
        f'{" or ".join(" and ".join(place) for place in _PLACES)}; or a pair (params, state).'
    )


def _describe(found: Any) -> str:
    if isinstance(found, Record):
        return f'a NamedTuple with the fields {", ".join(found.named()) or "(not known)"}'
    if isinstance(found, dict):
        keys = ', '.join(map(str, list(found)[:8]))
        return f'a dict of {len(found)} keys: {keys}'
    if isinstance(found, Array):
        return 'an array'
    return f'a {type(found).__name__}' + (f' of {len(found)}' if hasattr(found, '__len__') else '')


def _integer(value: Any) -> int:
    value = value.value if isinstance(value, Array) else value
    # Nothing but a number may become an array: a list of lists may have 2^60 elements.
    value = np.asarray(value if isinstance(value, int | np.ndarray) else 0.0)
    if value.size != 1 or value.dtype.kind not in 'iu':
        raise UserError("its 'step' is no integer.")
    return int(value.reshape(()))


def _root(params: _Tree) -> str:
    """The path of the ResNet in a tree, such as 'res_net50'; there must be exactly one."""
    roots = [
        _path(key)[: -len('/initial_conv')]
        for key in params
        if _path(key).endswith('/initial_conv')
    ]
    if len(roots) != 1:
        tops = sorted({_path(key).split('/')[0] for key in params})
        raise UserError(
            f'it holds {len(roots)} modules .../initial_conv (the first layer of a ResNet) instead '
            f'of one. Its modules: {", ".join(tops[:8])}.'
        )
    return roots[0]


def _path(key: Any) -> str:
    """A module's path without '~', which Haiku inserts for modules made in a constructor."""
    return '/'.join(part for part in str(key).split('/') if part != '~')


def _below(tree: _Tree, root: str) -> dict[str, np.ndarray]:
    """The arrays of the modules below `root`, by their path from there, 'module/name'."""
    found = {}
    for key, module in tree.items():
        path = _path(key)
        if not path.startswith(f'{root}/'):
            continue
        if not isinstance(module, dict):
            raise UserError(f'{key} is {_describe(module)}, not a dict of arrays.')
        for name, leaf in module.items():
            if not isinstance(leaf, Array):
                raise UserError(f'{key}/{name} is {_describe(leaf)}, not an array.')
            found[f'{path}/{name}'.removeprefix(f'{root}/')] = leaf.value
    return found


def _architecture(params: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """Finds the encoder's name and arguments from the names and shapes of its convolutions."""
    if 'final_batchnorm/scale' in params:
        raise UserError(
            'it holds a final_batchnorm: a ResNet v2 (pre-activation). byol_jax has ResNet v1.'
        )
    groups = {name.split('/')[0] for name in params if name.startswith('block_group_')}
    if groups != {f'block_group_{i}' for i in range(_GROUPS)}:
        found = ', '.join(sorted(groups)) or 'none'
        raise UserError(f'a ResNet has block_group_0 to block_group_{_GROUPS - 1}; found: {found}.')
    first = [_kernel(params, f'block_group_{i}/block_0/conv_0/w') for i in range(_GROUPS)]
    width = _kernel(params, 'initial_conv/w').shape[3] / _STEM
    sizes = tuple(
        len({name.split('/')[1] for name in params if name.startswith(f'block_group_{i}/')})
        for i in range(_GROUPS)
    )
    bottleneck = 'block_group_0/block_0/conv_2/w' in params
    known = ENCODERS.entries.items()
    name = next((n for n, make in known if _makes(make, sizes, bottleneck)), 'resnet')
    # DeepMind's convolutions and pooling pad like TensorFlow's. Their basic blocks have a
    # projection in the shortcut even where the number of channels does not change.
    kwargs: dict[str, Any] = {'same_padding': True}
    if name == 'resnet':
        kwargs |= {'stage_sizes': list(sizes), 'bottleneck': bottleneck}
    if not bottleneck and 'block_group_0/block_0/shortcut_conv/w' in params:
        kwargs['project_every_stage'] = True
    if width != 1:
        kwargs['width'] = int(width) if width.is_integer() else width
    channels = [kernel.shape[3] for kernel in first]
    if channels != [round(c * width) for c in _CHANNELS]:
        kwargs['channels'] = [
            int(c / width) if (c / width).is_integer() else c / width for c in channels
        ]
    return name, kwargs


def _kernel(params: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in params or params[name].ndim != 4 or params[name].size == 0:
        raise UserError(f'it holds no {name} [height, width, channels in, channels out].')
    return params[name]


def _makes(make: Any, sizes: tuple[int, ...], bottleneck: bool) -> bool:
    """Whether an entry of the encoder registry is this ResNet."""
    return (
        isinstance(make, functools.partial)
        and make.args == (sizes,)
        and make.keywords.get('bottleneck', False) == bottleneck
    )


def _variables(
    name: str,
    kwargs: Mapping[str, Any],
    params: Mapping[str, np.ndarray],
    state: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The variables of the Flax network, each taken from the file and of the right shape.

    Raises:
      UserError: one is missing, has another shape or dtype, or the file has others too.
    """

    def shape_of(path: str) -> tuple[int, ...] | None:
        collection, *layers, kind = path.split('/')
        found = (params if collection == 'params' else state).get(
            f'{_haiku_module(layers)}/{_HAIKU_LEAVES[kind]}'
        )
        # Batch normalisation keeps [1, 1, 1, C].
        return None if found is None else found.shape if kind == 'kernel' else found.shape[-1:]

    where = f'its arrays are not those of a {_title(name, kwargs)}'
    _, expected = declared_network(
        name, kwargs, _IMAGE_SIZE, shape_of, len(params) + len(state), where, spare=_SPARE
    )
    used = set()

    def find(path: Any, leaf: Any) -> np.ndarray:
        collection, *layers, kind = (key.key for key in path)
        haiku = f'{_haiku_module(layers)}/{_HAIKU_LEAVES[kind]}'
        found = (params if collection == 'params' else state).get(haiku)
        if found is None:
            raise UserError(f"a {_title(name, kwargs)} has {haiku}; it is not in the file's tree.")
        # Haiku's batch normalisation has [1, 1, 1, C] where Flax has [C].
        shape = found.shape[-1:] if len(leaf.shape) == 1 else found.shape
        if shape != leaf.shape or found.size != leaf.size or found.dtype.kind != 'f':
            raise UserError(
                f'{haiku} is {found.dtype} {list(found.shape)}; a {_title(name, kwargs)} has '
                f'float32 {list(leaf.shape)} there.'
            )
        used.add(haiku)
        # A copy, because a view would keep the whole file in memory.
        return np.array(found, np.float32, order='C').reshape(leaf.shape)

    variables = jax.tree_util.tree_map_with_path(find, expected)
    # 'logits' is a classification head, which comes after the representation.
    odd = sorted(key for key in params if key not in used and not key.startswith('logits/'))
    if odd:
        raise UserError(f'it holds {odd[0]}, which a {_title(name, kwargs)} does not have.')
    return dict(variables)


# Names of Flax's parameters and statistics -> Haiku's. `average` is the running mean corrected for
# its start at 0, with which their BatchNorm evaluates; `hidden` is not corrected.
_HAIKU_LEAVES = {
    'kernel': 'w',
    'scale': 'scale',
    'bias': 'offset',
    'mean': 'mean_ema/average',
    'var': 'var_ema/average',
}


def _haiku_module(layers: list[str]) -> str:
    """Haiku's module for Flax's layers: ['stage1', 'block2', 'bn1'] -> 'block_group_0/block_1/...'.

    ['conv1'] and ['bn1'] are the stem.
    """
    if len(layers) == 1:
        return {'conv1': 'initial_conv', 'bn1': 'initial_batchnorm'}[layers[0]]
    stage, block, layer = (_counted_from_0(name) for name in layers)
    return (
        f'block_group_{stage[1]}/block_{block[1]}/'
        + {
            'conv': f'conv_{layer[1]}',
            'bn': f'batchnorm_{layer[1]}',
            'shortcut_conv': 'shortcut_conv',
            'shortcut_bn': 'shortcut_batchnorm',
        }[layer[0]]
    )


def _counted_from_0(name: str) -> tuple[str, int]:
    """Splits a name and its number, and counts from 0 instead of 1: 'stage1' -> ('stage', 0)."""
    word = name.rstrip('0123456789')
    return word, int(name[len(word) :] or 1) - 1


def _title(name: str, kwargs: Mapping[str, Any]) -> str:
    return f'{name} of width {kwargs.get("width", 1)}'
