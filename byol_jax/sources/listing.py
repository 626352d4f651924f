"""All files below a folder, with what tells later whether the list still holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from byol_jax.errors import UserError
from byol_jax.sources.names import CODEC, Names


class Listing(NamedTuple):
    """What lies below a folder. Paths are relative to it, with '/'; its own is ''.

    Attributes:
      files: with one of the extensions asked for, sorted.
      folders: those that were searched, in the order of the search.
      times: int64 [folders, 2], mtime and ctime of each before it was listed, nanoseconds.
      links: (path, where it really leads) of every link to a folder.
      loose: links that led to no folder then, but would be searched if they came to.
      others: how many files have another extension or a hidden name.
    """

    files: Names
    folders: Names
    times: np.ndarray
    links: list[tuple[str, str]]
    loose: list[str]
    others: int


class _Found(NamedTuple):
    """The names in one folder: of files, with NUL between two, and of folders."""

    files: bytes
    folders: list[str]


def list_tree(root: Path, extensions: tuple[str, ...]) -> Listing:
    """Lists the files below `root` whose names, in lower case, end in one of `extensions`.

    Hidden files and folders are left out. Links to folders are followed, but no folder is searched
    twice: a link may lead back to one above it.

    Args:
      root: an existing folder.
      extensions: such as '.jpg'.

    Raises:
      UserError: a folder cannot be listed. Its pictures would be missing without a word.
    """
    found: dict[str, _Found] = {}
    times: list[tuple[int, int]] = []
    links: list[tuple[str, str]] = []
    loose: list[str] = []
    seen: set[str] = set()
    others = 0
    # A folder, and where it really is; the last is searched first.
    waiting = [('', os.path.realpath(root))]
    while waiting:
        folder, real = waiting.pop()
        if real in seen:
            continue
        seen.add(real)
        path = os.path.join(root, folder) if folder else str(root)
        prefix = folder + '/' if folder else ''
        files: list[str] = []
        subfolders: list[tuple[str, str]] = []
        try:
            # Before the list: what comes in while it is made changes them.
            status = os.stat(path)
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    hidden = name.startswith('.')
                    if _is_folder(entry):
                        if hidden:
                            continue
                        target = os.path.join(real, name)
                        if entry.is_symlink():
                            target = os.path.realpath(target)
                            links.append((prefix + name, target))
                        subfolders.append((name, target))
                    elif not hidden and name.lower().endswith(extensions):
                        files.append(name)
                    else:
                        others += 1
                        if not hidden and entry.is_symlink():
                            loose.append(prefix + name)
        except OSError as error:
            raise UserError(f'{path} cannot be listed: {error.strerror}.') from error
        times.append((status.st_mtime_ns, status.st_ctime_ns))
        subfolders.sort()
        # Not as strings, of which a million are a hundred megabytes.
        row = '\0'.join(files).encode(*CODEC)
        found[folder] = _Found(row, [name for name, _ in subfolders])
        waiting += [(prefix + name, target) for name, target in reversed(subfolders)]
    folders = Names.of(found)
    return Listing(
        Names.of(_in_order(found)), folders, np.array(times, np.int64), links, loose, others
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that cannot be followed: a file that cannot be read.
        return False


def _in_order(found: dict[str, _Found]) -> Iterator[str]:
    """The paths of all files, sorted; what is passed leaves `found`.

    A path is compared by what follows the folders it shares with another, where a folder's name
    ends in '/': sorting the names in each folder so sorts the paths.
    """
    stack = [('', _entries(found.pop('')))]
    while stack:
        prefix, entries = stack[-1]
        for name in entries:
            if not name.endswith('/'):
                yield prefix + name
            elif prefix + name[:-1] in found:
                inner = prefix + name
                stack.append((inner, _entries(found.pop(inner[:-1]))))
                break
        else:
            stack.pop()


def _entries(found: _Found) -> Iterator[str]:
    """The names in one folder in the order of their paths; folders end in '/'."""
    files = found.files.decode(*CODEC).split('\0') if found.files else []
    return iter(sorted([*files, *(name + '/' for name in found.folders)]))
