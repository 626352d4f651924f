"""Whole runs of main.py, as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from whole_runs import SAMPLE, assert_same_state, final_state, make_damaged_folder, start, wait_for

from byol_jax.app.modes import MODES, Request
from byol_jax.errors import UserError
from byol_jax.settings import Settings, changed


@pytest.fixture(scope='module')
def run(main_py, tmp_path_factory):
    """One uninterrupted tiny run: (workdir, completed process)."""
    workdir = tmp_path_factory.mktemp('run') / 'w'
    result = main_py(SAMPLE, *TINY, f'--workdir={workdir}', compiling='alone')
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_leaves_what_the_contract_names(run):
    """A run leaves config, metrics, events, checkpoints, views, report and encoder."""
    workdir, _ = run
    names = {p.name for p in workdir.iterdir()}
    assert names == {
        '.lock',
        'command.txt',
        'config.json',
        'data.json',
        'identity.json',
        'layers.txt',
        'metrics.jsonl',
        'results.json',
        'tensorboard',
        'checkpoints',
        'views.png',
        'report.html',
        'encoder',
    }
    assert {p.name for p in (workdir / 'encoder').iterdir()} == {
        'encoder.json',
        'encoder.safetensors',
    }
    assert any(p.name.startswith('events.') for p in (workdir / 'tensorboard').iterdir())


def test_explains_itself(run):
    """Progress shows loss, speed, input wait and time left; the end shows before and after."""
    _, result = run
    line = next(x for x in result.stdout.splitlines() if x.startswith('step 4/8'))
    for word in ('loss', 'images/s', 'input wait', 'left', 'feature std'):
        assert word in line
    assert 'randomly initialised' in result.stdout
    assert 'trained 8 steps' in result.stdout
    assert result.stderr == ''


def test_metrics(run):
    """metrics.jsonl has one object for each logged step, with the keys of the contract."""
    records = [json.loads(x) for x in (run[0] / 'metrics.jsonl').read_text().splitlines()]
    assert [r['step'] for r in records] == [2, 4, 6, 8]
    for record in records:
        assert {
            'epoch',
            'loss',
            'learning_rate',
            'tau',
            'feature_std',
            'images_per_second',
            'input_wait_fraction',
        } <= set(record)
        assert 0 <= record['loss'] <= 8
        assert 0 <= record['input_wait_fraction'] <= 1
        assert record['bad_files'] == 0
        assert {
            'representation_std',
            'rankme_representation',
            'rankme_projection',
            'alignment',
            'uniformity',
            'online_target_cosine',
            'prediction_target_cosine',
            'gradient_norm',
            'update_norm',
            'parameter_norm',
        } <= set(record)
        assert 1 <= record['rankme_projection'] <= 8.01
        assert record['prediction_target_cosine'] == pytest.approx(1 - record['loss'] / 4, abs=1e-5)
    assert records[-1]['tau'] > records[0]['tau']


def test_views_picture(run):
    """views.png shows originals and both views."""
    with Image.open(run[0] / 'views.png') as picture:
        assert picture.width > 3 * 90
        assert picture.height > 8 * 90


def test_report_stands_alone(run):
    """report.html loads nothing from elsewhere and has all sections, in at most 1 MB."""
    text = (run[0] / 'report.html').read_text()
    assert len(text) < 1_000_000
    # One curve for each value of a record, one of two values, and the spectrum.
    record = json.loads((run[0] / 'metrics.jsonl').read_text().splitlines()[-1])
    assert text.count('<svg') == len(set(record) - {'step', 'epoch'}) + 2
    assert 'src="http' not in text
    assert 'href="http' not in text
    for word in (
        'Finished: all 8 steps',
        'too early to say',
        'Before and after',
        'randomly initialised',
        'View pairs',
        'Spectrum of the features',
        'Map of the embeddings',
        'By PCA',
        'Nearest neighbours',
    ):
        assert word in text


def test_tensorboard_has_the_pictures(run):
    """The view pairs, the map and the neighbours are among the events."""
    events = b''.join(p.read_bytes() for p in (run[0] / 'tensorboard').iterdir())
    for name in (b'views', b'map/pca', b'neighbours'):
        assert name in events
    assert events.count(b'\x89PNG') >= 3


def test_encoder_is_the_online_network(run):
    """The exported encoder is the online network of the last step."""
    from byol_jax import load_encoder

    encoder = load_encoder(run[0] / 'encoder')
    assert encoder.description['step'] == 8
    leaves = final_state(run[0])
    kernel = np.asarray(encoder.variables['params']['conv1']['kernel'])
    stored = next(
        v for k, v in leaves.items() if 'online_params' in k and "['encoder']['conv1']" in k
    )
    np.testing.assert_array_equal(kernel, np.asarray(stored))


def test_again_is_a_no_op(run, main_py):
    """Starting a finished run again trains nothing and does not change its weights."""
    workdir, _ = run
    before = final_state(workdir)
    result = main_py(SAMPLE, *TINY, f'--workdir={workdir}')
    assert result.returncode == 0
    assert 'all 8 steps are done' in result.stdout
    after = final_state(workdir)
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.fixture
def request_of(run):
    """Gives the request with which main.py calls a mode on the finished run, in this process.

    Reading flags and ending the process are tested with the runs above.
    """

    def request(**changes):
        config = json.loads((run[0] / 'config.json').read_text())
        changes = {key.replace('__', '.'): value for key, value in changes.items()}
        return Request(Settings.of(changed(config, changes)), run[0], 'the command')

    return request


@pytest.mark.parametrize('mode', ['evaluate', 'embed', 'export', 'views', 'summary'])
def test_modes(run, request_of, mode, capsys):
    """Every mode works on a finished run and does not change its weights."""
    workdir, _ = run
    weights = (workdir / 'encoder' / 'encoder.safetensors').read_bytes()
    MODES[mode](request_of(evaluate__protocols=('spectrum',)))
    printed = capsys.readouterr().out
    assert (workdir / 'encoder' / 'encoder.safetensors').read_bytes() == weights
    if mode == 'embed':
        with np.load(workdir / 'embeddings.npz') as arrays:
            assert arrays['features'].dtype == np.float32
            assert len(arrays['features']) == len(arrays['names']) == len(arrays['labels'])
            assert str(arrays['encoder_sha256']) in printed
        (workdir / 'embeddings.npz').unlink()
    if mode == 'summary':
        assert 'avgpool' in printed
        assert '<- tapped' in printed
    if mode == 'evaluate':
        (workdir / 'evaluation.json').unlink()


def test_embed_with_any_encoder_to_parquet(run, main_py, tmp_path):
    """With --encoder and --output no workdir is needed, and none is made."""
    from byol_jax import load_encoder

    parquet = pytest.importorskip('pyarrow.parquet')
    folder, output = run[0] / 'encoder', tmp_path / 'new' / 'features.parquet'
    where = (f'--encoder={folder}', f'--output={output}', f'--workdir={tmp_path / "w"}')
    result = main_py(SAMPLE, *TINY, '--mode=embed', *where)
    assert result.returncode == 0, result.stderr
    encoder, table = load_encoder(folder), parquet.read_table(output)
    size = encoder.description['feature_size']
    digest = encoder.weights_sha256
    assert table.schema.metadata[b'byol_jax.encoder_sha256'] == digest.encode()
    assert table.schema.field('features').type.list_size == size
    for part in (
        f'{len(table):,} x {size} features: {output}',
        f'{folder}, weights sha256 {digest}',
    ):
        assert part in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ['new']


def test_evaluate_takes_any_encoder(run, main_py, tmp_path):
    """--encoder is measured as at the end of its run, at its own size, whatever the config's."""
    where = (f'--encoder={run[0] / "encoder"}', f'--workdir={tmp_path / "w"}')
    chosen = ("--config.evaluate.protocols=('knn','spectrum')", '--config.views.image_size=64')
    result = main_py(SAMPLE, *TINY, *chosen, '--mode=evaluate', *where)
    assert result.returncode == 0, result.stderr
    in_the_run = next(x for x in run[1].stdout.splitlines() if x.startswith('trained 8 steps'))
    found = json.loads((tmp_path / 'w' / 'evaluation.json').read_text())['metrics']
    alone = [f'{found["knn_20"]:.1%}', f'{found["feature_std"]:.4f}']
    assert alone == in_the_run.split()[-2:]
    assert [p.name for p in (tmp_path / 'w').iterdir()] == ['evaluation.json']


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--encoder=x',), '--encoder=x goes with --mode=evaluate and --mode=embed, not with'),
        # The files that a mode accepts are tested elsewhere without a process.
        pytest.param(
            ('--output=x.npz', '--mode=evaluate'), 'ends in .json', marks=pytest.mark.slow
        ),
        pytest.param(
            ('--output=x.csv', '--mode=embed'),
            'x.csv: embeddings are written to a file that ends',
            marks=pytest.mark.slow,
        ),
    ],
    ids=['encoder', 'output', 'suffix'],
)
def test_flags_of_modes(main_py, tmp_path, arguments, words):
    """A flag that the mode does not use, or a wrong value, is named in one line."""
    result = main_py(SAMPLE, *arguments, f'--workdir={tmp_path / "w"}')
    assert result.returncode != 0
    assert result.stderr.startswith('error: ')
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_resume_onto_a_logged_step(tmp_path, main_py):
    """A run may log every step, and resume from a checkpoint whose next step is logged."""
    often = ('--config.log.every_steps=1', '--config.checkpoint.every_steps=3')
    process = start(tmp_path / 'w', '--config.total_steps=100000', *often)
    wait_for(tmp_path / 'w' / 'checkpoints' / '3', process)
    process.kill()
    process.communicate(timeout=60)
    process = start(tmp_path / 'w', '--config.total_steps=100000', *often)
    wait_for(tmp_path / 'w' / 'checkpoints' / '12', process)
    process.kill()
    process.communicate(timeout=60)
    lines = (tmp_path / 'w' / 'metrics.jsonl').read_text().splitlines(keepends=True)
    steps = [json.loads(line)['step'] for line in lines if line.endswith('\n')]
    assert steps == list(range(1, len(steps) + 1))


def test_export_with_another_config_changes_nothing(run, request_of):
    """--mode=export with another network's config is refused and changes no checkpoint."""
    workdir, _ = run
    before = sorted(str(p) for p in workdir.rglob('*'))
    with pytest.raises(UserError, match='belongs to a run with another config'):
        MODES['export'](request_of(encoder__kwargs__num_classes=3))
    assert sorted(str(p) for p in workdir.rglob('*')) == before


@pytest.mark.parametrize('devices', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_run_goes_on_bit_for_bit(run, tmp_path, main_py, devices):
    """A run killed with SIGKILL half-way and started again ends as an uninterrupted one.

    Each start compiles anew.
    """
    how = {'devices': devices, 'compiling': 'alone' if devices == 1 else 'optimised'}
    whole = run[0] if devices == 1 else tmp_path / 'whole'
    if devices > 1:
        assert main_py(SAMPLE, *TINY, f'--workdir={whole}', **how).returncode == 0
    killed = tmp_path / 'killed'
    process = start(killed, **how)
    wait_for(killed / 'checkpoints' / '4', process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert 'Under way: step' in (killed / 'report.html').read_text()
    result = main_py(SAMPLE, *TINY, f'--workdir={killed}', **how)
    assert result.returncode == 0, result.stderr
    assert 'going on from the checkpoint of step' in result.stdout
    expected = final_state(whole)
    assert any('optimizer' in key for key in expected)
    assert any('target_stats' in key for key in expected)
    assert_same_state(final_state(killed), expected)
    steps = [json.loads(x)['step'] for x in (killed / 'metrics.jsonl').read_text().splitlines()]
    assert steps == [2, 4, 6, 8]
    assert 'Finished: all 8 steps' in (killed / 'report.html').read_text()


def test_sigterm_saves(tmp_path, main_py):
    """SIGTERM ends a run after its step with a checkpoint of that step, whatever the interval."""
    long = ('--config.total_steps=100000', '--config.checkpoint.every_steps=100000')
    process = start(tmp_path / 'w', *long)
    wait_for(tmp_path / 'w' / 'tensorboard', process)
    while not (tmp_path / 'w' / 'metrics.jsonl').read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert 'SIGTERM: saving after this step' in output
    assert 'Stopped: SIGTERM, and the state is saved.' in (tmp_path / 'w/report.html').read_text()
    saved = [p for p in (tmp_path / 'w' / 'checkpoints').iterdir() if p.name.isdigit()]
    assert len(saved) == 1


@pytest.mark.slow
def test_non_finite_loss_stops(tmp_path, main_py):
    """A loss that is not finite stops the run; the checkpoint before it is kept and good.

    The first step of the warm-up has a learning rate of 0.
    """
    result = main_py(
        SAMPLE,
        *TINY,
        '--config.optimizer.base_learning_rate=1e38',
        '--config.checkpoint.every_steps=1',
        f'--workdir={tmp_path / "w"}',
    )
    assert result.returncode != 0
    assert 'The loss of step' in result.stderr
    assert 'Traceback' not in result.stderr
    assert not (tmp_path / 'w' / 'encoder').exists()
    kept = [p.name for p in (tmp_path / 'w' / 'checkpoints').iterdir() if p.name.isdigit()]
    assert kept == ['1']
    assert all(np.isfinite(leaf).all() for leaf in final_state(tmp_path / 'w').values())
    alarm = json.loads((tmp_path / 'w' / 'alarms.jsonl').read_text().splitlines()[-1])
    assert 'class="state">stopped: not finite' in (tmp_path / 'w' / 'report.html').read_text()
    assert alarm['name'] == 'non_finite'
    assert 'the checkpoint of step 1, from before it, is kept' in alarm['evidence']
    assert 'ALARM at step 2: non_finite' in result.stdout


@pytest.mark.slow
def test_a_slow_source_is_named(tmp_path, main_py):
    """If pictures come too slowly, the run says so once, with the setting to change."""
    rng = np.random.default_rng(0)
    (tmp_path / 'pictures').mkdir()
    for i in range(4):
        picture = Image.fromarray(rng.integers(0, 256, (1500, 1500, 3), np.uint8))
        picture.save(tmp_path / 'pictures' / f'{i}.png')
    result = main_py(
        SAMPLE,
        *TINY,
        '--config.data.source=folder',
        '--config.data.tile_size=0',
        '--config.data.held_out_fraction=0.0',
        f'--config.data.path={tmp_path / "pictures"}',
        '--config.data.workers=1',
        '--config.total_steps=30',
        f'--workdir={tmp_path / "w"}',
    )
    assert result.returncode == 0, result.stderr
    raised = [x for x in result.stdout.splitlines() if 'ALARM at step 20: input_bound' in x]
    assert len(raised) == 1
    assert 'raise data.workers=1' in raised[0]


@pytest.mark.slow
def test_runs_with_bfloat16_and_accumulation(tmp_path, main_py):
    """bfloat16 compute and gradient accumulation train, with float32 parameters."""
    result = main_py(
        SAMPLE,
        *TINY,
        '--config.precision=bfloat16',
        '--config.accumulate_steps=2',
        '--config.batch_size=16',
        f'--workdir={tmp_path / "w"}',
        devices=2,
    )
    assert result.returncode == 0, result.stderr
    leaves = final_state(tmp_path / 'w')
    assert {v.dtype for k, v in leaves.items() if 'params' in k} == {np.dtype('float32')}


def test_missing_data_trains_on_nothing(tmp_path, main_py):
    """configs/div2k.py with a missing folder stops; it uses no other data instead."""
    result = main_py(
        '--config=configs/div2k.py',
        f'--config.data.path={tmp_path / "DIV2K"}',
        f'--workdir={tmp_path / "w"}',
    )
    assert result.returncode != 0
    assert 'does not exist' in result.stderr
    assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_official_div2k_folders(tmp_path, main_py):
    """The official folders train, with the low-resolution picture as the source of view 1."""
    rng = np.random.default_rng(0)
    hr = tmp_path / 'DIV2K_train_HR'
    lr = tmp_path / 'DIV2K_train_LR_bicubic' / 'X2'
    hr.mkdir()
    lr.mkdir(parents=True)
    for i in range(1, 4):
        picture = Image.fromarray(rng.integers(0, 256, (256, 384, 3), np.uint8))
        picture.save(hr / f'{i:04}.png')
        picture.resize((192, 128)).save(lr / f'{i:04}x2.png')
    tiny = [x for x in TINY if 'stage_sizes' not in x and 'width' not in x]
    result = main_py(
        '--config=configs/div2k.py:lr_hr',
        *tiny,
        '--config.encoder.name=resnet',
        '--config.encoder.kwargs.stage_sizes=(1,)',
        '--config.encoder.kwargs.width=0.125',
        f'--config.data.path={tmp_path}',
        f'--workdir={tmp_path / "w"}',
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'w' / 'encoder' / 'encoder.json').exists()


@pytest.mark.slow
def test_damaged_picture_loses_no_step(tmp_path, main_py):
    """If no file may be bad, the first one is named, and the steps before it are saved."""
    folder = tmp_path / 'pictures'
    damaged = make_damaged_folder(folder)
    result = main_py(
        SAMPLE,
        *TINY,
        '--config.data.source=folder',
        '--config.data.tile_size=0',
        '--config.data.held_out_fraction=0.0',
        '--config.data.max_bad_fraction=0.0',
        '--config.checkpoint.every_steps=100',
        f'--config.data.path={folder}',
        f'--workdir={tmp_path / "w"}',
    )
    assert result.returncode != 0
    assert 'Traceback' not in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert f'{damaged.name} cannot be decoded' in result.stderr
    assert [p.name for p in (tmp_path / 'w' / 'checkpoints').iterdir() if p.name.isdigit()] == ['3']
    assert (tmp_path / 'w' / 'bad_files.txt').read_text().startswith(f'{damaged}\t')


@pytest.fixture
def sample_run(tmp_path, main_py):
    """The unchanged sample run: (workdir, what it printed).

    The environment variable SAMPLE_RUN may name the workdir of an existing one; WORKDIR.log is
    then what it printed.
    """
    made = os.environ.get('SAMPLE_RUN')
    if made:
        return Path(made), Path(f'{made}.log').read_text()
    result = main_py(SAMPLE, f'--workdir={tmp_path / "w"}', compiling='optimised', timeout=800)
    assert result.returncode == 0, result.stderr
    return tmp_path / 'w', result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sample_run_beats_random(sample_run):
    """The unchanged sample run ends with an encoder that is better than the random one."""
    workdir, printed = sample_run
    table = [x for x in printed.splitlines() if x.startswith(('randomly', 'trained'))]
    random, trained = (float(row.split('%')[0].split()[-1]) for row in table)
    assert trained > random
    assert not (workdir / 'alarms.jsonl').exists()
    records = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert [r['step'] for r in records if 'lidar' in r] == [320]
