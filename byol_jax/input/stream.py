"""The stream of examples, as a pure function of integers; needs no TensorFlow.

The examples form one endless stream: position p of the stream is example p mod N of epoch
p div N, in the order that (seed, epoch) gives. Batch k holds positions k B to (k + 1) B - 1. So a
run can go on from any step at once, and nothing of the pipeline needs to be saved.

Where an example's picture cannot be read, another example's takes its place at that position. Which
one is a function of (seed, epoch, example) too, so no other position changes, whoever makes it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.bad_files import BadFile, bad_file, name_some
from byol_jax.sources.base import Source
from byol_jax.views.augment import ViewParams, crop_resize, make_view, view_params
from byol_jax.views.draws import Photometric, draw_crops, draw_photometric, uniforms

# (example, key) of the picture of each view.
Which = tuple[tuple[int, str], tuple[int, str]]

# Other examples tried, at most, in place of one that cannot be read. With half of all pictures bad
# one position in four billion would find none.
MOST_REPLACEMENTS = 32


class Loaded(NamedTuple):
    """What a position of the stream shows.

    Attributes:
      pictures: uint8 [H, W, 3], for each view.
      example: the one they are of; another than the position's own if that cannot be read.
      bad: what could not be read on the way to it.
    """

    pictures: tuple[np.ndarray, np.ndarray]
    example: int
    bad: Sequence[BadFile] = ()


class NoPictureError(UserError):
    """Neither an example nor any that was tried in its place can be read; `bad` says why."""

    def __init__(self, bad: Sequence[BadFile]):
        others = 'and there is no other to take its place'
        if len(bad) > 1:
            others = f'nor can {len(bad) - 1:,} others that were tried in its place'
        super().__init__(
            f'A picture cannot be read, {others}: {name_some(bad, 3)}. Is the disk still there? '
            'See to that, then give the same command again.'
        )
        self.bad = bad


def _plain(view: Any) -> Any:
    return view if dataclasses.is_dataclass(view) else SimpleNamespace(**view)


class PairMaker:
    """Loads the pictures of any position of the stream and makes its two views."""

    def __init__(self, source: Source, config: Any):
        """Args:
        source: the training pictures.
        config: whose seed, views and data.pair_keys are used.
        """
        self._source = source
        self._seed = config.seed
        self._size = config.views.image_size
        self._antialias = config.views.antialias
        # Plain objects: an attribute of a ConfigDict takes 10 us, and each view asks for 16.
        self._views = tuple(_plain(getattr(config.views, f'view{n}')) for n in (1, 2))
        self._keys = tuple(config.data.pair_keys)

    def example(self, position: int) -> tuple[int, int]:
        """(epoch, index of the example) at a position of the stream."""
        epoch, place = divmod(position, len(self._source))
        return epoch, int(epoch_order(self._seed, epoch, len(self._source))[place])

    def pictures(self, position: int) -> Which:
        """(example, key) of the picture that each view at a position is made from."""
        return self._which(*self.example(position))

    def load(self, position: int) -> Loaded:
        """The pictures at a position: its example's, or those of the first replacement there is.

        Raises:
          NoPictureError: none of the replacements can be read either.
        """
        epoch, index = self.example(position)
        others = replacements(self._seed, epoch, index, len(self._source))
        bad = []
        for candidate in itertools.chain([index], others):
            first, second = self._which(epoch, candidate)
            try:
                # In the source's order: a later frame of a clip is decoded on from an earlier one.
                loaded = {
                    which: self._source.load_in_epoch(epoch, *which)
                    for which in sorted({first, second})
                }
            except BadPicture as error:
                bad.append(bad_file(error))
            else:
                return Loaded((loaded[first], loaded[second]), candidate, bad)
        raise NoPictureError(bad)

    def views(
        self, pictures: tuple[np.ndarray, np.ndarray], drawn: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The views that a position makes of its pictures: two uint8 [S, S, 3].

        Args:
          pictures: uint8 [H, W, 3], of each view.
          drawn: the position's variates, float64 [2, VARIATES], of `variates`; they are its own,
            whichever example the pictures are of.
        """
        first, second = (
            make_view(picture, params, self._size, self._antialias)
            for picture, params in self._params(pictures, drawn)
        )
        return first, second

    def crops(
        self, pictures: tuple[np.ndarray, np.ndarray], drawn: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `views`, but cropped and resized only; `photometric` has the rest."""
        first, second = (
            crop_resize(picture, params.crop, self._size, self._antialias)
            for picture, params in self._params(pictures, drawn)
        )
        return first, second

    def _params(
        self, pictures: tuple[np.ndarray, np.ndarray], drawn: np.ndarray
    ) -> Iterator[tuple[np.ndarray, ViewParams]]:
        for view, picture, u in zip(self._views, pictures, drawn.tolist(), strict=True):
            height, width = picture.shape[:2]
            yield picture, view_params(view, height, width, u)

    def photometric(self, drawn: np.ndarray) -> dict[str, Photometric]:
        """What the views at B positions have beside the crop: {'colors1', 'colors2'}.

        Args:
          drawn: the positions' variates, float64 [2, B, VARIATES], of `variates`.
        """
        both = zip(self._views, drawn, strict=True)
        return {f'colors{n}': draw_photometric(view, u) for n, (view, u) in enumerate(both, 1)}

    def drawn(self, positions: Sequence[int], height: int, width: int) -> dict[str, Any]:
        """All that makes the views at B positions of pictures of one size.

        Returns:
          {'example': int32 [B], 'crop1', 'crop2': int32 [B, 4], 'colors1', 'colors2'}.
        """
        drawn: dict[str, Any] = {'example': self.examples(positions)[1].astype(np.int32)}
        for n, (view, u) in enumerate(zip(self._views, self.variates(positions), strict=True), 1):
            drawn[f'crop{n}'] = draw_crops(view, height, width, u)
            drawn[f'colors{n}'] = draw_photometric(view, u)
        return drawn

    def examples(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """As `example` for B positions: (epochs, indices), int64 [B] each."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), len(self._source))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = epoch_order(self._seed, int(epoch), len(self._source))
            indices[here] = order[places[here]]
        return epochs, indices

    def variates(self, positions: Sequence[int]) -> np.ndarray:
        """What is drawn for both views at B positions: float64 [2, B, VARIATES] in [0, 1)."""
        epochs, indices = self.examples(positions)
        return np.stack([uniforms(self._seed, number, epochs, indices) for number in (1, 2)])

    def pair(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The views at a position: two uint8 [S, S, 3]."""
        return self.views(self.load(position).pictures, self.variates([position])[:, 0])

    def _which(self, epoch: int, example: int) -> Which:
        """What the two views of an example are made from: its own picture and a partner's."""
        second = example
        partners = self._source.partners(example)
        if len(partners):
            place = draw_place(len(partners), self._seed, epoch, example, number=2)
            second = int(partners[place])
        return (example, self._keys[0]), (second, self._keys[1])


@functools.lru_cache(maxsize=3)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(examples), int [examples]."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 2], counter=[0, 0, 0, epoch]))
    return rng.permutation(examples)


def replacements(seed: int, epoch: int, example: int, examples: int) -> Iterator[int]:
    """Up to MOST_REPLACEMENTS other examples, to be tried in this order in place of `example`.

    They are drawn without repetition from all others, alike, as a function of the arguments.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 3], counter=[0, 0, example, epoch]))
    tries = min(MOST_REPLACEMENTS, examples - 1)
    for other in rng.choice(examples - 1, tries, replace=False) if tries else ():
        yield int(other) + int(other >= example)


def draw_place(count: int, seed: int, epoch: int, example: int, number: int) -> int:
    """Which of `count` partners of an example feeds view `number`: uniform in range(count).

    A stream of its own, so that partners change nothing else that is drawn.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 4], counter=[0, number, example, epoch]))
    return int(rng.random() * count)
