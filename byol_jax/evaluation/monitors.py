"""Label-free measures of features, in float64, and the monitors of a run made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from byol_jax.evaluation.features import checked_features, checked_views, unit_rows

# Bounds the work on a batch, rows^2 x size: 256 rows of 2,048 values (50 ms on one core).
_MOST_WORK = 256**2 * 2048


def measure(features: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The monitors of a batch, of whatever features there are; what each means: docs/monitors.md.

    Args:
      features: float [V, N, size] each, of V views of N pictures: 'representation' (y),
        'projection' (z), 'prediction' (q(z)) and 'target' (z'). Any may be missing; others are
        left alone.

    Returns:
      representation_std: `unit_std` of the representation: 0 to about 1/sqrt(D).
      rankme_representation: over all views, 1 to min(V N, size). Of wide features fewer rows are
        taken, evenly spaced: 256 of 2,048 values.
      rankme_projection: likewise.
      alignment: of the projections of each two views, 0 to 4; not there if V is 1.
      uniformity: of the projections, the mean of the views', -8 to 0; not there if N is 1.
      online_target_cosine: of z and z' of the same view: how far the target lags behind.
      prediction_target_cosine: of q(z) and z' of the other views: BYOL's 1 - loss / 4.
      prediction_projection_cosine: of q(z) and z: 1 where the predictor does nothing.

    Raises:
      ValueError: other shapes, or NaN or infinity.
    """
    values = {}
    if 'representation' in features:
        y = _affordable(_rows(features['representation']))
        values['representation_std'] = unit_std(y)
        values['rankme_representation'] = rank_me(y)
    z, q, target = (features.get(name) for name in ('projection', 'prediction', 'target'))
    if z is not None:
        values['rankme_projection'] = rank_me(_affordable(_rows(z)))
        if len(z) > 1:
            pairs = itertools.combinations(z, 2)
            values['alignment'] = float(np.mean([alignment(*pair) for pair in pairs]))
        if z.shape[1] > 1:
            values['uniformity'] = float(np.mean([uniformity(view) for view in z]))
    if z is not None and target is not None:
        values['online_target_cosine'] = mean_cosine(_rows(z), _rows(target))
    if q is not None and target is not None and len(q) > 1:
        of, other = np.array(list(itertools.permutations(range(len(q)), 2))).T
        values['prediction_target_cosine'] = mean_cosine(_rows(q[of]), _rows(target[other]))
    if q is not None and z is not None:
        values['prediction_projection_cosine'] = mean_cosine(_rows(q), _rows(z))
    return values


def _rows(views: np.ndarray) -> np.ndarray:
    """[V, N, size] -> [V N, size]."""
    return views.reshape(-1, views.shape[-1])


def _affordable(rows: np.ndarray) -> np.ndarray:
    """As many rows, evenly spaced, as a decomposition can take without holding a run up."""
    most = max(2, math.isqrt(_MOST_WORK // rows.shape[1]))
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def unit_std(features: np.ndarray) -> float:
    """Mean over channels of the std of unit-length rows: float [N, D] -> about 1/sqrt(D) or less.

    0 means that all pictures are given the same features (SimSiam, arXiv:2011.10566, Section 4.1).
    """
    return float(unit_rows(np.asarray(features, np.float64)).std(axis=0).mean())


def rank_me(features: np.ndarray, epsilon: float = 1e-7) -> float:
    """RankMe: how many directions the features use, weighed by how much they use each.

    With sigma the singular values, p_k = sigma_k / ||sigma||_1 + epsilon and the result is
    exp(-sum_k p_k log p_k) (Garrido et al. 2023, arXiv:2210.02885, Equation 1). The features are
    neither centred nor scaled to unit length. Their order, a rotation and one common factor change
    nothing.

    Args:
      features: float [N, D]. At N below D no more than N directions can be seen; the paper takes
        N = 25,600 (its Appendix G).
      epsilon: 1e-7 is the paper's, for features in float32.

    Returns:
      1 (all features on one line through 0, or all 0) to min(N, D), but for epsilon, which adds
      up to 1.6e-6 min(N, D) to the entropy.

    Raises:
      ValueError: not [N, D], or NaN or infinity in it.
    """
    return rank_of(singular_values(features), epsilon)


def singular_values(features: np.ndarray) -> np.ndarray:
    """Singular values of features, not centred: float [N, D] -> float64 [min(N, D)], falling.

    Raises:
      ValueError: as `rank_me`.
    """
    return np.linalg.svd(checked_features(features).astype(np.float64), compute_uv=False)


def rank_of(spectrum: np.ndarray, epsilon: float = 1e-7) -> float:
    """The effective rank of a spectrum: exp of the entropy of its shares, each plus epsilon.

    Of singular values it is `rank_me`.

    Args:
      spectrum: float64 [K], each 0 or more.
      epsilon: at least 0.

    Returns:
      1 (also where all are 0) to K, but for epsilon.
    """
    total = spectrum.sum()
    p = (spectrum / total if total > 0 else np.zeros_like(spectrum)) + epsilon
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p))))


def lidar(
    features: np.ndarray, delta: float = 1e-4, epsilon: float = 1e-8, block: int = 256
) -> float:
    """LiDAR: how many directions tell pictures apart better than views of one picture differ.

    Each picture is a class of its own, its views are the members (Thilak et al. 2023,
    arXiv:2312.04000, Equations 1 to 4 of its first version). With S_b the covariance of the class
    means and S_w the mean covariance within a class, plus delta I, and lambda the eigenvalues of
    S_w^(-1/2) S_b S_w^(-1/2): p_i = lambda_i / ||lambda||_1 + epsilon, and the result is
    exp(-sum_i p_i log p_i). Both covariances are the unbiased estimates: they are divided by n - 1
    and by n (q - 1). A shift and a rotation change nothing; a common factor does, as far as delta
    weighs beside S_w. Few views leave noise of order 1/q in S_b, so compare at equal n, q and D.

    Args:
      features: float [n, q, D], q views of each of n pictures; n and q at least 2. The rank is at
        most n - 1, so n should exceed D.
      delta: above 0; keeps S_w invertible. 1e-4 is that of rbalestr-lab/stable-pretraining (its
        LiDAR callback) and of the code of Skean et al. 2025 (arXiv:2502.02013).
      epsilon: at least 0; 1e-8 is the former's.
      block: pictures taken to float64 at a time; bounds the memory.

    Returns:
      1 (also where all pictures have the same features) to min(n - 1, D), but for epsilon.

    Raises:
      ValueError: not [n, q, D], fewer than two pictures or views, delta not above 0, or NaN or
        infinity in the features.
    """
    features = checked_features(features, ndim=3)
    pictures, views, size = features.shape
    if pictures < 2 or views < 2 or delta <= 0:
        raise ValueError(
            f'LiDAR needs two pictures, two views of each and delta above 0, got {pictures}, '
            f'{views} and {delta}'
        )
    means = np.empty((pictures, size))
    within = np.zeros((size, size))
    for start in range(0, pictures, block):
        part = features[start : start + block].astype(np.float64)
        means[start : start + block] = part.mean(axis=1)
        residuals = (part - part.mean(axis=1, keepdims=True)).reshape(-1, size)
        within += residuals.T @ residuals
    variances, axes = np.linalg.eigh(within / (pictures * (views - 1)))
    # The eigenvalues sought are the squared singular values of the centred, whitened means.
    whitened = (means - means.mean(axis=0)) @ (axes / np.sqrt(np.maximum(variances, 0) + delta))
    eigenvalues = np.zeros(size)
    found = np.linalg.svd(whitened, compute_uv=False) ** 2 / (pictures - 1)
    eigenvalues[: len(found)] = found
    return rank_of(eigenvalues, epsilon)


def alignment(view1: np.ndarray, view2: np.ndarray, alpha: float = 2) -> float:
    """How far the features of two views of a picture lie apart, on the unit sphere.

    The mean of ||z1 - z2||^alpha (Wang and Isola 2020, arXiv:2005.10242, Section 4.1). At alpha = 2
    it is 2 - 2 `mean_cosine`.

    Args:
      view1: float [N, D], of any length.
      view2: float [N, D], row by row of the same pictures.
      alpha: above 0; 2 is the paper's.

    Returns:
      0 (the same direction) to 2^alpha (opposite ones).

    Raises:
      ValueError: shapes that differ or are not [N, D], or NaN or infinity.
    """
    z1, z2 = (unit_rows(z.astype(np.float64)) for z in checked_views(view1, view2))
    return float(np.mean(np.linalg.norm(z1 - z2, axis=1) ** alpha))


def mean_cosine(view1: np.ndarray, view2: np.ndarray) -> float:
    """Mean cosine between two views of the same pictures: float [N, D] twice -> [-1, 1].

    Raises:
      ValueError: as `alignment`.
    """
    z1, z2 = (unit_rows(z.astype(np.float64)) for z in checked_views(view1, view2))
    return float(np.mean(np.sum(z1 * z2, axis=1)))


def uniformity(features: np.ndarray, t: float = 2, block: int = 1024) -> float:
    """How evenly features cover the unit sphere; lower is more even.

    The logarithm of the mean of exp(-t ||zi - zj||^2) (Wang and Isola 2020, arXiv:2005.10242,
    Section 4.1) over all N (N - 1) / 2 pairs of different rows, as the paper's code takes it.

    Args:
      features: float [N, D], N at least 2, of any length.
      t: above 0; 2 is the paper's.
      block: rows compared at a time; bounds the memory to about 24 bytes x block x N.

    Returns:
      -4 t to 0, which is collapse. Even cover of a sphere of many dimensions has about -2 t.

    Raises:
      ValueError: fewer than two rows, not [N, D], or NaN or infinity.
    """
    features = checked_features(features)
    if len(features) < 2:
        raise ValueError('pairs of different pictures need two of them, got one')
    z = unit_rows(features.astype(np.float64))
    lengths = np.sum(z**2, axis=1)
    total = 0.0
    for start in range(0, len(z), block):
        rows = slice(start, start + block)
        squares = lengths[rows, None] + lengths[start:] - 2 * z[rows] @ z[start:].T
        # What lies above the diagonal: of each pair the row that comes first.
        total += np.triu(np.exp(-t * np.maximum(squares, 0)), 1).sum()
    return float(np.log(total / (len(z) * (len(z) - 1) / 2)))
