"""The features of a source, and the protocol of the before/after table."""

from __future__ import annotations

import numpy as np
import pytest
from colours import CLASSES, Colours, labelled, measured, one_hot_of_label, options_with

from byol_jax.evaluation.features import encode_source
from byol_jax.evaluation.monitors import unit_std
from byol_jax.evaluation.table import describe
from byol_jax.sources.data import Data


def test_encode_source_pads_the_last_batch():
    """The encoder always gets full batches of the right size; padding gives no features."""
    colours = np.arange(21).reshape(7, 3)
    calls = []

    def encode(images):
        calls.append(images)
        return images.mean(axis=(1, 2))

    seen = []
    features, indices, bad = encode_source(
        encode,
        Colours(colours),
        'image',
        image_size=8,
        crop_fraction=1.0,
        batch_size=4,
        progress=lambda *x: seen.append(x),
    )
    assert seen == [('features', 4, 7), ('features', 7, 7)]
    assert (indices.tolist(), bad) == (list(range(7)), [])
    assert [call.shape for call in calls] == [(4, 8, 8, 3)] * 2
    assert all(call.dtype == np.uint8 for call in calls)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, colours)
    np.testing.assert_array_equal(calls[1][3], np.zeros((8, 8, 3)))


def test_unit_std_known_answers():
    """Equal directions have a std of 0; opposite and orthogonal ones their known values."""
    assert unit_std(np.array([[1.0, 2.0], [3.0, 6.0]])) == pytest.approx(0, abs=1e-12)
    assert unit_std(np.array([[1.0, 0.0], [-5.0, 0.0]])) == pytest.approx(0.5)
    assert unit_std(np.eye(4)) == pytest.approx(np.sqrt(3) / 4)
    random = np.random.default_rng(0).normal(size=(4096, 64))
    assert unit_std(random) == pytest.approx(1 / 8, rel=0.01)


def test_perfect_features_have_accuracy_one():
    """An encoder that tells the classes apart classifies every held-out picture correctly."""
    data = Data(labelled(40, 0), labelled(13, 1))
    options = options_with(knn_k=(3,))
    found = measured(one_hot_of_label, data, options)
    assert found.accuracy == 1.0
    assert found.feature_std == pytest.approx(0.4, rel=0.05)
    assert (len(found.gallery), len(found.queries)) == (40, 13)
    assert 'Each of 13 held-out pictures' in describe(found, options)


def test_useless_features_have_the_accuracy_of_a_constant():
    """An encoder that sees no difference always predicts the same class."""
    data = Data(labelled(40, 0), labelled(20, 1))
    found = measured(lambda images: np.ones((4, 3), np.float32), data, options_with(knn_k=(40,)))
    assert found.accuracy == pytest.approx(1 / CLASSES)
    assert found.feature_std == pytest.approx(0, abs=1e-7)


def test_wrong_labels_are_counted():
    """The accuracy is the share of right answers: with one wrong in four it is 0.75."""
    gallery = labelled(40, 0)
    queries = Colours([[0, 0, 0], [50, 0, 0], [100, 0, 0], [150, 0, 0]], np.array([0, 1, 2, 4]))
    found = measured(one_hot_of_label, Data(gallery, queries), options_with(knn_k=(3,)))
    assert found.accuracy == 0.75


def test_unlabelled_data_has_no_accuracy():
    """Without labels there is no accuracy, but there are neighbours."""
    rng = np.random.default_rng(0)
    data = Data(*(Colours(rng.integers(0, 256, (n, 3))) for n in (12, 5)))
    options = options_with(knn_k=(2,))
    found = measured(lambda images: images.mean(axis=(1, 2)), data, options)
    assert found.accuracy is None
    assert found.neighbours.indices.shape == (5, 2)
    assert 'No accuracy' in describe(found, options)


@pytest.mark.parametrize(('count', 'gallery', 'queries'), [(30, 22, 8), (5, 5, 5)])
def test_nothing_held_out(count, gallery, queries):
    """Without held-out pictures, a few training pictures are queries, and there is no accuracy."""
    data = Data(labelled(count, 0), labelled(0, 1))
    found = measured(one_hot_of_label, data, options_with(knn_k=(3,)))
    assert found.accuracy is None
    assert (len(found.gallery), len(found.queries)) == (gallery, queries)
    if gallery > queries:
        names = [{s.name(i) for i in range(len(s))} for s in (found.gallery, found.queries)]
        assert not names[0] & names[1]


def test_large_data_is_thinned_evenly():
    """At most max_gallery and max_queries pictures are compared, evenly spaced over all."""
    data = Data(labelled(40, 0), labelled(20, 1))
    found = measured(
        one_hot_of_label, data, options_with(knn_k=(1,), max_gallery=10, max_queries=5)
    )
    assert (len(found.gallery), len(found.queries)) == (10, 5)
    assert [found.queries.name(i) for i in (0, 4)] == ['colour 0', 'colour 19']
    assert len(found.gallery.labels) == 10
