"""Projects features to a plane to look at: PCA, and UMAP if it is installed."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import numpy as np

from byol_jax.errors import UserError
from byol_jax.evaluation.features import checked_features, unit_rows

UMAP_MISSING = (
    'There is no map by UMAP, which keeps neighbours together better than PCA, because umap-learn '
    "is not installed (pip install 'umap-learn>=0.5.9')."
)

# Number of neighbours in UMAP's graph; its default (McInnes et al. 2018, arXiv:1802.03426, Section
# 4.3).
_NEIGHBOURS = 15
# With fewer rows, UMAP has no graph of neighbours to lay out.
UMAP_FEWEST = 4


class Plane(NamedTuple):
    """Positions of rows on a plane.

    Attributes:
      places: float64 [N, 2], the positions.
      shares: share of the variance that each axis shows, in [0, 1].
    """

    places: np.ndarray
    shares: tuple[float, float]


def pca(features: np.ndarray) -> Plane:
    """The first two principal components of unit-length rows.

    Rows are scaled to unit length, because neighbours are found by cosine, and centred. The sign of
    an axis is chosen so that the position farthest from 0 is positive.

    Args:
      features: float [N, D], N at least 1.

    Raises:
      ValueError: the features are not [N, D], or contain NaN or infinity.
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
    """Whether umap-learn, an extra of this package, is installed."""
    spec = importlib.util.find_spec('umap')
    # Without an origin it is a mere folder of that name.
    return spec is not None and spec.origin is not None


def umap(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """UMAP by cosine distance, which keeps neighbours together: float [N, D] -> float64 [N, 2].

    The same features and seed give the same positions on one machine and version of umap-learn.

    Raises:
      UserError: umap-learn is not installed, or there are fewer than four rows.
      ValueError: the features are not [N, D], or contain NaN or infinity.
    """
    x = checked_features(features)
    if not umap_installed():
        raise UserError(UMAP_MISSING)
    if len(x) < UMAP_FEWEST:
        raise UserError(f'UMAP needs at least {UMAP_FEWEST} pictures, got {len(x)}.')
    # Imported late, because the import compiles for seconds.
    from umap import UMAP

    layout = UMAP(
        n_neighbors=min(_NEIGHBOURS, len(x) - 1),
        metric='cosine',
        random_state=seed,
        # With a seed UMAP uses one thread anyway, and warns if it is asked for more.
        n_jobs=1,
    )
    return np.asarray(layout.fit_transform(x), np.float64)
