"""k-means on the sphere and mutual information, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from byol_jax.evaluation.clustering import clustering_score, k_means, mutual_information


@pytest.fixture(scope='module')
def groups():
    """Features [120, 8] of different lengths, in four groups of directions, and the groups."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 4
    features = np.eye(8)[labels] + 0.05 * rng.normal(size=(120, 8))
    return (features * rng.uniform(0.01, 100, (120, 1))).astype(np.float32), labels


def information_by_definition(labels1, labels2):
    """I(A; B) / ((H(A) + H(B)) / 2) from the joint distribution."""
    joint = np.zeros((labels1.max() + 1, labels2.max() + 1))
    np.add.at(joint, (labels1, labels2), 1 / len(labels1))

    def entropy(p):
        return -np.sum(p[p > 0] * np.log(p[p > 0]))

    one, other, both = entropy(joint.sum(1)), entropy(joint.sum(0)), entropy(joint.ravel())
    return 2 * (one + other - both) / (one + other)


def test_mutual_information_is_its_definition():
    """For random labellings it equals the definition and scikit-learn's value."""
    rng = np.random.default_rng(0)
    labels1, labels2 = rng.integers(0, 5, 300), rng.integers(0, 3, 300)
    labels2[:150] = labels1[:150] % 3
    found = mutual_information(labels1, labels2)
    assert found == pytest.approx(information_by_definition(labels1, labels2), rel=1e-10)
    assert found == pytest.approx(normalized_mutual_info_score(labels1, labels2), rel=1e-12)
    assert 0.05 < found < 0.9


def test_mutual_information_known_answers():
    """1 for the same groups with other names, 0 for independent groups and for a single group."""
    labels = np.repeat(np.arange(4), 6)
    assert mutual_information(labels, (labels + 1) % 4) == pytest.approx(1)
    assert mutual_information(labels, np.tile(np.arange(3), 8)) == pytest.approx(0, abs=1e-12)
    assert mutual_information(labels, np.zeros(24, int)) == pytest.approx(0, abs=1e-12)
    assert mutual_information(labels, np.arange(24)) < 1


def test_groups_of_directions_are_found(groups):
    """k-means finds the groups, whatever the lengths of the features."""
    features, labels = groups
    found = k_means(features, 4, seed=0)
    assert found.assignments.shape == (120,)
    assert found.assignments.dtype == np.int64
    assert mutual_information(found.assignments, labels) == pytest.approx(1)
    assert clustering_score(features, labels, seed=0) == pytest.approx(1)
    assert 0 < clustering_score(features, labels, seed=0, k=2) < 0.9


def test_the_inertia_is_the_squared_distance_to_the_centres(groups):
    """The inertia is the sum of squared distances of unit rows to the mean of their cluster."""
    features, _ = groups
    found = k_means(features, 4, seed=0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    parts = [unit[found.assignments == cluster] for cluster in range(4)]
    expected = sum(np.sum((part - part.mean(axis=0)) ** 2) for part in parts)
    assert found.inertia == pytest.approx(expected, rel=1e-4)


def test_more_restarts_are_never_worse():
    """Of several restarts the one with the lowest inertia is kept; the seed determines them."""
    features = np.random.default_rng(1).normal(size=(150, 6))
    inertias = [k_means(features, 12, seed=0, restarts=n).inertia for n in (1, 10)]
    assert inertias[1] < inertias[0]
    again, other = (k_means(features, 12, seed=s).assignments for s in (0, 1))
    np.testing.assert_array_equal(again, k_means(features, 12, seed=0).assignments)
    assert np.any(again != other)


def test_random_features_have_no_groups():
    """Clusters of noise share almost no information with the labels."""
    rng = np.random.default_rng(2)
    assert clustering_score(rng.normal(size=(300, 16)), np.arange(300) % 5, seed=0) < 0.08


@pytest.mark.parametrize('value', [0.0, 2.5])
def test_collapsed_features_are_one_cluster(value):
    """Equal features fall into one cluster, which shares no information with the labels."""
    labels = np.arange(30) % 3
    features = np.full((30, 4), value)
    assert len(np.unique(k_means(features, 3, seed=0).assignments)) == 1
    assert clustering_score(features, labels, seed=0) == pytest.approx(0, abs=1e-12)


def test_unusable_input_is_refused(groups):
    """NaN, too many clusters, and labels of another number or type are errors."""
    features, labels = groups
    with pytest.raises(ValueError, match='NaN'):
        k_means(np.full((5, 2), np.nan), 2, seed=0)
    for k in (0, 121):
        with pytest.raises(ValueError, match='k must be 1 to 120'):
            k_means(features, k, seed=0)
    with pytest.raises(ValueError, match='120 integers'):
        clustering_score(features, labels[:-1], seed=0)
    with pytest.raises(ValueError, match='integers'):
        mutual_information(labels, labels.astype(float))
    with pytest.raises(ValueError, match='needs labels, got none'):
        mutual_information(np.array([], int), np.array([], int))
