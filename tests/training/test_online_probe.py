"""The online linear probe: what it computes, and that it does not affect BYOL."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from feeds import SIZE, Mixed, feed_of, make_config
from network_steps import QUICK
from tiny_runs import make_batch, make_byol

from byol_jax.app.build import build_training, step_of
from byol_jax.app.plan import make_plan
from byol_jax.errors import BadPicture
from byol_jax.settings import Settings
from byol_jax.sources.bad_files import BadFiles
from byol_jax.sources.base import Cached, Subset
from byol_jax.training.online_probe import (
    MOST_LABELS,
    labels_of_probe,
    probe_step,
    start_probe,
    too_many_labels,
    without_unlabelled,
)
from byol_jax.training.step import AXIS, pmap_step, shard_batch

# A step that is not awaited can deadlock on simulated devices, so there is a time limit.
pytestmark = pytest.mark.timeout(120)

ROWS, WIDTH, LABELS = 12, 5, 3


def reference(features, labels, steps):
    """Softmax regression by Adam (arXiv:1412.6980, Algorithm 1) in float64: loss, accuracy, [W, b].

    Each step has one row of `features` [steps, B, D] and `labels` [steps, B].
    """
    theta = np.zeros((WIDTH + 1, LABELS))
    m, v, found = np.zeros_like(theta), np.zeros_like(theta), []
    for step in range(steps):
        x = features[step].astype(np.float64)
        variance = x.var(axis=0)
        x = (x - x.mean(axis=0)) / np.sqrt(variance + 1e-5 * variance.mean())
        x = np.c_[x, np.ones(len(x))]
        scores = x @ theta
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        known = np.flatnonzero(labels[step] >= 0)
        target = np.eye(LABELS)[labels[step][known]]
        loss = -np.mean(np.sum(target * np.log(p[known]), axis=1))
        accuracy = np.mean(scores[known].argmax(axis=1) == labels[step][known])
        grad = x[known].T @ (p[known] - target) / len(known)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        hats = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        theta = theta - hats[0] / (np.sqrt(hats[1]) + 1e-5) / WIDTH
        found.append((loss, accuracy))
    return np.array(found), theta


@pytest.mark.parametrize('devices', [1, 2])
def test_is_softmax_regression(devices):
    """Loss, accuracy and weights of 20 steps equal a NumPy reference on one device and on two;
    examples without a label do not count, even if they are all of one device.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, LABELS, (20, ROWS))
    labels[:, : ROWS // 2][::2] = -1
    # With a third of the examples for each label, the first gradient would be 0 up to rounding,
    # which Adam would amplify.
    labels[0, ROWS // 2 :] = [0, 0, 0, 0, 0, 1]
    features = rng.normal(3, 2, (20, ROWS, WIDTH)) + np.eye(WIDTH)[labels] * 3
    features[..., -1] = 7.0
    features = features.astype(np.float32)
    step_fn = jax.pmap(
        lambda *a: probe_step(*a, AXIS),
        axis_name=AXIS,
        in_axes=(None, 0, 0),
        out_axes=None,
        devices=jax.devices()[:devices],
    )
    probe, found = start_probe(WIDTH, LABELS), []
    for x, y in zip(features, labels, strict=True):
        batch = shard_batch({'x': x, 'y': y}, devices)
        probe, metrics = jax.device_get(step_fn(probe, batch['x'], batch['y']))
        assert metrics['online_probe_examples'] == np.sum(y >= 0)
        found.append((metrics['online_probe_loss'], metrics['online_probe_accuracy']))
    expected, theta = reference(features, labels, 20)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert expected[0, 0] == pytest.approx(np.log(LABELS))
    np.testing.assert_allclose(probe.kernel, theta[:-1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(probe.bias, theta[-1], rtol=1e-3, atol=1e-5)
    assert not np.any(probe.kernel[-1]), 'a channel that is always the same'


@functools.cache
def compiled(devices, accumulate_steps, probing):
    """The first state of a tiny run, and its monitored step."""
    config = Settings.of(tiny_runs.make_config(accumulate_steps=accumulate_steps))
    byol, plan = make_byol(), make_plan(config, tiny_runs.PICTURES, devices)
    training = build_training(config, plan, byol)
    step = step_of(config, plan, byol, training, plan.monitored)
    state, batch = training.initial, make_batch(0)
    if probing:
        state = state._replace(online_probe=jax.device_get(start_probe(tiny_runs.WIDTH, 2)))
        batch['label'] = bright(batch['view1'])
    lowered = pmap_step(step, monitored=True).lower(state, shard_batch(batch, devices))
    return state, lowered.compile(QUICK)


def train(steps=6, devices=1, labels=None, accumulate_steps=1, shown=False):
    """States, on the host, and metrics of a tiny run whose pictures have these labels, if any.

    `shown`: whether pictures of label 1 are darker on the left, in both views.
    """
    state, step_fn = compiled(devices, accumulate_steps, labels is not None)
    states, found = [], []
    for number in range(steps):
        batch = make_batch(number)
        if labels is not None:
            batch['label'] = labels(batch['view1'])
            if shown:
                for view in ('view1', 'view2'):
                    batch[view][batch['label'] == 1, :, : tiny_runs.SIZE // 2] //= 2
        state, metrics, _ = step_fn(state, shard_batch(batch, devices))
        # Awaited, because two pending steps on simulated devices can deadlock.
        found.append(jax.device_get(metrics))
        states.append(jax.device_get(state))
        state = states[-1]
    return states, found


def bright(view):
    """Labels: whether pictures are brighter than middle grey."""
    return (view.mean(axis=(1, 2, 3)) > 128).astype(np.int32)


def every_other(view):
    """Labels that are independent of the pictures."""
    return np.arange(len(view), dtype=np.int32) % 2


@pytest.mark.parametrize('accumulate_steps', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_changes_nothing_of_byol(accumulate_steps):
    """With and without a probe, the networks, their statistics, the optimizer and all metrics are
    the same bit for bit after each step, for any labels.
    """
    alone, plain = train(accumulate_steps=accumulate_steps)
    for labels in (bright, lambda view: 1 - bright(view)):
        states, metrics = train(labels=labels, accumulate_steps=accumulate_steps)
        for a, b in zip(alone, states, strict=True):
            assert a.online_probe is None
            assert np.any(b.online_probe.kernel)
            for x, y in zip(
                jax.tree.leaves(a), jax.tree.leaves(b._replace(online_probe=None)), strict=True
            ):
                np.testing.assert_array_equal(x, y)
        for a, b in zip(plain, metrics, strict=True):
            assert {name: b[name] for name in a} == a
            assert {name for name in b if name not in a} == {
                'online_probe_loss',
                'online_probe_accuracy',
                'online_probe_examples',
            }


def test_learns():
    """In 60 steps it learns labels that pictures show, and nothing of labels that they hide."""
    _, metrics = train(60, labels=every_other)
    assert np.mean([m['online_probe_accuracy'] for m in metrics[-20:]]) < 0.6
    _, metrics = train(60, labels=every_other, shown=True)
    accuracy = [m['online_probe_accuracy'] for m in metrics]
    loss = [m['online_probe_loss'] for m in metrics]
    assert loss[0] == pytest.approx(np.log(2))
    assert np.mean(accuracy[-10:]) > 0.93
    assert np.mean(loss[-10:]) < 0.35


@pytest.mark.parametrize('accumulate_steps', [1, 2])
def test_two_devices_are_one(accumulate_steps):
    """Two devices, with or without microbatches, find and learn the same as one, up to rounding."""
    (one, of_one) = train(3, labels=bright)
    (two, of_two) = train(3, 2, bright, accumulate_steps)
    if accumulate_steps == 1:
        np.testing.assert_allclose(
            one[-1].online_probe.kernel, two[-1].online_probe.kernel, atol=1e-4
        )
    for a, b in zip(of_one, of_two, strict=True):
        assert b['online_probe_examples'] == a['online_probe_examples'] == tiny_runs.BATCH
        if accumulate_steps == 1:
            assert b['online_probe_loss'] == pytest.approx(a['online_probe_loss'], rel=1e-4)


def test_a_batch_without_labels_has_no_figures():
    """If no example of a batch has a label, the probe does not change except its optimizer's
    momentum, and the record lacks its metrics, which would be a meaningless 0.
    """
    states, metrics = train(1, labels=lambda view: np.full(len(view), -1, np.int32))
    assert not np.any(states[0].online_probe.kernel)
    values = {name: float(value) for name, value in metrics[0].items()}
    left = without_unlabelled(values)
    assert 'loss' in left
    assert not [name for name in left if name.startswith('online_probe')]
    known = without_unlabelled({'loss': 1.0, 'online_probe_loss': 2.0, 'online_probe_examples': 3})
    assert known == {'loss': 1.0, 'online_probe_loss': 2.0}


class Labelled(Mixed):
    """Pictures with labels, some of them unreadable."""

    label_names = ('a', 'b', 'c', 'd')
    labels = np.array([0, 1, 2, 3, 0, 1, 2, 3, -1, -1])

    def load(self, index, key):
        if index in (2, 5):
            raise BadPicture(self.name(index), 'is damaged', 'Mend it.')
        return super().load(index, key)


@pytest.mark.parametrize('on', ['cpu', 'accelerator'])
@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: Cached(s, 10**6)], ids=['plain', 'kept'])
def test_labels_are_those_of_what_is_shown(on, wrap):
    """A batch has the label of each picture that it shows; a replacement has its own label."""
    source = Subset(wrap(Labelled()), np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0]))
    bad_files = BadFiles(source, 'image', 0.5)
    feed = feed_of(source, make_config(on), labels=True, bad_files=bad_files)
    shown = []
    for batch in itertools.islice(feed.batches, 3):
        assert batch['label'].dtype == np.int32
        assert batch['view1'].shape == (8, SIZE, SIZE, 3)
        original = 9 - batch['example']
        np.testing.assert_array_equal(batch['label'], Labelled.labels[original])
        shown += original.tolist()
    feed.batches.close()
    assert {2, 5}.isdisjoint(shown)
    assert len(shown) == 24
    assert set(shown) == set(range(10)) - {2, 5}


def test_no_probe_without_labels():
    """Without labels, or with more labels than a probe is worth, there is neither a probe nor a
    label in a batch.
    """
    assert labels_of_probe(Labelled()) == 4
    assert labels_of_probe(Mixed()) == 0
    many = Labelled()
    many.label_names = range(MOST_LABELS + 1)
    assert labels_of_probe(many) == 0
    assert '22,001 labels' in too_many_labels(many)
    assert too_many_labels(Labelled()) == too_many_labels(Mixed()) == ''
    feed = feed_of(Labelled(), make_config(), bad_files=BadFiles(Labelled(), 'image', 0.5))
    assert 'label' not in next(feed.batches)
    feed.batches.close()


def test_a_source_without_labels_shows_none():
    """A source without labels, or with hidden ones, gives -1 for each example."""
    np.testing.assert_array_equal(Mixed().shown_labels(np.array([3, 1])), [-1, -1])


@pytest.mark.parametrize('scale', [1e-12, 1.0, 1e12])
def test_the_scale_of_a_representation_is_of_no_account(scale):
    """A probe needs no tuning: features of any scale train it equally, and equal features for all
    pictures keep it finite.
    """
    rng = np.random.default_rng(1)
    labels = rng.integers(0, LABELS, ROWS)
    x = (rng.normal(2, 1, (ROWS, WIDTH)) + np.eye(WIDTH)[labels]).astype(np.float32)
    step_fn = jax.jit(
        jax.vmap(lambda *a: probe_step(*a, AXIS), axis_name=AXIS, in_axes=(None, 0, 0))
    )

    def losses(x):
        probe, found = start_probe(WIDTH, LABELS), []
        for _ in range(5):
            probe, metrics = step_fn(probe, x[None], labels[None])
            probe = jax.tree.map(lambda leaf: leaf[0], probe)
            found.append(float(metrics['online_probe_loss'][0]))
        assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), probe))
        return found

    np.testing.assert_allclose(losses(x * np.float32(scale)), losses(x), rtol=1e-4)
    assert np.isfinite(losses(np.full_like(x, scale))).all()
