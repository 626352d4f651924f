"""All ways from pictures to the step give the same views, wherever they are made."""

from __future__ import annotations

import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import ROOT, process_environment
from feeds import BATCH, COUNT, WITHOUT_TENSORFLOW, Mixed, feed_of, make_config, quick
from starts import make_byol
from streams import batches, stream_of

from byol_jax.app.build import build_training, step_of
from byol_jax.app.plan import make_plan
from byol_jax.errors import UserError
from byol_jax.input.feed import pictures_in_memory, shown_views
from byol_jax.settings import Settings
from byol_jax.sources.array import Array
from byol_jax.sources.base import Subset
from byol_jax.training.step import (
    AXIS,
    everywhere,
    pmap_feed,
    pmap_step,
    replicate,
    shard_batch,
)

# A step that is not awaited can deadlock on simulated devices, so there is a time limit.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def array(tmp_path) -> Array:
    images = np.random.default_rng(1).integers(0, 256, (COUNT, 20, 24, 3), np.uint8)
    np.savez(tmp_path / 'a.npz', images=images)
    return Array(tmp_path / 'a.npz')


def same(a, b) -> bool:
    return all(
        np.array_equal(x, y) and x.dtype == y.dtype
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize('kind', ['pictures', 'array', 'part of an array'])
def test_views_are_those_of_the_cpu(array, kind):
    """Over two epochs, every view of every batch is within 1 of 255 of the CPU pipeline's, so
    order, epochs and draws are the same.
    """
    source = {
        'pictures': Mixed(),
        'array': array,
        'part of an array': Subset(array, np.array([7, 1, 2, 9, 4])),
    }[kind]
    feed = feed_of(source, make_config())
    assert (len(feed.shared) > 0) == (kind != 'pictures')
    make = jax.jit(feed.views)
    expected = batches(source, make_config('cpu'), start_step=0, stop_step=3)
    for batch, expects in zip(feed.batches, expected, strict=False):
        np.testing.assert_array_equal(batch['example'], expects['example'])
        made = make(batch, *feed.shared)
        assert made.keys() == expects.keys()
        for name, expected in expects.items():
            assert made[name].dtype == expected.dtype
            if name not in ('view1', 'view2'):
                # XLA divides by multiplying with the inverse.
                np.testing.assert_allclose(made[name], expected, rtol=3e-7)
                continue
            apart = np.abs(np.asarray(made[name]).astype(int) - expected)
            assert apart.max() <= 1
            assert apart.mean() < 1e-3
    feed.batches.close()


@pytest.mark.parametrize('kind', ['pictures', 'array'])
def test_starting_late_gives_the_same_batches(array, kind):
    """A feed that begins at step k gives, bit for bit, the batches from k on: a resumed run needs
    only the number of its step.
    """
    source = array if kind == 'array' else Mixed()
    whole = list(feed_of(source, make_config()).batches)
    late = list(feed_of(source, make_config(), start=4).batches)
    assert (len(whole), len(late)) == (6, 2)
    assert same(whole[4:], late)
    assert not same(whole[4], whole[5])


def test_hosts_share_a_batch(array):
    """Each of two processes feeds its half of every batch, in order."""
    (whole, *_) = feed_of(array, make_config()).batches
    halves = [
        next(feed_of(array, make_config(), process_index=index, process_count=2).batches)
        for index in range(2)
    ]
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), *halves)
    assert same(joined, whole)


def test_a_batch_of_an_array_is_small(array):
    """With an array, only the draws travel to the device: at most 100 bytes for an example, for
    pictures of any size.
    """
    (batch, *_) = feed_of(array, make_config()).batches
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) <= 100 * BATCH


def test_array_is_given_not_compiled_in(array):
    """The array is an argument of the step, whole on every device, not a constant of the program,
    and is not copied if all of it is trained on.
    """
    assert pictures_in_memory(array) is array.images
    assert pictures_in_memory(Subset(array, np.arange(COUNT))) is array.images
    feed = feed_of(array, make_config())
    shared = everywhere(feed.shared)
    assert shared[0].is_fully_replicated
    assert shared[0].devices() == set(jax.local_devices())
    (batch, *_) = feed.batches
    jaxpr = jax.make_jaxpr(feed.views)(batch, *feed.shared)
    assert all(np.size(constant) < array.images.size for constant in jaxpr.consts)


def test_every_device_makes_its_own_views(array):
    """On each of four devices, the mapped step gets the views of that device's share; it is called
    twice, because nothing shared may be donated.
    """
    devices = jax.local_device_count()
    assert devices == 4
    feed = feed_of(array, quick(make_config()))

    def step(state, views):
        return state + 1, jax.lax.all_gather(views, AXIS)

    mapped, make = pmap_feed(step, feed), jax.jit(feed.views)
    state = everywhere(np.zeros((), np.int32))
    for count in (1, 2):
        batch = next(feed.batches)
        state, views = mapped(state, shard_batch(batch, devices))
        assert int(state) == count
        assert same(views, shard_batch(make(batch, *feed.shared), devices))


@pytest.mark.slow
def test_step_trains_on_the_views(array):
    """A step that makes its views, on four devices and with accumulation, changes the state as the
    plain step does on the same views; twice, because nothing shared may be donated.
    """
    config = quick(make_config(accumulate_steps=2))
    devices = jax.local_device_count()
    feed = feed_of(array, config)
    plan = make_plan(config, COUNT, devices)
    byol = make_byol(AXIS)
    settings = Settings.of(config)
    training = build_training(settings, plan, byol)
    step = step_of(settings, plan, byol, training)
    fed, plain = pmap_feed(step, feed), pmap_step(step)
    state, expected = replicate(training.initial), replicate(training.initial)
    make = jax.jit(feed.views)
    for _ in range(2):
        batch = next(feed.batches)
        state, metrics = fed(state, shard_batch(batch, devices))
        jax.block_until_ready(state)
        views = jax.tree.map(np.asarray, make(batch, *feed.shared))
        expected, plain_metrics = plain(expected, shard_batch(views, devices))
        jax.block_until_ready(expected)
        assert metrics['loss'] == pytest.approx(float(plain_metrics['loss']), rel=1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_shown_views_are_those_of_the_step(array):
    """The picture of view pairs shows, bit for bit, the views that the step makes at a position."""
    config = quick(make_config())
    for source in (Mixed(), array):
        feed = feed_of(source, config)
        (_, second, *_) = feed.batches
        views = jax.jit(feed.views)(second, *feed.shared)
        stream = stream_of(source, config)
        positions = [BATCH + 3, BATCH + 6]
        pictures = [stream.load(position).pictures for position in positions]
        shown = shown_views(stream, positions, pictures, config.views.on)
        for (view1, view2), row in zip(shown, (3, 6), strict=True):
            np.testing.assert_array_equal(view1, views['view1'][row])
            np.testing.assert_array_equal(view2, views['view2'][row])


def test_array_that_does_not_fit_is_refused(array, monkeypatch):
    """An array larger than the device's memory is refused before it is sent."""
    device = types.SimpleNamespace(memory_stats=lambda: {'bytes_limit': array.images.nbytes - 1})
    monkeypatch.setattr(jax, 'local_devices', lambda: [device])
    with pytest.raises(UserError, match=r"views.on='cpu'"):
        feed_of(array, make_config())


FEED_WITHOUT = """
import byol_jax.app.modes  # all that main.py imports
from byol_jax.input.feed import open_feed
from byol_jax.sources.array import Array
from byol_jax.views.recipes import paper_views

source, views = Array(sys.argv[1]), paper_views(16)
print(len(list(open_feed(source, views, batch_size=4, stop_step=2, on='accelerator').batches)))
try:
    open_feed(source, views, batch_size=4, stop_step=2)
except byol_jax.errors.UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_array_needs_no_tensorflow(array):
    """Without TensorFlow, everything that main.py imports can be imported, and an array feeds the
    step; what needs TensorFlow says so. (tests/app/test_device_run.py trains this way.)
    """
    result = subprocess.run(
        [sys.executable, '-c', WITHOUT_TENSORFLOW + FEED_WITHOUT, str(array.path)],
        cwd=ROOT,
        env=process_environment(1),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    count, said = result.stdout.split('\n', 1)
    assert count == '2', result.stderr
    assert said.startswith('TensorFlow is not installed. Only'), result.stderr
