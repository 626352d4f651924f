"""examples/own: each part by its values, and through main.py without an edit of ours."""

from __future__ import annotations

import ast
import importlib
import io
import json
import math
import sqlite3

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, TINY
from PIL import Image

from byol_jax import UserError

SAMPLE = '--config=configs/div2k.py:sample'


@pytest.fixture(autouse=True)
def _checkout_on_the_path(monkeypatch):
    """Puts the checkout on the path, as for main.py."""
    monkeypatch.syspath_prepend(str(ROOT))


def own(module: str):
    return importlib.import_module(f'examples.own.{module}')


def records(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def database(tmp_path_factory):
    """A SQLite file of 24 pictures with two labels; every pixel shows which picture it is."""
    path = tmp_path_factory.mktemp('sqlite') / 'pictures.db'
    with sqlite3.connect(path) as connection:
        connection.execute('CREATE TABLE pictures (name TEXT, image BLOB, label TEXT)')
        for number in range(24):
            data = io.BytesIO()
            Image.fromarray(np.full((40, 40, 3), 10 * number, np.uint8)).save(data, 'PNG')
            row = (f'{number}.png', data.getvalue(), 'odd' if number % 2 else 'even')
            connection.execute('INSERT INTO pictures VALUES (?, ?, ?)', row)
    connection.close()
    return path


def test_angle():
    """The distance is the angle: 0 for equal directions, a right angle for orthogonal ones."""
    loss = own('loss').AngleByol
    vectors = jnp.array([[1.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    others = jnp.array([[1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    found = loss.distance(None, vectors, others)
    # At 180 degrees, clipping the cosine makes the angle 0.8 degrees smaller.
    np.testing.assert_allclose(found, [math.pi / 4, math.pi / 2, math.pi], atol=0.015)
    assert loss.loss_scale == (0.0, math.pi, 2 * math.pi)
    slope = jax.grad(lambda x: loss.distance(None, x, others).sum())(vectors)
    assert np.isfinite(slope).all()


def test_quarter_turns():
    """Each of the four rotations equals NumPy's, on the CPU and in JAX."""
    turns = own('view').QuarterTurns()
    drawn = turns.parameters(np.array([[0.0], [0.3], [0.5], [0.99]]), np.ones(4), np.ones(4))
    assert drawn.tolist() == [0, 1, 2, 3]
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    for number in drawn:
        expected = np.rot90(image, number)
        np.testing.assert_array_equal(turns.apply(image, number), expected)
        np.testing.assert_array_equal(turns.apply_jax(jnp.asarray(image), number), expected)


def test_clipped_sgd():
    """One step by hand: a long gradient is scaled to 1, and the mask chooses what decays."""
    params = {'kernel': jnp.array([1.0, 2.0]), 'bias': jnp.array([4.0])}
    grads = {'kernel': jnp.array([3.0, 0.0]), 'bias': jnp.array([4.0])}
    mask = {'kernel': True, 'bias': False}
    optimizer = own('optimizer').clipped_sgd(lambda step: 0.5, 0.1, mask, momentum=0.9, clip=1.0)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    found = optax.apply_updates(params, updates)
    # Nesterov's first step is 1 + 0.9 times the gradient.
    expected = 1 - 0.5 * 1.9 * (0.6 + 0.1 * 1.0), 2 - 0.5 * 1.9 * (0.0 + 0.1 * 2.0)
    np.testing.assert_allclose(found['kernel'], expected, rtol=1e-6)
    np.testing.assert_allclose(found['bias'], [4 - 0.5 * 1.9 * 0.8], rtol=1e-6)


def test_sqlite(database):
    """Pictures, names and labels are those of the table; another file is an error."""
    source = own('source').SqliteSource(str(database))
    assert len(source) == 24
    assert [source.name(i) for i in (0, 23)] == ['0.png', '23.png']
    assert source.label_names == ('even', 'odd')
    assert source.labels.tolist() == [0, 1] * 12
    picture = source.load(7, 'image')
    assert picture.shape == (40, 40, 3)
    assert (picture == 70).all()
    with pytest.raises(UserError, match='no such table: other'):
        own('source').SqliteSource(str(database), table='other')
    with pytest.raises(UserError, match='unable to open'):
        own('source').SqliteSource(str(database.parent / 'none.db'))


def test_through_main_py(main_py, tmp_path):
    """A user's own loss, view operation, optimizer and hook in one run of main.py."""
    operations = "('crop','flip','examples.own.view:QuarterTurns','jitter','gray','blur')"
    done = main_py(
        SAMPLE,
        *TINY,
        '--config.method.name=examples.own.loss:AngleByol',
        f'--config.views.view1.operations={operations}',
        '--config.optimizer.name=examples.own.optimizer:clipped_sgd',
        '--config.optimizer.base_learning_rate=0.1',
        '--config.optimizer.kwargs.clip=0.5',
        "--config.hooks=(('examples.own.hook:Patience',{'epochs':0.01,'metric':'learning_rate'}),)",
        f'--workdir={tmp_path}',
    )
    assert done.returncode == 0, done.stderr
    # The learning rates logged at steps 2, 4 and 6 are 50 %, 93 % and 50 % of the peak.
    assert 'stopped at step 6 by a hook: learning_rate has not risen' in done.stdout
    assert [record['step'] for record in records(tmp_path)] == [2, 4, 6]
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['optimizer']['kwargs'] == {'clip': 0.5}
    assert config['views']['view1']['operations'][2] == 'examples.own.view:QuarterTurns'
    # Untrained predictions are about orthogonal to their targets: two angles of pi / 2.
    assert abs(records(tmp_path)[0]['loss'] - math.pi) < 1
    assert (tmp_path / 'encoder' / 'encoder.safetensors').exists()
    assert 'has not risen' in (tmp_path / 'report.html').read_text()


def test_source_through_main_py(main_py, tmp_path, database):
    """A run on the SQLite file, whose labels serve the online probe and the table."""
    done = main_py(
        '--config=configs/folder.py',
        '--config.encoder.name=resnet',
        *[flag for flag in TINY if '.tile_' not in flag],
        '--config.data.source=examples.own.source:SqliteSource',
        f'--config.data.path={database}',
        '--config.data.held_out_fraction=0.25',
        f'--workdir={tmp_path}',
    )
    assert done.returncode == 0, done.stderr
    assert '18 training examples, 6 held out' in done.stdout
    assert 'online_probe_accuracy' in records(tmp_path)[-1]


@pytest.mark.parametrize(
    ('flag', 'words'),
    [
        ('--config.method.name=examples.own.loss:Angel', "Did you mean 'AngleByol'?"),
        ('--config.optimizer.kwargs.momentm=1', "Did you mean 'momentum'?"),
        ('--config.hooks=examples.own.hook:Patiense', "Did you mean 'Patience'?"),
        ("--config.hooks=(('examples.own.hook:Patience',{'epoch':1}),)", "Did you mean 'epochs'?"),
        ("--config.views.view1.operations=('crop','flp')", "Did you mean 'flip'?"),
        ('--config.data.source=smaple', "Did you mean 'sample'?"),
        ('--config.encoder.name=resnet5', "Did you mean 'resnet50'?"),
    ],
)
def test_near_misses(flag, words):
    """For a wrong name or argument of any part, the nearest is suggested, by one rule."""
    from byol_jax.app.build import build_run
    from byol_jax.app.hooks import own_hooks
    from byol_jax.app.recipes import load_recipe
    from byol_jax.settings import Settings, changed, plain

    key, _, value = flag.removeprefix('--config.').partition('=')
    if value.startswith('('):
        value = ast.literal_eval(value)
    config = Settings.of(changed(plain(load_recipe('div2k:sample')), {key: value}))
    make = own_hooks if config.hooks else build_run
    with pytest.raises(UserError) as caught:
        make(config.hooks or config)
    assert words in str(caught.value)
    assert '\n' not in str(caught.value)
