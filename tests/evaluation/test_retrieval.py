"""Recall of the other view against a sort of all pictures, and ties that are counted fairly."""

from __future__ import annotations

import numpy as np
import pytest

from byol_jax.evaluation.retrieval import recall


def recall_by_sorting(view1, view2, k):
    """The share of queries whose own index is among the first k of all, sorted by cosine."""
    hits = 0
    for index, query in enumerate(view1):
        cosines = [query @ other / np.linalg.norm(query) / np.linalg.norm(other) for other in view2]
        hits += index in np.argsort(cosines)[::-1][:k]
    return hits / len(view1)


@pytest.mark.parametrize('block', [1024, 17, 1])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_recall_is_what_sorting_finds(block, dtype):
    """Recall at 1, 5 and 20 of noisy views, whatever their lengths and the size of a block."""
    rng = np.random.default_rng(0)
    view1 = rng.normal(size=(100, 8))
    view2 = (view1 + rng.normal(size=(100, 8))) * rng.uniform(0.1, 10, (100, 1))
    view1, view2 = view1.astype(dtype), view2.astype(dtype)
    found = recall(view1, view2, (1, 5, 20), block)
    expected = {k: recall_by_sorting(view1, view2, k) for k in (1, 5, 20)}
    assert found == pytest.approx(expected)
    assert 0.05 < found[1] < found[5] < found[20] < 1


def test_equal_views_are_always_found():
    """A view that equals its query is the nearest of all."""
    view = np.random.default_rng(0).normal(size=(50, 6))
    assert recall(view, 2 * view) == {1: 1.0, 5: 1.0}


def test_opposite_views_are_never_found():
    """A view opposite to its query is the last of all."""
    angles = np.arange(12) * 2 * np.pi / 12
    view = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert recall(view, -view, (1, 11, 12)) == pytest.approx({1: 0, 11: 0, 12: 1})


@pytest.mark.parametrize('value', [0.0, 0.3])
@pytest.mark.parametrize('block', [1024, 7])
def test_collapsed_features_score_chance(value, block):
    """Features that are all the same, or all zeros, find the other view k times in N."""
    view = value * np.tile(np.linspace(-1, 2, 17), (40, 1))
    chance = pytest.approx({1: 1 / 40, 5: 5 / 40, 100: 1})
    assert recall(view, view, (1, 5, 100), block) == chance
    # Lengths that differ leave unit rows that differ in their last bit.
    lengths = np.random.default_rng(0).uniform(0.1, 10, (40, 1))
    assert recall(view * lengths, view[::-1] / lengths, (1, 5, 100), block) == chance


def test_ties_count_their_expected_value():
    """Two copies of a picture find each other as often as themselves: half the time at k = 1."""
    view = np.eye(3)[[0, 0, 1, 2]]
    assert recall(view, view, (1, 2)) == pytest.approx({1: (0.5 + 0.5 + 1 + 1) / 4, 2: 1})
    # Behind one that is nearer: places 2 and 3 are drawn for, so k = 2 has one half.
    queries, pool = np.array([[1.0, 0]] * 3), np.array([[1.0, 1], [1, 1], [1, 0]])
    assert recall(queries, pool, (1, 2, 3)) == pytest.approx(
        {1: 1 / 3, 2: (0.5 + 0.5 + 1) / 3, 3: 1}
    )


def test_a_rotation_and_an_order_change_nothing():
    """Both views rotated alike, or both in another order, are found as often."""
    rng = np.random.default_rng(1)
    view1 = rng.normal(size=(60, 5))
    view2 = view1 + 0.8 * rng.normal(size=(60, 5))
    turn, order = np.linalg.qr(rng.normal(size=(5, 5)))[0], rng.permutation(60)
    expected = pytest.approx(recall(view1, view2))
    assert recall(view1 @ turn, view2 @ turn) == expected
    assert recall(view1[order], view2[order]) == expected


def test_unusable_input_is_refused():
    """NaN, unequal shapes and a k below 1."""
    view = np.ones((4, 3))
    with pytest.raises(ValueError, match='view 1: 4 of 4 hold NaN'):
        recall(np.nan * view, view)
    with pytest.raises(ValueError, match='different shapes'):
        recall(view, view[:3])
    with pytest.raises(ValueError, match='k of at least 1'):
        recall(view, view, (0, 1))
