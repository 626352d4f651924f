"""A workdir belongs to one config: which configs count as the same, old ones included."""

from __future__ import annotations

import errno
import json
import os
import re

import pytest

from byol_jax import UserError
from byol_jax.app import workdir as workdir_module
from byol_jax.app.workdir import (
    About,
    check_apart,
    check_workdir,
    claim_workdir,
    config_of_run,
    release_workdir,
)
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
    (workdir / 'identity.json').unlink()
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


FILES = ('config.json', 'data.json', 'identity.json')
DAMAGE = {
    'missing': lambda path: path.unlink(),
    'empty': lambda path: path.write_bytes(b''),
    'half': lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    'binary': lambda path: path.write_bytes(bytes(range(256)) * 9),
    'a list': lambda path: path.write_text('[1, 2]'),
    'a number': lambda path: path.write_text('5'),
    'brackets': lambda path: path.write_text('[' * 200_000),
    'sections that are none': lambda path: path.write_text('{"data": 5, "examples": "x"}'),
    'other values': lambda path: path.write_text(
        path.read_text().replace('"seed": 0', '"seed": 5').replace('"examples": 8', '"examples": 9')
    ),
    'folder': lambda path: (path.unlink(), path.mkdir(), (path / 'x').touch()),
    'pipe': lambda path: (path.unlink(), os.mkfifo(path)),
    'link to nothing': lambda path: (path.unlink(), path.symlink_to('nowhere')),
    'utf-16': lambda path: path.write_text(path.read_text(), encoding='utf-16'),
    'nan': lambda path: path.write_text(
        re.sub('("base_learning_rate": )[^,]*', r'\1NaN', path.read_text())
    ),
}


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('name', FILES)
def test_each_is_known_from_the_others(tmp_path, capsys, name, damage):
    """Whatever has happened to one of the files, the run goes on, and another run is refused; the
    file is written again, what was there is kept, and it is said."""
    config = config_with()
    workdir = claimed(tmp_path, config)
    right = {each: (workdir / each).read_bytes() for each in FILES}
    capsys.readouterr()
    DAMAGE[damage](workdir / name)
    with pytest.raises(UserError, match='seed: 0 there, 1 now'):
        claimed(workdir, config_with(seed=1))
    claimed(workdir, config)
    assert {each: (workdir / each).read_bytes() for each in FILES} == right
    said = capsys.readouterr().out
    changed = damage != 'nan' or name == 'config.json'
    if damage not in ('other values', 'nan') or changed:
        assert name in said
    there = damage not in ('missing',) and name in said and 'damaged' in said
    assert len(list(workdir.glob(f'{name}.damaged*'))) == int(there)


@pytest.mark.parametrize('damage', DAMAGE)
def test_of_older_versions_only_the_config_is_needed(tmp_path, damage):
    """A run without identity.json whose config.json cannot be read is refused in one line; without
    data.json it goes on."""
    config = config_with()
    for name in ('config.json', 'data.json'):
        workdir = tmp_path / name
        claimed(workdir, config)
        (workdir / 'checkpoints').mkdir()
        (workdir / 'identity.json').unlink()
        before = (workdir / name).read_bytes()
        DAMAGE[damage](workdir / name)
        same = (
            not (workdir / name).is_dir()
            and damage != 'pipe'
            and ((workdir / name).exists() and (workdir / name).read_bytes() == before)
        )
        if name == 'data.json' and (damage not in ('other values',) or same):
            claimed(workdir, config)
            assert json.loads((workdir / name).read_text()) == DATA
            continue
        if same:
            continue
        with pytest.raises(UserError, match=r'Give another --workdir|give another --workdir|now'):
            claimed(workdir, config)


def test_a_run_of_an_older_version_is_noted(tmp_path, capsys):
    """It goes on, what identifies it is kept from now on, and that is said once."""
    config = config_with()
    workdir = claimed(tmp_path, config)
    (workdir / 'identity.json').unlink()
    capsys.readouterr()
    claimed(workdir, config)
    assert 'identity.json notes from now on' in capsys.readouterr().out
    claimed(workdir, config)
    assert capsys.readouterr().out == ''


def test_what_is_noted_of_older_data(tmp_path):
    """Sizes and contents that the run did not know are compared from the next start on."""
    config = config_with()
    workdir = claimed(tmp_path, config)
    more = DATA | {'sizes': 'ab cd'}
    claim_workdir(workdir, config, more)
    release_workdir(workdir)
    assert json.loads((workdir / 'data.json').read_text()) == more
    with pytest.raises(UserError, match='1 of 2 files have other sizes'):
        claim_workdir(workdir, config, DATA | {'sizes': 'ab ce'})


def test_own_parts_and_the_layer_are_known(tmp_path):
    """Another body of an own part is refused; a layer may be named in another way."""
    config = config_with()
    about = About('avgpool', {'encoder': [1.0, 2.0]})
    claim_workdir(tmp_path, config, DATA, about=about)
    release_workdir(tmp_path)
    with pytest.raises(UserError, match='on a fixed input its result differs'):
        claim_workdir(tmp_path, config, DATA, about=About('avgpool', {'encoder': [1.0, 1.0]}))
    again = config_with(encoder__hidden_layer='-1')
    claim_workdir(tmp_path, again, DATA, about=about)
    release_workdir(tmp_path)
    with pytest.raises(UserError, match=r'encoder\.hidden_layer'):
        claim_workdir(tmp_path, again, DATA, about=About('fc', {'encoder': [1.0, 2.0]}))


@pytest.mark.parametrize('name', ['metrics.jsonl', 'views.png', 'report.html', 'tensorboard'])
def test_odd_things_are_kept_aside(tmp_path, capsys, name):
    """A folder in the place of a file, or a file in that of a folder, makes room and is said."""
    config = config_with()
    workdir = claimed(tmp_path, config)
    path = workdir / name
    path.touch() if name == 'tensorboard' else path.mkdir()
    claimed(workdir, config)
    assert not path.exists()
    assert (workdir / f'{name}.damaged').exists()
    assert f'{path} is no f' in capsys.readouterr().out


def test_the_folder_of_the_data_is_no_workdir(tmp_path):
    """views.png would become data; a workdir inside of it will do."""
    data = config_with(data__path=f'{tmp_path}/.').data
    check_apart(tmp_path / 'run', data)
    with pytest.raises(UserError, match='is the folder of the pictures'):
        check_apart(tmp_path, data)
