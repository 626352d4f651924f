"""The spectrum of the features, before and after training, for the report."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from byol_jax.app.report.chart import Line, line_chart, thin
from byol_jax.evaluation.monitors import rank_of

# Smaller than what float32 features can carry: noise, and no power of ten is worth a tick for it.
_SMALLEST = 1e-8


class Spectrum(NamedTuple):
    """Singular values of an encoder's features, float64 [K], falling; `name` says whose."""

    name: str
    sigma: np.ndarray


def spectrum_section(spectra: Sequence[Spectrum], pictures: int) -> str:
    """Singular values over the largest one, on a logarithmic axis, and RankMe, as HTML.

    Args:
      spectra: of the encoders to compare.
      pictures: how many features they are of.
    """
    lines, ranks = [], []
    for name, sigma in spectra:
        shares = sigma / sigma[0] if sigma[0] > 0 else sigma
        points = [(float(n), float(s)) for n, s in enumerate(shares, 1) if s >= _SMALLEST]
        lines.append(Line(thin(points), name))
        ranks.append(f'{name}: RankMe {rank_of(sigma):.1f} of {len(sigma)}')
    chart = line_chart(
        lines,
        x_label='number of the direction',
        log=True,
        words='Singular values of the features, before and after',
    )
    return (
        '<h2>Spectrum of the features</h2><p class="note">Singular values over the largest, of '
        f'{pictures:,} training pictures. A line that falls at once means few directions are used; '
        'RankMe (arXiv:2210.02885) counts them.</p>'
        f'<figure class="one">{chart}<figcaption><span>{html.escape("; ".join(ranks))}</span>'
        '</figcaption></figure>'
    )
