"""A user's own method, named in a config and run in the training step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK
from starts import make_start

from byol_jax.errors import UserError
from byol_jax.methods.base import LossScale, Method, Outputs, build_method, l2_normalize
from byol_jax.methods.byol import Byol
from byol_jax.models.heads import MLP
from byol_jax.models.tap import TappedEncoder
from byol_jax.training.step import AXIS, make_train_step, pmap_step, shard_batch

# Two pending steps on simulated devices can deadlock: every step is awaited, with a time limit.
pytestmark = pytest.mark.timeout(120)

SIZE, BATCH, TAU_BASE, STEPS = 4, 16, 0.9, 5


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name='fc')(x.reshape(len(x), -1))


class Linear(nn.Module):
    output_size: int = 3

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(self.output_size, name='out')(x)


@dataclasses.dataclass(frozen=True)
class Absolute(Byol):
    """BYOL with the mean absolute difference of unit vectors, times a weight, as the distance."""

    weight: float = 1.0

    loss_scale = LossScale(0.0, 2.0, 4.0)

    def distance(self, prediction, projection):
        difference = l2_normalize(prediction) - l2_normalize(projection)
        return self.weight * jnp.abs(difference).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class Alike(Method):
    """Three views, no predictor: the first view's features approach the target's of the others.

    The area of an example's box is its weight.
    """

    encoder: TappedEncoder
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: Any = jnp.float32

    views = ('global', 'local1', 'local2')
    target_parts = ('encoder',)
    loss_scale = LossScale(0.0, 1.0, math.inf)

    def init(self, rng, image_size):
        variables = self.encoder.init(rng, jnp.zeros((2, image_size, image_size, 3)))
        scale = {'scale': jnp.ones(())}
        return {'encoder': variables['params'], 'own': scale}, {'encoder': {}, 'own': {}}

    def loss(self, params, target_params, stats, target_stats, batch, rng=None):
        seen = [self.represent(params, stats, batch[view], True)[0] for view in self.views]
        other = [
            jax.lax.stop_gradient(self.represent(target_params, target_stats, batch[view])[0])
            for view in self.views[1:]
        ]
        areas = jnp.prod(batch['global/box'][:, 2:], axis=1)
        first = params['own']['scale'] * seen[0]
        each = sum(jnp.mean((first - x) ** 2, axis=1) for x in other)
        metrics = {'area': areas.mean(), 'first': jnp.abs(seen[0]).mean()}
        return jnp.mean(areas * each), Outputs(
            stats, target_stats, {'representation': jnp.stack(seen)}, metrics
        )


def parts():
    return {
        'encoder': TappedEncoder(Net(), 'fc'),
        'projector': Linear(),
        'predictor': Linear(),
        'mean': (0.5,) * 3,
        'std': (0.25,) * 3,
    }


def make_batch(views, step=0):
    rng = np.random.default_rng(step)
    batch = {view: rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8) for view in views}
    for view in views:
        batch[f'{view}/box'] = rng.uniform(0.2, 0.5, (BATCH, 4)).astype(np.float32)
        batch[f'{view}/mirrored'] = rng.uniform(size=BATCH) < 0.5
    return batch


def steps(method, devices=1, accumulate_steps=1, count=2):
    """[(state, metrics, features)] on the host; the first has only the state."""
    start = make_start(method, SIZE, peak=1.0, total_steps=STEPS, weight_decay=0.01)
    step = make_train_step(
        method,
        start.optimizer,
        total_steps=STEPS,
        tau_base=TAU_BASE,
        seed=0,
        accumulate_steps=accumulate_steps,
        monitored=2,
    )
    state, found = start.initial, [(start.initial, None, None)]
    mapped = pmap_step(step, monitored=True)
    compiled = mapped.lower(state, shard_batch(make_batch(method.views), devices)).compile(QUICK)
    for number in range(count):
        batch = shard_batch(make_batch(method.views, number), devices)
        found.append(jax.device_get(jax.block_until_ready(compiled(state, batch))))
        state = found[-1][0]
    return found


def test_a_distance_of_ones_own():
    """A subclass with another distance is named by its module and gets its arguments."""
    method = build_method('test_own_method:Absolute', {'weight': 3.0}, **parts())
    assert isinstance(method, Absolute)
    assert method.loss_scale == (0, 2, 4)
    assert method.weight == 3
    (initial, _, _), (_, metrics, features), _ = steps(method)
    assert features['prediction'].shape == (1, 2, 2, 3)
    batch = make_batch(method.views)
    x = [((batch[v] / 255 - 0.5) / 0.25).reshape(BATCH, -1) for v in method.views]
    dense = lambda p, name, x: x @ p[name]['kernel'] + p[name]['bias']  # noqa: E731
    params = initial.online_params
    z = [dense(params['projector'], 'out', dense(params['encoder'], 'fc', v)) for v in x]
    q = [dense(params['predictor'], 'out', v) for v in z]
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    expected = sum(3 * np.abs(unit(q[i]) - unit(z[1 - i])).sum(axis=1).mean() for i in (0, 1))
    assert metrics['loss'] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(('devices', 'accumulate_steps'), [(1, 1), (2, 2)])
def test_another_method_through_the_step(devices, accumulate_steps):
    """Another method has its own views, parts, targets, metrics, loss, gradient and average."""
    if jax.local_device_count() < devices:
        pytest.skip('needs two devices')
    method = build_method('test_own_method:Alike', {}, **parts())
    (before, _, _), (after, metrics, features), _ = steps(method, devices, accumulate_steps)
    assert before.target_params.keys() == {'encoder'}
    assert before.online_params.keys() == {'encoder', 'own'}
    batch = make_batch(method.views)
    fc = before.online_params['encoder']['fc']
    y = [
        ((batch[v] / 255 - 0.5) / 0.25).reshape(BATCH, -1) @ fc['kernel'] + fc['bias']
        for v in method.views
    ]
    areas = batch['global/box'][:, 2:].prod(axis=1)
    each = sum(((y[0] - other) ** 2).mean(axis=1) for other in y[1:])
    assert metrics['loss'] == pytest.approx((areas * each).mean(), rel=1e-5)
    assert metrics['area'] == pytest.approx(areas.mean(), rel=1e-6)
    assert metrics['first'] == pytest.approx(np.abs(y[0]).mean(), rel=1e-5)
    assert 'learning_rate' not in metrics
    # LARS on a scalar: only momentum and rate; the gradient is that of its scale.
    slope = sum(2 * (y[0] * (y[0] - other)).mean(axis=1) for other in y[1:])
    moved = after.online_params['own']['scale'] - before.online_params['own']['scale']
    assert moved == pytest.approx(-(areas * slope).mean(), rel=1e-4)
    np.testing.assert_allclose(
        after.target_params['encoder']['fc']['kernel'],
        TAU_BASE * before.target_params['encoder']['fc']['kernel']
        + (1 - TAU_BASE) * after.online_params['encoder']['fc']['kernel'],
        rtol=1e-5,
        atol=1e-6,
    )
    # The first two examples of each device and microbatch, in all three views.
    shown = features['representation']
    assert shown.shape == (devices, 3, 2 * accumulate_steps, 6)
    own = np.reshape(y, (3, devices, accumulate_steps, -1, 6))[:, :, :, :2]
    np.testing.assert_allclose(
        shown, np.moveaxis(own, 0, 1).reshape(shown.shape), rtol=1e-4, atol=1e-5
    )


class TakesAName(Alike):
    """One of its metrics has the name of one of the step's."""

    def loss(self, *arguments):
        loss, outputs = super().loss(*arguments)
        return loss, outputs._replace(metrics={'tau': loss})


def test_a_metric_may_not_hide_one_of_the_steps():
    """A metric's name that is taken is refused when the step is traced."""
    given = {key: value for key, value in parts().items() if key in ('encoder', 'mean', 'std')}
    with pytest.raises(UserError, match="metric 'tau' has the name of one of the step's own"):
        steps(TakesAName(**given))


@dataclasses.dataclass(frozen=True)
class Told(Alike):
    """Takes the name of the device axis."""

    axis_name: str | None = None


def test_a_method_gets_what_it_names():
    """Its constructor gets those of a run's values that it takes."""
    method = build_method('test_own_method:Told', {}, **parts(), axis_name=AXIS)
    assert method.axis_name == AXIS
    assert not hasattr(method, 'predictor')
    byol = build_method('byol', {}, **parts())
    assert (byol.views, byol.target_parts) == (('view1', 'view2'), ('encoder', 'projector'))
    assert byol.loss_scale == (0, 4, 8)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'says'),
    [
        ('bylo', {}, ["method.name='bylo' is not a known method", "Did you mean 'byol'?"]),
        ('test_own_method:Absolut', {}, ["has no 'Absolut'", "Did you mean 'Absolute'?"]),
        ('test_own_method:Net', {}, ['not a subclass of byol_jax.methods.base.Method']),
        ('test_own_method:SIZE', {}, ['not a subclass of byol_jax.methods.base.Method']),
        ('test_own_method:Absolute', {'wieght': 1}, ["no argument 'wieght'", "mean 'weight'?"]),
        ('byol', {'encoder': 1}, ["'byol' takes no argument 'encoder'", 'It takes: none']),
    ],
)
def test_what_is_no_method(name, kwargs, says):
    """A line says what was given, what exists, and the nearest of it."""
    with pytest.raises(UserError) as caught:
        build_method(name, kwargs, **parts())
    assert '\n' not in str(caught.value)
    for words in says:
        assert words in str(caught.value)


def test_untrained_names_what_gets_no_gradient():
    """Names what is behind the tap or frozen, under the part 'encoder'; statistics do not count."""
    encoder = TappedEncoder(
        Net(),
        'fc',
        behind=frozenset({'params/head/kernel', 'batch_stats/bn/mean'}),
        frozen=frozenset({'params/fc/bias'}),
    )
    byol = Byol(encoder, MLP(), MLP(), (0.0,) * 3, (1.0,) * 3)
    assert byol.untrained() == {'encoder/head/kernel', 'encoder/fc/bias'}
    assert byol.feature_size(SIZE) == 6
