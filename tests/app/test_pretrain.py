"""byol_jax.pretrain: what main.py does, from Python."""

from __future__ import annotations

import functools
import json
import threading

import cv2
import numpy as np
import pytest
from PIL import Image

import byol_jax
from byol_jax import UserError
from byol_jax.app import pretrain as module
from byol_jax.sources import Array, Files

TINY = {
    'encoder': 'resnet',
    'encoder__kwargs': {'stage_sizes': (1,), 'width': 0.125},
    'steps': 4,
    'warmup_steps': 1,
    'batch_size': 8,
    'views__image_size': 32,
    'projector__hidden_size': 16,
    'projector__output_size': 8,
    'predictor__hidden_size': 16,
    'log__every_steps': 2,
    'checkpoint__every_steps': 2,
    'log__tensorboard': False,
}


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 255, (32, 40, 36, 3)).astype(np.uint8)


def test_an_array_and_again(images, tmp_path, capsys):
    """A run on an array returns encoder, records and paths; a second call returns the same."""
    run = byol_jax.pretrain(images, workdir=tmp_path / 'a', **TINY)
    assert [record['step'] for record in run.metrics] == [2, 4]
    assert run.encoder(images[:3]).shape == (3, 8)
    assert run.encoder.description['step'] == 4
    assert run.report.exists()
    assert [row['name'] for row in run.results['results']] == [
        'randomly initialised',
        'trained 4 steps',
    ]
    command = (tmp_path / 'a' / 'command.txt').read_text()
    assert command.startswith("byol_jax.pretrain(<ndarray>, encoder='resnet', ")
    assert json.loads((tmp_path / 'a' / 'config.json').read_text())['data']['source'] == 'given'

    again = byol_jax.pretrain(Array.of(images), workdir=str(tmp_path / 'a'), **TINY)
    assert again.encoder.weights_sha256 == run.encoder.weights_sha256
    assert 'all 4 steps are done' in capsys.readouterr().out
    # Other pictures with the same names are other data.
    with pytest.raises(UserError, match='The data is not what this run began with'):
        byol_jax.pretrain(images[::-1], workdir=tmp_path / 'a', **TINY)


@pytest.mark.slow
def test_runs_in_a_thread_one_after_the_other(images, tmp_path, monkeypatch):
    """Two runs in one process, in threads, with workdirs as text in the home folder, are alike, and
    OpenCV's threads are as they were."""
    monkeypatch.setenv('HOME', str(tmp_path))
    cv2.setNumThreads(3)
    runs = []
    for name in ('one', 'two'):
        call = functools.partial(byol_jax.pretrain, images, workdir=f'~/{name}', **TINY)
        thread = threading.Thread(target=lambda call=call: runs.append(call()))
        thread.start()
        thread.join()
    assert [run.workdir for run in runs] == [tmp_path / 'one', tmp_path / 'two']
    assert runs[0].encoder.weights_sha256 == runs[1].encoder.weights_sha256
    assert cv2.getNumThreads() == 3


def test_ways_to_give_pictures(images, tmp_path):
    """A path is opened by the recipe; files, arrays and sources are used as they are."""
    assert module._source_of('photos') == ('photos', None)
    assert module._source_of(tmp_path) == (str(tmp_path), None)
    _, source = module._source_of(images)
    assert isinstance(source, Array)
    np.testing.assert_array_equal(source.load(5, 'image'), images[5])
    assert images.flags.writeable
    paths = []
    for number in (3, 1, 2):
        paths.append(tmp_path / f'{number}.png')
        Image.fromarray(images[number]).save(paths[-1])
    _, source = module._source_of(paths)
    assert isinstance(source, Files)
    assert [source.name(i) for i in range(3)] == [str(path) for path in paths]
    np.testing.assert_array_equal(source.load(1, 'image'), images[1])
    assert source.size(1, 'image') == (40, 36)
    for wrong in (3, {'a': 1}, [1, 2]):
        with pytest.raises(UserError, match='give a folder'):
            module._source_of(wrong)
    with pytest.raises(UserError, match=r'1 of 4 files do not exist: .*nothing\.png'):
        Files([*paths, tmp_path / 'nothing.png'])
    with pytest.raises(UserError, match='list of files is empty'):
        Files([])


def test_the_encoder_is_the_recipes_unless_given(images, monkeypatch, tmp_path):
    """A recipe comes with its network and the network's arguments."""
    begun = []

    def train(config, *rest):
        begun.append(config.encoder)
        raise UserError('far enough')

    monkeypatch.setattr(module, 'train', train)
    for given in ({}, {'encoder': 'resnet34'}):
        with pytest.raises(UserError, match='far enough'):
            byol_jax.pretrain(images, recipe='cifar10', workdir=tmp_path, **given)
    assert [encoder.name for encoder in begun] == ['resnet18', 'resnet34']
    assert [dict(encoder.kwargs) for encoder in begun] == [{'small_images': True}, {}]


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'batchsize': 8}, "Did you mean 'batch_size'?"),
        ({'views': {'image_size': 8}}, "'views' is a section"),
        ({'recipe': 'fodler'}, "Did you mean 'folder'?"),
        ({'encoder': 'resnet5'}, "Did you mean 'resnet50'?"),
        ({'encoder': lambda x: x}, 'must be a name, or a class'),
        ({'steps': 4, 'epochs': 1.0}, 'total_epochs and total_steps'),
        ({'encoder__kwargs': {'widht': 1}}, "Did you mean 'width'?"),
        ({'optimizer__name': 'adamw'}, 'needs a learning rate of its own: 0.3 is for lars'),
        ({'optimizer__name': 'adam'}, "Did you mean 'adamw'?"),
    ],
)
def test_what_is_refused(images, tmp_path, changes, words):
    """Wrong keys and values have main.py's messages, and nothing is written."""
    with pytest.raises(UserError) as caught:
        byol_jax.pretrain(images, workdir=tmp_path / 'w', **{**TINY, **changes})
    assert words in str(caught.value)
    assert not (tmp_path / 'w').exists()
