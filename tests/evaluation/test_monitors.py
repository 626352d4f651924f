"""The monitors: known answers for made-up features, and the way from the step to the host."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK
from streams import stream_of, views_at, views_of
from tiny_runs import Keep, make_config

from byol_jax.app.build import build_training, step_of
from byol_jax.app.hooks import Event, Hooks, on_host
from byol_jax.app.monitors import (
    LIDAR_PICTURES,
    LIDAR_VIEWS,
    Alarms,
    Lidar,
    LidarMonitor,
    Monitors,
    lidar_views,
)
from byol_jax.app.plan import make_plan
from byol_jax.app.saving import NonFinite, Saving, check_finite
from byol_jax.evaluation.monitors import lidar, measure, unit_std
from byol_jax.methods.byol import Byol
from byol_jax.models.tap import TappedEncoder
from byol_jax.settings import Settings
from byol_jax.sources.base import Source
from byol_jax.training.step import pmap_step, shard_batch, spread

pytestmark = pytest.mark.timeout(120)

NAMES = ('representation', 'projection', 'prediction', 'target')


def features(rows, **changes):
    """The same rows for every feature of both views; `changes` replaces some features."""
    both = np.stack([rows, rows]).astype(np.float32)
    return dict.fromkeys(NAMES, both) | changes


def test_orthogonal_features():
    """Pictures along N axes: rank N, std sqrt((N - 1) / N) / sqrt(N), uniformity exp(-4)."""
    n = 8
    found = measure(features(np.eye(n)))
    assert found['rankme_representation'] == pytest.approx(n, rel=1e-4)
    assert found['rankme_projection'] == pytest.approx(n, rel=1e-4)
    assert found['representation_std'] == pytest.approx(math.sqrt((n - 1) / n / n), rel=1e-6)
    # Two of them have distance sqrt(2): exp(-2 x 2).
    assert found['uniformity'] == pytest.approx(-4, rel=1e-6)
    assert found['alignment'] == pytest.approx(0, abs=1e-9)


def test_random_features_have_the_std_of_even_cover():
    """Evenly spread directions have a std of 1/sqrt(D) for each channel, the healthy level."""
    rows = np.random.default_rng(0).normal(size=(256, 64))
    found = measure(features(rows))
    assert found['representation_std'] == pytest.approx(1 / 8, rel=0.01)


def test_collapsed_features():
    """The same features for all pictures: rank 1, std 0, uniformity 0."""
    found = measure(features(np.tile([[3.0, 4.0, 0.0]], (6, 1))))
    assert found['rankme_projection'] == pytest.approx(1, abs=1e-4)
    assert found['representation_std'] == pytest.approx(0, abs=1e-7)
    assert found['uniformity'] == pytest.approx(0, abs=1e-6)


def test_cosines_are_between_what_they_say():
    """Shows which view is compared with which: every feature has its own directions."""
    # Unit vectors at these angles, degrees: [view, picture, 2].
    at = lambda *degrees: np.stack(  # noqa: E731
        [[(math.cos(math.radians(d)), math.sin(math.radians(d)))] * 2 for d in degrees]
    )
    found = measure(
        {
            'representation': at(0, 0),
            'projection': at(0, 60),
            'prediction': at(10, 70),
            'target': at(20, 100),
        }
    )
    cosine = lambda *degrees: np.mean([math.cos(math.radians(d)) for d in degrees])  # noqa: E731
    assert found['alignment'] == pytest.approx(2 - 2 * cosine(60))
    assert found['online_target_cosine'] == pytest.approx(cosine(20, 40))
    assert found['prediction_target_cosine'] == pytest.approx(cosine(90, 50))
    assert found['prediction_projection_cosine'] == pytest.approx(cosine(10, 10))


def test_one_picture_has_no_uniformity():
    """A process with a single picture leaves out the metrics that need two."""
    found = measure(features(np.ones((1, 4))))
    assert 'uniformity' not in found
    assert found['rankme_projection'] == pytest.approx(1, abs=1e-4)


def test_only_what_is_there_is_measured():
    """Without a predictor or target their cosines are left out; other features are ignored."""
    rows = np.random.default_rng(0).normal(size=(6, 4))
    both = features(rows)
    found = measure({'representation': both['representation'], 'anchors': np.ones(3)})
    assert set(found) == {'representation_std', 'rankme_representation'}
    found = measure({name: both[name] for name in ('projection', 'target')})
    assert set(found) == {'rankme_projection', 'alignment', 'uniformity', 'online_target_cosine'}
    one = measure({name: view[:1] for name, view in both.items()})
    assert set(measure(both)) - set(one) == {'alignment', 'prediction_target_cosine'}


def test_more_than_two_views():
    """All pairs of views count alike: 2 of 6 ordered pairs of these show the same picture."""
    views = np.stack([np.eye(4), np.eye(4), -np.eye(4)])
    found = measure({'projection': views, 'prediction': views, 'target': views})
    assert found['alignment'] == pytest.approx((0 + 4 + 4) / 3)
    assert found['prediction_target_cosine'] == pytest.approx((2 - 4) / 6)


def test_wide_features_are_thinned_out():
    """Of very wide features, only a few evenly spaced rows are used; their rank says how many."""
    rows = np.zeros((600, 32_768), np.float32)
    rows[np.arange(600), np.arange(600)] = 1
    wide = np.stack([rows, rows])
    found = measure({'representation': wide})
    # sqrt(256^2 x 2,048 / 32,768) = 64.
    assert found['rankme_representation'] == pytest.approx(64, rel=0.01)


class Sum(nn.Module):
    """The mean colour of each picture, times a kernel of ones, plus a bias that is 0."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(5, name='fc')(x.mean(axis=(1, 2)))
        return Keep(name='out')(x)


class Head(nn.Module):
    """One layer with a bias."""

    output_size: int = 4

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(self.output_size, name='linear')(x)


def linear_byol():
    return Byol(TappedEncoder(Sum(), 'out'), Head(), Head(), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_the_step_hands_out_the_features_of_its_batch():
    """On two devices with two microbatches each: the features of every picture, in order.

    They are computed here from the parameters before the step.
    """
    if jax.local_device_count() < 2:
        pytest.skip('needs two devices')
    config = make_config(batch_size=16, accumulate_steps=2, projector__output_size=4)
    byol, plan = linear_byol(), make_plan(make_config(batch_size=16, accumulate_steps=2), 100, 2)
    config = Settings.of(config)
    training = build_training(config, plan, byol)
    rng = np.random.default_rng(0)
    batch = {view: rng.integers(0, 256, (16, 8, 8, 3), np.uint8) for view in ('view1', 'view2')}
    step = step_of(config, plan, byol, training, plan.monitored)
    given, shares = jax.tree.map(np.array, training.initial), shard_batch(batch, 2)
    compiled = pmap_step(step, monitored=True).lower(given, shares).compile(QUICK)
    _, metrics, shown = compiled(given, shares)
    initial, host = training.initial, on_host(shown)
    linear = lambda tree, x: x @ tree['kernel'] + tree['bias']  # noqa: E731
    online, target = initial.online_params, initial.target_params
    for number, view in enumerate(('view1', 'view2')):
        y = linear(online['encoder']['fc'], (batch[view] / 255).mean(axis=(1, 2)))
        z = linear(online['projector']['linear'], y)
        expected = {
            'representation': y,
            'projection': z,
            'prediction': linear(online['predictor']['linear'], z),
            'target': linear(target['projector']['linear'], y),
        }
        assert host.keys() == expected.keys()
        for name, rows in expected.items():
            assert host[name].dtype == np.float32
            np.testing.assert_allclose(host[name][number], rows, rtol=1e-4, atol=1e-5)

    found, metrics = measure(host), jax.device_get(metrics)
    assert found['prediction_target_cosine'] == pytest.approx(1 - metrics['loss'] / 4, abs=1e-5)
    assert unit_std(host['projection'].reshape(-1, 4)) == pytest.approx(
        float(metrics['feature_std']), rel=1e-4
    )
    assert metrics['parameter_norm'] > 0
    assert metrics['stats_spread'] == 0


@pytest.mark.parametrize(
    ('batch', 'devices', 'passes', 'expected'),
    [(64, 1, 1, 64), (4096, 1, 1, 256), (4096, 8, 2, 16), (8, 2, 2, 2), (4096, 512, 8, 1)],
)
def test_how_many_examples_are_looked_at(batch, devices, passes, expected):
    """256 evenly spaced examples over all devices and microbatches, or all of a smaller batch."""
    config = make_config(batch_size=batch, accumulate_steps=passes)
    assert make_plan(config, 10_000, devices).monitored == expected
    assert min(256, batch) <= expected * devices * passes <= max(256, devices * passes)


def test_spread_of_statistics():
    """Statistics of 1 and 3 differ by 1 from their mean of 2, by half; integers are ignored."""
    own = {'mean': np.array([[1.0], [3.0]]), 'count': np.array([[1], [5]])}

    def both(own):
        average = {'mean': jax.lax.pmean(own['mean'], 'devices'), 'count': own['count']}
        return spread(own, average)

    np.testing.assert_allclose(jax.vmap(both, axis_name='devices')(own), 0.5)
    same = {'mean': np.array([[2.0], [2.0]]), 'count': np.array([[1], [1]])}
    np.testing.assert_allclose(jax.vmap(both, axis_name='devices')(same), 0)


class Pictures(Source):
    """A source of eight pictures in memory."""

    def __init__(self, count=8):
        self.pictures = np.random.default_rng(0).integers(0, 256, (count, 24, 32, 3), np.uint8)

    def __len__(self):
        return len(self.pictures)

    def load(self, index, key):
        return self.pictures[index]

    def name(self, index):
        return str(index)


def test_lidar_views_are_those_of_training():
    """Views 2 k and 2 k + 1 of a picture are those that training shows of it in epoch k."""
    config, source = make_config(), Pictures()
    stream = stream_of(source, config)
    views = lidar_views(stream, 2)
    assert views.shape == (LIDAR_VIEWS, 8, 8, 8, 3)
    for epoch in range(LIDAR_VIEWS // 2):
        for place in range(8):
            pair = views_at(stream, 8 * epoch + place)
            example = stream.example(8 * epoch + place)[1]
            row = [stream.example(p)[1] for p in range(8)].index(example)
            np.testing.assert_array_equal(views[2 * epoch][row], pair[0])
            np.testing.assert_array_equal(views[2 * epoch + 1][row], pair[1])
    assert lidar_views(stream_of(Pictures(150), config), 2).shape[1] == LIDAR_PICTURES


def test_lidar_is_that_of_the_online_projections():
    """The views of a picture form a class; projections are made without training anything."""
    config, source = make_config(projector__output_size=4), Pictures()
    byol = linear_byol()
    params, stats = byol.init(jax.random.key(0), 8)
    state = SimpleNamespace(online_params=params, online_stats=stats)
    watch = Lidar(byol, stream_of(source, config), 2)
    params_of = lambda part, name: jax.tree.map(np.asarray, params[part][name])  # noqa: E731
    fc, linear = params_of('encoder', 'fc'), params_of('projector', 'linear')
    views = lidar_views(stream_of(source, config), 2)
    y = (views / 255).mean(axis=(2, 3)) @ fc['kernel'] + fc['bias']
    z = y @ linear['kernel'] + linear['bias']
    assert watch(state) == pytest.approx(lidar(np.moveaxis(z, 0, 1)), rel=1e-3)
    assert watch(state) == watch(state)


def test_lidar_comes_at_its_interval(tmp_path):
    """At every log.lidar_every_steps-th step, never with 0; the other monitors always."""
    byol = linear_byol()
    params, stats = byol.init(jax.random.key(0), 8)
    state = SimpleNamespace(online_params=params, online_stats=stats)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 6, 4)))
    handed_out = dict.fromkeys(NAMES, rows)

    def found(every, step):
        run = make_run(tmp_path, log__lidar_every_steps=every)
        found = {}
        for hook in (Monitors(), LidarMonitor()):
            hook.start(run, START)
            found |= hook.measure(Event(run, step, state, handed_out))
        return found

    assert ['lidar' in found(20, step) for step in (10, 20, 30)] == [False, True, False]
    assert all('rankme_projection' in found(20, step) for step in (10, 20, 30))
    assert 1 <= found(20, 20)['lidar'] <= 4.01
    assert 'lidar' not in found(0, 20)


def test_monitors_fail_each_by_itself(tmp_path, capsys):
    """Neither LiDAR of one picture nor a monitor's exception takes the others along."""
    run = make_run(tmp_path, log__lidar_every_steps=10)
    run.data.train = Pictures(1)
    # Features of another shape than the monitors take.
    wrong = {'representation': jnp.zeros((1, 2, 0, 4))}
    with Hooks([Monitors(), LidarMonitor(), Alarms()]) as hooks:
        hooks.start(run, START)
        for step in (10, 20):
            event = make_event(run, step, handed_out=wrong)
            hooks.log(event)
        hooks.fail(NonFinite(30, VALUES | {'loss': math.nan}))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(' failed')[0] for line in said[:2]] == [
        'hook byol_jax.app.monitors:LidarMonitor',
        'hook byol_jax.app.monitors:Monitors',
    ]
    assert said[0].endswith('it compares pictures, and the data has one.')
    assert said[2].startswith('ALARM at step 30: non_finite')
    assert len(said) == 3


def make_run(tmp_path, initial=None, **changes):
    config = make_config(**changes)
    return SimpleNamespace(
        initial_norm=0.0,
        pixels=(),
        config=config,
        plan=make_plan(config, 8, 1),
        method=linear_byol(),
        data=SimpleNamespace(train=Pictures()),
        training=SimpleNamespace(initial=initial),
        views=views_of(config),
        workdir=tmp_path,
    )


START = SimpleNamespace(step=0)
VALUES = {'loss': 1.0, 'gradient_norm': 1.0, 'learning_rate': 0.1}


def make_event(run, step, state=None, handed_out=None):
    event = Event(run, step, state, handed_out)
    event.add(VALUES)
    return event


def test_what_is_not_finite_stops_a_run(tmp_path, capsys):
    """NaN in a metric or a feature is an error; alarms.jsonl says which, and what is kept."""
    check_finite(3, VALUES)
    with pytest.raises(NonFinite, match='The loss of step 3 is nan'):
        check_finite(3, VALUES | {'loss': math.nan})
    run, alarms, saving = make_run(tmp_path), Alarms(), Saving(None)
    alarms.start(run, START)
    alarms.checkpoint(make_event(run, 2))
    handed_out = {'representation': jnp.full((1, 2, 4, 4), jnp.inf)}
    with pytest.raises(NonFinite, match='the representation is not finite') as caught:
        saving.measure(make_event(run, 4, handed_out=handed_out))
    alarms.fail(caught.value)
    line = capsys.readouterr().out
    assert line.startswith('ALARM at step 4: non_finite: the representation not finite')
    assert 'checkpoint of step 2' in line
    assert 'non_finite' in (tmp_path / 'alarms.jsonl').read_text()


def test_a_bad_state_is_not_saved(tmp_path):
    """A state in which a value became infinite is not saved, whatever the loss is.

    Values that were infinite from the start, such as a mask's, do not count.
    """
    state = lambda step, var: State(jnp.array(step), jnp.array([0, -jnp.inf]), jnp.array(var))  # noqa: E731
    saved = []
    run = make_run(tmp_path, jax.device_get(state(0, 1.0)))
    saving = Saving(SimpleNamespace(save=lambda step, state: saved.append(step)))
    saving.start(run, START)
    saving.checkpoint(make_event(run, 5, state(5, 2.0)))
    with pytest.raises(NonFinite, match=r'step 6 .*var is not finite'):
        saving.checkpoint(make_event(run, 6, state(6, math.inf)))
    # Between two checkpoints nobody looks at the state: the message says what is known of when.
    with pytest.raises(NonFinite, match=r'step 9 .*var is not finite since a step after 5'):
        saving.checkpoint(make_event(run, 9, state(9, math.inf)))
    assert saved == [5]


class State(NamedTuple):
    """A state with a mask that contains -inf on purpose."""

    step: jax.Array
    mask: jax.Array
    var: jax.Array
