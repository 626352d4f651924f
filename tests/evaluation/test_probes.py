"""Logistic and ridge regression, the choice of a penalty, and what all linear probes share."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from byol_jax.evaluation.features import Labelled, checked_labelled
from byol_jax.evaluation.neighbours import top_k
from byol_jax.evaluation.probes import (
    PENALTIES,
    LinearModel,
    best,
    held_out_rows,
    logistic_probe,
    result_on,
    ridge_probe,
)

PROBES = [logistic_probe, ridge_probe]
N, D, C = 300, 12, 4


def labelled(seed, spread=1.0, shift=0.0, scale=1.0):
    """Gaussian classes around fixed centres, which overlap more the larger the spread."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, N)
    centres = np.random.default_rng(99).normal(size=(C, D))
    features = centres[labels] + spread * rng.normal(size=(N, D))
    return Labelled((shift + scale * features).astype(np.float32), labels)


@pytest.mark.parametrize('probe', PROBES)
def test_separable_classes_are_told_apart(probe):
    """Well separated classes are all recognised, for any shift and scale of the features."""
    for shift, scale in ((0, 1), (1000, 1), (-3, 1e-4)):
        data = [labelled(seed, 0.2, shift, scale) for seed in (0, 1)]
        found = probe(*data, classes=C)
        assert (found.top1, found.top5) == (1, 1)
        assert set(found.held_out) == set(PENALTIES)
        assert max(found.held_out.values()) == 1


@pytest.mark.parametrize('probe', PROBES)
def test_random_labels_score_chance(probe):
    """Labels independent of the features are guessed about once in C."""
    rng = np.random.default_rng(0)
    train, test = (labelled(seed)._replace(labels=rng.integers(0, C, N)) for seed in (0, 1))
    assert probe(train, test, classes=C).top1 == pytest.approx(1 / C, abs=0.08)


@pytest.mark.parametrize('probe', PROBES)
def test_the_test_labels_choose_nothing(probe):
    """With other test labels and features, penalty and model stay the same bit for bit."""
    train, test = labelled(0, spread=3), labelled(1, spread=3)
    poisoned = Labelled(-test.features, (test.labels + 1) % C)
    found, other = (probe(train, data, classes=C) for data in (test, poisoned))
    assert found.chosen == other.chosen
    assert found.held_out == other.held_out
    for part, same in zip(found.model, other.model, strict=True):
        np.testing.assert_array_equal(part, same)
    assert found.top1 > other.top1


@pytest.mark.parametrize('probe', PROBES)
def test_the_held_out_images_choose_the_penalty(probe):
    """The accuracies are those on the held-out rows only, and the model is fitted to all rows."""
    train, test = labelled(0, spread=3), labelled(1, spread=3)
    by_seed = probe(train, test, classes=C, seed=7)
    given = probe(train, test, classes=C, held_out=held_out_rows(train.labels, seed=7))
    assert by_seed.held_out == given.held_out
    # Held-out images differ from the others, so that using them in the fit would show.
    held = held_out_rows(train.labels, 0.5)
    train.features[held] = 4 * train.features[held] + 3
    found = probe(train, test, classes=C, held_out=held)

    def scores(rows, x, penalty):
        features = train.features[rows].astype(float)
        mean, std = features.mean(axis=0), features.std(axis=0)
        features, labels, x = (features - mean) / std, train.labels[rows], (x - mean) / std
        if probe is ridge_probe:
            return Ridge(alpha=penalty).fit(features, np.eye(C)[labels]).predict(x)
        reference = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=10000)
        return reference.fit(features, labels).decision_function(x)

    for penalty in PENALTIES[6:]:
        of_held = scores(~held, train.features[held], penalty)
        assert found.held_out[penalty] == top_k(of_held, train.labels[held], 1)
    top = max(found.held_out.values())
    assert found.chosen == max(p for p in PENALTIES if found.held_out[p] == top)
    expected = scores(np.ones(N, bool), test.features, found.chosen)
    np.testing.assert_allclose(found.model.scores(test.features), expected, atol=1e-3)


@pytest.mark.parametrize('probe', PROBES)
def test_wrong_held_out_labels_mislead_the_choice_only(probe):
    """Held-out labels do determine the penalty: if all are wrong, the accuracies fall."""
    train, test = labelled(0), labelled(1)
    held = held_out_rows(train.labels)
    turned = np.where(held, (train.labels + 1) % C, train.labels)
    found = probe(train._replace(labels=turned), test, classes=C, held_out=held)
    assert max(found.held_out.values()) < 0.5


@pytest.mark.parametrize('probe', PROBES)
def test_constant_channels_and_missing_classes(probe):
    """A constant channel gets no weight; a class without images is never predicted."""
    train, test = labelled(0, 0.2), labelled(1, 0.2)
    train.features[:, 3] = 1000.1
    test.features[:, 3] = 1000.1
    found = probe(train, test, classes=C)
    assert found.top1 == 1
    assert np.abs(found.model.weights[3]).max() < 1e-3
    fewer = [data._replace(labels=np.minimum(data.labels, C - 2)) for data in (train, test)]
    found = probe(*fewer, classes=C)
    assert found.model.scores(test.features).argmax(axis=1).max() == C - 2


def test_unusable_input_is_refused():
    """Penalties of 0 or none, held-out rows of the wrong kind, features that do not fit."""
    train, test = labelled(0), labelled(1)
    for penalties in ((), (0.0, 1.0), (-1.0,)):
        for probe in PROBES:
            with pytest.raises(ValueError, match='all must be above 0'):
                probe(train, test, classes=C, penalties=penalties)
    for held in (np.zeros(N, bool), np.ones(N, bool), np.zeros(N, int), np.ones(3, bool)):
        with pytest.raises(ValueError, match='held_out must be True or False'):
            ridge_probe(train, test, classes=C, held_out=held)
    with pytest.raises(ValueError, match='test features: 12 channels'):
        ridge_probe(train, Labelled(test.features[:, :3], test.labels), classes=C)
    with pytest.raises(ValueError, match='training labels must be 0 to 1'):
        ridge_probe(train, test, classes=2)


def test_held_out_rows_are_a_share_of_every_class():
    """A tenth of each class, at least one and never all; the seed determines which."""
    labels = np.repeat([0, 1, 2, 3], [100, 50, 3, 1])
    held = held_out_rows(labels)
    assert held.dtype == bool
    assert [held[labels == label].sum() for label in range(4)] == [10, 5, 1, 0]
    np.testing.assert_array_equal(held, held_out_rows(labels, seed=0))
    assert np.any(held != held_out_rows(labels, seed=1))
    half = held_out_rows(labels, 0.5)
    assert [half[labels == label].sum() for label in range(4)] == [50, 25, 2, 0]


def test_held_out_rows_that_cannot_be():
    """A share outside (0, 1), or classes of one image each, are errors."""
    for fraction in (0, 1, -0.1):
        with pytest.raises(ValueError, match='between 0 and 1'):
            held_out_rows(np.zeros(10, int), fraction)
    with pytest.raises(ValueError, match='no class has two'):
        held_out_rows(np.arange(10))


def test_the_best_is_the_first_of_the_highest():
    """Of equal accuracies, the first value wins."""
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
    """NaN, wrong numbers of channels or labels, labels out of range; the data is named."""
    features, labels = np.ones((4, 2)), np.arange(4) % 2
    assert checked_labelled(Labelled(features, labels), 2, 'test', 2).labels.dtype == np.int64
    for data, said in (
        (Labelled(np.nan * features, labels), 'test features: 4 of 4 hold NaN'),
        (Labelled(features[:, :1], labels), '2 channels'),
        (Labelled(features, labels[:3]), 'test labels: 4 integers'),
        (Labelled(features, labels + 1), 'test labels must be 0 to 1, got 1 to 2'),
        (Labelled(features, labels - 1), 'got -1 to 0'),
        (Labelled(features, labels.astype(float)), 'integers'),
    ):
        with pytest.raises(ValueError, match=said):
            checked_labelled(data, 2, 'test', 2)


@pytest.mark.parametrize('probe', PROBES)
def test_two_labels_of_plain_arrays(probe):
    """Two labels, with as many classes as the labels show, and a model of both."""
    train, test = (
        data._replace(labels=data.labels // 2) for data in (labelled(0, 0.2), labelled(1, 0.2))
    )
    found = probe(train, test)
    assert found.model.weights.shape == (D, 2)
    assert found.top1 == top_k(found.model.scores(test.features), test.labels, 1) > 0.95


@pytest.mark.parametrize('probe', PROBES)
def test_labels_without_images_are_never_predicted(probe):
    """With only labels 0 and 2 of four, one of them is predicted, and the other two come last."""
    train, test = (
        data._replace(labels=data.labels // 2 * 2) for data in (labelled(0, 0.2), labelled(1, 0.2))
    )
    found = probe(train, test, classes=C)
    order = np.argsort(found.model.scores(test.features), axis=1)
    assert set(order[:, 2:].ravel()) == {0, 2}
    assert found.top1 > 0.95
