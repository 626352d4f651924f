"""Illustrations of an encoder: spectrum of its features, maps of pictures, nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from byol_jax.app.build import Run
from byol_jax.app.metrics import MetricsLog
from byol_jax.app.report.charts import Line, line_chart, thin
from byol_jax.app.report.page import data_uri
from byol_jax.app.report.pictures import (
    Legend,
    Row,
    Thumbnail,
    fit,
    legend,
    map_picture,
    neighbours_picture,
)
from byol_jax.cores import usable_cores
from byol_jax.errors import BadPicture
from byol_jax.evaluation.monitors import rank_of, singular_values
from byol_jax.evaluation.plane import UMAP_FEWEST, UMAP_MISSING, pca, umap, umap_installed
from byol_jax.evaluation.table import Evaluation, sampled
from byol_jax.sources.base import Source

_SHOWN_QUERIES, _SHOWN_NEIGHBOURS = 8, 6
_THUMBNAIL = 96
# Number of pictures on a map: few enough for a phone, and about 90 KB.
_ON_MAP = 256

# Singular values below this share of the largest one are rounding noise of float32 features.
_SMALLEST = 1e-8


class Spectrum(NamedTuple):
    """A chart of singular values.

    Attributes:
      chart: the chart, SVG.
      ranks: a line with RankMe of each encoder.
    """

    chart: Markup
    ranks: str


class Map(NamedTuple):
    """A map: pictures placed by their features.

    Attributes:
      name: short name, 'pca' or 'umap'.
      title: title on the page.
      note: how to read the map.
      picture: the map.
      uri: the map as a data: URI.
    """

    name: str
    title: str
    note: str
    picture: Image.Image
    uri: str


class ShownThumbnail(NamedTuple):
    """A `Thumbnail` for a page, with its picture as a data: URI."""

    uri: str
    caption: str
    same: bool | None


class Illustrations(NamedTuple):
    """The illustrations of the report.

    Attributes:
      pictures: number of pictures whose features the spectrum is computed from.
      spectrum: spectrum of all encoders; None if it is not shown.
      maps: maps by the last encoder.
      legend: (label, colour) of the borders on the maps; empty without labels.
      missing: a line on a map that could not be made, or ''.
      neighbours: queries with their nearest pictures, by the last encoder.
    """

    pictures: int = 0
    spectrum: Spectrum | None = None
    maps: Sequence[Map] = ()
    legend: Sequence[tuple[str, str]] = ()
    missing: str = ''
    neighbours: Sequence[tuple[ShownThumbnail, Sequence[ShownThumbnail]]] = ()

    @property
    def labelled(self) -> bool:
        """Whether the neighbours show if their label is that of the query."""
        return any(each.same is not None for _, found in self.neighbours for each in found)


def show_evaluations(
    evaluations: Mapping[str, Evaluation],
    run: Run,
    log: MetricsLog,
    step: int,
    with_umap: bool,
) -> Illustrations:
    """Draws spectrum, maps and nearest neighbours, and logs the pictures too.

    Args:
      evaluations: evaluations of encoders, by name. The spectrum shows all of them, the maps and
        neighbours only the last one.
      run: the run that the encoders belong to.
      log: the metrics log that gets the pictures.
      step: step of the last encoder.
      with_umap: whether to draw a map by UMAP too, which may take a minute.
    """
    last = [*evaluations.values()][-1]
    key = run.config.data.pair_keys[0]
    rows = _neighbours(last, key)
    maps, colours, missing = _maps(last, key, with_umap)
    log.picture('neighbours', neighbours_picture(rows, _THUMBNAIL), step)
    for each in maps:
        log.picture(f'map/{each.name}', each.picture, step)
    return Illustrations(
        pictures=len(last.features),
        spectrum=draw_spectrum(
            {name: singular_values(each.features) for name, each in evaluations.items()}
        ),
        maps=maps,
        legend=colours.names if colours else (),
        missing=missing,
        neighbours=for_page(rows),
    )


def draw_spectrum(spectra: Mapping[str, np.ndarray]) -> Spectrum:
    """Draws singular values relative to the largest one, on a logarithmic axis.

    Args:
      spectra: singular values of each encoder by name: float64 [K], in descending order.
    """
    lines, ranks = [], []
    for name, sigma in spectra.items():
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
    return Spectrum(chart, '; '.join(ranks))


def for_page(rows: Sequence[Row]) -> list[tuple[ShownThumbnail, list[ShownThumbnail]]]:
    """Converts the pictures in rows of neighbours to data: URIs."""

    def shown(thumbnail: Thumbnail) -> ShownThumbnail:
        return ShownThumbnail(data_uri(thumbnail.picture), thumbnail.caption, thumbnail.same)

    return [(shown(query), [shown(each) for each in found]) for query, found in rows]


def _maps(
    evaluation: Evaluation, key: str, with_umap: bool
) -> tuple[list[Map], Legend | None, str]:
    """Draws the maps of the gallery.

    Returns:
      The maps, their colours (None without labels), and a line on a map that could not be made.
    """
    gallery, features = evaluation.gallery, evaluation.features
    positions = sampled(len(gallery))
    shown = np.linspace(0, len(positions) - 1, min(len(positions), _ON_MAP)).astype(int)
    with ThreadPoolExecutor(usable_cores()) as pool:
        thumbnails = list(pool.map(lambda i: _thumbnail(gallery, int(i), key), positions[shown]))
    labels = gallery.labels_of(positions[shown]) if gallery.label_names else None
    colours = None if labels is None else legend(labels, gallery.label_names)

    def draw(name: str, title: str, note: str, places: np.ndarray) -> Map:
        borders = colours.of_example if colours else None
        sheet = map_picture(thumbnails, places[shown], borders)
        words = (
            f'{len(shown):,} of {len(features):,} training pictures{note} Each picture is put into '
            'the free cell nearest to its place; the axes are stretched.'
        )
        return Map(name, title, words, sheet, data_uri(sheet))

    plane = pca(features)
    maps = [
        draw(
            'pca',
            'By PCA',
            f'. The axes show {plane.shares[0]:.0%} and {plane.shares[1]:.0%} of the variance '
            'of the unit-length features.',
            plane.places,
        )
    ]
    if not with_umap:
        return maps, colours, ''
    if not umap_installed():
        return maps, colours, UMAP_MISSING
    if len(features) < UMAP_FEWEST:
        return maps, colours, f'No map by UMAP: it needs at least {UMAP_FEWEST} pictures.'
    note = '. Near pictures are alike (cosine); far ones need not differ more than others.'
    maps.append(draw('umap', 'By UMAP', note, umap(features)))
    return maps, colours, ''


def _neighbours(evaluation: Evaluation, key: str) -> list[Row]:
    """A few queries, each with its nearest pictures of the gallery."""
    rows: list[Row] = []
    nearest = evaluation.neighbours
    for query in _spread(evaluation.queries):
        found = [
            Thumbnail(
                _thumbnail(evaluation.gallery, int(index), key),
                f'{cosine:.2f}',
                _same_label(evaluation, query, int(index)),
            )
            for index, cosine in zip(
                nearest.indices[query, :_SHOWN_NEIGHBOURS],
                nearest.cosines[query, :_SHOWN_NEIGHBOURS],
                strict=True,
            )
        ]
        picture = _thumbnail(evaluation.queries, query, key)
        rows.append((Thumbnail(picture, evaluation.queries.name(query)), found))
    return rows


def _spread(queries: Source) -> list[int]:
    """Chooses a few queries: the middle one of each of the first labels, or evenly spaced ones."""
    if queries.labels is None:
        return list(np.unique(np.linspace(0, len(queries) - 1, _SHOWN_QUERIES).astype(int)))
    members = [np.flatnonzero(queries.labels == label) for label in np.unique(queries.labels)]
    return [int(m[len(m) // 2]) for m in members[:_SHOWN_QUERIES]]


def _same_label(evaluation: Evaluation, query: int, index: int) -> bool | None:
    gallery, queries = evaluation.gallery.labels, evaluation.queries.labels
    if gallery is None or queries is None:
        return None
    return bool(gallery[index] == queries[query])


def _thumbnail(source: Source, index: int, key: str) -> Image.Image:
    try:
        picture = source.load(index, key)
    except BadPicture:
        # The file was readable when it was encoded. The report goes on without it.
        return Image.new('RGB', (_THUMBNAIL, _THUMBNAIL), 'lightgrey')
    return fit(picture, _THUMBNAIL)
