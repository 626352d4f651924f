"""Accuracy among the first k, the held-out images, and the linear model of a probe."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from byol_jax.evaluation.probe import (
    Labelled,
    LinearModel,
    best,
    checked_labelled,
    held_out_rows,
    result_on,
)
from byol_jax.evaluation.ranking import top_k


@pytest.mark.parametrize('k', [1, 2, 5, 7])
def test_top_k_is_scikit_learns(k):
    """Of scores without ties, as scikit-learn counts them."""
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 7)), rng.integers(0, 7, 200)
    expected = top_k_accuracy_score(labels, scores, k=k, labels=range(7)) if k < 7 else 1
    assert top_k(scores, labels, k) == pytest.approx(expected)


def test_equal_scores_count_their_expected_value():
    """A constant answer scores k / C whatever the labels are, also where all are of one class."""
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


def test_held_out_rows_are_a_share_of_every_class():
    """A tenth of each class, at least one and never all; the seed says which."""
    labels = np.repeat([0, 1, 2, 3], [100, 50, 3, 1])
    held = held_out_rows(labels)
    assert held.dtype == bool
    assert [held[labels == label].sum() for label in range(4)] == [10, 5, 1, 0]
    np.testing.assert_array_equal(held, held_out_rows(labels, seed=0))
    assert np.any(held != held_out_rows(labels, seed=1))
    half = held_out_rows(labels, 0.5)
    assert [half[labels == label].sum() for label in range(4)] == [50, 25, 2, 0]


def test_held_out_rows_that_cannot_be():
    """A share outside (0, 1), or classes of one image each."""
    for fraction in (0, 1, -0.1):
        with pytest.raises(ValueError, match='between 0 and 1'):
            held_out_rows(np.zeros(10, int), fraction)
    with pytest.raises(ValueError, match='no class has two'):
        held_out_rows(np.arange(10))


def test_the_best_is_the_first_of_the_highest():
    """Of equal accuracies the first value tried."""
    assert best({0.4: 0.5, 0.3: 0.7, 0.2: 0.7, 0.1: 0.6}) == 0.3


def test_a_result_is_the_accuracy_of_its_model():
    """top1 and top5 are those of the scores x W + b on the test set."""
    rng = np.random.default_rng(0)
    model = LinearModel(rng.normal(size=(3, 8)), rng.normal(size=8))
    test = Labelled(rng.normal(size=(50, 3)), rng.integers(0, 8, 50))
    scores = np.array([[row @ w for w in model.weights.T] + model.bias for row in test.features])
    found = result_on(test, model, 0.1, {0.1: 0.9})
    assert found.top1 == top_k(scores, test.labels, 1)
    assert found.top5 == top_k(scores, test.labels, 5)
    assert found.top1 < found.top5 < 1
    assert (found.chosen, found.held_out) == (0.1, {0.1: 0.9})


def test_a_diverged_model_scores_nothing():
    """NaN and infinite weights give scores without a warning, and an accuracy of 0."""
    for value in (np.nan, np.inf):
        model = LinearModel(np.full((2, 3), value), np.zeros(3))
        assert top_k(model.scores(np.array([[1.0, -1.0]])), np.array([0]), 3) == 0


def test_unusable_data_is_refused():
    """NaN, another number of channels or labels, labels out of range: with the data's name."""
    features, labels = np.ones((4, 2)), np.arange(4) % 2
    assert checked_labelled(Labelled(features, labels), 2, 'test', 2).labels.dtype == np.int64
    for data, said in (
        (Labelled(np.nan * features, labels), 'test features: 4 of 4 hold NaN'),
        (Labelled(features[:, :1], labels), '2 channels'),
        (Labelled(features, labels[:3]), 'test labels: 4 whole numbers'),
        (Labelled(features, labels + 1), 'test labels: in 0 to 1, got 1 to 2'),
        (Labelled(features, labels - 1), 'got -1 to 0'),
        (Labelled(features, labels.astype(float)), 'whole numbers'),
    ):
        with pytest.raises(ValueError, match=said):
            checked_labelled(data, 2, 'test', 2)
