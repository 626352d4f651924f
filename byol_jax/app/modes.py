"""The modes of the command line, one function each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from byol_jax.app.alarms import pixel_alarms
from byol_jax.app.build import build_run, encoder_of_run, method_of, open_encoder
from byol_jax.app.data import build_data
from byol_jax.app.embeddings import Embeddings, check_embeddings_path, write_embeddings
from byol_jax.app.evaluate import as_trained, evaluate_encoder
from byol_jax.app.hosts import say
from byol_jax.app.introduction import first_look
from byol_jax.app.memory import encoding_memory
from byol_jax.app.progress_bars import progress_shown
from byol_jax.app.report.pictures import draw_views
from byol_jax.app.train import train
from byol_jax.app.workdir import check_apart, check_workdir
from byol_jax.evaluation.features import encode_source
from byol_jax.files import WORKDIR_MARK
from byol_jax.interop.export import save_encoder
from byol_jax.models.layer_table import layer_table
from byol_jax.settings import Settings
from byol_jax.sources.bad_files import name_some
from byol_jax.sources.base import Subset
from byol_jax.sources.data import Data
from byol_jax.views.recipes import config_views


@dataclasses.dataclass(frozen=True)
class Request:
    """The values of the command line's flags.

    Attributes:
      config: the run's settings.
      workdir: the workdir of the run.
      command: the command line, for the report.
      encoder: the encoder to use, for `open_encoder`; None for the one in the workdir.
      output: file to write; None for the mode's default in the workdir.
    """

    config: Settings
    workdir: Path
    command: str
    encoder: str | Path | None = None
    output: Path | None = None


def train_mode(request: Request) -> None:
    """Trains, or resumes training."""
    train(request.config, request.workdir, request.command)


def views(request: Request) -> None:
    """Writes views.png, and what marks its folder, whose pictures are never data."""
    config, workdir = request.config, request.workdir
    check_workdir(workdir, config)
    check_apart(workdir, config.data)
    run = build_run(config)
    _say_found(run.data)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / WORKDIR_MARK).touch()
    bad = draw_views(run, workdir)
    for alarm in pixel_alarms(first_look(run)):
        say(alarm.line())
    if bad:
        say(f'bad files, others are shown in their place: {name_some(bad)}')
    say(f'view pairs: {workdir / "views.png"}')


def summary(request: Request) -> None:
    """Prints the table of the encoder's layers; compiles and writes nothing."""
    config = request.config
    size = config.views.image_size
    say(f'{config.encoder.name} on views of {size}x{size} pixels\n')
    say(layer_table(method_of(config).encoder, size))


def evaluate(request: Request) -> None:
    """Measures an exported encoder with the protocols of the config; writes evaluation.json."""
    evaluate_encoder(
        request.config, request.workdir, request.encoder, request.output, request.command
    )


def embed(request: Request) -> None:
    """Writes the features, names and labels of all readable pictures of the config's data."""
    path = request.output or request.workdir / 'embeddings.npz'
    check_embeddings_path(path)
    named = str(request.encoder or request.workdir / 'encoder')
    encoder = open_encoder(named, request.config.modules)
    config = as_trained(request.config, encoder)
    first = config_views(config.views, config.data.pair_keys)['view1']
    everything = dataclasses.replace(config.data, held_out_fraction=0.0)
    data = build_data(dataclasses.replace(config, data=everything))
    _say_found(data)
    # Before the slow encoding, so that a folder that cannot be created is reported at once.
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress_shown() as progress, encoding_memory(config):
        features, indices, bad = encode_source(
            encoder,
            data.train,
            config.data.pair_keys[0],
            image_size=config.views.image_size,
            antialias=first.antialias,
            crop_fraction=config.evaluate.crop_fraction,
            batch_size=config.evaluate.batch_size,
            progress=progress,
        )
    source = Subset(data.train, indices)
    names = [source.name(i) for i in range(len(source))]
    sha256 = encoder.weights_sha256
    write_embeddings(path, Embeddings(features, names, source.labels, source.label_names, sha256))
    if bad:
        rows = len(data.train) - len(features)
        say(f'{len(bad):,} bad file(s), {rows:,} example(s) left out: {name_some(bad)}')
    say(f'{len(features):,} x {features.shape[1]} features: {path}')
    say(f'encoder: {named}, weights sha256 {sha256}')


def export(request: Request) -> None:
    """Writes the encoder of the newest good checkpoint to workdir/encoder."""
    config, workdir = request.config, request.workdir
    check_workdir(workdir, config)
    encoder = encoder_of_run(workdir, config.modules)
    save_encoder(encoder, workdir / 'encoder')
    say(f'encoder of step {encoder.description["step"]}: {workdir / "encoder"}')
    say(f'weights sha256 {encoder.weights_sha256}')


def _say_found(data: Data) -> None:
    for line in data.lines():
        say(line)


MODES: dict[str, Callable[[Request], None]] = {
    'train': train_mode,
    'views': views,
    'summary': summary,
    'evaluate': evaluate,
    'embed': embed,
    'export': export,
}
