"""Logistic and ridge regression against scikit-learn's, and how a penalty is chosen."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from byol_jax.evaluation.logistic import (
    PENALTIES,
    fit_logistic,
    fit_ridge,
    logistic_probe,
    ridge_probe,
)
from byol_jax.evaluation.probe import Labelled, held_out_rows
from byol_jax.evaluation.ranking import top_k

PROBES = [logistic_probe, ridge_probe]
# One shape for most tests: each is compiled once.
N, D, C = 300, 12, 4


def labelled(seed, spread=1.0, shift=0.0, scale=1.0):
    """Gaussian classes around fixed centres, that overlap the more the larger the spread."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, N)
    centres = np.random.default_rng(99).normal(size=(C, D))
    features = centres[labels] + spread * rng.normal(size=(N, D))
    return Labelled((shift + scale * features).astype(np.float32), labels)


def loss_of(model, data, penalty):
    """The objective of `fit_logistic`, by its definition."""
    scores = data.features.astype(float) @ model.weights + model.bias
    likelihoods = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    own = likelihoods[np.arange(len(scores)), data.labels]
    return -np.log(own).sum() + penalty / 2 * np.sum(model.weights**2)


@pytest.mark.parametrize('penalty', [0.1, 1.0, 100.0])
def test_logistic_regression_is_scikit_learns(penalty):
    """The same objective, coefficients to 1e-3, and every prediction the same."""
    train, test = labelled(0, spread=1.5), labelled(1, spread=1.5)
    found = fit_logistic(train, C, penalty)
    reference = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=10000)
    reference.fit(train.features.astype(float), train.labels)
    assert found.weights.dtype == found.bias.dtype == np.float64
    # Of solutions that differ by a constant over classes, both take the one that sums to 0.
    np.testing.assert_allclose(found.weights, reference.coef_.T, atol=1e-3)
    np.testing.assert_allclose(found.bias, reference.intercept_, atol=1e-3)
    np.testing.assert_array_equal(
        found.scores(test.features).argmax(axis=1), reference.predict(test.features.astype(float))
    )
    accuracy = top_k(found.scores(test.features), test.labels, 1)
    assert accuracy == pytest.approx(reference.score(test.features.astype(float), test.labels))
    assert 0.3 < accuracy < 1


def test_logistic_regression_is_at_the_minimum():
    """No small step away from the result lowers the objective."""
    train, rng = labelled(0, spread=1.5), np.random.default_rng(0)
    found = fit_logistic(train, C, 1.0)
    least = loss_of(found, train, 1.0)
    for _ in range(20):
        weights, bias = (part + 1e-3 * rng.normal(size=part.shape) for part in found)
        assert loss_of(type(found)(weights, bias), train, 1.0) > least


@pytest.mark.parametrize('penalty', [1e-3, 1.0, 1000.0])
@pytest.mark.parametrize('rows', [N, D // 2])
def test_ridge_regression_is_scikit_learns(penalty, rows):
    """Coefficients to 1e-6 relative, with more and with fewer images than channels."""
    train = Labelled(*(part[:rows] for part in labelled(0, shift=3)))
    found = fit_ridge(train, C, penalty)
    features = train.features.astype(float)
    reference = Ridge(alpha=penalty, solver='svd').fit(features, np.eye(C)[train.labels])
    np.testing.assert_allclose(found.weights, reference.coef_.T, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.scores(features), reference.predict(features), rtol=1e-6)


@pytest.mark.parametrize('probe', PROBES)
def test_separable_classes_are_told_apart(probe):
    """Well separated classes are all found, of any shift and scale of the features."""
    for shift, scale in ((0, 1), (1000, 1), (-3, 1e-4)):
        data = [labelled(seed, 0.2, shift, scale) for seed in (0, 1)]
        found = probe(*data, classes=C)
        assert (found.top1, found.top5) == (1, 1)
        assert set(found.held_out) == set(PENALTIES)
        assert max(found.held_out.values()) == 1


@pytest.mark.parametrize('probe', PROBES)
def test_random_labels_score_chance(probe):
    """Labels that have nothing to do with the features are guessed at about 1 in C."""
    rng = np.random.default_rng(0)
    train, test = (labelled(seed)._replace(labels=rng.integers(0, C, N)) for seed in (0, 1))
    assert probe(train, test, classes=C).top1 == pytest.approx(1 / C, abs=0.08)


@pytest.mark.parametrize('probe', PROBES)
def test_the_test_labels_choose_nothing(probe):
    """With other test labels and features the penalty and the model stay the same to the bit."""
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
    """The accuracies are those on the held-out rows alone, and the model is fitted to all rows."""
    train, test = labelled(0, spread=3), labelled(1, spread=3)
    by_seed = probe(train, test, classes=C, seed=7)
    given = probe(train, test, classes=C, held_out=held_out_rows(train.labels, seed=7))
    assert by_seed.held_out == given.held_out
    # Held-out images unlike the others, so that any use of them in the fit would show.
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
    """Held-out labels do steer the penalty: with all of them turned, the accuracies fall."""
    train, test = labelled(0), labelled(1)
    held = held_out_rows(train.labels)
    turned = np.where(held, (train.labels + 1) % C, train.labels)
    found = probe(train._replace(labels=turned), test, classes=C, held_out=held)
    assert max(found.held_out.values()) < 0.5


@pytest.mark.parametrize('probe', PROBES)
def test_constant_channels_and_missing_classes(probe):
    """A constant channel carries no weight; a class without images is never predicted."""
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
            with pytest.raises(ValueError, match='penalties must be above 0'):
                probe(train, test, classes=C, penalties=penalties)
    with pytest.raises(ValueError, match='penalties'):
        fit_logistic(train, C, 0)
    for held in (np.zeros(N, bool), np.ones(N, bool), np.zeros(N, int), np.ones(3, bool)):
        with pytest.raises(ValueError, match='held_out must say'):
            ridge_probe(train, test, classes=C, held_out=held)
    with pytest.raises(ValueError, match='test features: 12 channels'):
        ridge_probe(train, Labelled(test.features[:, :3], test.labels), classes=C)
    with pytest.raises(ValueError, match='training labels: in 0 to 1'):
        ridge_probe(train, test, classes=2)
