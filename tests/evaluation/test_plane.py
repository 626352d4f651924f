"""Features in a plane: PCA equals scikit-learn's, and UMAP gets the right arguments."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.decomposition import PCA

from byol_jax.errors import UserError
from byol_jax.evaluation import plane
from byol_jax.evaluation.plane import pca, umap


def groups(count=120, size=16, seed=0):
    """Features in three groups, and the group of each."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return (5 * np.eye(size)[labels] + rng.normal(size=(count, size))).astype(np.float32), labels


def test_pca_is_scikit_learns():
    """Coordinates and shares of variance equal scikit-learn's for unit rows, except for signs."""
    x = groups()[0].astype(np.float64)
    found = pca(x)
    reference = PCA(2)
    expected = reference.fit_transform(x / np.linalg.norm(x, axis=1, keepdims=True))
    np.testing.assert_allclose(np.abs(found.places), np.abs(expected), atol=1e-6)
    np.testing.assert_allclose(found.shares, reference.explained_variance_ratio_, atol=1e-6)
    farthest = found.places[np.abs(found.places).argmax(axis=0), [0, 1]]
    assert (farthest > 0).all()
    np.testing.assert_array_equal(pca(x).places, found.places)


def test_pca_of_few_and_of_equal_rows():
    """With one picture, one channel, or equal rows: coordinates of 0 and no share, not NaN."""
    for x in (np.ones((1, 5)), np.ones((4, 1)), np.ones((6, 3)), np.zeros((3, 3))):
        found = pca(x)
        assert found.places.shape == (len(x), 2)
        np.testing.assert_allclose(found.places, 0, atol=1e-12)
        assert found.shares == pytest.approx((0, 0), abs=1e-6)
    with pytest.raises(ValueError, match='NaN'):
        pca(np.full((2, 2), np.nan))


def test_a_folder_named_umap_is_no_package(monkeypatch, tmp_path):
    """A folder named umap in the working directory does not count as umap-learn."""
    (tmp_path / 'umap').mkdir()
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    assert not plane.umap_installed()


def test_umap_that_is_not_installed_is_said(monkeypatch):
    """Without umap-learn the error says how to install it."""
    monkeypatch.setattr(plane.importlib.util, 'find_spec', lambda name: None)
    assert not plane.umap_installed()
    with pytest.raises(UserError, match='pip install'):
        umap(groups()[0])


def test_umap_is_asked_for_cosine_and_one_seed(monkeypatch):
    """UMAP gets features, cosine metric, seed, and at most as many neighbours as exist."""
    asked = {}

    class Layout:
        def __init__(self, **options):
            asked.update(options)

        def fit_transform(self, x):
            return x[:, :2]

    monkeypatch.setitem(sys.modules, 'umap', type(sys)('umap'))
    sys.modules['umap'].UMAP = Layout
    monkeypatch.setattr(plane, 'umap_installed', lambda: True)
    x, _ = groups(8)
    places = umap(x, seed=3)
    np.testing.assert_array_equal(places, x[:, :2])
    assert places.dtype == np.float64
    assert asked == {'n_neighbors': 7, 'metric': 'cosine', 'random_state': 3, 'n_jobs': 1}
    with pytest.raises(UserError, match='needs at least 4'):
        umap(x[:3])


def test_umap_keeps_groups_together():
    """The real UMAP, if installed, is deterministic and keeps groups apart."""
    pytest.importorskip('umap')
    x, labels = groups(60)
    places = umap(x)
    np.testing.assert_array_equal(places, umap(x))
    distances = np.linalg.norm(places[:, None] - places, axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert np.mean(labels[distances.argmin(axis=1)] == labels) > 0.9
