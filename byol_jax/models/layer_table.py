"""The table of an encoder's layers, from which a user chooses the layer to tap."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp

from byol_jax.models.network import OUTPUT, path_name
from byol_jax.models.tap import TappedEncoder
from byol_jax.models.tappable import Layer

# The remark that ends the tapped layer's line.
TAPPED = '<- tapped: the representation'


def layer_table(encoder: TappedEncoder, image_size: int) -> str:
    """One line for each layer (path, class, output shape, parameters, FLOPs), then the sums.

    Args:
      encoder: a tapped encoder with its `behind` and `frozen`, as `tap` returns it.
      image_size: side of the square pictures, pixels.
    """
    shape = (1, image_size, image_size, 3)
    layers, sizes = encoder.layers(shape), _parameter_sizes(encoder, shape)
    rows = [
        (
            layer.path,
            layer.kind,
            'x'.join(map(str, layer.shape[1:])),
            f'{layer.parameters:,}',
            _short(layer.flops),
            _remark(layer, layers, encoder, sizes.keys()),
        )
        for layer in layers
    ]
    head = ('layer', 'module', 'output', 'parameters', 'FLOPs', '')
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(5)]
    lines = []
    for row in [head, *rows]:
        left = [f'{cell:<{width}}' for cell, width in zip(row[:3], widths[:3], strict=True)]
        right = [f'{cell:>{width}}' for cell, width in zip(row[3:5], widths[3:], strict=True)]
        lines.append('  '.join([*left, *right, row[5]]).rstrip())
    return '\n'.join([*lines, '', _sums(encoder, shape, sizes)])


def _remark(
    layer: Layer, layers: Sequence[Layer], encoder: TappedEncoder, params: Collection[str]
) -> str:
    if layer.path == encoder.hidden_layer:
        return TAPPED
    order = [other.path for other in layers]
    own = next((p for p in (layer.path, *_shorter(layer.path)) if _inside(p, params)), layer.path)
    inside = _inside(own, params)
    # A layer that ends after the tapped layer is behind it, unless it encloses the tapped layer.
    encloses = any(
        name == OUTPUT or f'{encoder.hidden_layer}/'.startswith(f'{name}/')
        for name in (layer.path, *_shorter(layer.path))
    )
    later = order.index(layer.path) > order.index(encoder.hidden_layer) and not encloses
    # Parameters tell whether a layer is trained; it may be called before and behind the tap.
    if inside <= encoder.behind if inside else later:
        return '(behind the tap: not trained)'
    if inside and inside <= encoder.behind | encoder.frozen:
        return '(frozen: not trained)'
    parts = ' and '.join(
        what
        for what, paths in (('frozen', encoder.frozen), ('behind the tap', encoder.behind))
        if inside & paths
    )
    return f'(partly {parts})' if parts else ''


def _shorter(path: str) -> list[str]:
    """The paths that remain without the elements of outputs at its end: 'a.b.0' -> 'a.b', 'a'."""
    parts = path.split('.')
    return ['.'.join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _inside(layer: str, params: Collection[str]) -> set[str]:
    """The paths in `params` of the layer's parameters, inner layers included."""
    return {path for path in params if path.startswith(f'params/{layer}/')}


def _parameter_sizes(encoder: TappedEncoder, shape: tuple[int, ...]) -> dict[str, int]:
    variables = jax.eval_shape(
        encoder.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    return {
        f'params/{path_name(path)}': leaf.size
        for path, leaf in jax.tree.leaves_with_path(variables['params'])
    }


def _sums(encoder: TappedEncoder, shape: tuple[int, ...], sizes: Mapping[str, int]) -> str:
    behind = sum(size for path, size in sizes.items() if path in encoder.behind)
    frozen = sum(size for path, size in sizes.items() if path in encoder.frozen - encoder.behind)
    total = sum(sizes.values())
    text = f'{total:,} parameters: {total - behind - frozen:,} trained'
    text += f', {behind:,} behind the tap' if behind else ''
    text += f', {frozen:,} frozen' if frozen else ''
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    features = jax.eval_shape(
        lambda rng, x: encoder.apply(encoder.init(rng, x), x, train=False)[0],
        jax.random.key(0),
        images,
    )
    return (
        f'{text}\n{features.shape[-1]:,} features, {_short(encoder.flops(shape))} FLOPs a picture '
        'up to the tap (a multiply-add counts 2, padding nothing)'
    )


def _short(count: int) -> str:
    """1234567 -> '1.23 M'."""
    for factor, unit in ((1e12, ' T'), (1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
        if count >= factor:
            return f'{count / factor:.3g}{unit}'
    return str(count)
