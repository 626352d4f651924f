"""Files that cannot be read: each is counted once and named, and their number is limited."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.base import Source

# Bad files that a message names; the others are counted.
SHOWN = 5


class BadFile(NamedTuple):
    """A `BadPicture` without its traceback, which would keep the file's bytes in memory.

    Attributes:
      file: that holds the picture, as `Source.file` names it.
      reason: what is wrong with it, a phrase that follows the name.
    """

    file: str
    reason: str


def bad_file(error: BadPicture) -> BadFile:
    """The file and the reason of an error."""
    return BadFile(error.file, error.reason)


def name_some(bad: Sequence[BadFile], most: int = SHOWN) -> str:
    """Names some bad files, with their reasons, and counts the others, on one line.

    Args:
      bad: the files.
      most: how many are named.
    """
    shown = '; '.join(f'{printable(file)} {reason}' for file, reason in bad[:most])
    more = len(bad) - most
    return shown + (f'; and {more:,} more' if more > 0 else '')


def printable(file: str) -> str:
    """A file's name in characters that every terminal can show: one line, valid UTF-8."""
    text = file.encode(errors='backslashreplace').decode()
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


class BadFiles:
    """The distinct files of a run that could not be read, in the order they were found."""

    def __init__(
        self,
        source: Source,
        key: str,
        max_fraction: float,
        left_out: Sequence[BadFile] = (),
    ):
        """Counts those left out.

        Args:
          source: the training pictures.
          key: which picture of an example is counted.
          max_fraction: share of the training pictures that may be bad (data.max_bad_fraction), in
            [0, 1].
          left_out: bad files that were left out of the source; they count as found.
        """
        self._source = source
        self._key = key
        self._max_fraction = max_fraction
        self._left_out = len(left_out)
        self._reasons: dict[str, str] = {}
        self.add(left_out)

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, bad: Iterable[BadFile]) -> None:
        """Counts files that are not counted yet."""
        for file, reason in bad:
            self._reasons.setdefault(file, reason)

    def since(self, count: int) -> list[BadFile]:
        """Those found after the first `count`."""
        if count == len(self):
            return []
        return [BadFile(*item) for item in itertools.islice(self._reasons.items(), count, None)]

    @functools.cached_property
    def total(self) -> int:
        """Number of training files; many examples may be tiles of one file."""
        # Goes over all names, so it is asked for only if something is bad.
        count = len(self._source)
        files = (hash(self._source.file(index, self._key)) for index in range(count))
        # Hashes, since a million names would fill memory. The chance that two of a million names
        # share a 64-bit hash is 3e-8, and the count would be off by one.
        return len(np.unique(np.fromiter(files, np.int64, count))) + self._left_out

    @property
    def none_allowed(self) -> bool:
        """Whether the first bad file is one too many."""
        return self._max_fraction == 0

    @property
    def allowed(self) -> int:
        """How many files may be bad: the fraction, rounded down, but at least 1 unless it is 0.

        With the default of 0.01, one damaged picture would stop a run on fewer than a hundred.
        """
        if self.none_allowed:
            return 0
        # Rounding may put a product that is a whole number just below it.
        return max(1, int(self._max_fraction * self.total + 1e-9))

    def too_many(self) -> bool:
        """Whether more are bad than allowed."""
        # One bad file is decided without going over all names.
        return len(self) > 0 and (self.none_allowed or len(self) > 1) and len(self) > self.allowed

    def check(self) -> None:
        """Raises UserError, naming the first few, if more are bad than allowed."""
        if self.too_many():
            raise UserError(
                f'{len(self):,} of {self.total:,} training pictures cannot be read, and '
                f'data.max_bad_fraction={self._max_fraction:g} allows {self.allowed:,}: '
                f'{name_some(self.since(0), 3)}. If the disk is at fault, or they can be mended, '
                'see to that; else raise the limit. The same command then goes on from here.'
            )


def still_bad(source: Source, keys: Sequence[str], files: Collection[str]) -> list[BadFile]:
    """Reads files again that could not be read before.

    Args:
      source: whose pictures they are; other files are skipped.
      keys: the pictures of an example that are used.
      files: as `Source.file` names them.

    Returns:
      Those that still cannot be read.
    """
    if not files:
        return []
    places: dict[str, tuple[int, str]] = {}
    for index, key in itertools.product(range(len(source)), dict.fromkeys(keys)):
        file = source.file(index, key)
        if file in files:
            places.setdefault(file, (index, key))

    def read(place: tuple[int, str]) -> BadFile | None:
        try:
            source.load(*place)
        except BadPicture as error:
            return bad_file(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [bad for bad in pool.map(read, places.values()) if bad is not None]
