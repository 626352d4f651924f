"""The interface of a source, and wrappers for sources: a subset, and a cache in memory.

A source of your own is a class with three methods (docs/data.md, "A source of your own"):

    class Mine(Source):
        def __len__(self): ...
        def load(self, index, key): ...
        def name(self, index): ...
"""

from __future__ import annotations

import abc
import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from threading import Lock

import numpy as np

from byol_jax.errors import UserError

# Sources call it during work that may take long, with the kind of work, such as 'sizes read', the
# number of things done, and the number of all (0: unknown).
Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


def check_picture(source: Source, index: int, picture: np.ndarray) -> None:
    """Raises UserError if a picture that a source loaded is not uint8 [H, W, 3]."""
    shape, dtype = np.shape(picture), getattr(picture, 'dtype', type(picture).__name__)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise UserError(
            f'The source gave {dtype} {list(shape)} for {source.name(index)}: load must give uint8 '
            '[H, W, 3], RGB in [0, 255].'
        )


class Source(abc.ABC):
    """Pictures with random access by index.

    A subclass must define `__len__`, `load` and `name`; the defaults of the rest fit most sources.

    Attributes:
      keys: names of the pictures each example has, such as ('image',) or ('hr', 'lr').
      labels: int [N], indices into `label_names`; None for unlabelled pictures. Training never uses
        them.
      label_names: the name of each label.
      groups: int [N], the group of each example, such as the clip of each frame: a group is held
        out as a whole. None: every example is a group.
      labels_are: what the labels name, in the plural.
      unlabelled: why there are no labels, for a person, where that is known.
      labels_at_hand: whether `labels` is known without reading the examples.
      own_files: whether `file` is the path of a file that holds this picture and no other.
      unused: lines for a person about data that is there and not used; usually none.
    """

    keys: tuple[str, ...] = ('image',)
    labels: np.ndarray | None = None
    label_names: Sequence[str] = ()
    groups: np.ndarray | None = None
    labels_are: str = 'classes'
    unlabelled: str = ''
    labels_at_hand = True
    own_files = False
    unused: Sequence[str] = ()

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def load(self, index: int, key: str) -> np.ndarray:
        """Reads one picture. Must give the same pixels every time. Called from many threads.

        Args:
          index: index of the example, 0 to `len(self) - 1`.
          key: which of its pictures, one of `keys`.

        Returns:
          uint8 [H, W, 3], RGB, of any height and width.

        Raises:
          BadPicture: this picture cannot be read. Training then shows another one in its place.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """The name of example `index` for a person, such as a file name. Must not change."""

    def names(self, indices: np.ndarray) -> Iterator[str]:
        """The names of many examples; override it if `name` is slow for a million of them.

        Args:
          indices: indices of the examples, int [any number].

        Returns:
          The `name` of each.
        """
        return map(self.name, indices.tolist())

    def file(self, index: int, key: str) -> str:
        """The file or record that holds a picture, as `BadPicture.file` names it.

        Bad files are counted by this name, so examples from one file must give the same name.
        """
        return self.name(index)

    def load_in_epoch(self, epoch: int, index: int, key: str) -> np.ndarray:
        """Like `load`, for training; the picture may also depend on the epoch, from 0."""
        return self.load(index, key)

    def stored_in(self, index: int, key: str) -> str | None:
        """The file on disk whose bytes hold a picture, perhaps with others; None: not known.

        By its size and bytes a run knows its data again.
        """
        return self.file(index, key) if self.own_files else None

    def stamp(self, index: int, key: str) -> tuple[str, str] | None:
        """What identifies a picture in a cache on disk (data.cache).

        Returns:
          (identity, version). The version changes whenever the pixels may have changed. None: the
          picture cannot be cached.

        Raises:
          OSError: the picture's file does not exist, or cannot be accessed.
        """
        if not self.own_files:
            return None
        path = os.path.abspath(self.file(index, key))
        found = os.stat(path)
        return path, f'{found.st_size} {found.st_mtime_ns}'

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        """The labels of some examples: int [len(indices)], or None without labels."""
        return None if self.labels is None else self.labels[indices]

    def shown_labels(self, indices: np.ndarray) -> np.ndarray:
        """Labels of examples that have just been loaded: int [len(indices)], -1 for no label.

        Training asks for the labels of each batch. A source that reads its labels together with
        its pictures keeps them in `load`.
        """
        labels = self.labels_of(indices)
        return np.full(len(indices), -1) if labels is None else labels

    def size(self, index: int, key: str) -> tuple[int, int]:
        """The size of a picture; override it if the size is known without decoding.

        Returns:
          (height, width).

        Raises:
          BadPicture: the picture cannot be read.
        """
        height, width = self.load(index, key).shape[:2]
        return height, width

    def partners(self, index: int) -> np.ndarray:
        """Other examples that view 2 may show instead of example `index`.

        Returns:
          Indices of examples, int [any number]. If it is empty, both views show example `index`.
        """
        return np.zeros(0, np.int64)


class Wrapped(Source):
    """All examples of another source, in its order; subclasses override some of its methods.

    The subclass must define `load`; `load_in_epoch` and `size` use it by default.
    """

    def __init__(self, source: Source):
        self.source = source
        self.keys = source.keys
        self.groups = source.groups
        self.labels_are = source.labels_are
        self.unlabelled = source.unlabelled
        self.labels_at_hand = source.labels_at_hand
        self.own_files = source.own_files

    @property
    def label_names(self) -> Sequence[str]:  # type: ignore[override]
        return self.source.label_names

    @functools.cached_property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        """As in `Source`; read when first used, since some sources must read every example."""
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

    def stored_in(self, index: int, key: str) -> str | None:
        return self.source.stored_in(index, key)

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

    def stored_in(self, index: int, key: str) -> str | None:
        return self.source.stored_in(int(self.indices[index]), key)

    def stamp(self, index: int, key: str) -> tuple[str, str] | None:
        return self.source.stamp(int(self.indices[index]), key)

    def size(self, index: int, key: str) -> tuple[int, int]:
        return self.source.size(int(self.indices[index]), key)

    def partners(self, index: int) -> np.ndarray:
        places = self._places[self.source.partners(int(self.indices[index]))]
        return places[places >= 0]

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """The index in this subset of each example of `source`: int [len(source)], -1 for none."""
        places = np.full(len(self.source), -1, np.int64)
        places[self.indices] = np.arange(len(self.indices))
        return places


class Cached(Wrapped):
    """Another source, whose most recently used pictures are kept decoded in memory."""

    def __init__(self, source: Source, max_bytes: int):
        """Loads nothing yet.

        Args:
          source: the source whose pictures are kept.
          max_bytes: how many bytes of pictures are kept at most.
        """
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
            # The source decodes the picture to find its size: keep it.
            height, width = self.load(index, key).shape[:2]
            return height, width
        return self.source.size(index, key)
