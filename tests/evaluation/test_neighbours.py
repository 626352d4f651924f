"""Nearest neighbours against scikit-learn, recall against a sort, and fair counts of ties."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from byol_jax.evaluation.neighbours import (
    Neighbours,
    classify,
    knn_accuracy,
    nearest,
    recall,
    top_k,
)

CLASSES = 5
TEMPERATURE = 0.07


@pytest.fixture(scope='module')
def features():
    """Random gallery [200, 16], queries [61, 16] of different lengths, and the gallery's labels."""
    rng = np.random.default_rng(0)
    gallery, queries = (rng.normal(size=(n, 16)) * rng.uniform(0.1, 10, (n, 1)) for n in (200, 61))
    return gallery, queries, rng.integers(0, CLASSES, 200)


@pytest.mark.parametrize('k', [1, 20, 200])
@pytest.mark.parametrize('block', [1024, 7])
def test_neighbours_and_votes_match_scikit_learn(features, k, block):
    """Neighbours, cosines and weighted votes equal KNeighborsClassifier's, with any block size."""
    gallery, queries, labels = features
    sklearn = KNeighborsClassifier(
        k,
        metric='cosine',
        algorithm='brute',
        weights=lambda distance: np.exp((1 - distance) / TEMPERATURE),
    ).fit(gallery, labels)
    distances, indices = sklearn.kneighbors(queries)
    found = nearest(gallery, queries, k, block)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.cosines, 1 - distances, atol=1e-6)
    predicted = classify(found, labels, TEMPERATURE, CLASSES)
    np.testing.assert_array_equal(predicted, sklearn.predict(queries))


def test_the_order_of_the_gallery_is_not_kept():
    """Memory is that of one block of cosines, however many queries there are."""
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(20_000, 4)), rng.normal(size=(768, 4))
    tracemalloc.start()
    found = nearest(gallery, queries, 20, block=256)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    block = 4 * 256 * 20_000
    assert kept < found.indices.nbytes + found.cosines.nbytes + 10_000
    # The next block is made while the last one is still there.
    assert peak < 3 * block


def test_accuracy_of_plain_arrays(features):
    """The share of right votes; a label that no gallery picture has counts as wrong."""
    gallery, queries, labels = features
    found = nearest(gallery, queries, 20)
    truth = classify(found, labels, TEMPERATURE, CLASSES)
    assert knn_accuracy(gallery, labels, queries, truth) == 1
    truth[:15] = CLASSES + 3
    assert knn_accuracy(gallery, labels, queries, truth) == pytest.approx(46 / 61)
    with pytest.raises(ValueError, match='query labels: 61 integers'):
        knn_accuracy(gallery, labels, queries, truth[1:])
    with pytest.raises(ValueError, match='0 or more, got -1'):
        knn_accuracy(gallery, labels - 1, queries, truth)


def test_the_temperature_matters():
    """With a low temperature the nearest neighbour decides, with a high one the majority."""
    neighbours = Neighbours(np.array([[0, 1, 2]]), np.array([[0.9, 0.8, 0.8]], np.float32))
    labels = np.array([1, 0, 0])
    assert classify(neighbours, labels, 0.01, 2) == [1]
    assert classify(neighbours, labels, 1.0, 2) == [0]


def test_a_tiny_temperature_does_not_overflow():
    """Votes stay finite at any temperature; the nearest neighbour wins."""
    neighbours = Neighbours(np.array([[0, 1]]), np.array([[0.9, 0.8]], np.float32))
    assert classify(neighbours, np.array([1, 0]), 1e-4, 2) == [1]


def test_equal_cosines_come_in_gallery_order():
    """Of equally near pictures, the lower index comes first, for any gallery size."""
    lengths = 2.0 ** (np.arange(300) % 5)
    gallery = np.eye(3)[np.arange(300) % 3] * lengths[:, None]
    found = nearest(gallery, np.array([[0, 1, 0]]), 200)
    others = np.flatnonzero(np.arange(300) % 3 != 1)
    np.testing.assert_array_equal(found.indices[0, :100], np.arange(1, 300, 3))
    np.testing.assert_array_equal(found.indices[0, 100:], others[:100])
    np.testing.assert_array_equal(found.cosines[0], np.repeat([1, 0], 100))


def test_equal_votes_go_to_the_lowest_label():
    """Of equally voted labels the lowest is predicted."""
    neighbours = Neighbours(np.array([[0, 1]]), np.array([[0.5, 0.5]], np.float32))
    assert classify(neighbours, np.array([3, 1]), TEMPERATURE, 5) == [1]


def test_more_neighbours_than_pictures():
    """A k above the gallery's size means the whole gallery."""
    found = nearest(np.eye(3), np.eye(3)[:2], 20)
    assert found.indices.shape == found.cosines.shape == (2, 3)
    np.testing.assert_array_equal(found.indices[:, 0], [0, 1])


def test_a_zero_feature_is_no_neighbour_of_anything():
    """A feature vector of zeros has cosine 0 with everything, not NaN."""
    found = nearest(np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 0.0]]), 2)
    np.testing.assert_array_equal(found.indices, [[1, 0], [0, 1]])
    np.testing.assert_allclose(found.cosines, [[np.sqrt(0.5), 0], [0, 0]], atol=1e-6)


def recall_by_sorting(view1, view2, k):
    """The share of queries whose own index is among the first k when all are sorted by cosine."""
    hits = 0
    for index, query in enumerate(view1):
        cosines = [query @ other / np.linalg.norm(query) / np.linalg.norm(other) for other in view2]
        hits += index in np.argsort(cosines)[::-1][:k]
    return hits / len(view1)


@pytest.mark.parametrize('block', [1024, 17, 1])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_recall_is_what_sorting_finds(block, dtype):
    """Recall at 1, 5 and 20 of noisy views, for any lengths and block size."""
    rng = np.random.default_rng(0)
    view1 = rng.normal(size=(100, 8))
    view2 = (view1 + rng.normal(size=(100, 8))) * rng.uniform(0.1, 10, (100, 1))
    view1, view2 = view1.astype(dtype), view2.astype(dtype)
    found = recall(view1, view2, (1, 5, 20), block)
    expected = {k: recall_by_sorting(view1, view2, k) for k in (1, 5, 20)}
    assert found == pytest.approx(expected)
    assert 0.05 < found[1] < found[5] < found[20] < 1


def test_equal_views_are_always_found():
    """A view that equals its query is always the nearest."""
    view = np.random.default_rng(0).normal(size=(50, 6))
    assert recall(view, 2 * view) == {1: 1.0, 5: 1.0}


def test_opposite_views_are_never_found():
    """A view opposite to its query is always the last."""
    angles = np.arange(12) * 2 * np.pi / 12
    view = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert recall(view, -view, (1, 11, 12)) == pytest.approx({1: 0, 11: 0, 12: 1})


@pytest.mark.parametrize('value', [0.0, 0.3])
@pytest.mark.parametrize('block', [1024, 7])
def test_collapsed_features_score_chance(value, block):
    """If all features are the same, or zeros, the other view is found k times in N."""
    view = value * np.tile(np.linspace(-1, 2, 17), (40, 1))
    chance = pytest.approx({1: 1 / 40, 5: 5 / 40, 100: 1})
    assert recall(view, view, (1, 5, 100), block) == chance
    # Rows of different lengths differ in the last bit when scaled to unit length.
    lengths = np.random.default_rng(0).uniform(0.1, 10, (40, 1))
    assert recall(view * lengths, view[::-1] / lengths, (1, 5, 100), block) == chance


def test_ties_count_their_expected_value():
    """Two copies of a picture find each other as often as themselves: half of the time at k = 1."""
    view = np.eye(3)[[0, 0, 1, 2]]
    assert recall(view, view, (1, 2)) == pytest.approx({1: (0.5 + 0.5 + 1 + 1) / 4, 2: 1})
    # One is nearer, so two share places 2 and 3: at k = 2 each counts one half.
    queries, pool = np.array([[1.0, 0]] * 3), np.array([[1.0, 1], [1, 1], [1, 0]])
    assert recall(queries, pool, (1, 2, 3)) == pytest.approx(
        {1: 1 / 3, 2: (0.5 + 0.5 + 1) / 3, 3: 1}
    )


def test_a_rotation_and_an_order_change_nothing():
    """If both views are rotated or reordered alike, they are found as often."""
    rng = np.random.default_rng(1)
    view1 = rng.normal(size=(60, 5))
    view2 = view1 + 0.8 * rng.normal(size=(60, 5))
    turn, order = np.linalg.qr(rng.normal(size=(5, 5)))[0], rng.permutation(60)
    expected = pytest.approx(recall(view1, view2))
    assert recall(view1 @ turn, view2 @ turn) == expected
    assert recall(view1[order], view2[order]) == expected


def test_unusable_views_are_refused():
    """NaN, unequal shapes and a k below 1."""
    view = np.ones((4, 3))
    with pytest.raises(ValueError, match='view 1: 4 of 4 hold NaN'):
        recall(np.nan * view, view)
    with pytest.raises(ValueError, match='different shapes'):
        recall(view, view[:3])
    with pytest.raises(ValueError, match='k of at least 1'):
        recall(view, view, (0, 1))


@pytest.mark.parametrize('k', [1, 2, 5, 7])
def test_top_k_is_scikit_learns(k):
    """For scores without ties it equals scikit-learn's value."""
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 7)), rng.integers(0, 7, 200)
    expected = top_k_accuracy_score(labels, scores, k=k, labels=range(7)) if k < 7 else 1
    assert top_k(scores, labels, k) == pytest.approx(expected)


def test_equal_scores_count_their_expected_value():
    """A constant score counts k / C for any labels, also if all have one class."""
    for label in (0, 3):
        labels = np.full(10, label)
        assert top_k(np.ones((10, 4)), labels, 1) == pytest.approx(1 / 4)
        assert top_k(np.ones((10, 4)), labels, 3) == pytest.approx(3 / 4)
    assert top_k(np.ones((10, 4)), labels, 5) == 1
    assert top_k(np.array([[2.0, 1, 1]]), np.array([1]), 2) == pytest.approx(0.5)


def test_scores_that_are_no_numbers_are_wrong():
    """A row with NaN or infinity counts as wrong at every k."""
    scores = np.array([[np.nan, 0.0], [np.inf, 0.0], [1.0, 0.0], [-np.inf, 0.0]])
    for k in (1, 2):
        assert top_k(scores, np.zeros(4, int), k) == 1 / 4
