"""The examples keep the promises of their documentation."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, process_environment
from PIL import Image

from byol_jax import UserError, load_encoder
from byol_jax.interop.encoder import make_encoder
from byol_jax.interop.export import save_encoder
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder

SIZE = 16
FINETUNE = ROOT / 'examples' / 'finetune.py'
# Mean colours, 0 to 255, of two classes of noise.
COLOURS = {'brick': (150, 110, 100), 'sea': (100, 110, 150)}
OPTIONS = ('--epochs=10', '--batch=8', '--learning_rate=1e-2')
# A head that starts at zero needs this rate.
LINEAR = ('--linear', '--learning_rate=1e-1')

NNX = """
from flax import nnx

class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))
"""


def write_encoder(folder, name='resnet', hidden_layer='avgpool', **kwargs):
    """Exports a randomly initialised network as training would."""
    tapped = TappedEncoder(build_encoder(name, kwargs), hidden_layer)
    encoder = make_encoder(
        name=name,
        kwargs=kwargs,
        hidden_layer=hidden_layer,
        variables=tapped.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3))),
        image_size=SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        step=0,
    )
    save_encoder(encoder, folder)


def write_pictures(folder, count, seed):
    """Writes `count` PNGs of various sizes for each class of COLOURS."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            height, width = rng.integers(SIZE, 2 * SIZE, 2)
            # A picture's brightness tells nothing: only its colour does.
            light = rng.uniform(-30, 30)
            noise = rng.normal(0, 40, (height, width, 3))
            pixels = (np.array(colour) + light + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f'{number}.png')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder with an `encoder`, 40 pictures to `train` on and 20 others to `test` on."""
    folder = tmp_path_factory.mktemp('finetune')
    write_encoder(folder / 'encoder', stage_sizes=(1,), width=0.125)
    write_pictures(folder / 'train', 20, seed=1)
    write_pictures(folder / 'test', 10, seed=2)
    return folder


@pytest.fixture(scope='module')
def example():
    """examples/finetune.py as a module."""
    spec = importlib.util.spec_from_file_location('finetune', FINETUNE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, **environment):
    """Runs the example as a user would, under a hard time limit."""
    return subprocess.run(
        [sys.executable, '-W', 'error', str(FINETUNE), *map(str, arguments)],
        env=process_environment(devices=1) | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_on(data, *arguments, **environment):
    """What a successful run on `data` prints."""
    done = run(
        f'--encoder={data / "encoder"}',
        f'--train={data / "train"}',
        f'--test={data / "test"}',
        *OPTIONS,
        *arguments,
        **environment,
    )
    assert (done.returncode, done.stderr) == (0, '')
    return done.stdout


def accuracies(printed):
    """The accuracies in the printed lines, per cent."""
    return [float(share) for share in re.findall(r'test accuracy (\S+) %', printed)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_finetuning_learns_and_repeats(data):
    """From chance to 90 %; the same seed repeats the numbers, and the export does not change."""
    before = contents(data / 'encoder')
    printed = run_on(data, '--seed=3')
    assert '40 pictures of 2 classes, 20 to test on' in printed
    shares = accuracies(printed)
    assert len(shares) == 1 + 10
    assert shares[0] == 50
    assert shares[-1] >= 90
    assert run_on(data, '--seed=3') == printed
    assert contents(data / 'encoder') == before


def test_linear_head_learns_without_tensorflow(data, tmp_path):
    """A head on the frozen encoder beats chance, and nothing needs TensorFlow."""
    (tmp_path / 'tensorflow.py').write_text("raise ImportError('not here')")
    shares = accuracies(run_on(data, *LINEAR, PYTHONPATH=str(tmp_path)))
    assert shares[-1] >= 75


def finetune(example, data, linear):
    """The variables before and after two epochs, and the head."""
    encoder = load_encoder(data / 'encoder')
    train, test = example.open_folders(data / 'train', data / 'test')
    params, state = example.finetune(
        encoder, train, test, epochs=2, batch=8, learning_rate=1e-2, linear=linear, seed=0
    )
    after = {'params': params['encoder'], **state}
    assert jax.tree.structure(after) == jax.tree.structure(dict(encoder.variables))
    return encoder.variables, after, params['head']


def test_linear_leaves_the_encoder(example, data):
    """With --linear, no parameter and no batch statistic of the encoder changes by a bit."""
    before, after, head = finetune(example, data, linear=True)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(head))


def test_finetuning_trains_all(example, data):
    """Without --linear, every parameter and every batch statistic changes."""
    before, after, head = finetune(example, data, linear=False)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), after, before)
    assert all(jax.tree.leaves(moved)), moved
    assert all(np.any(leaf) for leaf in jax.tree.leaves(head))


def test_other_classes_are_an_error(data, tmp_path):
    """Folders that differ in classes end the run with one line that names the differing ones."""
    write_pictures(tmp_path, 1, seed=0)
    (tmp_path / 'sea').rename(tmp_path / 'sky')
    done = run(f'--encoder={data / "encoder"}', f'--train={data / "train"}', f'--test={tmp_path}')
    assert done.returncode == 1
    assert done.stdout == ''
    assert re.fullmatch(r'error: .* only one of them has: sea, sky\.\n', done.stderr)


def test_wrong_folders_are_errors(example, data, tmp_path):
    """A folder that is missing, empty, or without classes is named with its flag."""
    absent, empty, flat = data / 'tests', tmp_path / 'empty', data / 'test' / 'sea'
    empty.mkdir()
    for path, message in (
        (absent, f"--test={absent} does not exist. Did you mean 'test'?"),
        (empty, f'--test={empty} holds no image'),
        (flat, f'--test={flat} has no class folders'),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            example.open_folders(data / 'train', path)


@pytest.mark.parametrize('other', ['train', 'train/', 'train/../train', 'train/sea', '.', 'link'])
def test_a_test_set_that_was_trained_on_is_an_error(example, data, other):
    """The same folder by any name, or one inside the other, is refused in one line."""
    link = data / 'link'
    if not link.exists():
        link.symlink_to(data / 'train')
    with pytest.raises(UserError, match='same folder, or one lies inside the other'):
        example.open_folders(str(data / 'train'), f'{data}/{other}')


@pytest.mark.parametrize('part', ['train', 'test'])
def test_a_damaged_picture_is_an_error(example, tmp_path, part):
    """A damaged picture is neither skipped in training nor in the accuracy: its file is named."""
    write_encoder(tmp_path / 'encoder', stage_sizes=(1,), width=0.125)
    for seed, name in enumerate(('train', 'test')):
        write_pictures(tmp_path / name, 4, seed)
    (tmp_path / part / 'sea' / '2.png').write_bytes(b'')
    with pytest.raises(UserError, match=f'{part}/sea/2.png is empty'):
        finetune(example, tmp_path, linear=True)


@pytest.mark.slow
@pytest.mark.parametrize(('flags', 'least'), [((), 90), (LINEAR, 75)], ids=['all', 'linear'])
def test_nnx_encoder(data, tmp_path, monkeypatch, flags, least):
    """An NNX network with batch normalisation and dropout learns with the same command."""
    (tmp_path / 'own_finetuned.py').write_text(NNX)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        write_encoder(tmp_path / 'encoder', 'own_finetuned:Net', 'output')
        del sys.modules['own_finetuned']
    for name in ('train', 'test'):
        (tmp_path / name).symlink_to(data / name)
    allow = ('--allow', 'own_finetuned')
    assert accuracies(run_on(tmp_path, *flags, *allow, PYTHONPATH=str(tmp_path)))[-1] >= least
