"""Bad input: a clear message, an exit code other than 0, no traceback, nothing overwritten."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, TINY
from whole_runs import release_locks

from byol_jax.errors import UserError

SAMPLE = '--config=configs/div2k.py:sample'
DATA = {'examples': 8, 'held_out': 2, 'names_sha256': 'ab'}


@pytest.fixture(autouse=True)
def no_lock_left():
    """Releases the locks, which end with the process; here the process continues."""
    yield
    release_locks()


def refused(result, *words: str) -> None:
    """Checks that a run ended with a readable error that has all the words."""
    assert result.returncode not in (0, None), result.stdout
    assert 'Traceback' not in result.stderr
    assert result.stderr.startswith('error: '), result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ((), ('No --config given', 'div2k')),
        (('--config=configs/div2l.py',), ("Did you mean 'configs/div2k.py'?",)),
        (('--config=configs/div2k.py:smaple',), ("'lr_hr', 'sample'",)),
        ((SAMPLE, '--config.optimzer.weight_decay=1'), ("Did you mean 'optimizer.weight_decay'?",)),
        ((SAMPLE, '--config.batchsize=8'), ("Did you mean 'batch_size'?",)),
        ((SAMPLE, '--config.batch_size=many'), ('batch_size', 'many')),
        ((SAMPLE, '--wrkdir=x'), ('wrkdir', 'workdir')),
        ((SAMPLE, '--mode=trian'), ('trian', 'train|views|summary')),
        ((SAMPLE, 'train'), ("'train' is not a flag",)),
    ],
    ids=lambda value: ' '.join(value) or 'nothing',
)
def test_flags(main_py, tmp_path, arguments, words):
    """A wrong flag, config or key is named, with the nearest right one."""
    refused(main_py(f'--workdir={tmp_path / "w"}', *arguments), *words)
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--config.batch_size=7',), ('batch_size=7', '2 device(s)', '6 or 8')),
        (('--config.encoder.hidden_layer=avgpol',), ("Did you mean 'avgpool'?", 'stage1/block1')),
    ],
    ids=' '.join,
)
def test_values(main_py, tmp_path, arguments, words):
    """A value that cannot be used is named, with what is allowed, before anything is written."""
    check_value(main_py, tmp_path, arguments, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--config.data.source=folder',), ("data.source='folder' needs the folder",)),
        (
            ('--config.data.source=folder', '--config.data.path=/nowhere/at/all'),
            ('data.path=/nowhere/at/all', 'does not exist'),
        ),
        (('--config.encoder.name=resnet5O',), ("Did you mean 'resnet50'?", 'resnet200')),
        (
            ('--config.views.image_size=2',),
            ('views.image_size=2 is too small', 'use at least 4', 'small_images'),
        ),
        (('--config.data.tile_size=-64',), ('data.tile_size=-64 must be at least 0',)),
        (('--config.encoder.kwargs.widht=2',), ("Did you mean 'width'?",)),
        (('--config.total_epochs=3',), ('Exactly one of total_epochs and total_steps', 'both')),
        (('--config.warmup_steps=8',), ('warm-up (8 steps) must be shorter',)),
        (
            ('--config.optimizer.name=adam', '--config.optimizer.base_learning_rate=1'),
            ("optimizer.name='adam'", "Did you mean 'adamw'?"),
        ),
        (('--config.optimizer.name=adam',), ("optimizer.name='adam'", "Did you mean 'adamw'?")),
        (('--config.optimizer.name=adamw',), ('needs a learning rate of its own',)),
        (('--config.views.view1.flip=2',), ('views.view1.flip=2', 'probability')),
        (('--config.data.tile_size=5000',), ('smaller than data.tile_size=5000',)),
    ],
    ids=' '.join,
)
def test_more_values(main_py, tmp_path, arguments, words):
    """The same for values whose messages are tested elsewhere without a process."""
    check_value(main_py, tmp_path, arguments, words)


def test_arguments_of_another_encoder(main_py):
    """Arguments of another encoder have their own types, whatever the config's encoder has."""
    kwargs = {'width': 16, 'heads': 2, 'depth': 1, 'patch_size': 8}  # The config's width is 0.5.
    arguments = [f'--config.encoder.kwargs.{name}={value}' for name, value in kwargs.items()]
    own = ('--config.encoder.name=vit', '--config.encoder.hidden_layer=norm', '--mode=summary')
    done = main_py(SAMPLE, *own, *arguments, '--config.encoder.pool=cls')
    assert done.returncode == 0, done.stderr
    assert 'patch_embed' in done.stdout
    assert '6x6x16' in done.stdout


def check_value(main_py, tmp_path, arguments, words):
    workdir = tmp_path / 'w'
    refused(main_py(SAMPLE, *TINY, *arguments, f'--workdir={workdir}', devices=2), *words)
    assert not workdir.exists()


def test_empty_folder(main_py, tmp_path):
    """A folder without images is said to hold none."""
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'pictures' / 'notes.txt').write_text('no picture')
    refused(
        main_py(
            SAMPLE,
            '--config.data.source=folder',
            f'--config.data.path={tmp_path / "pictures"}',
            f'--workdir={tmp_path / "w"}',
        ),
        'holds no image',
        '.jpg',
    )


def test_workdir_of_another_config(main_py, tmp_path):
    """A workdir of another config is refused, with the difference, and not changed."""
    from byol_jax.app.workdir import claim_workdir
    from configs import div2k

    config = div2k.get_config('sample')
    claim_workdir(tmp_path / 'w', config, DATA)
    before = (tmp_path / 'w' / 'config.json').read_bytes()
    result = main_py(SAMPLE, '--config.optimizer.momentum=0.8', f'--workdir={tmp_path / "w"}')
    refused(result, 'belongs to a run with another config', 'optimizer.kwargs.momentum')
    names = {p.name for p in (tmp_path / 'w').iterdir()}
    assert names == {'config.json', 'data.json', 'identity.json', '.lock'}
    assert (tmp_path / 'w' / 'config.json').read_bytes() == before


def test_config_json_is_data(tmp_path):
    """config.json is plain JSON that holds every resolved key."""
    from byol_jax.app.workdir import claim_workdir
    from configs import div2k

    claim_workdir(tmp_path, div2k.get_config('sample'), DATA)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['views']['view1']['crop_area'] == [0.08, 1.0]
    assert config['encoder']['kwargs']['width'] == 0.5


def test_log_keys_may_change(tmp_path):
    """Keys that do not affect the weights may change when a run is resumed."""
    from byol_jax.app.workdir import claim_workdir
    from configs import div2k

    config = div2k.get_config('sample').unlock()
    claim_workdir(tmp_path, config, DATA)
    release_locks()
    config.log.every_steps = 1
    claim_workdir(tmp_path, config, DATA)


def test_other_data_is_refused(tmp_path):
    """A run does not continue on data that has changed."""
    from byol_jax.app.workdir import claim_workdir
    from configs import div2k

    config = div2k.get_config('sample')
    claim_workdir(tmp_path, config, DATA)
    release_locks()
    with pytest.raises(UserError, match='8 training and 2 held-out examples then, 9 and 2'):
        claim_workdir(tmp_path, config, DATA | {'examples': 9})
    with pytest.raises(UserError, match='other names'):
        claim_workdir(tmp_path, config, DATA | {'names_sha256': 'cd'})


def test_two_processes_do_not_share_a_workdir(tmp_path):
    """A workdir with a run under way is refused to a second run."""
    from byol_jax.app.workdir import claim_workdir
    from configs import div2k

    config = div2k.get_config('sample')
    claim_workdir(tmp_path, config, DATA)
    with pytest.raises(UserError, match='Another process is training'):
        claim_workdir(tmp_path, config, DATA)
    release_locks()
    claim_workdir(tmp_path, config, DATA)


def test_every_config_loads():
    """Each file in configs/ gives a config that is checked against the plan without error."""
    import importlib

    from byol_jax.app.plan import make_plan

    for path in (ROOT / 'configs').glob('[!_]*.py'):
        module = importlib.import_module(f'configs.{path.stem}')
        for argument in getattr(module, 'ARGUMENTS', ('',)):
            config = module.get_config(argument) if argument else module.get_config()
            assert make_plan(config, 100_000, 4).total_steps > 0
