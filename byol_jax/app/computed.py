"""What parts of the user's own compute on a fixed input: code has no version, so its result does.

A run notes these numbers when it begins. Ours are not among them: their results are promised.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from byol_jax.app.build import optimizer_of
from byol_jax.errors import UserError
from byol_jax.methods.base import METHODS, Method, build_method
from byol_jax.models.heads import MLP
from byol_jax.models.registry import ENCODERS, build_encoder
from byol_jax.models.tap import TappedEncoder
from byol_jax.settings import Settings
from byol_jax.training.optimizers import OPTIMIZERS
from byol_jax.training.step import AXIS
from byol_jax.views.recipes import OPERATIONS
from byol_jax.views.view import View

Tree = Any

# By part: the numbers.
Computed = dict[str, list[float]]

# Numbers of a result that are kept, evenly spaced.
_KEPT = 16
# A relative difference (Euclidean) that rounding on another machine or by another version of a
# library does not reach. Views are of whole levels.
_TOLERANCE = 2e-3
_TOLERANCE_OF_VIEWS = 2e-2

# What JAX and Flax raise for a function that cannot be run on this input.
_CANNOT_RUN = (
    TypeError,
    ValueError,
    NotImplementedError,
    KeyError,
    jax.errors.JaxRuntimeError,
    UserError,
)

# The first words of a refusal, and what to look at.
_PARTS = {
    'encoder': ("The network of encoder.name='{}'", 'encoder.name'),
    'method': ("The loss of method.name='{}'", 'method.name'),
    'optimizer': ("The step of optimizer.name='{}'", 'optimizer.name'),
    'views.view1': ("An operation of views.view1, '{}',", 'views.view1.operations'),
    'views.view2': ("An operation of views.view2, '{}',", 'views.view2.operations'),
}


def computed(config: Settings, method: Method, views: Mapping[str, View]) -> Computed:
    """What the parts of the user's own compute; empty where all parts are ours.

    Weights are fixed too, so the numbers do not depend on how or from what a network starts.

    Args:
      config: of the run.
      method: of the run.
      views: of the run.

    Returns:
      At most _KEPT numbers of each part; none of a part that does not run on this input.
    """
    parts = {
        'encoder': (config.encoder.name not in ENCODERS, lambda: _encoder(config, method)),
        'method': (config.method.name not in METHODS, lambda: _loss(config)),
        'optimizer': (config.optimizer.name not in OPTIMIZERS, lambda: _optimizer(config)),
    }
    for name, view in config.views.named.items():
        own = any(each.name not in OPERATIONS for each in view.operations)
        parts[f'views.{name}'] = (own, lambda name=name: _view(views[name]))  # type: ignore[misc]
    found = {}
    # In full precision and on the CPU, where there is one: accelerators round each in its own way.
    with jax.default_matmul_precision('highest'), jax.default_device(_cpu()):
        for part, (own, compute) in parts.items():
            if not own:
                continue
            try:
                result = np.ravel(np.asarray(compute(), np.float64))
            except _CANNOT_RUN:
                continue
            kept = result[np.linspace(0, len(result) - 1, min(len(result), _KEPT)).astype(int)]
            if np.isfinite(kept).all():
                found[part] = [float(f'{value:.7g}') for value in kept]
    return found


def check_same_computed(then: Mapping[str, Any], now: Mapping[str, Any], config: Settings) -> None:
    """Checks that the parts of the user's own compute what they did.

    Args:
      then: what the run noted when it began.
      now: `computed`.
      config: of the run.

    Raises:
      UserError: one does not; says which, and by how much.
    """
    for part, numbers in now.items():
        old = np.asarray(then.get(part, numbers), float)
        new = np.asarray(numbers)
        size = max(float(np.linalg.norm(old)), 1e-12) if old.shape == new.shape else 0
        apart = float(np.linalg.norm(new - old)) / size if size else 1.0
        tolerance = _TOLERANCE_OF_VIEWS if part.startswith('views.') else _TOLERANCE
        if apart <= tolerance:
            continue
        words, key = _PARTS[part]
        name = _own_name(config, part)
        raise UserError(
            f'{words.format(name)} is not what this run began with: on a fixed input its result '
            f'differs by {apart:.2g} of its length ({_shown(old)} then, {_shown(new)} now). Its '
            f'code, or code that it uses, has changed. Undo that, or start anew in another '
            f'--workdir with a name of its own in {key}.'
        )


def _shown(numbers: np.ndarray) -> str:
    return ', '.join(f'{value:.4g}' for value in numbers[:3]) + (', ..' if len(numbers) > 3 else '')


def _own_name(config: Settings, part: str) -> str:
    if part.startswith('views.'):
        view = config.views.named[part.removeprefix('views.')]
        return next(each.name for each in view.operations if each.name not in OPERATIONS)
    return str(getattr(config, part).name)


def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend='cpu')[0]
    except RuntimeError:
        # JAX_PLATFORMS leaves the CPU out.
        return None


def _filled(shapes: Tree) -> Tree:
    """Fixed arrays of these shapes, such as a network may have: its variances are above 0."""

    def fill(path: Any, x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return np.zeros(x.shape, x.dtype)
        rng = np.random.Generator(np.random.Philox(zlib.crc32(jax.tree_util.keystr(path).encode())))
        if len(x.shape) < 2:
            return np.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        limit = np.sqrt(3 / np.prod(x.shape[:-1]))
        return np.asarray(rng.uniform(-limit, limit, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _pixels(size: int, key: int) -> np.ndarray:
    """Two fixed pictures: uint8 [2, size, size, 3]."""
    rng = np.random.Generator(np.random.Philox(key))
    return rng.integers(0, 256, (2, size, size, 3), np.uint8)


def _encoder(config: Settings, method: Method) -> Any:
    """The tapped features, in inference mode."""
    options, size = config.encoder, config.views.image_size
    # Not the method's own encoder, which may want the axis of the devices.
    network = build_encoder(options.name, options.kwargs)
    tapped = TappedEncoder(network, method.encoder.hidden_layer, options.pool)
    images = ((_pixels(size, 0) - 127.5) / 64).astype(np.float32)
    variables = _filled(jax.eval_shape(tapped.init, jax.random.key(0), images))
    run = jax.jit(lambda v, x: tapped.apply(v, x, train=False)[0].astype(jnp.float32))
    return run(variables, images)


class _Small(nn.Module):
    """Stands for the encoder where the method is looked at."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.tanh(nn.Dense(8, name='out')(x.reshape(len(x), -1)))


def _loss(config: Settings) -> Any:
    """The loss of two pictures in training, of small networks."""
    size = 8
    method: Method = build_method(
        config.method.name,
        config.method.kwargs,
        encoder=TappedEncoder(_Small(), 'out'),
        projector=MLP(8, 4, AXIS),
        predictor=MLP(8, 4, AXIS),
        mean=config.views.mean,
        std=config.views.std,
        axis_name=AXIS,
    )
    params, stats = _filled(jax.eval_shape(lambda: method.init(jax.random.key(0), size)))
    target = {part: jax.tree.map(lambda x: x * 0.9, params[part]) for part in method.target_parts}
    target_stats = {part: stats[part] for part in method.target_parts if part in stats}
    batch: dict[str, Any] = {'example': np.arange(2, dtype=np.int32)[None]}
    for number, view in enumerate(method.views):
        batch[view] = _pixels(size, number)[None]
        batch[f'{view}/box'] = np.array([[[0, 0, 1, 1], [0, 0.2, 0.5, 0.8]]], np.float32)
        batch[f'{view}/mirrored'] = np.array([[False, True]])

    def loss(batch: Any) -> Any:
        return method.loss(params, target, stats, target_stats, batch, jax.random.key(0))[0]

    return jax.jit(jax.vmap(loss, axis_name=AXIS))(batch)


def _optimizer(config: Settings) -> Any:
    """Three updates of two parameters, from fixed gradients."""
    params = {'encoder': {'fc': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}}}
    mask = {'encoder': {'fc': {'kernel': True, 'bias': False}}}
    optimizer = optimizer_of(config, mask, lambda step: 0.1 * config.optimizer.base_learning_rate)
    state, updates = optimizer.init(params), []
    for number in range(1, 4):
        gradients = jax.tree.map(
            lambda x, n=number: (n * jnp.arange(1.0, x.size + 1) / 7).reshape(x.shape), params
        )
        change, state = optimizer.update(gradients, state, params)
        updates.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(change)]))
        params = jax.tree.map(lambda p, u: p + u, params, change)
    return np.concatenate(updates)


def _view(view: View) -> Any:
    """The mean colours of parts of views of a fixed picture."""
    rows, columns = np.mgrid[0:48, 0:64]
    picture = np.stack([4 * columns, 5 * rows, (rows * columns) % 256], axis=-1).astype(np.uint8)
    epochs = np.arange(8)
    made = [
        view.make(picture, step)
        for step in view.steps(view.draw(0, 1, epochs, np.zeros(len(epochs), np.int64)))
    ]
    return [x.reshape(2, len(x) // 2, 2, -1, 3).mean(axis=(1, 3)) for x in (_even(m) for m in made)]


def _even(view: np.ndarray) -> np.ndarray:
    side = len(view) // 2 * 2
    return np.asarray(view, np.float64)[:side, :side]
