"""A tiny random encoder on disk, and a request to evaluate it, for the tests of the modes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from byol_jax.app.modes import Request
from byol_jax.interop.encoder import make_encoder
from byol_jax.interop.export import save_encoder
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder
from byol_jax.settings import Settings
from configs import default

SIZE = 16
KWARGS = {'stage_sizes': (1,), 'width': 0.125}


def save_random_encoder(folder: Path, broken: bool = False) -> Path:
    """Writes the encoder, which has 8 features; all are NaN if `broken`."""
    tapped = TappedEncoder(build_encoder('resnet', KWARGS), 'avgpool')
    variables = tapped.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    if broken:
        variables = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), variables)
    encoder = make_encoder(
        name='resnet',
        kwargs=KWARGS,
        hidden_layer='avgpool',
        variables=variables,
        image_size=SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        step=7,
    )
    save_encoder(encoder, folder)
    return folder


def write_pictures(folder: Path, classes: dict[str, int], seed: int) -> Path:
    """Writes pictures in class folders ('' for none): hues that overlap, and noise."""
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            colour = rng.normal(80 + 70 * np.eye(3)[sorted(classes).index(name) % 3], 30)
            noise = rng.normal(0, 25, (20, 24, 3))
            picture = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / name / f'{i:02}.png')
    return folder


def evaluation_request(
    encoder: Path, workdir: Path, output: Path | None = None, **changes: object
) -> Request:
    """A request for --mode=evaluate or embed on class folders; `changes` has '__' for a dot."""
    config = default.get_config()
    config.views.image_size = 64  # This is not the encoder's image size, which counts.
    config.evaluate.batch_size = 8
    config.evaluate.protocols = ('knn',)
    config.evaluate.knn_k = (5,)
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return Request(Settings.of(config), workdir, 'the command', encoder, output)
