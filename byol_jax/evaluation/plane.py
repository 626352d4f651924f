"""Features on a plane, so that they can be looked at: PCA, and UMAP where it is installed."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import numpy as np

from byol_jax.errors import UserError
from byol_jax.evaluation.features import checked_features, unit_rows

UMAP_MISSING = (
    'No map by UMAP, which keeps neighbours together better than PCA: umap-learn is not installed '
    "(pip install 'umap-learn>=0.5.9')."
)

# UMAP's own default (McInnes et al. 2018, arXiv:1802.03426, Section 4.3): what is near.
_NEIGHBOURS = 15
# Fewer rows than this make no graph of neighbours worth a layout.
UMAP_FEWEST = 4


class Plane(NamedTuple):
    """Where rows lie on a plane.

    Attributes:
      places: float64 [N, 2].
      shares: of the variance that each axis shows, in [0, 1].
    """

    places: np.ndarray
    shares: tuple[float, float]


def pca(features: np.ndarray) -> Plane:
    """The two directions in which unit-length rows differ most.

    The features are set to unit length, because neighbours are found by their cosine, and centred.
    The sign of an axis is chosen such that the place farthest from 0 is positive.

    Args:
      features: float [N, D], N at least 1.

    Raises:
      ValueError: not [N, D], or NaN or infinity.
    """
    x = unit_rows(checked_features(features).astype(np.float64))
    x -= x.mean(axis=0)
    left, sigma, _ = np.linalg.svd(x, full_matrices=False)
    places = np.zeros((len(x), 2))
    count = min(2, len(sigma))
    places[:, :count] = left[:, :count] * sigma[:count]
    farthest = places[np.abs(places).argmax(axis=0), [0, 1]]
    places *= np.where(farthest < 0, -1, 1)
    variances = np.zeros(2)
    variances[:count] = sigma[:count] ** 2
    first, second = variances / max(np.sum(sigma**2), 1e-12)
    return Plane(places, (float(first), float(second)))


def umap_installed() -> bool:
    """Whether `umap` can be had: umap-learn is an extra of this package."""
    spec = importlib.util.find_spec('umap')
    # Without an origin it is no more than a folder of that name.
    return spec is not None and spec.origin is not None


def umap(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """UMAP by cosine, which keeps neighbours together: float [N, D] -> float64 [N, 2].

    The same features and seed give the same places, on one machine and version.

    Raises:
      UserError: umap-learn is not installed, or there are fewer than four rows.
      ValueError: not [N, D], or NaN or infinity.
    """
    x = checked_features(features)
    if not umap_installed():
        raise UserError(UMAP_MISSING)
    if len(x) < UMAP_FEWEST:
        raise UserError(f'UMAP needs {UMAP_FEWEST} pictures and more, got {len(x)}.')
    # It compiles for seconds when it is imported.
    from umap import UMAP

    layout = UMAP(
        n_neighbors=min(_NEIGHBOURS, len(x) - 1),
        metric='cosine',
        random_state=seed,
        # A seed takes one thread anyway, and it warns of more.
        n_jobs=1,
    )
    return np.asarray(layout.fit_transform(x), np.float64)
