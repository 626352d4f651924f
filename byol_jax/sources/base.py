"""The contract of a source, and the wrappers that every source can be put in."""

from __future__ import annotations

import abc
import functools
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from threading import Lock

import numpy as np


class Source(abc.ABC):
    """Pictures with random access by index.

    Attributes:
      keys: names of the pictures each example has, such as ('image',) or ('hr', 'lr').
      labels: int [N], or None for unlabelled pictures.
      label_names: the name of each label.
      groups: int [N] where examples belong together, such as the frames of a clip, and only whole
        groups may be held out; else None.
      labels_at_hand: whether `labels` costs nothing; else it reads every example.
      own_files: whether `file` is the path of a file that holds this picture and no other.
      unused: lines for a person that name what else there is and is not used, most often none.
    """

    keys: tuple[str, ...] = ('image',)
    labels: np.ndarray | None = None
    label_names: Sequence[str] = ()
    groups: np.ndarray | None = None
    labels_at_hand = True
    own_files = False
    unused: Sequence[str] = ()

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def load(self, index: int, key: str) -> np.ndarray:
        """Picture `key` of example `index`: uint8 [H, W, 3], RGB. Called from many threads.

        Raises:
          BadPicture: this picture cannot be read now. Nothing remembers it: every call tries.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """What a person would call example `index`: a file name, say."""

    def names(self, indices: np.ndarray) -> Iterator[str]:
        """`name` of some examples, int [any number]: of a million, in a second."""
        return map(self.name, indices.tolist())

    def file(self, index: int, key: str) -> str:
        """The file (or record) that holds a picture, as `BadPicture.file` names it.

        Examples cut from one file have it in common.
        """
        return self.name(index)

    def load_in_epoch(self, epoch: int, index: int, key: str) -> np.ndarray:
        """As `load`, for training in an epoch (from 0), of which what is shown may be a function.

        By default all epochs show the same.
        """
        return self.load(index, key)

    def stamp(self, index: int, key: str) -> tuple[str, str] | None:
        """(which picture this is, what changes when its pixels may have), for a cache on disk.

        None: nothing is known of that, so the picture must not be kept.

        Raises:
          OSError: its file is not there, or cannot be asked.
        """
        if not self.own_files:
            return None
        path = os.path.abspath(self.file(index, key))
        found = os.stat(path)
        return path, f'{found.st_size} {found.st_mtime_ns}'

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        """Labels of some examples: int [len(indices)], or None."""
        return None if self.labels is None else self.labels[indices]

    def shown_labels(self, indices: np.ndarray) -> np.ndarray:
        """Labels of examples whose pictures have just been loaded: int [len(indices)], -1 for none.

        For training, which asks for those of each batch: where labels are not at hand, loading a
        picture remembers its label.
        """
        labels = self.labels_of(indices)
        return np.full(len(indices), -1) if labels is None else labels

    def size(self, index: int, key: str) -> tuple[int, int]:
        """(height, width) of a picture; sources that know it without decoding override this.

        Raises:
          BadPicture: it cannot be read.
        """
        height, width = self.load(index, key).shape[:2]
        return height, width

    def partners(self, index: int) -> np.ndarray:
        """Other examples that may feed view 2 in place of example `index`: int [any number].

        Without any, both views come from the same example.
        """
        return np.zeros(0, np.int64)


class Wrapped(Source):
    """All examples of another source, in its order; a subclass changes some of what it says.

    `load_in_epoch` and `size` come from the subclass's own `load`, as of any source.
    """

    def __init__(self, source: Source):
        self.source = source
        self.keys = source.keys
        self.groups = source.groups
        self.labels_at_hand = source.labels_at_hand
        self.own_files = source.own_files

    @property
    def label_names(self) -> Sequence[str]:  # type: ignore[override]
        return self.source.label_names

    @functools.cached_property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        """Read when first asked for, since some sources must read every example for it."""
        return self.source.labels

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        return self.source.labels_of(indices)

    def shown_labels(self, indices: np.ndarray) -> np.ndarray:
        return self.source.shown_labels(indices)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def names(self, indices: np.ndarray) -> Iterator[str]:
        return self.source.names(indices)

    def file(self, index: int, key: str) -> str:
        return self.source.file(index, key)

    def stamp(self, index: int, key: str) -> tuple[str, str] | None:
        return self.source.stamp(index, key)

    def partners(self, index: int) -> np.ndarray:
        return self.source.partners(index)


class Subset(Wrapped):
    """Some examples of another source, in the given order."""

    def __init__(self, source: Source, indices: np.ndarray):
        super().__init__(source)
        self.indices = np.asarray(indices, np.int64)
        self.groups = None if source.groups is None else source.groups[self.indices]

    @functools.cached_property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        return self.source.labels_of(self.indices)

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        return self.source.labels_of(self.indices[indices])

    def shown_labels(self, indices: np.ndarray) -> np.ndarray:
        return self.source.shown_labels(self.indices[indices])

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, key: str) -> np.ndarray:
        return self.source.load(int(self.indices[index]), key)

    def load_in_epoch(self, epoch: int, index: int, key: str) -> np.ndarray:
        return self.source.load_in_epoch(epoch, int(self.indices[index]), key)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def names(self, indices: np.ndarray) -> Iterator[str]:
        return self.source.names(self.indices[indices])

    def file(self, index: int, key: str) -> str:
        return self.source.file(int(self.indices[index]), key)

    def stamp(self, index: int, key: str) -> tuple[str, str] | None:
        return self.source.stamp(int(self.indices[index]), key)

    def size(self, index: int, key: str) -> tuple[int, int]:
        return self.source.size(int(self.indices[index]), key)

    def partners(self, index: int) -> np.ndarray:
        places = self._places[self.source.partners(int(self.indices[index]))]
        return places[places >= 0]

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """Where each example of the other source is in this one: int [its length], -1 for none."""
        places = np.full(len(self.source), -1, np.int64)
        places[self.indices] = np.arange(len(self.indices))
        return places


class Cached(Wrapped):
    """Keeps the decoded pictures used last in memory, up to a number of bytes."""

    def __init__(self, source: Source, max_bytes: int):
        super().__init__(source)
        self._max_bytes = max_bytes
        self._bytes = 0
        self._pictures: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()
        self._lock = Lock()

    def load(self, index: int, key: str) -> np.ndarray:
        with self._lock:
            picture = self._pictures.get((index, key))
            if picture is not None:
                self._pictures.move_to_end((index, key))
                return picture
        picture = self.source.load(index, key)
        with self._lock:
            if (index, key) not in self._pictures and picture.nbytes <= self._max_bytes:
                self._pictures[index, key] = picture
                self._bytes += picture.nbytes
                while self._bytes > self._max_bytes:
                    _, oldest = self._pictures.popitem(last=False)
                    self._bytes -= oldest.nbytes
        return picture

    def size(self, index: int, key: str) -> tuple[int, int]:
        if type(self.source).size is Source.size:
            # Known by decoding only: let that fill the cache.
            height, width = self.load(index, key).shape[:2]
            return height, width
        return self.source.size(index, key)
