"""A tree of image files; the first folder level names the classes, if there is one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from byol_jax.errors import UserError, did_you_mean
from byol_jax.sources.base import Source
from byol_jax.sources.decode import EXTENSIONS, read_file, read_size
from byol_jax.sources.index import listed
from byol_jax.sources.names import Names


class Folder(Source):
    """Every image below a folder, sorted by path.

    Labels are the names of the folders right below `root` if every image lies in one of at least
    two of them, as in `train/cat/1.jpg`; else there are none.
    """

    own_files = True

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

    def names(self, indices: np.ndarray) -> Iterator[str]:
        return self._files.some(indices.tolist())

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
      files: paths relative to the root, with '/', sorted.

    Returns:
      A label for each file, int [N], and their names; None and none unless every file lies in one
      of at least two folders.
    """
    tops: list[str] = []
    ends = [0]
    while ends[-1] < len(files):
        top, slash, _ = files[ends[-1]].partition('/')
        if not slash:
            return None, ()
        tops.append(top)
        ends.append(_end(files, ends[-1], top))
    if len(tops) < 2:
        return None, ()
    # The paths of 'a.b' come before those of 'a', the name after it.
    order = sorted(range(len(tops)), key=tops.__getitem__)
    label = np.empty(len(tops), np.int64)
    label[order] = np.arange(len(tops))
    return np.repeat(label, np.diff(ends)), tuple(tops[i] for i in order)


def _end(files: Sequence[str], start: int, top: str) -> int:
    """Where the files in folder `top`, the first of which is at `start`, end.

    Looks at few of them: of a million strings each would have to be made.
    """
    step = 1
    while start + step < len(files) and files[start + step].startswith(top + '/'):
        step *= 2
    # '0' is what comes after '/'.
    return bisect_left(files, top + '0', start + step // 2, min(start + step, len(files)))


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
