"""The photographs that scikit-image and scikit-learn contain: real data without a download."""

from __future__ import annotations

import importlib.resources

import numpy as np

from byol_jax.errors import UserError
from byol_jax.sources.base import Source
from byol_jax.sources.decode import decode

# Every colour photograph in the wheels of the two packages, and the left one of the stereo pair.
PHOTOGRAPHS = {
    'astronaut': ('skimage.data', 'astronaut.png'),
    'cat': ('skimage.data', 'chelsea.png'),
    'coffee': ('skimage.data', 'coffee.png'),
    'deep field': ('skimage.data', 'hubble_deep_field.jpg'),
    'tissue': ('skimage.data', 'ihc.png'),
    'motorcycle': ('skimage.data', 'motorcycle_left.png'),
    'retina': ('skimage.data', 'retina.jpg'),
    'rocket': ('skimage.data', 'rocket.jpg'),
    'temple': ('sklearn.datasets.images', 'china.jpg'),
    'flower': ('sklearn.datasets.images', 'flower.jpg'),
}


class SamplePhotographs(Source):
    """Ten colour photographs of 300x451 to 1411x1411 pixels; each is its own class."""

    def __init__(self) -> None:
        self.label_names = tuple(PHOTOGRAPHS)
        self.labels = np.arange(len(PHOTOGRAPHS))
        self._pictures = [_read(name) for name in PHOTOGRAPHS]

    def __len__(self) -> int:
        return len(self._pictures)

    def load(self, index: int, key: str) -> np.ndarray:
        return self._pictures[index]

    def name(self, index: int) -> str:
        return self.label_names[index]


def _read(name: str) -> np.ndarray:
    package, file = PHOTOGRAPHS[name]
    try:
        data = importlib.resources.files(package).joinpath(file).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"The sample photograph '{name}' ({package}/{file}) is missing: {error}. Install what "
            'requirements.txt lists (scikit-image >= 0.25 and scikit-learn).'
        ) from error
    return decode(data, f'{package}/{file}', max_megapixels=10)
