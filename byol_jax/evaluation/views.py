"""Features of random views: of both views as in training, and of crops for the linear protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from byol_jax.errors import UserError
from byol_jax.evaluation.features import Encode, Labelled, encode_some, in_batches
from byol_jax.evaluation.linear import Epoch
from byol_jax.input.stream import NoPictureError, PairMaker, epoch_order
from byol_jax.sources.bad_files import BadFile
from byol_jax.sources.base import Source
from byol_jax.views.augment import ViewParams, draw_view, make_view


class Pairs(NamedTuple):
    """Features of both views of some pictures.

    Attributes:
      view1, view2: float32 [M, D], row by row the same picture.
      bad: what could not be read; no row is of these.
    """

    view1: np.ndarray
    view2: np.ndarray
    bad: list[BadFile]


def encode_pairs(encode: Encode, source: Source, most: int, config: Any) -> Pairs:
    """Features of the two views that training would make of some pictures in its first epoch.

    They are a function of the config's seed. Where pictures belong together, as the frames of a
    clip do, at most one of a group is taken: the views of another would be right answers too.

    Args:
      encode: uint8 [B, S, S, 3] -> float32 [B, D].
      source: the pictures. most: of them to take, at least 1.
      config: whose seed, views, data.pair_keys and evaluate.batch_size are used.

    Raises:
      UserError: none can be read.
    """
    maker = PairMaker(source, config)
    positions = _positions(source, maker, most)
    drawn = dict(zip(positions, maker.variates(positions).swapaxes(0, 1), strict=True))

    def load(position: int) -> np.ndarray | list[BadFile]:
        try:
            loaded = maker.load(position)
        except NoPictureError as error:
            return [*error.bad]
        if loaded.bad:
            # Another picture stands in for this one, and has a place of its own.
            return [*loaded.bad]
        return np.stack(maker.views(loaded.pictures, drawn[position]))

    views: list[np.ndarray] = []
    bad: dict[str, BadFile] = {}
    for _, made in in_batches(load, positions, config.evaluate.batch_size):
        pairs = [pair for pair in made if isinstance(pair, np.ndarray)]
        bad |= {file.file: file for pair in made if isinstance(pair, list) for file in pair}
        if pairs:
            of_both = zip(*pairs, strict=True)
            features = [
                encode_some(encode, images, config.evaluate.batch_size) for images in of_both
            ]
            views.append(np.stack(features))
    if not views:
        raise UserError(f'None of {len(positions):,} pictures can be read, to make views of them.')
    view1, view2 = np.concatenate(views, axis=1)
    return Pairs(view1, view2, [*bad.values()])


def _positions(source: Source, maker: PairMaker, most: int) -> list[int]:
    """The first positions of the stream, of one example a group."""
    if source.groups is None:
        return list(range(min(most, len(source))))
    positions: list[int] = []
    seen: set[int] = set()
    for position in range(len(source)):
        group = int(source.groups[maker.example(position)[1]])
        if group not in seen and len(positions) < most:
            seen.add(group)
            positions.append(position)
    return positions


def augmented(encode: Encode, source: Source, labels: np.ndarray, config: Any) -> Epoch:
    """The training images of the linear protocol: new random crops and flips in every epoch.

    As DeepMind's byol/utils/dataset.py makes them for linear evaluation: the crop and the flip of
    pretraining, without its colours and blur.

    Args:
      encode: uint8 [B, S, S, 3] -> float32 [B, D].
      source: the pictures. labels: int [its length].
      config: whose seed, views.view1 (crop_area, crop_ratio, flip), views.image_size,
        views.antialias, first of data.pair_keys and evaluate.batch_size are used.

    Returns:
      An epoch, whose order, crops and flips are functions of (seed, epoch, example). It raises
      BadPicture if a picture cannot be read.
    """
    key, size, antialias = config.data.pair_keys[0], config.views.image_size, config.views.antialias
    batch_size = config.evaluate.batch_size

    def epoch(number: int) -> Iterator[Labelled]:
        def load(example: int) -> np.ndarray:
            picture = source.load(example, key)
            height, width = picture.shape[:2]
            drawn = draw_view(
                config.views.view1,
                height,
                width,
                seed=config.seed,
                epoch=number,
                example=example,
                number=1,
            )
            return make_view(picture, ViewParams(drawn.crop, drawn.flip), size, antialias)

        order = epoch_order(config.seed, number, len(source))
        for examples, images in in_batches(load, order.tolist(), batch_size):
            yield Labelled(encode_some(encode, images, batch_size), labels[np.asarray(examples)])

    return epoch
