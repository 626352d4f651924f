"""A run keeps the weights it started from: their source may go, and may not change unsaid."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
from encoders import save_random_encoder

from byol_jax.app.start import first_weights, keep_first
from byol_jax.app.workdir import About, Start, claim_workdir, release_workdir
from byol_jax.errors import UserError
from byol_jax.interop.encoder import Encoder
from byol_jax.interop.export import load_encoder, save_encoder
from configs import default

DATA = {'examples': 8, 'held_out': 0}


def begin(workdir, source):
    """What a first start leaves, up to its training."""
    first = first_weights(str(source), workdir)
    about = About(start=Start(first.source, first.encoder.weights_sha256))
    claim_workdir(workdir, default.get_config(), DATA, about=about)
    release_workdir(workdir)
    keep_first(first, workdir)
    return first.encoder


def save_state(workdir):
    (workdir / 'checkpoints' / '4').mkdir(parents=True)


def other_weights(folder):
    encoder = load_encoder(folder)
    negative = jax.tree.map(np.negative, encoder.variables)
    save_encoder(Encoder(encoder.network, negative, encoder.description), folder)


@pytest.fixture
def source(tmp_path):
    return save_random_encoder(tmp_path / 'source')


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / 'run'


def test_random_weights_keep_nothing(workdir):
    """A run from random weights has no start."""
    assert first_weights('', workdir) is None
    keep_first(None, workdir)
    assert not workdir.exists()


@pytest.mark.parametrize('saved', [False, True], ids=['before', 'after'])
@pytest.mark.parametrize('what', ['gone', 'damaged'])
def test_the_source_may_go(source, workdir, capsys, what, saved):
    """Before and after the first checkpoint the run starts from its own copy, and says so."""
    encoder = begin(workdir, source)
    if saved:
        save_state(workdir)
    if what == 'gone':
        shutil.rmtree(source)
    else:
        (source / 'encoder.json').write_text('{')
    again = first_weights(str(source), workdir)
    assert again.encoder.weights_sha256 == encoder.weights_sha256
    assert 'starts from its own copy' in capsys.readouterr().out


def test_a_changed_source_is_said(source, workdir, capsys):
    """The run goes on as it began; another source of other weights is another run."""
    encoder = begin(workdir, source)
    other_weights(source)
    again = first_weights(str(source), workdir)
    assert again.encoder.weights_sha256 == encoder.weights_sha256
    said = capsys.readouterr().out
    assert f'encoder.init_from={source} holds weights' in said
    assert encoder.weights_sha256[:12] in said
    with pytest.raises(UserError, match=r'this run started from .*source, weights'):
        first_weights(f'{source}/.', workdir)


def test_the_same_weights_elsewhere(source, workdir, tmp_path, capsys):
    """A copy, under any name, is the same start."""
    encoder = begin(workdir, source)
    shutil.copytree(source, tmp_path / 'copy')
    again = first_weights(str(tmp_path / 'copy'), workdir)
    assert again.encoder.weights_sha256 == encoder.weights_sha256
    assert capsys.readouterr().out == ''


def test_without_a_copy(source, workdir, capsys):
    """With a state of its own a run goes on without its start; without one it cannot."""
    begin(workdir, source)
    shutil.rmtree(source)
    shutil.rmtree(workdir / 'start')
    with pytest.raises(UserError, match='does not exist'):
        first_weights(str(source), workdir)
    save_state(workdir)
    assert first_weights(str(source), workdir).encoder is None
    assert 'cannot compare with its start' in capsys.readouterr().out


def test_a_run_of_an_older_version(source, workdir):
    """Its start is what encoder.init_from names now; it is kept from now on."""
    claim_workdir(workdir, default.get_config(), DATA)
    release_workdir(workdir)
    (workdir / 'identity.json').unlink()
    encoder = begin(workdir, source)
    shutil.rmtree(source)
    assert first_weights(str(source), workdir).encoder.weights_sha256 == encoder.weights_sha256


def test_a_copy_that_cannot_be_written(source, workdir, monkeypatch, capsys):
    """A full disk is said; the run then needs its source."""

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('byol_jax.app.start.save_encoder', full)
    begin(workdir, source)
    assert 'start cannot be written: No space left' in capsys.readouterr().out
    assert first_weights(str(source), workdir) is not None
