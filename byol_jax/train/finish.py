"""What a run shows: the picture of its view pairs, and the report at its end."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from byol_jax.data.bad_files import BadFile
from byol_jax.data.sources.base import Source
from byol_jax.data.stream import PairMaker
from byol_jax.errors import BadPicture
from byol_jax.evaluate.protocol import Evaluation, describe
from byol_jax.report.alarm_log import summary
from byol_jax.report.metrics import read_metrics
from byol_jax.report.page import Result, Thumbnail, results_text, write_report
from byol_jax.report.pictures import fit, save_picture, views_picture
from byol_jax.report.progress import duration
from byol_jax.report.results_file import write_results
from byol_jax.train.feed import shown_views
from byol_jax.train.setup import Run
from byol_jax.train.workdir import resolve

_ROWS = 8
_SHOWN_QUERIES, _SHOWN_NEIGHBOURS = 8, 6
_THUMBNAIL = 96


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
    before: Evaluation,
    after: Evaluation,
    bad_files: int,
    command: str,
    seconds: float,
) -> str:
    """Writes report.html and results.json; returns the before/after table for the terminal.

    Args:
      run: that has ended. workdir: of the run.
      before, after: of the encoder, measured.
      bad_files: how many there were.
      command: that started the run.
      seconds: this start of it took.
    """
    first = 'as loaded' if run.training.origin else 'randomly initialised'
    results = [
        Result(first, before.accuracy, before.feature_std),
        Result(f'trained {run.plan.total_steps:,} steps', after.accuracy, after.feature_std),
    ]
    protocol = f'{describe(after, run.config)} Both encoders are measured alike.'
    versions = ', '.join(
        f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'flax', 'optax')
    )
    write_report(
        workdir / 'report.html',
        title=f'BYOL: {run.config.name}',
        summary={
            'Encoder': f'{run.config.encoder.name}, tapped at {run.config.encoder.hidden_layer}',
            **({'Start': run.training.origin} if run.training.origin else {}),
            'Training examples': f'{run.plan.examples:,} ({len(run.data.held_out):,} held out)',
            **_left_out(run),
            'Bad files': f'{bad_files:,}, named in bad_files.txt' if bad_files else 'none',
            'Alarms': summary(workdir),
            'Steps': f'{run.plan.total_steps:,} of {run.plan.batch_size} pairs '
            f'({run.plan.epoch(run.plan.total_steps):.1f} epochs)',
            'Time of this start': duration(seconds),
            'Devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
            'Versions': f'Python {platform.python_version()}, {versions}',
        },
        results=results,
        protocol=protocol,
        records=read_metrics(workdir),
        projection_size=run.config.projector.output_size,
        views=workdir / 'views.png',
        neighbours=_shown_neighbours(after, run.config.data.pair_keys[0]),
        config=resolve(run.config),
        command=command,
    )
    write_results(workdir, [result._asdict() for result in results], protocol)
    return f'{results_text(results)}\n{protocol}'


def _left_out(run: Run) -> dict[str, str]:
    small = len(run.data.small)
    return {'Left out': f'{small:,} pictures smaller than a tile'} if small else {}


def _shown_neighbours(evaluation: Evaluation, key: str) -> list[tuple[Thumbnail, list[Thumbnail]]]:
    rows = []
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
