"""What an encoder is measured on is resized as what it was trained on was."""

from __future__ import annotations

import json

import numpy as np
import pytest
from encoders import SIZE, evaluation_request, save_random_encoder

from byol_jax.app.evaluate import as_trained
from byol_jax.app.modes import MODES
from byol_jax.app.periodic import neighbours_of
from byol_jax.evaluation.subject import subject_of
from byol_jax.files import sealed
from byol_jax.interop.export import load_encoder
from byol_jax.settings import Settings
from byol_jax.sources.array import Array
from byol_jax.sources.base import Subset
from byol_jax.sources.data import Data
from byol_jax.views.crop import center_view
from byol_jax.views.recipes import config_views
from configs import default

# Of 64 x 64 noise a quarter is left: with and without antialiasing are far apart.
PICTURES = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)


def settings(antialias, **changes):
    config = default.get_config()
    config.views.update({'image_size': SIZE, 'antialias': antialias})
    config.evaluate.batch_size = 4
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return Settings.of(config)


def expected(antialias):
    return [center_view(picture, SIZE, 0.875, antialias) for picture in PICTURES]


class Seen:
    """An encoder that keeps what it is shown."""

    def __init__(self):
        self.pictures = []

    def __call__(self, images):
        self.pictures += [image for image in images if image.any()]
        return images.reshape(len(images), -1)[:, :8].astype(np.float32)


def before_and_after(config, encode):
    neighbours_of(encode, data(), config)


def protocols(config, encode):
    views = config_views(config.views, config.data.pair_keys)
    subject_of(encode, data(), views, config.evaluate, image_size=SIZE)


def data():
    """The first two pictures are held out."""
    array = Array.of(PICTURES, np.arange(6) % 2)
    return Data(Subset(array, np.arange(2, 6)), Subset(array, np.arange(2)))


@pytest.mark.parametrize('antialias', [True, False])
@pytest.mark.parametrize('where', [before_and_after, protocols])
@pytest.mark.parametrize('beside', [False, True], ids=['key', 'argument'])
def test_centre_crops_are_resized_as_the_crops_of_training(where, antialias, beside):
    """As the key views.antialias says, or the argument beside the operation, which goes first."""
    config = settings(antialias)
    if beside:
        operations = (('crop', {'antialias': antialias}), 'flip')
        config = settings(not antialias, views__view1__operations=operations)
    seen = Seen()
    where(config, seen)
    shown = {image.tobytes() for image in seen.pictures}
    assert shown == {image.tobytes() for image in expected(antialias)}
    assert np.abs(np.subtract(*map(np.float32, map(expected, (True, False))))).mean() > 10


@pytest.mark.parametrize(
    ('said', 'config', 'antialias'),
    [(True, False, True), (False, True, False), (None, True, True), (None, False, False)],
)
def test_an_exported_encoder_says_how(tmp_path, said, config, antialias):
    """--mode=embed goes by encoder.json, and by the config where an older one does not say."""
    folder = save_random_encoder(tmp_path / 'encoder')
    path = folder / 'encoder.json'
    about = json.loads(path.read_text())
    assert about['antialias'] is True
    del about['antialias']
    # Older ones have no digest either.
    del about['sha256']
    path.write_text(json.dumps(about if said is None else sealed({**about, 'antialias': said})))
    np.savez(tmp_path / 'pictures.npz', images=PICTURES)
    request = evaluation_request(
        folder,
        tmp_path / 'w',
        tmp_path / 'features.npz',
        data__source='array',
        data__path=str(tmp_path / 'pictures.npz'),
        views__antialias=config,
    )
    MODES['embed'](request)
    encoder = load_encoder(folder)
    assert as_trained(request.config, encoder).views.antialias == antialias
    with np.load(tmp_path / 'features.npz') as arrays:
        np.testing.assert_allclose(
            arrays['features'], encoder(np.stack(expected(antialias))), rtol=1e-5
        )
