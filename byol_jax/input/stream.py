"""The stream of examples, as a pure function of integers; needs no TensorFlow.

The examples form one endless stream: position p of the stream is example p mod N of epoch
p div N, in the order that (seed, epoch) gives. Batch k holds positions k B to (k + 1) B - 1. So a
run can go on from any step at once, and nothing of the pipeline needs to be saved.

Where an example's picture cannot be read, another example's takes its place at that position. Which
one is a function of (seed, epoch, example) too, so no other position changes, whoever makes it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.bad_files import BadFile, bad_file, name_some
from byol_jax.sources.base import Source, check_picture
from byol_jax.views.view import Drawn, View

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

    pictures: tuple[np.ndarray, ...]
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


class Stream:
    """What every position shows: its example, the pictures of its views, and what they draw."""

    def __init__(self, source: Source, views: Mapping[str, View], seed: int = 0):
        """Reads nothing yet.

        Args:
          source: the pictures.
          views: by name, of each example. Their numbers (1, 2, ..) are their places here.
          seed: of the order and of every random choice.
        """
        self.source = source
        self.views = dict(views)
        self.seed = seed

    def example(self, position: int) -> tuple[int, int]:
        """(epoch, index of the example) at a position of the stream."""
        epoch, place = divmod(position, len(self.source))
        return epoch, int(epoch_order(self.seed, epoch, len(self.source))[place])

    def examples(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """As `example` for B positions: (epochs, indices), int64 [B] each."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), len(self.source))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = epoch_order(self.seed, int(epoch), len(self.source))
            indices[here] = order[places[here]]
        return epochs, indices

    def draw(self, positions: Sequence[int]) -> dict[str, Drawn]:
        """What each view draws at B positions, by its name.

        It is the position's own, whichever example the pictures there are of.
        """
        epochs, indices = self.examples(positions)
        return {
            name: view.draw(self.seed, number, epochs, indices)
            for number, (name, view) in enumerate(self.views.items(), 1)
        }

    def pictures(self, position: int) -> tuple[tuple[int, str], ...]:
        """(example, key) of the picture that each view at a position is made from."""
        return self._which(*self.example(position))

    def load(self, position: int) -> Loaded:
        """The pictures at a position: its example's, or those of the first replacement there is.

        Raises:
          NoPictureError: none of the replacements can be read either.
        """
        epoch, index = self.example(position)
        others = replacements(self.seed, epoch, index, len(self.source))
        bad = []
        for candidate in itertools.chain([index], others):
            which = self._which(epoch, candidate)
            try:
                # In the source's order: a later frame of a clip is decoded on from an earlier one.
                loaded = {
                    each: self.source.load_in_epoch(epoch, *each) for each in sorted(set(which))
                }
            except BadPicture as error:
                bad.append(bad_file(error))
            else:
                for each, picture in loaded.items():
                    check_picture(self.source.name(each[0]), picture)
                return Loaded(tuple(loaded[each] for each in which), candidate, bad)
        raise NoPictureError(bad)

    def drawn_whole(self, positions: Sequence[int], height: int, width: int) -> dict[str, Any]:
        """All that makes the views at B positions on a device that has the pictures.

        Args:
          positions: of the stream.
          height: of all pictures, pixels.
          width: likewise.

        Returns:
          'example', int32 [B], and '<view>/drawn' (`View.for_device_whole`) and '<view>/mirrored',
          bool [B], for each view.
        """
        batch: dict[str, Any] = {'example': self.examples(positions)[1].astype(np.int32)}
        for name, drawn in self.draw(positions).items():
            view = self.views[name]
            batch[f'{name}/drawn'] = view.for_device_whole(drawn, height, width)
            batch[f'{name}/mirrored'] = view.mirrored(drawn)
        return batch

    def _which(self, epoch: int, example: int) -> tuple[tuple[int, str], ...]:
        """What the views of an example are made from: its own pictures and its partners'."""
        which = []
        partners: np.ndarray | None = None
        for number, view in enumerate(self.views.values(), 1):
            shown = example
            if view.partner:
                if partners is None:
                    partners = self.source.partners(example)
                if len(partners):
                    place = draw_place(len(partners), self.seed, epoch, example, number)
                    shown = int(partners[place])
            which.append((shown, view.picture))
        return tuple(which)


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
