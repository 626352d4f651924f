"""Label-free measures of how well features fill their space."""

from __future__ import annotations

import numpy as np


def unit_std(features: np.ndarray) -> float:
    """Mean over channels of the std of unit-length rows: float [N, D] -> about 1/sqrt(D) or less.

    0 means that all pictures are given the same features (SimSiam, arXiv:2011.10566, Section 4.1).
    """
    x = np.asarray(features, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return float(x.std(axis=0).mean())
