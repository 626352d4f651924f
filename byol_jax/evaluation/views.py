"""Encodes random views: pairs of training views, and crops for the linear protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from byol_jax.errors import UserError
from byol_jax.evaluation.features import Encode, Labelled, encode_some, in_batches
from byol_jax.evaluation.linear import Epoch
from byol_jax.input.stream import NoPictureError, Stream, epoch_order
from byol_jax.sources.bad_files import BadFile
from byol_jax.sources.base import Source
from byol_jax.views.recipes import crop_and_flip
from byol_jax.views.view import View


class Pairs(NamedTuple):
    """Features of both views of some pictures.

    Attributes:
      view1: float32 [M, D].
      view2: float32 [M, D]; row i belongs to the same picture as row i of view1.
      bad: files that could not be read; their pictures are left out.
    """

    view1: np.ndarray
    view2: np.ndarray
    bad: list[BadFile]


def encode_pairs(encode: Encode, stream: Stream, most: int, batch_size: int = 64) -> Pairs:
    """Encodes the first two views that training makes of some pictures in epoch 0.

    The views depend on the stream's seed only. If pictures belong together, like the frames of a
    clip, only one of each group is taken, because the views of the others would be right answers
    too.

    Args:
      encode: maps uint8 [B, S, S, 3] to float32 [B, D].
      stream: the pictures and their views.
      most: number of pictures, at most; at least 1.
      batch_size: B.

    Raises:
      UserError: no picture can be read.
    """
    positions = _positions(stream, most)
    kinds = list(stream.views.values())[:2]
    steps = [view.steps(d) for view, d in zip(kinds, stream.draw(positions).values(), strict=False)]
    own = dict(zip(positions, zip(*steps, strict=True), strict=True))

    def load(position: int) -> np.ndarray | list[BadFile]:
        try:
            loaded = stream.load(position)
        except NoPictureError as error:
            return [*error.bad]
        if loaded.bad:
            # `loaded` has another picture in its place, which has a position of its own.
            return [*loaded.bad]
        shown = zip(kinds, loaded.pictures, own[position], strict=False)
        return np.stack([view.make(picture, steps) for view, picture, steps in shown])

    views: list[np.ndarray] = []
    bad: dict[str, BadFile] = {}
    for _, made in in_batches(load, positions, batch_size):
        pairs = [pair for pair in made if isinstance(pair, np.ndarray)]
        bad |= {file.file: file for pair in made if isinstance(pair, list) for file in pair}
        if pairs:
            of_both = zip(*pairs, strict=True)
            features = [encode_some(encode, images, batch_size) for images in of_both]
            views.append(np.stack(features))
    if not views:
        raise UserError(f'None of {len(positions):,} pictures can be read to make views.')
    view1, view2 = np.concatenate(views, axis=1)
    return Pairs(view1, view2, [*bad.values()])


def _positions(stream: Stream, most: int) -> list[int]:
    """The first positions of the stream, only one of each group."""
    source = stream.source
    if source.groups is None:
        return list(range(min(most, len(source))))
    positions: list[int] = []
    seen: set[int] = set()
    for position in range(len(source)):
        group = int(source.groups[stream.example(position)[1]])
        if group not in seen and len(positions) < most:
            seen.add(group)
            positions.append(position)
    return positions


def augmented(
    encode: Encode,
    source: Source,
    labels: np.ndarray,
    view: View,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Epoch:
    """The training features of the linear protocol, from new random crops and flips in every epoch.

    As in DeepMind's byol/utils/dataset.py for linear evaluation, the crop and the flip are those of
    pretraining, without changes of colour and blur.

    Args:
      encode: maps uint8 [B, S, S, 3] to float32 [B, D].
      source: N pictures.
      labels: int [N].
      view: the view whose crop and flip are used, drawn as for view 1.
      seed: seed of the order and of every crop and flip.
      batch_size: B.

    Returns:
      A function of the epoch's number (see `linear.Epoch`). Order, crops and flips depend on (seed,
      epoch, example) only. It raises BadPicture if a picture cannot be read.
    """
    plain = crop_and_flip(view)

    def epoch(number: int) -> Iterator[Labelled]:
        def load(example: int) -> np.ndarray:
            drawn = plain.draw(seed, 1, np.array([number]), np.array([example]))
            (steps,) = plain.steps(drawn)
            return plain.make(source.load(example, view.picture), steps)

        order = epoch_order(seed, number, len(source))
        for examples, images in in_batches(load, order.tolist(), batch_size):
            yield Labelled(encode_some(encode, images, batch_size), labels[np.asarray(examples)])

    return epoch
