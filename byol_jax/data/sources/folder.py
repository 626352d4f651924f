"""A tree of image files; the first folder level names the classes, if there is one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from byol_jax.data.sources.base import Source
from byol_jax.data.sources.decode import EXTENSIONS, read_file, read_size
from byol_jax.errors import UserError, did_you_mean


class Folder(Source):
    """Every image below a folder, sorted by path.

    Labels are the names of the folders right below `root` if every image lies in one of at least
    two of them, as in `train/cat/1.jpg`; else there are none.
    """

    own_files = True

    def __init__(self, root: str | Path, max_megapixels: float = 200, given_as: str = 'data.path'):
        """Lists the files; decodes none.

        Args:
          root: the folder. max_megapixels: larger pictures are refused.
          given_as: what the user named the folder with, for messages.

        Raises:
          UserError: the folder does not exist, is no folder, holds no image, or cannot be listed
            with all that is in it.
        """
        self.root = Path(root).expanduser()
        self.max_megapixels = max_megapixels
        self._files = list_files(self.root, given_as)
        self.labels, self.label_names = class_labels(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int, key: str) -> np.ndarray:
        return read_file(self.root / self._files[index], self.max_megapixels)

    def name(self, index: int) -> str:
        return self._files[index]

    def file(self, index: int, key: str) -> str:
        return str(self.root / self._files[index])

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
    tops = [file.split('/')[0] if '/' in file else None for file in files]
    classes = sorted({top for top in tops if top is not None})
    if len(classes) < 2 or None in tops:
        return None, ()
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[top] for top in tops if top is not None]), tuple(classes)


def list_files(
    root: Path,
    given_as: str,
    extensions: tuple[str, ...] = EXTENSIONS,
    kind: str = 'image',
) -> list[str]:
    """Paths of all files below `root` with one of `extensions`, relative with '/', sorted.

    Hidden files and folders are left out.

    Raises:
      UserError: the folder does not exist or holds no such file; the message calls them `kind`.
    """
    files, others = [], 0
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        # By default the pictures in there would be missing without a word.
        raise UserError(f'{error.filename} cannot be listed: {error.strerror}.') from error

    tree = os.walk(existing_folder(root, given_as), onerror=refuse, followlinks=True)
    for folder, subfolders, names in tree:
        # A link may lead back to a folder above it.
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
        relative = Path(folder).relative_to(root)
        for name in names:
            if name.lower().endswith(extensions) and not name.startswith('.'):
                files.append((relative / name).as_posix())
            else:
                others += 1
    if not files:
        raise UserError(
            f'{given_as}={root} holds no {kind}: of its {others} file(s), none ends in '
            f'{", ".join(extensions)}.'
        )
    return sorted(files)
