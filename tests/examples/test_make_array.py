"""examples/make_array.py: an array from a folder, in the form that training reads."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, process_environment
from PIL import Image

from byol_jax.sources.array import Array
from byol_jax.sources.folder import Folder
from byol_jax.views.crop import center_view

CLASSES = {'brick': 3, 'sea': 5}


def make_array(*arguments) -> subprocess.CompletedProcess:
    """Runs the example as a user would, with a time limit."""
    return subprocess.run(
        [sys.executable, '-W', 'error', 'examples/make_array.py', *map(str, arguments)],
        cwd=ROOT,
        env=process_environment(devices=1),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    """Two classes of noise, 20x16 pixels, PNG."""
    rng = np.random.default_rng(0)
    for name, count in CLASSES.items():
        (tmp_path / 'pictures' / name).mkdir(parents=True)
        for number in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8))
            picture.save(tmp_path / 'pictures' / name / f'{number}.png')
    return tmp_path / 'pictures'


def test_holds_the_folder(folder, tmp_path):
    """Without options: every picture unchanged, with its path and its class."""
    done = make_array(f'--folder={folder}', f'--output={tmp_path / "a.npz"}')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('8 pictures of 20x16, 2 classes, ')
    array, source = Array(tmp_path / 'a.npz'), Folder(folder)
    assert len(array) == len(source) == 8
    for i in range(8):
        np.testing.assert_array_equal(array.load(i, 'image'), source.load(i, 'image'))
        assert array.name(i) == source.name(i)
    np.testing.assert_array_equal(array.labels, source.labels)
    assert list(array.label_names) == ['brick', 'sea']


def test_size_and_limit(folder, tmp_path):
    """--size stores the centre square, resized; --per_class the first of each class."""
    done = make_array(
        f'--folder={folder}', f'--output={tmp_path / "a.npz"}', '--size=8', '--per_class=4'
    )
    assert (done.returncode, done.stderr) == (0, '')
    array, source = Array(tmp_path / 'a.npz'), Folder(folder)
    names = [array.name(i) for i in range(len(array))]
    assert names == [f'brick/{i}.png' for i in range(3)] + [f'sea/{i}.png' for i in range(4)]
    for i in range(len(array)):
        expected = center_view(source.load(i, 'image'), 8, 1.0)
        np.testing.assert_array_equal(array.load(i, 'image'), expected)
    assert array.labels.tolist() == [0] * 3 + [1] * 4


@pytest.fixture
def refused(monkeypatch):
    """Runs the example in this process, and returns the error with which it exits."""
    spec = importlib.util.spec_from_file_location('make_array', ROOT / 'examples/make_array.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, 'argv', ['make_array.py', *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            module.main()
        return stop.value.code

    return run


def test_what_cannot_be_taken_is_named(folder, tmp_path, refused):
    """Damaged pictures or other sizes stop it, with their names, and nothing is written;
    so do wrong flags.
    """
    output = f'--output={tmp_path / "a.npz"}'
    Image.new('RGB', (9, 7)).save(folder / 'sea' / '2.png')
    said = refused(f'--folder={folder}', output)
    assert 'error: The first picture has 20x16 pixels. 1 of 8' in said
    assert 'sea/2.png has 9x7 pixels' in said
    assert '--size=S' in said
    (folder / 'sea' / '2.png').write_bytes(b'')
    said = refused(f'--folder={folder}', output)
    assert 'error: 1 of 8 pictures cannot be used' in said
    assert '--size=S' not in said
    assert 'sea/2.png is empty' in refused(f'--folder={folder}', output, '--size=8')
    for arguments, words in (
        ((f'--folder={folder / "brick"}', output, '--per_class=2'), 'needs class folders'),
        ((f'--folder={folder / "no"}', output), 'does not exist'),
        ((f'--folder={folder}', f'--output={tmp_path / "a.npy"}'), 'must end in .npz'),
        ((f'--folder={folder}', f'--output={tmp_path / "no" / "a.npz"}'), 'there is no folder'),
    ):
        assert words in refused(*arguments)
    assert not list(tmp_path.glob('a.*'))
