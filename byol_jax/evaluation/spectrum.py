"""Label-free measures of how well features fill their space, in float64."""

from __future__ import annotations

import numpy as np

from byol_jax.evaluation.inputs import checked_features, checked_views


def unit_std(features: np.ndarray) -> float:
    """Mean over channels of the std of unit-length rows: float [N, D] -> about 1/sqrt(D) or less.

    0 means that all pictures are given the same features (SimSiam, arXiv:2011.10566, Section 4.1).
    """
    return float(unit_rows(np.asarray(features, np.float64)).std(axis=0).mean())


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows of float [N, D] at length 1, in the same type; a row of zeros stays one."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


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
    """Of features as they are, not centred: float [N, D] -> float64 [min(N, D)], falling.

    Raises:
      ValueError: as `rank_me`.
    """
    return np.linalg.svd(checked_features(features).astype(np.float64), compute_uv=False)


def rank_of(sigma: np.ndarray, epsilon: float = 1e-7) -> float:
    """`rank_me` of features by their singular values, float64 [K] from 0 up."""
    return _effective_rank(sigma, epsilon)


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
    return _effective_rank(eigenvalues, epsilon)


def _effective_rank(spectrum: np.ndarray, epsilon: float) -> float:
    """exp of the entropy of a spectrum, float64 [K] of values from 0 up; 1 where all are 0."""
    total = spectrum.sum()
    p = (spectrum / total if total > 0 else np.zeros_like(spectrum)) + epsilon
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p))))


def alignment(view1: np.ndarray, view2: np.ndarray, alpha: float = 2) -> float:
    """How far the features of two views of a picture lie apart, on the unit sphere.

    The mean of ||z1 - z2||^alpha (Wang and Isola 2020, arXiv:2005.10242, Section 4.1). At alpha = 2
    it is 2 - 2 `mean_cosine`.

    Args:
      view1, view2: float [N, D], of any length; row by row the same picture.
      alpha: above 0; 2 is the paper's.

    Returns:
      0 (the same direction) to 2^alpha (opposite ones).

    Raises:
      ValueError: shapes that differ or are not [N, D], or NaN or infinity.
    """
    z1, z2 = (unit_rows(z.astype(np.float64)) for z in checked_views(view1, view2))
    return float(np.mean(np.linalg.norm(z1 - z2, axis=1) ** alpha))


def mean_cosine(view1: np.ndarray, view2: np.ndarray) -> float:
    """Mean cosine between two views of the same picture: float [N, D] twice -> [-1, 1].

    Raises:
      ValueError: as `alignment`.
    """
    z1, z2 = (unit_rows(z.astype(np.float64)) for z in checked_views(view1, view2))
    return float(np.mean(np.sum(z1 * z2, axis=1)))


def background_cosine(features: np.ndarray) -> float:
    """Mean cosine between different pictures, over all N (N - 1) / 2 pairs: 1 is collapse.

    Args:
      features: float [N, D], N at least 2, of any length.

    Returns:
      -1 / (N - 1) to 1; about 0 where features point everywhere.

    Raises:
      ValueError: fewer than two rows, not [N, D], or NaN or infinity.
    """
    z = _unit_pool(features)
    of_all = np.sum(z.sum(axis=0) ** 2) - np.sum(z**2)
    return float(of_all / (len(z) * (len(z) - 1)))


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
    z = _unit_pool(features)
    lengths = np.sum(z**2, axis=1)
    total = 0.0
    for start in range(0, len(z), block):
        rows = slice(start, start + block)
        squares = lengths[rows, None] + lengths[start:] - 2 * z[rows] @ z[start:].T
        # What lies above the diagonal: of each pair the row that comes first.
        total += np.triu(np.exp(-t * np.maximum(squares, 0)), 1).sum()
    return float(np.log(total / (len(z) * (len(z) - 1) / 2)))


def _unit_pool(features: np.ndarray) -> np.ndarray:
    features = checked_features(features)
    if len(features) < 2:
        raise ValueError('pairs of different pictures need two of them, got one')
    return unit_rows(features.astype(np.float64))
