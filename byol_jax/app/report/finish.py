"""What a run shows: the picture of its view pairs, and the report at its end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from byol_jax.app.metrics import MetricsLog
from byol_jax.app.report.map import Legend, Map, legend, map_picture, map_section
from byol_jax.app.report.neighbours import Row, Thumbnail, neighbours_picture, neighbours_section
from byol_jax.app.report.pictures import fit, save_picture, views_picture
from byol_jax.app.report.results import Result, results_section, results_text
from byol_jax.app.report.results_file import write_results
from byol_jax.app.report.run_report import RunReport
from byol_jax.app.report.spectrum import Spectrum, spectrum_section
from byol_jax.app.setup import Run
from byol_jax.errors import BadPicture
from byol_jax.evaluation.monitors import singular_values
from byol_jax.evaluation.plane import UMAP_FEWEST, UMAP_MISSING, pca, umap, umap_installed
from byol_jax.evaluation.protocol import Evaluation, describe, sampled
from byol_jax.input.feed import shown_views
from byol_jax.input.stream import PairMaker
from byol_jax.sources.bad_files import BadFile
from byol_jax.sources.base import Source

_ROWS = 8
_SHOWN_QUERIES, _SHOWN_NEIGHBOURS = 8, 6
_THUMBNAIL = 96
# Pictures on a map: few enough for a phone, and 90 KB in all.
_ON_MAP = 256


def draw_views(run: Run, workdir: Path) -> list[BadFile]:
    """Writes views.png: for the first examples of the run, the original(s), view 1 and view 2.

    There are two originals where the views are made from two pictures.

    Returns:
      What could not be read; as in training, another picture is in its place.
    """
    maker = PairMaker(run.data.train, run.config)
    positions = _first_of_each_label(run.data.train, maker)
    titles = ['original']
    if any(first != second for first, second in map(maker.pictures, positions)):
        keys = tuple(run.config.data.pair_keys)
        titles = [f'original {n}' for n in (keys if keys[0] != keys[1] else (1, 2))]
    loaded = [maker.load(position) for position in positions]
    bad = [file for each in loaded for file in each.bad]
    pictures = [each.pictures for each in loaded]
    rows = [
        (*originals[: len(titles)], *views)
        for originals, views in zip(pictures, shown_views(run, positions, pictures), strict=True)
    ]
    side = min(224, max(96, run.config.views.image_size))
    save_picture(views_picture(rows, (*titles, 'view 1', 'view 2'), side), workdir / 'views.png')
    return list(dict.fromkeys(bad))


def _first_of_each_label(source: Source, maker: PairMaker) -> list[int]:
    """Positions of the stream to show: the first of each label, filled up with the next ones."""
    labels = source.labels if source.labels_at_hand else None
    positions = list(range(min(len(source), 64 * _ROWS)))
    if labels is not None:
        seen: set[int] = set()
        first = []
        for position in positions:
            label = int(labels[maker.example(position)[1]])
            if label not in seen:
                seen.add(label)
                first.append(position)
        positions = first + [p for p in positions if p not in first]
    return positions[:_ROWS]


def finish_report(
    run: Run,
    workdir: Path,
    report: RunReport,
    log: MetricsLog,
    before: Evaluation,
    after: Evaluation,
    bad_files: int,
) -> str:
    """Writes the last report.html, its pictures and results.json; returns the table as text.

    Args:
      run: that has ended. workdir, report: of the run. log: of the run, for the pictures.
      before, after: of the encoder, measured.
      bad_files: how many there were.
    """
    first = 'as loaded' if run.training.origin else 'randomly initialised'
    last = f'trained {run.plan.total_steps:,} steps'
    results = [
        Result(first, before.accuracy, before.feature_std),
        Result(last, after.accuracy, after.feature_std),
    ]
    protocol = f'{describe(after, run.config)} Both encoders are measured alike.'
    found = show_evaluations(
        {first: before, last: after}, run, log, run.plan.total_steps, with_umap=True
    )
    report.finished(results_section(results, protocol), found, bad_files)
    write_results(workdir, [result._asdict() for result in results], protocol)
    return f'{results_text(results)}\n{protocol}'


def show_evaluations(
    evaluations: Mapping[str, Evaluation],
    run: Run,
    log: MetricsLog,
    step: int,
    with_umap: bool,
) -> list[str]:
    """Spectrum, map of the embeddings and nearest neighbours, as HTML; the pictures go to the log.

    Args:
      evaluations: of encoders, by name. The spectrum shows all, the others the last one.
      run: theirs. log: for the pictures. step: that the last one is of.
      with_umap: a map by UMAP too, which may take a minute.
    """
    spectra = [
        Spectrum(name, singular_values(evaluation.features))
        for name, evaluation in evaluations.items()
    ]
    last = [*evaluations.values()][-1]
    key = run.config.data.pair_keys[0]
    rows = _shown_neighbours(last, key)
    maps, colours, missing = _maps(last, key, with_umap)
    log.picture('neighbours', neighbours_picture(rows, _THUMBNAIL), step)
    for each in maps:
        log.picture(f'map/{each.name}', each.picture, step)
    return [
        spectrum_section(spectra, len(last.features)),
        map_section(maps, colours, missing),
        neighbours_section(rows),
    ]


def _maps(
    evaluation: Evaluation, key: str, with_umap: bool
) -> tuple[list[Map], Legend | None, str]:
    """The maps of the gallery, their colours if there are labels, and what could not be made."""
    gallery, features = evaluation.gallery, evaluation.features
    positions = sampled(len(gallery))
    shown = np.linspace(0, len(positions) - 1, min(len(positions), _ON_MAP)).astype(int)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        thumbnails = list(pool.map(lambda i: _thumbnail(gallery, int(i), key), positions[shown]))
    labels = gallery.labels_of(positions[shown]) if gallery.label_names else None
    colours = None if labels is None else legend(labels, gallery.label_names)
    borders = colours.of_example if colours else None
    plane = pca(features)
    of = f'{len(shown):,} of the {len(features):,} training pictures laid out'
    stretched = 'Each picture is put into the free cell nearest to its place; axes are stretched.'
    maps = [
        Map(
            'pca',
            'By PCA',
            f'{of}. The axes show {plane.shares[0]:.0%} and {plane.shares[1]:.0%} of the variance '
            f'of the features at unit length. {stretched}',
            map_picture(thumbnails, plane.places[shown], borders),
        )
    ]
    if not with_umap:
        return maps, colours, ''
    if not umap_installed():
        return maps, colours, UMAP_MISSING
    if len(features) < UMAP_FEWEST:
        return maps, colours, f'No map by UMAP: it takes {UMAP_FEWEST} pictures and more.'
    places = umap(features)
    maps.append(
        Map(
            'umap',
            'By UMAP',
            f'{of}; near ones are alike (cosine), far ones need not differ more. {stretched}',
            map_picture(thumbnails, places[shown], borders),
        )
    )
    return maps, colours, ''


def _shown_neighbours(evaluation: Evaluation, key: str) -> list[Row]:
    rows: list[Row] = []
    for query in _spread(evaluation.queries):
        found = [
            Thumbnail(
                _thumbnail(evaluation.gallery, int(index), key),
                f'{cosine:.2f}',
                _same_label(evaluation, query, int(index)),
            )
            for index, cosine in zip(
                evaluation.neighbours.indices[query, :_SHOWN_NEIGHBOURS],
                evaluation.neighbours.cosines[query, :_SHOWN_NEIGHBOURS],
                strict=True,
            )
        ]
        picture = _thumbnail(evaluation.queries, query, key)
        rows.append((Thumbnail(picture, evaluation.queries.name(query)), found))
    return rows


def _spread(queries: Source) -> list[int]:
    """A few queries: the middle one of each label as far as they go, else evenly spaced ones."""
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
        # It could be read a moment ago: not worth losing the report of a whole run.
        return Image.new('RGB', (_THUMBNAIL, _THUMBNAIL), 'lightgrey')
    return fit(picture, _THUMBNAIL)
