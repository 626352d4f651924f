"""A tree of image files; the first folder level names the classes, if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from byol_jax.data.sources.base import Source
from byol_jax.data.sources.decode import EXTENSIONS, read_file, read_size
from byol_jax.data.sources.index import listed
from byol_jax.data.sources.names import Names
from byol_jax.errors import UserError, did_you_mean


class Folder(Source):
    """Every image below a folder, sorted by path.

    Labels are the names of the folders right below `root` if every image lies in one of at least
    two of them, as in `train/cat/1.jpg`; else there are none.
    """

    def __init__(
        self,
        root: str | Path,
        max_megapixels: float = 200,
        given_as: str = 'data.path',
        index: str = '',
    ):
        """Lists the files; decodes none.

        Args:
          root: the folder. max_megapixels: larger pictures are refused.
          given_as: what the user named the folder with, for messages.
          index: the file the list is kept in: '' for none, 'auto' for one in the user's cache.

        Raises:
          UserError: the folder does not exist, is no folder, holds no image, or cannot be listed
            with all that is in it.
        """
        self.root = Path(root).expanduser()
        self.max_megapixels = max_megapixels
        # What every path begins with, as pathlib writes it.
        self._prefix = str(self.root / '_')[:-1]
        self._files = list_files(self.root, given_as, index=index)
        self.labels, self.label_names = class_labels(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int, key: str) -> np.ndarray:
        return read_file(self.root / self._files[index], self.max_megapixels)

    def name(self, index: int) -> str:
        return self._files[index]

    def file(self, index: int, key: str) -> str:
        return self._prefix + self._files[index]

    def size(self, index: int, key: str) -> tuple[int, int]:
        return read_size(self.root / self._files[index], self.max_megapixels)


def existing_folder(root: Path, key: str = 'data.path') -> Path:
    """Returns `root`, or raises UserError with the nearest folder there is beside it."""
    if root.is_dir():
        return root
    if root.exists():
        raise UserError(f'{key}={root} is a file, not a folder.')
    beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
    raise UserError(f'{key}={root} does not exist.{did_you_mean(root.name, beside)}')


def class_labels(files: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The classes that the first folder level names.

    Args:
      files: paths relative to the root, with '/'.

    Returns:
      A label for each file, int [N], and their names; None and none unless every file lies in one
      of at least two folders.
    """
    numbers: dict[str, int] = {}
    found = np.empty(len(files), np.int64)
    for i, file in enumerate(files):
        top, slash, _ = file.partition('/')
        if not slash:
            return None, ()
        found[i] = numbers.setdefault(top, len(numbers))
    if len(numbers) < 2:
        return None, ()
    classes = sorted(numbers)
    labels = np.empty(len(classes), np.int64)
    labels[[numbers[name] for name in classes]] = np.arange(len(classes))
    return labels[found], tuple(classes)


def list_files(
    root: Path,
    given_as: str,
    extensions: tuple[str, ...] = EXTENSIONS,
    kind: str = 'image',
    index: str = '',
) -> Names:
    """Paths of all files below `root` with one of `extensions`, relative with '/', sorted.

    Hidden files and folders are left out.

    Args:
      root, extensions, index: as `index.listed`.
      given_as: what the user named the folder with. kind: what to call the files.

    Raises:
      UserError: the folder does not exist, holds no such file, or cannot be listed.
    """
    listing = listed(existing_folder(root, given_as), extensions, index)
    if not listing.files:
        raise UserError(
            f'{given_as}={root} holds no {kind}: of its {listing.others} file(s), none ends in '
            f'{", ".join(extensions)}.'
        )
    return listing.files
