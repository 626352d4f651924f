"""Label-free measures of features, computed in float64, and the monitors of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from byol_jax.evaluation.features import checked_features, checked_views, unit_rows

# Limit on rows^2 x size of a decomposition: that of 256 rows of 2,048 values (50 ms on one core).
_MOST_WORK = 256**2 * 2048


def measure(features: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Computes the monitors of a batch from the features that there are. See docs/monitors.md.

    Args:
      features: float [V, N, size] by name, from V views of N pictures: 'representation' (y),
        'projection' (z), 'prediction' (q(z)) and 'target' (z'). Any of them may be missing; other
        names are ignored.

    Returns:
      The monitors by name, without those whose features are missing:

      - 'representation_std': `unit_std` of the representation, 0 to about 1/sqrt(D).
      - 'rankme_representation': `rank_me` over all views, 1 to min(V N, size). For wide features
        only some rows are used, evenly spaced (256 rows at 2,048 channels).
      - 'rankme_projection': likewise for the projection.
      - 'alignment': mean over pairs of views of the projections' `alignment`, 0 to 4; needs V > 1.
      - 'uniformity': mean over views of the projections' `uniformity`, -8 to 0; needs N > 1.
      - 'online_target_cosine': mean cosine of z and z' of the same view; shows how far the target
        lags behind.
      - 'prediction_target_cosine': mean cosine of q(z) and z' of the other views; for BYOL this is
        1 - loss / 4.
      - 'prediction_projection_cosine': mean cosine of q(z) and z; 1 if the predictor does nothing.

    Raises:
      ValueError: a shape is wrong, or there is NaN or infinity.
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
    """Evenly spaced rows, so few that their decomposition does not delay the run."""
    most = max(2, math.isqrt(_MOST_WORK // rows.shape[1]))
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def unit_std(features: np.ndarray) -> float:
    """Mean over channels of the std of unit-length rows: float [N, D] -> 0 to about 1/sqrt(D).

    0 means that all pictures have the same features (SimSiam, arXiv:2011.10566, Section 4.1).
    """
    return float(unit_rows(np.asarray(features, np.float64)).std(axis=0).mean())


def rank_me(features: np.ndarray, epsilon: float = 1e-7) -> float:
    """RankMe: the effective number of directions that the features use.

    With sigma the singular values, p_k = sigma_k / ||sigma||_1 + epsilon and the result is
    exp(-sum_k p_k log p_k) (Garrido et al. 2023, arXiv:2210.02885, Equation 1). The features are
    neither centred nor scaled to unit length. The result does not depend on the order of the rows,
    a rotation, or a common factor.

    Args:
      features: float [N, D]. With N below D, at most N directions can be seen; the paper takes
        N = 25,600 (its Appendix G).
      epsilon: 1e-7 is the paper's value for float32 features.

    Returns:
      1 (all features on one line through 0, or all 0) to min(N, D), up to an error from epsilon,
      which adds at most 1.6e-6 min(N, D) to the entropy.

    Raises:
      ValueError: the features are not [N, D], or contain NaN or infinity.
    """
    return rank_of(singular_values(features), epsilon)


def singular_values(features: np.ndarray) -> np.ndarray:
    """Singular values of uncentred features: float [N, D] -> float64 [min(N, D)], descending.

    Raises:
      ValueError: as for `rank_me`.
    """
    return np.linalg.svd(checked_features(features).astype(np.float64), compute_uv=False)


def rank_of(spectrum: np.ndarray, epsilon: float = 1e-7) -> float:
    """The effective rank of a spectrum: exp of the entropy of its shares, each plus epsilon.

    For singular values this is `rank_me`.

    Args:
      spectrum: float64 [K], each at least 0.
      epsilon: at least 0.

    Returns:
      1 (also if all values are 0) to K, up to an error from epsilon.
    """
    total = spectrum.sum()
    p = (spectrum / total if total > 0 else np.zeros_like(spectrum)) + epsilon
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p))))


def lidar(
    features: np.ndarray, delta: float = 1e-4, epsilon: float = 1e-8, block: int = 256
) -> float:
    """LiDAR: the effective number of directions that separate pictures beyond their views' spread.

    Each picture is a class and its views are the members (Thilak et al. 2023, arXiv:2312.04000,
    Equations 1 to 4 of its first version). Let S_b be the covariance of the class means, S_w the
    mean covariance within a class plus delta I, and lambda the eigenvalues of
    S_w^(-1/2) S_b S_w^(-1/2). Then p_i = lambda_i / ||lambda||_1 + epsilon, and the result is
    exp(-sum_i p_i log p_i). Both covariances are unbiased estimates (divided by n - 1 and by
    n (q - 1)). A shift or a rotation changes nothing. A common factor does, to the extent that
    delta matters beside S_w. Few views leave noise of order 1/q in S_b, so compare only values of
    equal n, q and D.

    Args:
      features: float [n, q, D], q views of each of n pictures; n and q at least 2. The rank is at
        most n - 1, so n should exceed D.
      delta: above 0; keeps S_w invertible. 1e-4 is the value of the LiDAR callback of
        rbalestr-lab/stable-pretraining and of the code of Skean et al. 2025 (arXiv:2502.02013).
      epsilon: at least 0; 1e-8 is the value of rbalestr-lab/stable-pretraining.
      block: number of pictures converted to float64 at a time; limits the memory.

    Returns:
      1 (also if all pictures have the same features) to min(n - 1, D), up to an error from epsilon.

    Raises:
      ValueError: the features are not [n, q, D] or contain NaN or infinity, there are fewer than
        two pictures or views, or delta is not above 0.
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
    # lambda are the squared singular values of the centred, whitened means.
    whitened = (means - means.mean(axis=0)) @ (axes / np.sqrt(np.maximum(variances, 0) + delta))
    eigenvalues = np.zeros(size)
    found = np.linalg.svd(whitened, compute_uv=False) ** 2 / (pictures - 1)
    eigenvalues[: len(found)] = found
    return rank_of(eigenvalues, epsilon)


def alignment(view1: np.ndarray, view2: np.ndarray, alpha: float = 2) -> float:
    """Mean distance on the unit sphere between the features of two views of a picture.

    The mean of ||z1 - z2||^alpha (Wang and Isola 2020, arXiv:2005.10242, Section 4.1). With
    alpha = 2 it is 2 - 2 `mean_cosine`.

    Args:
      view1: float [N, D]; rows are scaled to unit length.
      view2: float [N, D]; row i belongs to the same picture as row i of view1.
      alpha: above 0; the paper takes 2.

    Returns:
      0 (same directions) to 2^alpha (opposite directions).

    Raises:
      ValueError: the shapes differ or are not [N, D], or there is NaN or infinity.
    """
    z1, z2 = (unit_rows(z.astype(np.float64)) for z in checked_views(view1, view2))
    return float(np.mean(np.linalg.norm(z1 - z2, axis=1) ** alpha))


def mean_cosine(view1: np.ndarray, view2: np.ndarray) -> float:
    """Mean cosine between two views of the same pictures: two float [N, D] -> -1 to 1.

    Raises:
      ValueError: as for `alignment`.
    """
    z1, z2 = (unit_rows(z.astype(np.float64)) for z in checked_views(view1, view2))
    return float(np.mean(np.sum(z1 * z2, axis=1)))


def uniformity(features: np.ndarray, t: float = 2, block: int = 1024) -> float:
    """How evenly features cover the unit sphere; lower is more even.

    The logarithm of the mean of exp(-t ||zi - zj||^2) (Wang and Isola 2020, arXiv:2005.10242,
    Section 4.1) over all N (N - 1) / 2 pairs of different rows, as in the paper's code.

    Args:
      features: float [N, D], N at least 2; rows are scaled to unit length.
      t: above 0; the paper takes 2.
      block: number of rows compared at a time; limits the memory to about 24 bytes x block x N.

    Returns:
      -4 t to 0. 0 is collapse; an even cover of a sphere of many dimensions has about -2 t.

    Raises:
      ValueError: there are fewer than two rows, the features are not [N, D], or contain NaN or
        infinity.
    """
    features = checked_features(features)
    if len(features) < 2:
        raise ValueError('uniformity needs at least two pictures, got one')
    z = unit_rows(features.astype(np.float64))
    lengths = np.sum(z**2, axis=1)
    total = 0.0
    for start in range(0, len(z), block):
        rows = slice(start, start + block)
        squares = lengths[rows, None] + lengths[start:] - 2 * z[rows] @ z[start:].T
        # Only above the diagonal, so that each pair counts once.
        total += np.triu(np.exp(-t * np.maximum(squares, 0)), 1).sum()
    return float(np.log(total / (len(z) * (len(z) - 1) / 2)))
