"""Files that cannot be read: each is counted once and named, and their number is limited."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from byol_jax.cores import usable_cores
from byol_jax.errors import BadPicture, UserError, printable
from byol_jax.sources.base import Source

# How many bad files a message names; it counts the rest.
SHOWN = 5


class BadFile(NamedTuple):
    """A `BadPicture` without its traceback, which would keep the file's bytes in memory.

    Attributes:
      file: the file that holds the picture, as `Source.file` names it.
      reason: what is wrong with it: a phrase that follows the file's name.
    """

    file: str
    reason: str


def bad_file(error: BadPicture) -> BadFile:
    """Takes the file and the reason from an error."""
    return BadFile(error.file, error.reason)


def name_some(bad: Sequence[BadFile], most: int = SHOWN) -> str:
    """Names some bad files with their reasons, and counts the rest, on one line.

    Args:
      bad: the bad files.
      most: how many to name.
    """
    shown = '; '.join(f'{printable(file)} {reason}' for file, reason in bad[:most])
    more = len(bad) - most
    return shown + (f'; and {more:,} more' if more > 0 else '')


class BadFiles:
    """The files that a run could not read, each once, in the order in which they were found."""

    def __init__(
        self,
        source: Source,
        key: str,
        max_fraction: float,
        left_out: Sequence[BadFile] = (),
    ):
        """Begins with the files that were left out of the source.

        Args:
          source: the training pictures.
          key: the picture of an example whose files `total` counts.
          max_fraction: share of the training files that may be bad (data.max_bad_fraction), in
            [0, 1].
          left_out: bad files that the source leaves out; they count as found.
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
        """Adds the files that are not there yet."""
        for file, reason in bad:
            self._reasons.setdefault(file, reason)

    def since(self, count: int) -> list[BadFile]:
        """The bad files that were found after the first `count`."""
        if count == len(self):
            return []
        return [BadFile(*item) for item in itertools.islice(self._reasons.items(), count, None)]

    @functools.cached_property
    def total(self) -> int:
        """Number of training files, which is less than that of examples if these are tiles."""
        # This goes over all names, so it is computed only once a file is bad.
        count = len(self._source)
        files = (hash(self._source.file(index, self._key)) for index in range(count))
        # Hashes take less memory than a million names. Two of a million names share a 64-bit hash
        # with a probability of 3e-8; the count would then be off by one.
        return len(np.unique(np.fromiter(files, np.int64, count))) + self._left_out

    @property
    def none_allowed(self) -> bool:
        """Whether one bad file is too many."""
        return self._max_fraction == 0

    @property
    def allowed(self) -> int:
        """How many files may be bad: the fraction of all, rounded down; at least 1 unless it is 0.

        Without the minimum of 1, the default of 0.01 would let one damaged picture stop a run on
        fewer than a hundred.
        """
        if self.none_allowed:
            return 0
        # The small term is for products that rounding puts just below a whole number.
        return max(1, int(self._max_fraction * self.total + 1e-9))

    def too_many(self) -> bool:
        """Whether more are bad than allowed."""
        # The order matters: `allowed` goes over all names, which one bad file need not cause.
        return len(self) > 0 and (self.none_allowed or len(self) > 1) and len(self) > self.allowed

    def check(self) -> None:
        """Checks that no more files are bad than allowed.

        Raises:
          UserError: more are bad; the message names the first three.
        """
        if self.too_many():
            raise UserError(
                f'{len(self):,} of {self.total:,} training pictures cannot be read, and '
                f'data.max_bad_fraction={self._max_fraction:g} allows {self.allowed:,}: '
                f'{name_some(self.since(0), 3)}. Mend the disk, mend or convert the files, or '
                'raise the limit; the same command then continues from here.'
            )


def still_bad(source: Source, keys: Sequence[str], files: Collection[str]) -> list[BadFile]:
    """Tries again to read files that could not be read before.

    Args:
      source: the pictures; files that hold none of them are skipped.
      keys: the pictures of an example that are used.
      files: the files, as `Source.file` names them.

    Returns:
      The files that still cannot be read.
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

    with ThreadPoolExecutor(usable_cores()) as pool:
        return [bad for bad in pool.map(read, places.values()) if bad is not None]
