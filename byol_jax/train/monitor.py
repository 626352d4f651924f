"""The monitors of a run: which features are looked at, how they reach the host, and LiDAR."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from byol_jax.byol import Byol, Features
from byol_jax.data.augment import draw_view, make_view
from byol_jax.data.pipeline import PairMaker
from byol_jax.data.sources.base import Source
from byol_jax.evaluate.monitors import measure
from byol_jax.evaluate.spectrum import lidar
from byol_jax.plan import Plan
from byol_jax.train.state import TrainState

# Examples of a batch that the monitors look at, at most (or one of every pass of every device).
EXAMPLES = 256

# LiDAR's pictures and views of each. arXiv:2312.04000 takes about 1,000 and 50, which cost as much
# as many training steps; with 100 the rank is at most 99.
LIDAR_PICTURES, LIDAR_VIEWS = 100, 10


def monitored(plan: Plan) -> int:
    """Examples that each pass of each device hands out (`make_train_step`), at least 1."""
    passes = plan.device_count * plan.accumulate_steps
    share = plan.device_batch_size // plan.accumulate_steps
    return min(share, math.ceil(EXAMPLES / passes))


def measured(features: Features) -> dict[str, float]:
    """The monitors of a step from what `pmap_step` handed out: [devices, 2, M, size] a leaf.

    Of several processes each sees its own devices' examples.
    """
    return measure(*map(_on_host, features))


def _on_host(x: jax.Array) -> np.ndarray:
    """[devices, 2, M, size] -> float32 [2, devices M, size], of this process's devices."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    rows = np.concatenate([np.asarray(shard.data, np.float32) for shard in shards])
    return np.moveaxis(rows, 0, 1).reshape(2, -1, x.shape[-1])


class Lidar:
    """LiDAR of the online projections, in inference mode, over the same views every time."""

    def __init__(self, byol: Byol, source: Source, config: Any):
        """Makes nothing yet.

        Args:
          byol: the networks. source: the training pictures.
          config: whose seed, views and data.pair_keys are used.
        """
        self._byol, self._source, self._config = byol, source, config
        self._views: np.ndarray | None = None
        self._project = jax.jit(byol.project)

    def __call__(self, state: TrainState) -> float:
        """LiDAR of a state: 1 to the number of pictures less 1, or P if that is less.

        The views are made by the first call and kept: 1,000 of them, 150 MB at 224 pixels.
        """
        if self._views is None:
            self._views = lidar_views(self._source, self._config)
        # One device's copy: nothing here may wait for other processes.
        own = jax.tree.map(
            lambda x: x.addressable_data(0), (state.online_params, state.online_stats)
        )
        projections = [np.asarray(self._project(*own, views)) for views in self._views]
        return lidar(np.stack(projections, axis=1))


def lidar_views(source: Source, config: Any) -> np.ndarray:
    """Training views of the first pictures of the stream: uint8 [views, pictures, S, S, 3].

    Views 2 k and 2 k + 1 of a picture are its views 1 and 2 of epoch k, but of one picture where
    training takes a partner for the second.
    """
    maker = PairMaker(source, config)
    count = min(LIDAR_PICTURES, len(source))

    def of_picture(position: int) -> list[np.ndarray]:
        _, example = maker.example(position)
        pictures = maker.load(position).pictures
        views = []
        for number in range(LIDAR_VIEWS):
            epoch, which = divmod(number, 2)
            picture = pictures[which]
            params = draw_view(
                (config.views.view1, config.views.view2)[which],
                *picture.shape[:2],
                seed=config.seed,
                epoch=epoch,
                example=example,
                number=which + 1,
            )
            views.append(make_view(picture, params, config.views.image_size))
        return views

    with ThreadPoolExecutor(config.data.workers or os.cpu_count()) as pool:
        made = list(pool.map(of_picture, range(count)))
    return np.stack([np.stack(views) for views in zip(*made, strict=True)])
