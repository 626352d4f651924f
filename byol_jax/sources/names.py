"""Many strings in little memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

import numpy as np

# Any string comes back as it was, also one with the lone surrogates that stand for the bytes of a
# file's name that is no text; and the bytes sort as the strings do.
CODEC = ('utf-8', 'surrogatepass')

# Strings encoded at once: what is in memory twice.
_CHUNK = 4096


class Names(Sequence[str]):
    """A sequence of strings that takes their UTF-8 bytes and 8 more for each, not some 80 more.

    Attributes:
      block: the bytes of all strings, one after the other.
      starts: int64 [N + 1], where each string starts in it, and the end.
    """

    def __init__(self, block: bytes, starts: np.ndarray):
        self.block = block
        self.starts = np.ascontiguousarray(starts, np.int64)
        # Its items are Python's numbers, at a third of what NumPy's cost.
        self._starts = self.starts.data

    @classmethod
    def of(cls, strings: Iterable[str]) -> Names:
        """Takes the strings one by one; they need not be in memory together."""
        blocks: list[bytes] = []
        lengths: list[np.ndarray] = []
        strings = iter(strings)
        while chunk := [string.encode(*CODEC) for string in islice(strings, _CHUNK)]:
            blocks.append(b''.join(chunk))
            lengths.append(np.fromiter(map(len, chunk), np.int64, len(chunk)))
        starts = np.zeros(1 + sum(map(len, lengths)), np.int64)
        if lengths:
            np.concatenate(lengths, out=starts[1:])
        np.cumsum(starts, out=starts)
        return cls(b''.join(blocks), starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One string, or a list of some."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = operator.index(index)
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(f'{index} of {len(self)} names')
        return self.block[self._starts[place] : self._starts[place + 1]].decode(*CODEC)

    def __iter__(self) -> Iterator[str]:
        block, start = self.block, 0
        for end in islice(self._starts, 1, None):
            yield block[start:end].decode(*CODEC)
            start = end

    def some(self, indices: Iterable[int]) -> Iterator[str]:
        """Those at `indices`, which count from 0, faster than one by one."""
        block, starts = self.block, self._starts
        for index in indices:
            yield block[starts[index] : starts[index + 1]].decode(*CODEC)

    def take(self, indices: Iterable[int]) -> Names:
        """Those at `indices`, which count from 0, in that order."""
        return Names.of(self.some(indices))
