"""The example of a user's own protocol, on arrays and through main.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
from encoders import save_random_encoder, write_pictures
from sklearn.neighbors import NearestCentroid

from byol_jax.evaluation import FeatureSet, Subject, Unmeasured
from examples.own.protocol import ClassMeans


def test_it_is_scikit_learns_nearest_centroid():
    """For plain and unit-length features it equals scikit-learn's; too few pictures are said."""
    rng = np.random.default_rng(0)
    sets = [FeatureSet(rng.normal(size=(n, 4)) + 1, rng.integers(0, 3, n)) for n in (60, 40)]
    for cosine in (False, True):
        train, test = (
            x.features / np.linalg.norm(x.features, axis=1, keepdims=True) if cosine else x.features
            for x in sets
        )
        expected = NearestCentroid().fit(train, sets[0].labels).score(test, sets[1].labels)
        found = ClassMeans(cosine).measure(Subject(*sets))
        assert found.metrics['class_means'].value == pytest.approx(expected)
    few = FeatureSet(sets[0].features[:5], np.array([0, 1, 2, 0, 1]))
    with pytest.raises(Unmeasured, match='fewer than two'):
        ClassMeans().measure(Subject(few, sets[1]))


def test_main_py(tmp_path, main_py):
    """Named in a config with its argument, it appears in the table and in evaluation.json."""
    encoder = save_random_encoder(tmp_path / 'encoder')
    write_pictures(tmp_path / 'pictures', {'bird': 12, 'cat': 12}, 0)
    done = main_py(
        '--config=configs/folder.py',
        '--mode=evaluate',
        f'--encoder={encoder}',
        f'--workdir={tmp_path / "run"}',
        f'--config.data.path={tmp_path / "pictures"}',
        '--config.data.held_out_fraction=0.25',
        "--config.evaluate.protocols=('knn',('examples.own.protocol:ClassMeans',{'cosine':True}))",
        '--config.evaluate.knn_k=(3,)',
    )
    assert done.returncode == 0, done.stderr
    assert 'accuracy, nearest of 2 class means' in done.stdout
    found = json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
    assert set(found['metrics']) == {'knn_3', 'class_means'}
    assert found['protocols']['examples.own.protocol:ClassMeans']['cosine'] is True
