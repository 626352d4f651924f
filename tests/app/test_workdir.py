"""A workdir belongs to one config: which configs count as the same, old ones included."""

from __future__ import annotations

import errno
import json

import pytest

from byol_jax import UserError
from byol_jax.app import workdir as workdir_module
from byol_jax.app.workdir import check_workdir, claim_workdir, config_of_run, release_workdir
from byol_jax.settings import Settings, changed, plain
from configs import folder

DATA = {'examples': 8, 'held_out': 0}


def config_with(**changes):
    dotted = {key.replace('__', '.'): value for key, value in changes.items()}
    return Settings.of(changed(plain(folder.get_config()), dotted))


def claimed(workdir, config):
    claim_workdir(workdir, config, DATA)
    release_workdir(workdir)
    return workdir


@pytest.mark.parametrize(
    'given',
    [
        {'optimizer__kwargs__momentum': 0.9},
        {'optimizer__name': 'adamw', 'optimizer__kwargs__b2': 0.999},
        {'optimizer__name': 'optax:sgd', 'optimizer__kwargs__momentum': 0.9},
    ],
)
def test_an_argument_given_at_its_default(tmp_path, given):
    """The same config continues the run, which keeps the argument it was given."""
    config = config_with(**given)
    workdir = claimed(tmp_path, config)
    claimed(workdir, config)
    if config.optimizer.name == 'optax:sgd':
        assert config_of_run(workdir).optimizer.kwargs == {'momentum': 0.9}
        with pytest.raises(UserError, match=r'optimizer\.kwargs\.momentum: 0\.9 there'):
            claimed(workdir, config_with(optimizer__name='optax:sgd'))


@pytest.mark.parametrize('momentum', [0.9, 0.8])
def test_a_config_of_an_older_version(tmp_path, momentum):
    """A config from before optimizer.kwargs continues its run unchanged."""
    now = {} if momentum == 0.9 else {'optimizer__kwargs__momentum': momentum}
    config = config_with(**now)
    workdir = claimed(tmp_path, config)
    path = workdir / 'config.json'
    old = json.loads(path.read_text())
    del old['method'], old['hooks'], old['data']['kwargs'], old['optimizer']['kwargs']
    for view in ('view1', 'view2'):
        del old['views'][view]['operations']
    old['target'] = {'base_ema': old['target'].pop('tau_base')}
    old['optimizer'] |= {'momentum': momentum, 'trust_coefficient': 1e-3}
    old['optimizer'] |= {'b1': 0.9, 'b2': 0.999, 'epsilon': 1e-8}
    path.write_text(json.dumps(old))
    assert config_of_run(workdir) == config
    claimed(workdir, config)
    with pytest.raises(UserError, match=r'optimizer\.kwargs\.momentum: .* there, 0\.5 now'):
        check_workdir(workdir, config_with(optimizer__kwargs__momentum=0.5))


@pytest.mark.parametrize('begun', [False, True])
def test_a_claim_that_fails_holds_nothing(tmp_path, monkeypatch, begun):
    """After a failed claim, the same process can claim the workdir again."""
    config = config_with()
    if begun:
        claimed(tmp_path, config)

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(workdir_module, '_write_command', full)
        with pytest.raises((OSError, UserError), match='No space left'):
            claim_workdir(tmp_path, config, DATA, 'python main.py')
    claimed(tmp_path, config)
