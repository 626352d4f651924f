"""The modes of main.py other than training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from byol_jax.data.sources.build import build_data
from byol_jax.errors import UserError
from byol_jax.evaluate.features import encode_source
from byol_jax.evaluate.protocol import describe, evaluate
from byol_jax.files import write_whole
from byol_jax.interop.export import load_encoder, save_encoder
from byol_jax.report.page import Result, results_text
from byol_jax.train.checkpoint import Checkpoints
from byol_jax.train.finish import draw_views
from byol_jax.train.loop import train
from byol_jax.train.setup import build_byol, build_run, online_encoder
from byol_jax.train.state import TrainState
from byol_jax.train.workdir import check_workdir


def views(config: Any, workdir: Path, command: str) -> None:
    """Writes views.png and nothing else."""
    del command
    check_workdir(workdir, config)
    run = build_run(config)
    workdir.mkdir(parents=True, exist_ok=True)
    draw_views(run, workdir)
    print(f'view pairs: {workdir / "views.png"}')


def summary(config: Any, workdir: Path, command: str) -> None:
    """Prints the encoder's layers; compiles and writes nothing."""
    del workdir, command
    size = config.views.image_size
    encoder = build_byol(config).encoder
    layers = encoder.layers((1, size, size, 3))
    order = [layer.path for layer in layers]
    width = max(map(len, [*order, 'layer']))
    print(f'{config.encoder.name} on views of {size}x{size} pixels\n')
    print(f'{"layer":<{width}}  {"module":<12}{"output":<20}{"parameters":>12}')
    for layer in layers:
        shape = 'x'.join(map(str, layer.shape[1:]))
        mark = ''
        if layer.path == encoder.hidden_layer:
            mark = '  <- tapped: the representation'
        elif any(p.startswith(f'params/{layer.path}/') for p in encoder.behind):
            mark = '  (behind the tap: not trained)'
        print(f'{layer.path:<{width}}  {layer.kind:<12}{shape:<20}{layer.parameters:>12,}{mark}')
    variables = jax.eval_shape(
        encoder.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    print(f'\n{total:,} parameters')


def evaluate_mode(config: Any, workdir: Path, command: str) -> None:
    """Measures the exported encoder of the workdir on the config's data."""
    del command
    encoder = load_encoder(workdir / 'encoder')
    result = evaluate(encoder, build_data(config), config)
    name = f'{workdir / "encoder"} (step {encoder.description["step"]})'
    print(results_text([Result(name, result.accuracy, result.feature_std)]))
    print(describe(result, config))


def embed(config: Any, workdir: Path, command: str) -> None:
    """Writes embeddings.npz: features, names and labels of all pictures of the config's data."""
    del command
    encoder = load_encoder(workdir / 'encoder')
    config = config.copy_and_resolve_references()
    config.data.held_out_fraction = 0.0
    source = build_data(config).train
    features = encode_source(
        encoder,
        source,
        config.data.pair_keys[0],
        image_size=encoder.description['image_size'],
        crop_fraction=config.evaluate.crop_fraction,
        batch_size=config.evaluate.batch_size,
    )
    arrays: dict[str, Any] = {
        'features': features,
        'names': np.array([source.name(i) for i in range(len(source))]),
    }
    if source.labels is not None:
        arrays['labels'] = source.labels
        arrays['label_names'] = np.array(source.label_names)
    path = workdir / 'embeddings.npz'

    def write(partial: Path) -> None:
        with partial.open('wb') as file:
            np.savez(file, **arrays)

    write_whole(path, write)
    print(f'{len(features):,} x {features.shape[1]} features: {path}')


def export(config: Any, workdir: Path, command: str) -> None:
    """Writes the encoder of the newest good checkpoint to workdir/encoder."""
    del command
    if not (workdir / 'checkpoints').is_dir():
        raise UserError(f'{workdir} holds no checkpoints to export.')
    check_workdir(workdir, config)
    run = build_run(config)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, read_only=True)
    restored = checkpoints.restore(run.training.initial)
    checkpoints.close()
    if restored is None:
        raise UserError(f'{workdir / "checkpoints"} is empty: there is nothing to export.')
    save_encoder(online_encoder(config, TrainState(*restored[1])), workdir / 'encoder')
    print(f'encoder of step {restored[0]}: {workdir / "encoder"}')


MODES: dict[str, Callable[[Any, Path, str], None]] = {
    'train': train,
    'views': views,
    'summary': summary,
    'evaluate': evaluate_mode,
    'embed': embed,
    'export': export,
}
