"""RankMe, LiDAR, alignment and uniformity on constructed features with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from byol_jax.evaluation.monitors import alignment, lidar, mean_cosine, rank_me, uniformity


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def orthonormal(rng, size, count=None):
    """float64 [size, count], orthonormal columns in random directions."""
    return np.linalg.qr(rng.normal(size=(size, count or size)))[0]


def with_singular_values(rng, count, size, sigma):
    return orthonormal(rng, count, len(sigma)) * sigma @ orthonormal(rng, size, len(sigma)).T


# --- RankMe


def test_rank_me_is_the_papers_equation(rng):
    """p_k = sigma_k / ||sigma||_1 + epsilon, over min(N, D) singular values, exp of the entropy."""
    features = rng.normal(size=(50, 8)) * np.arange(1, 9)
    sigma = np.sqrt(np.linalg.eigvalsh(features.T @ features))
    for epsilon in (1e-7, 1e-2):
        p = sigma / sigma.sum() + epsilon
        expected = np.exp(-np.sum(p * np.log(p)))
        assert rank_me(features, epsilon) == pytest.approx(expected, rel=1e-12)
    assert rank_me(features) == rank_me(features, 1e-7)


def test_rank_me_of_an_isotropic_gaussian_is_near_its_size(rng):
    """Features that use all directions equally have a rank just below D, nearer for larger N."""
    few, many = (rank_me(rng.normal(size=(n, 64))) for n in (640, 64000))
    assert 60 < few < many < 64
    assert many == pytest.approx(64, rel=1e-3)


@pytest.mark.parametrize('rank', [1, 2, 5, 17])
def test_rank_me_of_equal_singular_values_is_their_number(rng, rank):
    """Features that use r of 32 directions equally have rank r, also in float32."""
    features = with_singular_values(rng, 200, 32, np.full(rank, 7.0))
    assert rank_me(features, 0) == pytest.approx(rank, rel=1e-10)
    assert rank_me(features) == pytest.approx(rank, rel=1e-4)
    assert rank_me(features.astype(np.float32)) == pytest.approx(rank, rel=1e-4)


def test_rank_me_of_unequal_singular_values(rng):
    """Two directions with weights 3 : 1 count as exp of the entropy of (3/4, 1/4)."""
    features = with_singular_values(rng, 20, 6, np.array([3.0, 1.0]))
    assert rank_me(features, 0) == pytest.approx(np.exp(stats.entropy([0.75, 0.25])), rel=1e-10)


@pytest.mark.parametrize('features', [np.full((30, 8), 3.5), np.zeros((30, 8)), np.ones((1, 8))])
def test_collapsed_features_have_rank_one(features):
    """A constant, zeros and a single picture have rank 1, without an error."""
    assert rank_me(features) == pytest.approx(1, abs=2e-5)


def test_rank_me_of_fewer_pictures_than_channels(rng):
    """With N below D the rank is at most N."""
    assert rank_me(with_singular_values(rng, 10, 40, np.ones(10))) == pytest.approx(10, rel=1e-4)


def test_rank_me_does_not_see_order_rotation_or_scale(rng):
    """Permuted rows, a rotation and a common factor do not change the rank; a shift does."""
    features = rng.normal(size=(60, 12)) * np.linspace(0.1, 1, 12)
    rank = rank_me(features)
    for other in (rng.permutation(features), features @ orthonormal(rng, 12), 1e6 * features):
        assert rank_me(other) == pytest.approx(rank, rel=1e-10)
    assert rank_me(features + 5) < rank / 2


# --- LiDAR


def views_of(rng, pictures, views, size, means, noise):
    """Features [n, q, D]: means [n, D] plus noise with mean 0 over a picture's views."""
    noise = noise * rng.normal(size=(pictures, views, size))
    return means[:, None] + noise - noise.mean(axis=1, keepdims=True)


def lidar_by_definition(features, delta, epsilon):
    """The paper's equations one by one: matrices, an inverse square root, eigenvalues, entropy."""
    n, q, size = features.shape
    grand = features.reshape(-1, size).mean(axis=0)
    between, within = np.zeros((size, size)), delta * np.eye(size)
    for picture in features:
        mean = picture.mean(axis=0)
        between += np.outer(mean - grand, mean - grand) / (n - 1)
        for view in picture:
            within += np.outer(view - mean, view - mean) / (n * (q - 1))
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.clip(np.linalg.eigvalsh(root @ between @ root), 0, None)
    p = eigenvalues / eigenvalues.sum() + epsilon
    return np.exp(-np.sum(p * np.log(p)))


@pytest.mark.parametrize(('n', 'q', 'size'), [(40, 5, 6), (5, 3, 12)])
@pytest.mark.parametrize('delta', [1e-4, 0.3])
@pytest.mark.parametrize('block', [256, 7])
def test_lidar_is_the_papers_definition(rng, n, q, size, delta, block):
    """Blockwise whitened means give the same as the LDA matrix, for n above and below D."""
    features = rng.normal(size=(n, 1, size)) + 0.5 * rng.normal(size=(n, q, size))
    features *= np.arange(1, size + 1)
    expected = lidar_by_definition(features, delta, 1e-3)
    assert lidar(features, delta, 1e-3, block) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize('rank', [1, 3, 10])
def test_lidar_counts_the_directions_that_tell_pictures_apart(rng, rank):
    """If means spread equally in r of 16 directions and views equally in all, the rank is r."""
    means = with_singular_values(rng, 400, 16, np.full(rank, 20.0))
    means -= means.mean(axis=0)
    features = views_of(rng, 400, 20, 16, means, 1.0)
    assert lidar(features) == pytest.approx(rank, rel=0.03)


def test_lidar_sees_through_noise_that_rank_me_counts(rng):
    """Views that differ by strong noise raise RankMe to D; LiDAR still finds two directions."""
    means = np.zeros((500, 16))
    means[:, :2] = rng.normal(size=(500, 2))
    features = means[:, None] + rng.normal(size=(500, 50, 16)) * np.where(np.arange(16) < 2, 0.1, 9)
    assert rank_me(features.reshape(-1, 16)) > 13
    assert lidar(features) < 3


def test_lidar_of_collapsed_features_is_one(rng):
    """Pictures that all look the same have rank 1, with and without noise in the views."""
    assert lidar(np.full((20, 4, 8), 2.0)) == pytest.approx(1, abs=1e-5)
    assert lidar(np.zeros((20, 4, 8))) == pytest.approx(1, abs=1e-5)
    features = views_of(rng, 20, 4, 8, np.zeros((20, 8)), 1.0)
    line = features + np.arange(20)[:, None, None]
    assert lidar(line) == pytest.approx(1, rel=1e-3)


def test_lidar_does_not_see_order_shift_or_rotation(rng):
    """Another order of pictures and views, a shift and a rotation do not change it."""
    features = rng.normal(size=(30, 1, 6)) + 0.3 * rng.normal(size=(30, 5, 6))
    rank = lidar(features)
    for other in (
        rng.permutation(features),
        rng.permutation(features, axis=1),
        features + 10,
        features @ orthonormal(rng, 6),
    ):
        assert lidar(other) == pytest.approx(rank, rel=1e-8)
    # Nor does any linear map, if delta is small enough.
    assert lidar(features @ rng.normal(size=(6, 6)), 1e-12) == pytest.approx(
        lidar(features, 1e-12), rel=1e-6
    )
    assert lidar(1e-3 * features, 1e-4) != pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize(
    ('shape', 'delta'), [((1, 5, 4), 1e-4), ((5, 1, 4), 1e-4), ((5, 5, 4), 0.0)]
)
def test_lidar_needs_pairs_and_delta(shape, delta):
    """One picture, one view or a delta of 0 is an error."""
    with pytest.raises(ValueError, match='two pictures, two views'):
        lidar(np.ones(shape), delta)


# --- alignment, uniformity, cosines


def test_alignment_known_answers(rng):
    """0 for equal directions, 2 for orthogonal, 4 for opposite ones; alpha is the exponent."""
    view = rng.normal(size=(20, 5))
    assert alignment(view, view * rng.uniform(0.1, 10, (20, 1))) == pytest.approx(0, abs=1e-12)
    assert alignment(view, -view) == pytest.approx(4)
    assert alignment(np.eye(4), np.roll(np.eye(4), 1, axis=0)) == pytest.approx(2)
    assert alignment(np.eye(4), np.roll(np.eye(4), 1, axis=0), alpha=1) == pytest.approx(2**0.5)
    assert alignment(view, -view, alpha=3) == pytest.approx(8)


def test_alignment_is_two_less_two_cosines(rng):
    """Alignment is 2 - 2 cos of two views, and neither depends on length or rotation."""
    view1, view2 = rng.normal(size=(2, 40, 7))
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(view1, view2, strict=True)
    ]
    assert mean_cosine(view1, view2) == pytest.approx(np.mean(cosines))
    assert alignment(view1, view2) == pytest.approx(2 - 2 * np.mean(cosines))
    turn = orthonormal(rng, 7)
    assert alignment(3 * view1 @ turn, view2 @ turn) == pytest.approx(alignment(view1, view2))


@pytest.mark.parametrize('t', [2, 0.5])
@pytest.mark.parametrize('block', [1024, 37, 1])
def test_uniformity_is_the_mean_over_all_pairs(rng, t, block):
    """With blocks of any size, every pair of different rows counts once."""
    features = rng.normal(size=(100, 6)) * rng.uniform(0.1, 10, (100, 1))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    kernel = [np.exp(-t * np.sum((unit[i] - unit[j]) ** 2)) for i in range(100) for j in range(i)]
    assert uniformity(features, t, block) == pytest.approx(np.log(np.mean(kernel)), rel=1e-12)


@pytest.mark.parametrize('t', [0.5, 2])
def test_uniformity_on_the_circle_is_the_integral(t):
    """N points evenly on a circle have log(e^-2t I0(2t)), without the diagonal."""
    count = 200
    angles = np.arange(count) * 2 * np.pi / count
    found = uniformity(np.stack([np.cos(angles), np.sin(angles)], axis=1), t)
    # The mean of exp(-t (2 - 2 cos a)) over the circle; for N even points it is exact to 1e-300.
    integral = np.exp(-2 * t) * special.i0(2 * t)
    assert found == pytest.approx(np.log((count * integral - 1) / (count - 1)), rel=1e-10)
    assert found == pytest.approx(np.log(integral), abs=0.02)


def test_uniformity_of_many_dimensions_and_of_collapse(rng):
    """About -2 t on a sphere of many dimensions, 0 in a collapse, -4 t for opposite points."""
    assert uniformity(rng.normal(size=(500, 4096))) == pytest.approx(-4, abs=0.01)
    assert uniformity(np.full((50, 8), 0.3)) == pytest.approx(0, abs=1e-12)
    assert uniformity(np.array([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-8)


def test_uniformity_does_not_see_order_rotation_or_length(rng):
    """Permuted, rotated and scaled rows give the same."""
    features = rng.normal(size=(64, 5)) + 0.5
    for other in (
        rng.permutation(features),
        features @ orthonormal(rng, 5),
        features * rng.uniform(0.1, 9, (64, 1)),
    ):
        assert uniformity(other) == pytest.approx(uniformity(features), rel=1e-10)


def test_zero_features_have_no_direction():
    """Rows of zeros stay at the centre: distance 1 to the sphere, cosine 0."""
    zeros, ones = np.zeros((4, 3)), np.ones((4, 3))
    assert alignment(zeros, ones) == pytest.approx(1)
    assert mean_cosine(zeros, ones) == 0
    assert uniformity(zeros) == 0
    assert uniformity(np.array([[0.0, 0.0], [5.0, 0.0]])) == pytest.approx(-2)


# --- what is refused


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_nan_and_infinity_are_refused(bad):
    """Every metric says how many rows are bad, and names the first."""
    features = np.ones((6, 4), np.float32)
    features[2, 1] = features[4, 0] = bad
    said = '2 of 6 hold NaN or infinity, the first at index 2'
    for measure in (rank_me, uniformity):
        with pytest.raises(ValueError, match=said):
            measure(features)
    for measure in (alignment, mean_cosine):
        with pytest.raises(ValueError, match='view 2: ' + said):
            measure(np.ones((6, 4)), features)
    with pytest.raises(ValueError, match=said):
        lidar(np.stack([features, features], axis=1))


def test_wrong_shapes_are_refused():
    """Wrong axes, empty arrays, unequal views, and a single row where pairs are needed."""
    for features in (np.ones(4), np.ones((0, 4)), np.ones((4, 0)), np.ones((2, 3, 4))):
        with pytest.raises(ValueError, match='2 axes'):
            rank_me(features)
    with pytest.raises(ValueError, match='3 axes'):
        lidar(np.ones((4, 4)))
    with pytest.raises(ValueError, match='different shapes'):
        alignment(np.ones((4, 2)), np.ones((5, 2)))
    with pytest.raises(ValueError, match='at least two pictures'):
        uniformity(np.ones((1, 3)))
