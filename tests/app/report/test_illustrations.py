"""The report's pictures of an encoder: spectrum, map and neighbours."""

from __future__ import annotations

import numpy as np
from PIL import Image

from byol_jax.app.report.illustrations import Illustrations, Map, draw_spectrum
from byol_jax.app.report.page import data_uri, render
from byol_jax.app.report.pictures import legend
from byol_jax.app.report.run_report import Report


def page_of(shown):
    return render('report.html', report=Report(shown=shown))


def test_section_says_what_is_missing():
    """The page has each map, the legend, and the line on what could not be made; all escaped."""
    picture = Image.new('RGB', (20, 20))
    colours = legend(np.array([0]), ['<a>'])
    maps = [Map('pca', 'By PCA', 'a & b', picture, data_uri(picture))]
    text = page_of(Illustrations(maps=maps, legend=colours.names, missing='No UMAP.'))
    for part in ('By PCA', 'a &amp; b', '&lt;a&gt;', 'No UMAP.', 'src="data:image/jpeg'):
        assert part in text
    assert 'class="legend"' in text
    assert 'class="legend"' not in page_of(Illustrations(maps=maps))


def test_spectrum_names_rankme():
    """Both spectra are drawn relative to their largest value, with RankMe."""
    spectra = {'before': np.full(8, 3.0), 'after': np.array([2.0, 0, 0, 0])}
    text = page_of(Illustrations(pictures=100, spectrum=draw_spectrum(spectra)))
    assert 'before: RankMe 8.0 of 8; after: RankMe 1.0 of 4' in text
    assert text.count('<polyline') == 1
    assert text.count('<circle') == 1
