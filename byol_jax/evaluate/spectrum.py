"""Label-free measures of how well features fill their space."""

from __future__ import annotations

import numpy as np


def unit_std(features: np.ndarray) -> float:
    """Mean over channels of the std of unit-length rows: float [N, D] -> about 1/sqrt(D) or less.

    0 means that all pictures are given the same features (SimSiam, arXiv:2011.10566, Section 4.1).
    """
    return float(unit_rows(np.asarray(features, np.float64)).std(axis=0).mean())


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows of float [N, D] at length 1, in the same type; a row of zeros stays one."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
