"""examples/train.py: a whole run with the library, and its result."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from conftest import ROOT, process_environment
from PIL import Image

from byol_jax import load_encoder

TRAIN = ROOT / 'examples' / 'train.py'


def test_train(tmp_path):
    """It has at most 80 lines, trains on a folder, and writes an encoder that loads."""
    assert len(TRAIN.read_text().splitlines()) <= 80
    rng = np.random.default_rng(0)
    (tmp_path / 'pictures').mkdir()
    for number in range(40):
        noise = rng.integers(0, 255, (72, 80, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / 'pictures' / f'{number}.png')
    folder = tmp_path / 'encoder'
    done = subprocess.run(
        [
            sys.executable,
            TRAIN,
            f'--folder={tmp_path / "pictures"}',
            f'--output={folder}',
            '--steps=10',
        ],
        cwd=ROOT,
        env=process_environment(2) | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    assert done.stdout.splitlines()[0].startswith('step 10/10  loss ')
    encoder = load_encoder(folder)
    features = encoder(rng.integers(0, 255, (3, 64, 64, 3)).astype(np.uint8))
    assert features.shape == (3, 128)
    assert np.isfinite(features).all()
    assert encoder.description['step'] == 10
