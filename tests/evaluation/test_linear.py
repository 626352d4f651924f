"""BYOL's linear protocol: its steps in NumPy, its minimum, and the choice of the learning rate."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from byol_jax.evaluation.features import Labelled
from byol_jax.evaluation.linear import LEARNING_RATES, linear_evaluation, train_linear
from byol_jax.evaluation.neighbours import top_k

N, D, C = 256, 10, 6


def labelled(seed, spread=1.0, count=N):
    """Gaussian classes around fixed centres, which overlap more the larger the spread."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, count)
    centres = np.random.default_rng(99).normal(size=(C, D))
    return Labelled((centres[labels] + spread * rng.normal(size=(count, D))).astype('f4'), labels)


def shuffled(data, seed):
    """The same features in every epoch, in a new random order."""

    def epoch(number):
        order = np.random.default_rng([seed, number]).permutation(len(data.labels))
        yield Labelled(data.features[order], data.labels[order])

    return epoch


def evaluate(train, held_out, test, **options):
    options = {'classes': C, 'epochs': 40, 'batch_size': 64, **options}
    return linear_evaluation(shuffled(train, 0), len(train.labels), held_out, test, **options)


def train_alone(train, rate, **options):
    options = {'feature_size': D, 'classes': C, 'epochs': 40, 'batch_size': 64, **options}
    return train_linear(shuffled(train, 0), len(train.labels), learning_rates=(rate,), **options)[
        rate
    ]


def sgd_in_numpy(weights, batches, base, momentum):
    """Nesterov's SGD as its authors write it, with a cosine from base x batch
    256, in float64.

    v <- momentum v + g, W <- W - rate (g + momentum v): Sutskever et al. 2013 after the usual
    change of variables; the gradient of softmax cross-entropy is written out.
    """
    bias = np.zeros(weights.shape[1])
    velocities = [np.zeros_like(weights), np.zeros_like(bias)]
    for step, (x, y) in enumerate(batches):
        rate = base * len(y) / 256 * (1 + np.cos(np.pi * step / len(batches))) / 2
        scores = x @ weights + bias
        p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        error = (p - np.eye(p.shape[1])[y]) / len(y)
        gradients = [x.T @ error, error.sum(axis=0)]
        velocities = [momentum * v + g for v, g in zip(velocities, gradients, strict=True)]
        weights, bias = (
            part - rate * (g + momentum * v)
            for part, g, v in zip((weights, bias), gradients, velocities, strict=True)
        )
    return weights, bias


@pytest.mark.parametrize('part', [1000, 7])
def test_training_is_the_papers_sgd(part):
    """Every rate equals Nesterov's SGD in float64 to 1e-4; batches span the ends of epochs."""
    train = labelled(0, count=90)
    seen = [[], []]

    def epoch(number):
        order = np.random.default_rng(number).permutation(90)
        for start in range(0, 90, part):
            rows = order[start : start + part]
            seen[0].extend(train.features[rows])
            seen[1].extend(train.labels[rows])
            yield Labelled(train.features[rows], train.labels[rows])

    rates = (0.4, 2.0)
    found = train_linear(
        epoch,
        90,
        feature_size=D,
        classes=C,
        learning_rates=rates,
        epochs=3,
        batch_size=64,
        momentum=0.9,
        seed=5,
    )
    assert len(seen[0]) == 270
    batches = [
        (np.array(seen[0][i : i + 64], float), np.array(seen[1][i : i + 64]))
        for i in range(0, 256, 64)
    ]
    start = jax.random.truncated_normal(jax.random.key(5), -2, 2, (D, C)) / D**0.5
    for rate in rates:
        weights, bias = sgd_in_numpy(np.asarray(start, float), batches, rate, 0.9)
        np.testing.assert_allclose(found[rate].weights, weights, atol=1e-4)
        np.testing.assert_allclose(found[rate].bias, bias, atol=1e-4)
        assert found[rate].weights.dtype == found[rate].bias.dtype == np.float32
        assert np.abs(weights - start).max() > 0.05


def test_the_protocol_is_the_papers():
    """Appendix C.1: five learning rates, 80 epochs of batches of 1024, momentum 0.9."""
    assert LEARNING_RATES == (0.4, 0.3, 0.2, 0.1, 0.05)
    for function in (linear_evaluation, train_linear):
        defaults = function.__kwdefaults__
        assert defaults['learning_rates'] == LEARNING_RATES
        assert (defaults['epochs'], defaults['batch_size'], defaults['momentum']) == (80, 1024, 0.9)


def test_it_finds_the_minimum_that_scikit_learn_finds():
    """At convergence, loss and predictions are those of unpenalised logistic regression.

    The mean training loss agrees to 1e-3 with scikit-learn's, and 99 of 100 test predictions.
    """
    train, test = labelled(0, 2.0), labelled(1, 2.0)
    found = train_alone(train, 2.0, epochs=600)
    reference = LogisticRegression(C=np.inf, max_iter=10000).fit(train.features, train.labels)

    def loss(scores):
        own = scores[np.arange(N), train.labels]
        return np.mean(np.log(np.exp(scores).sum(axis=1)) - own)

    least = loss(reference.decision_function(train.features))
    assert least == pytest.approx(loss(found.scores(train.features)), abs=1e-3)
    assert 0.3 < least < 1.5
    same = found.scores(test.features).argmax(axis=1) == reference.predict(test.features)
    assert same.mean() >= 0.99


def test_separable_classes_are_told_apart():
    """Well separated classes are all recognised, at top 1 and top 5."""
    found = evaluate(*(labelled(seed, 0.2) for seed in range(3)))
    assert (found.top1, found.top5) == (1, 1)


def test_random_labels_score_chance():
    """With labels independent of the features: 1 in C at top 1, 5 in C at top 5."""
    rng = np.random.default_rng(0)
    data = [labelled(seed, 3)._replace(labels=rng.integers(0, C, N)) for seed in range(3)]
    found = evaluate(*data)
    assert found.top1 == pytest.approx(1 / C, abs=0.08)
    assert found.top5 == pytest.approx(5 / C, abs=0.08)


def test_the_test_set_chooses_nothing():
    """With another test set, the learning rate and the model stay the same bit for bit."""
    train, held_out, test = (labelled(seed, 2) for seed in range(3))
    poisoned = Labelled(-test.features, (test.labels + 1) % C)
    found, other = (evaluate(train, held_out, data) for data in (test, poisoned))
    assert (found.chosen, found.held_out) == (other.chosen, other.held_out)
    for part, same in zip(found.model, other.model, strict=True):
        np.testing.assert_array_equal(part, same)
    assert found.top1 > other.top1


def test_the_held_out_images_choose_the_learning_rate():
    """The rate with the highest held-out accuracy is tested, even if another tests better."""
    train, held_out, test = (labelled(seed, 1.5) for seed in range(3))
    # Such a small rate hardly changes the initial weights.
    rates = (1e-6, 0.4)
    found = evaluate(train, held_out, test, learning_rates=rates)
    assert found.chosen == 0.4
    assert set(found.held_out) == set(rates)
    # These held-out labels are what the untrained classifier predicts.
    untrained = train_alone(train, 1e-6)
    guessed = untrained.scores(held_out.features).argmax(axis=1)
    misled = evaluate(train, held_out._replace(labels=guessed), test, learning_rates=rates)
    assert misled.chosen == 1e-6
    assert misled.held_out[1e-6] > 0.9
    assert misled.top1 < found.top1
    assert found.top1 == top_k(found.model.scores(test.features), test.labels, 1)


def test_rates_are_trained_as_if_alone():
    """A learning rate's model does not depend on the rates trained at the same time."""
    train, held_out, test = (labelled(seed, 2) for seed in range(3))
    rates = (0.4, 0.05)
    found = evaluate(train, held_out, test, learning_rates=rates)
    for rate in rates:
        alone = train_alone(train, rate)
        accuracy = top_k(alone.scores(held_out.features), held_out.labels, 1)
        assert found.held_out[rate] == pytest.approx(accuracy, abs=1 / N)
    np.testing.assert_allclose(found.model.weights, train_alone(train, found.chosen).weights, 1e-4)


def test_the_same_seed_gives_the_same_bits():
    """Equal seeds give equal models; another seed or another order gives another model."""
    train = labelled(0, 2)
    first = train_alone(train, 0.2, epochs=4)
    again, other = (train_alone(train, 0.2, epochs=4, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(first.weights, again.weights)
    assert np.any(first.weights != other.weights)
    reordered = train_linear(
        shuffled(train, 1),
        N,
        feature_size=D,
        classes=C,
        learning_rates=(0.2,),
        epochs=4,
        batch_size=64,
    )
    assert np.any(first.weights != reordered[0.2].weights)


def test_progress_counts_steps():
    """The kind of work, the steps done and the number of all steps, after each step."""
    train, seen = labelled(0), []
    train_alone(train, 0.2, epochs=2, progress=lambda *x: seen.append(x))
    assert seen == [('linear evaluation', step, 8) for step in range(1, 9)]


def test_a_rate_that_diverges_is_not_chosen():
    """A learning rate that overflows float32 gives NaN and loses, but does not stop others."""
    train, held_out, test = (labelled(seed) for seed in range(3))
    found = evaluate(train, held_out, test, learning_rates=(3e38, 0.1), epochs=10)
    assert found.held_out[3e38] == 0
    assert found.chosen == 0.1


def test_unusable_input_is_refused():
    """Epochs of other lengths, too few examples, repeated rates, bad features and labels."""
    train, held_out, test = (labelled(seed) for seed in range(3))
    for options in ({'learning_rates': ()}, {'learning_rates': (0.1, 0.1)}, {'epochs': 0}):
        with pytest.raises(ValueError, match='all different, and at least one step'):
            evaluate(train, held_out, test, **options)
    with pytest.raises(ValueError, match='0 steps'):
        evaluate(train, held_out, test, epochs=2, batch_size=1024)
    with pytest.raises(ValueError, match='epoch 0 has 256 examples, not 200'):
        linear_evaluation(shuffled(train, 0), 200, held_out, test, classes=C, batch_size=64)
    with pytest.raises(ValueError, match='training labels must be 0 to 4'):
        evaluate(
            train, *(data._replace(labels=data.labels % 5) for data in (held_out, test)), classes=5
        )
    nan = Labelled(np.full((N, D), np.nan), train.labels)
    narrow = Labelled(np.ones((N, 3)), train.labels)
    for data, said in ((nan, '256 of 256 hold NaN'), (narrow, '10 channels')):
        with pytest.raises(ValueError, match=f'training features: {said}'):
            evaluate(data, held_out, test)
        with pytest.raises(ValueError, match=f'test features: {said}'):
            evaluate(train, held_out, data)
    with pytest.raises(ValueError, match='held-out features: 256 of 256'):
        evaluate(train, nan, test)
