"""Small TFDS data sets of any features, made where a test needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


def noise(index: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    """A picture of noise, [8, 9, channels], different for every index."""
    rng = np.random.default_rng(index)
    return rng.integers(0, np.iinfo(dtype).max, (8, 9, channels), dtype, endpoint=True)


def image(channels: int = 3, **kwargs: Any) -> tfds.features.Image:
    """A feature for such pictures."""
    return tfds.features.Image(shape=(None, None, channels), **kwargs)


def builder_class(
    name: str,
    features: dict[str, Any],
    example: Callable[[int], dict[str, Any]],
    supervised_keys: Any = None,
    count: int = 6,
) -> type[tfds.core.GeneratorBasedBuilder]:
    """A data set with splits train and test, both of `count` examples.

    Args:
      name: name of the class; the data set's name is the same in snake_case. TFDS never forgets it.
      features: as in FeaturesDict.
      example: gives example i.
      supervised_keys: as in DatasetInfo.
      count: number of examples in each split.
    """

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=supervised_keys,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in ('train', 'test')}

    def _generate_examples(self):
        for i in range(count):
            yield i, example(i)

    return type(
        name,
        (tfds.core.GeneratorBasedBuilder,),
        {
            'VERSION': tfds.core.Version('1.0.0'),
            '_info': _info,
            '_split_generators': _split_generators,
            '_generate_examples': _generate_examples,
            '__module__': __name__,
        },
    )


def prepare(builder: type, folder: Path, file_format: str = 'tfrecord', shards: int = 1) -> Any:
    """Writes a data set below a folder and returns its builder."""
    made = builder(data_dir=folder, file_format=file_format)
    made.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=shards, try_download_gcs=False)
    )
    return made
