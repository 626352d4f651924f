"""--mode=evaluate: measures an exported encoder, prints the results and writes them to a file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from byol_jax import __version__
from byol_jax.app.build import open_encoder
from byol_jax.app.data import build_data
from byol_jax.app.fingerprint import names_of
from byol_jax.app.hosts import say
from byol_jax.app.memory import encoding_memory
from byol_jax.app.progress_bars import progress_shown
from byol_jax.errors import UserError
from byol_jax.evaluation.protocols import build_protocols, measure_encoder
from byol_jax.evaluation.subject import Subject, subject_of
from byol_jax.files import Damaged, check_place, read_object, write_whole
from byol_jax.interop.encoder import Encoder
from byol_jax.settings import Settings
from byol_jax.sources.bad_files import name_some
from byol_jax.sources.data import Data
from byol_jax.views.recipes import config_views

FORMAT = 'byol_jax evaluation 1'

# With fewer queries than this, a note says that the figures are rough.
_ROUGH = 100

_ELSEWHERE = 'Add --output=FILE.json, or another --workdir=DIR.'


def evaluate_encoder(
    config: Settings,
    workdir: Path,
    encoder_given: str | Path | None,
    output: Path | None,
    command: str,
) -> None:
    """Measures an exported encoder at the image size it was trained at; prints and writes results.

    Args:
      config: names the data and, in `evaluate`, the protocols.
      workdir: the workdir of the run.
      encoder_given: for `open_encoder`; None for `workdir / 'encoder'`.
      output: .json file to write; None for `workdir / 'evaluation.json'`.
      command: the command line, for the file.

    Raises:
      UserError: the encoder or the data cannot be used, or the file cannot be written.
    """
    start = time.perf_counter()
    protocols = build_protocols(config.evaluate)
    named = str(encoder_given or workdir / 'encoder')
    path = _place(workdir, encoder_given, output)
    encoder = open_encoder(named, config.modules)
    if output is None and encoder_given is not None:
        _check_not_of_another(path, encoder, named)
    config = as_trained(config, encoder)
    data = build_data(config)
    for line in data.lines():
        say(line)
    # Before the slow encoding, so that a folder that cannot be created is reported at once.
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = time.perf_counter()
    with progress_shown() as progress, encoding_memory(config):

        def tell(line: str) -> None:
            # Remove the bar first: a line printed into it would be unreadable.
            progress.close()
            say(line)

        subject = subject_of(
            encoder,
            data,
            config_views(config.views, config.data.pair_keys),
            config.evaluate,
            image_size=config.views.image_size,
            seed=config.seed,
            say=tell,
            progress=progress,
        )
        seconds = time.perf_counter() - encoding
        tell(f'{_encoded(subject)}: {seconds:.1f} s')
        measured = measure_encoder(subject, protocols)
    evaluation = {
        **_about(encoder, named),
        'data': _about_data(subject, config, data),
        'metrics': {name: metric.value for name, metric in measured.metrics.items()},
        'explained': {name: metric.explained for name, metric in measured.metrics.items()},
        'shown': {name: metric.shown for name, metric in measured.metrics.items()},
        'not_measured': measured.unmeasured,
        'notes': _notes(subject) + _other_split(Path(named).expanduser(), data),
        'protocols': measured.protocols,
        'bad_files': [file._asdict() for file in measured.bad],
        'options': {
            'seed': config.seed,
            'image_size': config.views.image_size,
            'evaluate': config.plain['evaluate'],
            'views': config.plain['views'],
        },
        'command': command,
        'seconds': {
            'features': round(seconds, 3),
            'all': round(time.perf_counter() - start, 3),
        },
    }
    text = json.dumps(evaluation, indent=2, allow_nan=False) + '\n'
    write_whole(path, lambda partial: partial.write_text(text, encoding='utf-8'))
    say(f'\n{evaluation_text(evaluation)}')
    if measured.bad:
        say(f'{len(measured.bad):,} bad file(s) left out: {name_some(measured.bad)}')
    say(f'\nevaluation: {path}')


def as_trained(config: Settings, encoder: Encoder) -> Settings:
    """A config whose views have the size and the resizing that an encoder was trained with."""
    about = encoder.description
    views = dataclasses.replace(
        config.views,
        image_size=about['image_size'],
        # Older exports do not say it.
        antialias=about.get('antialias', config.views.antialias),
    )
    return dataclasses.replace(config, views=views)


def _place(workdir: Path, encoder: str | Path | None, output: Path | None) -> Path:
    """The file to write.

    Raises:
      UserError: the file cannot be written there, or it would replace the evaluation of the
        workdir's own encoder.
    """
    path = output or workdir / 'evaluation.json'
    if path.suffix != '.json':
        raise UserError(f'--output={path}: an evaluation is written to a file that ends in .json.')
    check_place(path)
    own = (workdir / 'encoder').resolve()
    another = output is None and encoder is not None and Path(encoder).expanduser().resolve() != own
    if another and ((workdir / 'config.json').exists() or own.exists()):
        raise UserError(
            f'{workdir} belongs to a run with an encoder of its own, whose evaluation.json would '
            f'be replaced by that of {encoder}. {_ELSEWHERE}'
        )
    return path


def _check_not_of_another(path: Path, encoder: Encoder, folder: str) -> None:
    """Raises UserError if an existing file is no evaluation, or one of another encoder."""
    try:
        there = read_object(path)
    except Damaged:
        there = {}
    if there is None:
        return
    sha256 = there.get('weights_sha256')
    if not isinstance(sha256, str):
        raise UserError(f'{path} exists and is no evaluation, so it is not replaced. {_ELSEWHERE}')
    if sha256 != encoder.weights_sha256 and there.get('encoder') != folder:
        raise UserError(
            f'{path} is the evaluation of another encoder, {there.get("encoder")} (weights sha256 '
            f'{str(sha256)[:12]}...), and would be replaced. {_ELSEWHERE}'
        )


def _about(encoder: Encoder, folder: str) -> dict[str, Any]:
    names = ('jax', 'flax', 'numpy', 'scikit-learn')
    return {
        'format': FORMAT,
        'encoder': folder,
        'weights_sha256': encoder.weights_sha256,
        'step': encoder.description['step'],
        'versions': {
            'byol_jax': __version__,
            'python': platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
        },
        'device': jax.devices()[0].device_kind,
    }


def _encoded(subject: Subject) -> str:
    """A line for the terminal on what was encoded."""
    tested = f' and {len(subject.queries):,} {subject.queries_are}' if subject.queries else ''
    size = subject.gallery.features.shape[1]
    return f'features of {len(subject.gallery):,} training{tested} pictures, {size:,} values each'


def _about_data(subject: Subject, config: Settings, data: Data) -> dict[str, Any]:
    options, labels = config.data, subject.gallery.labels
    return {
        'source': options.source,
        'path': options.path,
        'name': options.name,
        'split': options.split if options.source == 'tfds' else None,
        'tile_size': options.tile_size,
        'test_path': config.evaluate.data_path,
        'test_split': config.evaluate.data_split,
        'held_out_fraction': options.held_out_fraction if data.test is None else None,
        'training': len(subject.gallery),
        'queries': len(subject.queries or ()),
        'queries_are': subject.queries_are,
        'labels': 0 if labels is None else len(np.unique(labels)),
    }


def _other_split(folder: Path, data: Data) -> list[str]:
    """A warning if the encoder's run split the same number of pictures in another way.

    In that case the encoder may have been trained on some of the test pictures. A different number
    of pictures means different data, which may be on purpose.
    """
    path = folder.parent / 'data.json'
    if data.test is not None:
        return []
    now = names_of(data)
    parts = ('examples', 'held_out')
    try:
        found = read_object(path)
    except Damaged as damage:
        return [f'{damage} So it is not known which pictures the encoder was trained on.']
    # What the run notes of contents besides is of no use here.
    then = {key: (found or {}).get(key) for key in now}
    same = all(isinstance(then[key], int) for key in parts) and sum(
        then[key] or 0 for key in parts
    ) == sum(now[key] for key in parts)
    if then == now or not same:
        return []
    return [
        f'The run of this encoder trained on {then["examples"]:,} pictures and held '
        f'{then["held_out"]:,} out. Here it is {now["examples"]:,} and {now["held_out"]:,}, or '
        'other pictures, so the encoder may have been trained on some of the test pictures. Use '
        f'the data flags of the run: {folder.parent / "command.txt"}.'
    ]


def _notes(subject: Subject) -> list[str]:
    """Notes on how far the results can be trusted."""
    gallery, queries = subject.gallery, subject.queries
    if queries is None:
        return []
    notes = []
    if len(queries) < _ROUGH:
        notes.append(f'{len(queries):,} test pictures give only a rough figure.')
    if gallery.labels is not None and queries.labels is not None:
        unseen = int(np.sum(~np.isin(queries.labels, gallery.labels)))
        if unseen:
            notes.append(
                f'{unseen:,} of {len(queries):,} test pictures have a label that no training '
                'picture has, so they always count as wrong.'
            )
    return notes


def evaluation_text(evaluation: Mapping[str, Any]) -> str:
    """The table for the terminal: a line per metric, also for those not measured.

    Args:
      evaluation: the content of an evaluation.json.
    """
    data, metrics = evaluation['data'], evaluation['metrics']
    names = [*metrics, *evaluation['not_measured']]
    width = max(map(len, names))
    tested = f', {data["queries"]:,} {data["queries_are"]}' if data['queries'] else ''
    labels = f', {data["labels"]:,} labels' if data['labels'] else ', no labels'
    lines = [
        f'{evaluation["encoder"]} (step {evaluation["step"]}): '
        f'{data["training"]:,} training{tested} pictures{labels}'
    ]
    for name, value in metrics.items():
        # Another version may have written it, and not say this of every metric.
        shown = f'{value:{evaluation.get("shown", {}).get(name, ".4g")}}'
        explained = evaluation.get('explained', {}).get(name, '')
        line = f'  {name:<{width}}  {shown:>8}  {explained}'
        lines.append(line.rstrip())
    for name, why in evaluation['not_measured'].items():
        lines.append(f'  {name:<{width}}  {"-":>8}  not measured: {why}')
    return '\n'.join([*lines, *evaluation['notes']])
