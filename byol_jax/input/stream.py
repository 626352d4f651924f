"""The stream of examples as a pure function of integers; needs no TensorFlow.

The examples form an endless stream: with N examples, position p is place p mod N in the order of
epoch p div N, which is a function of (seed, epoch). Batch k holds positions k B to (k + 1) B - 1.
So a run can continue from any step at once, and no state of the pipeline is saved.

If a picture cannot be read, another example takes its place at that position. Which one is a
function of (seed, epoch, example), so no other position changes, whichever process makes it.
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

# How many other examples are tried in place of one that cannot be read. With half of all pictures
# bad, all of them fail at one position in four billion.
MOST_REPLACEMENTS = 32


class Loaded(NamedTuple):
    """The pictures at a position of the stream.

    Attributes:
      pictures: the picture of each view, uint8 [H, W, 3].
      example: the example that is shown, the position's own or a replacement.
      bad: the files that could not be read before this example was tried.
    """

    pictures: tuple[np.ndarray, ...]
    example: int
    bad: Sequence[BadFile] = ()


class NoPictureError(UserError):
    """Neither an example nor any that was tried in its place can be read.

    Attributes:
      bad: the files that could not be read.
    """

    def __init__(self, bad: Sequence[BadFile]):
        others = 'and there is no other to take its place'
        if len(bad) > 1:
            others = f'nor can {len(bad) - 1:,} others that were tried in its place'
        super().__init__(
            f'A picture cannot be read, {others}: {name_some(bad, 3)}. Check that the disk can '
            'be read, then give the same command again.'
        )
        self.bad = bad


class Stream:
    """The example, the pictures and the random numbers of every position."""

    def __init__(self, source: Source, views: Mapping[str, View], seed: int = 0):
        """Reads nothing yet.

        Args:
          source: the pictures.
          views: the views of each example by name; their order numbers them, from 1.
          seed: seed of the order and of every random choice.
        """
        self.source = source
        self.views = dict(views)
        self.seed = seed
        self._pictures = [view.picture for view in self.views.values()]
        self._partners = any(view.partner for view in self.views.values())

    def example(self, position: int) -> tuple[int, int]:
        """(epoch, index of the example) at a position of the stream."""
        epoch, place = divmod(position, len(self.source))
        return epoch, int(epoch_order(self.seed, epoch, len(self.source))[place])

    def examples(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Like `example`, for B positions: (epochs, indices), int64 [B] each."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), len(self.source))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = epoch_order(self.seed, int(epoch), len(self.source))
            indices[here] = order[places[here]]
        return epochs, indices

    def draw(self, positions: Sequence[int]) -> dict[str, Drawn]:
        """The random numbers of each view at B positions, by the view's name.

        They depend on the position's own example, also if a replacement is shown.
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
        """Loads the pictures at a position, of its example or of the first readable replacement.

        Raises:
          NoPictureError: the example and all its replacements cannot be read.
        """
        epoch, index = self.example(position)
        others = replacements(self.seed, epoch, index, len(self.source))
        bad = []
        for candidate in itertools.chain([index], others):
            which = self._which(epoch, candidate)
            try:
                # Sorted, because a frame of a clip is decoded faster after an earlier one.
                loaded = {
                    each: self.source.load_in_epoch(epoch, *each) for each in sorted(set(which))
                }
            except BadPicture as error:
                bad.append(bad_file(error))
            else:
                for each, picture in loaded.items():
                    check_picture(self.source, each[0], picture)
                return Loaded(tuple(loaded[each] for each in which), candidate, bad)
        raise NoPictureError(bad)

    def drawn_whole(self, positions: Sequence[int], height: int, width: int) -> dict[str, Any]:
        """What a device that holds the pictures needs to make the views at B positions.

        Args:
          positions: positions of the stream.
          height: height of all pictures, pixels.
          width: width of all pictures, pixels.

        Returns:
          A dict of 'example', int32 [B], and, for each view, '<view>/drawn' (see
          `View.for_device_whole`) and '<view>/mirrored', bool [B].
        """
        batch: dict[str, Any] = {'example': self.examples(positions)[1].astype(np.int32)}
        for name, drawn in self.draw(positions).items():
            view = self.views[name]
            batch[f'{name}/drawn'] = view.for_device_whole(drawn, height, width)
            batch[f'{name}/mirrored'] = view.mirrored(drawn)
        return batch

    def _which(self, epoch: int, example: int) -> tuple[tuple[int, str], ...]:
        """(example, key) of each view's picture, of the example itself or of a partner."""
        partners = self.source.partners(example) if self._partners else ()
        if not len(partners):
            return tuple((example, picture) for picture in self._pictures)
        which = []
        for number, view in enumerate(self.views.values(), 1):
            shown = example
            if view.partner:
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
    """Up to MOST_REPLACEMENTS other examples, in the order in which they replace `example`.

    They are drawn uniformly and without repetition, as a function of the arguments.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 3], counter=[0, 0, example, epoch]))
    tries = min(MOST_REPLACEMENTS, examples - 1)
    for other in rng.choice(examples - 1, tries, replace=False) if tries else ():
        yield int(other) + int(other >= example)


def draw_place(count: int, seed: int, epoch: int, example: int, number: int) -> int:
    """Draws which of `count` partners of an example feeds view `number`: uniform in range(count).

    It has its own stream of random numbers, so partners change no other draw.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 4], counter=[0, number, example, epoch]))
    return int(rng.random() * count)
