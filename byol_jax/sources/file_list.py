"""Lists the files below a folder, holds their names in little memory, and keeps an index file.

With an index file, a large folder is not listed at every start. The index file is valid as long as
no folder has changed. It holds a line that names the format, the sha256 of the rest, the length of
a JSON header, the header, and the arrays of a `Listing`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import operator
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from byol_jax.errors import UserError
from byol_jax.files import is_workdir, parse_json, write_whole
from byol_jax.sources.base import Progress, no_progress

_log = logging.getLogger(__name__)

# Encodes every string, also the lone surrogates that Python puts into names that are not valid
# text, and keeps the order: the bytes sort as the strings do.
CODEC = ('utf-8', 'surrogatepass')

# How many strings are encoded at a time: these are in memory twice.
_CHUNK = 4096


class Names(Sequence[str]):
    """A sequence of strings with 8 bytes of overhead each; a Python str has about 80.

    Attributes:
      block: the UTF-8 bytes of all strings, one after the other.
      starts: where each string starts in `block`, and where the last ends, int64 [N + 1].
    """

    def __init__(self, block: bytes, starts: np.ndarray):
        self.block = block
        self.starts = np.ascontiguousarray(starts, np.int64)
        # Indexing a memoryview gives Python ints, in a third of the time of indexing an array.
        self._starts = self.starts.data

    @classmethod
    def of(cls, strings: Iterable[str]) -> Names:
        """Makes a sequence of any iterable of strings, which need not be in memory at once."""
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
        """Yields the strings at `indices`, from 0; faster than indexing one by one."""
        block, starts = self.block, self._starts
        for index in indices:
            yield block[starts[index] : starts[index + 1]].decode(*CODEC)

    def take(self, indices: Iterable[int]) -> Names:
        """Makes a sequence of the strings at `indices`, from 0."""
        return Names.of(self.some(indices))


# Folders, in lower case, that systems put beside files and fill with thumbnails, copies or what was
# thrown away: those of Synology, QNAP and Windows, ext4's, and that of zip files made by macOS.
SYSTEM_FOLDERS = frozenset(
    (
        '@eadir',
        '#recycle',
        '#snapshot',
        '@recycle',
        '@recently-snapshot',
        '$recycle.bin',
        'recycler',
        'system volume information',
        'lost+found',
        '__macosx',
    )
)
# What an extension looks like; '.0001' is none.
_EXTENSION = re.compile(r'\.[a-z][a-z0-9]{0,9}')
# Extensions that are counted apart, and files that are named of each.
_MOST_EXTENSIONS, _EXAMPLES = 100, 3


class Others(NamedTuple):
    """Files or folders that are not used.

    Attributes:
      number: how many there are.
      examples: the first few, relative to the root.
    """

    number: int
    examples: list[str]


class Listing(NamedTuple):
    """What lies below a folder, the root. Paths are relative to the root, with '/'; its own is ''.

    Attributes:
      files: the files with one of the wanted extensions, sorted.
      folders: the folders that were searched, in the order of the search.
      times: mtime and ctime of each folder before it was listed, nanoseconds, int64 [folders, 2].
      links: (path, target) of every link to a folder.
      loose: links that did not lead to a folder; if one does later, the listing is out of date.
      others: files that are not used, by their extension in lower case, '' for none.
      left_out: what else is not used, by what it is: hidden files, system folders, and what
        data.exclude names.
    """

    files: Names
    folders: Names
    times: np.ndarray
    links: list[tuple[str, str]]
    loose: list[str]
    others: dict[str, Others]
    left_out: dict[str, Others]


class _Found(NamedTuple):
    """The names in one folder: those of its files, joined by NUL, and those of its folders."""

    files: bytes
    folders: list[str]


class Exclusion:
    """Patterns of files and folders that are left out (data.exclude).

    `*` stands for anything, `?` for a character, `[ab]` for one of some. A pattern without '/' is
    of a name, wherever it lies; one with '/' of a path relative to the root. A folder is left out
    with all that is in it.
    """

    def __init__(self, patterns: Sequence[str] = ()):
        """Takes the patterns.

        Args:
          patterns: such as '*_mask.png', 'thumbnails' or 'train/old*'.
        """
        self.patterns = tuple(patterns)
        self._compiled = [
            (pattern, '/' in pattern.strip('/'), re.compile(fnmatch.translate(pattern.strip('/'))))
            for pattern in self.patterns
        ]

    def __call__(self, prefix: str, name: str) -> str:
        """The first pattern that fits a file or folder, or ''.

        Args:
          prefix: its folder, relative to the root, with '/' at the end; '' for the root.
          name: its own.
        """
        for pattern, whole, compiled in self._compiled:
            if compiled.match(prefix + name if whole else name):
                return pattern
        return ''


class _Counts:
    """Counts by kind, with the first few examples of each."""

    def __init__(self) -> None:
        self.found: dict[str, Others] = {}

    def add(self, kind: str, path: str) -> None:
        number, examples = self.found.get(kind, (0, []))
        if number < _EXAMPLES:
            examples.append(path)
        self.found[kind] = Others(number + 1, examples)

    def add_file(self, path: str) -> None:
        """Counts a file by its extension."""
        extension = os.path.splitext(path)[1].lower()
        known = extension in self.found or len(self.found) < _MOST_EXTENSIONS
        self.add(extension if known and _EXTENSION.fullmatch(extension) else '', path)


def list_tree(
    root: Path,
    extensions: tuple[str, ...],
    progress: Progress = no_progress,
    exclude: Sequence[str] = (),
) -> Listing:
    """Lists the files below `root` whose names, in lower case, end in one of `extensions`.

    Hidden files and folders, SYSTEM_FOLDERS and workdirs of runs are left out. Links to folders are
    followed, but no folder is searched twice: a link may lead back to one above it.

    Args:
      root: an existing folder.
      extensions: extensions in lower case, such as '.jpg'.
      progress: called after every folder with the number of files listed.
      exclude: patterns of what is left out, see `Exclusion`.

    Raises:
      UserError: a folder cannot be listed; without it, pictures would be missing. Or `root` is a
        workdir.
    """
    found: dict[str, _Found] = {}
    times: list[tuple[int, int]] = []
    links: list[tuple[str, str]] = []
    loose: list[str] = []
    seen: set[str] = set()
    others, left_out, excluded = _Counts(), _Counts(), Exclusion(exclude)
    listed_files = 0
    # Folders to search, each with its path after links are resolved; the last is searched first.
    waiting = [('', os.path.realpath(root))]
    while waiting:
        folder, real = waiting.pop()
        if real in seen:
            continue
        seen.add(real)
        path = os.path.join(root, folder) if folder else str(root)
        if is_workdir(path):
            if not folder:
                raise UserError(
                    f'{path} is the workdir of a run, whose pictures (views.png) are never data. '
                    'Give the folder with the pictures.'
                )
            left_out.add('workdirs of runs', folder)
            continue
        prefix = folder + '/' if folder else ''
        files: list[str] = []
        subfolders: list[tuple[str, str]] = []
        try:
            # Before listing, so that a file added during it shows as a change of the folder.
            status = os.stat(path)
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    hidden = name.startswith('.')
                    pattern = '' if hidden else excluded(prefix, name)
                    if pattern:
                        left_out.add(f"data.exclude='{pattern}'", prefix + name)
                    elif _is_folder(entry):
                        if hidden:
                            continue
                        if name.lower() in SYSTEM_FOLDERS:
                            left_out.add('folders of the system', prefix + name)
                            continue
                        target = os.path.join(real, name)
                        if entry.is_symlink():
                            target = os.path.realpath(target)
                            links.append((prefix + name, target))
                        subfolders.append((name, target))
                    elif not hidden and name.lower().endswith(extensions):
                        files.append(name)
                    elif hidden:
                        left_out.add('hidden files', prefix + name)
                    else:
                        others.add_file(prefix + name)
                        if entry.is_symlink():
                            loose.append(prefix + name)
        except OSError as error:
            raise UserError(f'{path} cannot be listed: {error.strerror}.') from error
        listed_files += len(files)
        progress('files listed', listed_files, 0)
        times.append((status.st_mtime_ns, status.st_ctime_ns))
        subfolders.sort()
        # Joined, because a million separate strings take 100 MB.
        row = '\0'.join(files).encode(*CODEC)
        found[folder] = _Found(row, [name for name, _ in subfolders])
        waiting += [(prefix + name, target) for name, target in reversed(subfolders)]
    folders = Names.of(found)
    return Listing(
        Names.of(_in_order(found)),
        folders,
        np.array(times, np.int64),
        links,
        loose,
        others.found,
        left_out.found,
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that cannot be followed counts as a file; an error shows when it is read.
        return False


def _in_order(found: dict[str, _Found]) -> Iterator[str]:
    """Yields the paths of all files, sorted; removes from `found` the folders it has entered.

    With a '/' behind each folder's name, sorting the names in each folder sorts all paths.
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
    """The names in one folder, sorted; those of folders end in '/'."""
    files = found.files.decode(*CODEC).split('\0') if found.files else []
    return iter(sorted([*files, *(name + '/' for name in found.folders)]))


# data.index='auto' keeps index files in the user's cache folder, for folders with at least
# KEPT_FROM files: listing fewer is quick.
AUTO = 'auto'
KEPT_FROM = 10_000

_FORMAT = b'byol_jax list of files, '
_MAGIC = _FORMAT + b'version 2\n'
_DIGEST = hashlib.sha256().digest_size

# Two changes of a folder within one step of the file system's clock give it the same time, so a
# folder that changed less than this before it was listed may change again unnoticed. FAT's steps
# are 2 seconds, the longest in use.
_TICK_NS = 2 * 10**9


class _Unusable(Exception):
    """An index file cannot be used; the message is a phrase that follows the file's name."""


def listed(
    root: Path,
    extensions: tuple[str, ...],
    index: str,
    progress: Progress = no_progress,
    exclude: Sequence[str] = (),
) -> Listing:
    """Like `list_tree`, but reads an index file if it is up to date, and writes it if not.

    An index file is up to date if every folder still has the times (mtime, ctime) that it had when
    it was listed, and every link the same target. If the file cannot be read or written, a log line
    says so, and the files are listed.

    Args:
      root: an existing folder.
      extensions: as in `list_tree`.
      index: data.index: '' for no index, AUTO, or the path of the index file.
      progress: as in `list_tree`.
      exclude: as in `list_tree`.

    Raises:
      UserError: as in `list_tree`; or the index file would lie in a folder that it lists.
    """
    if not index:
        return list_tree(root, extensions, progress, exclude)
    about = {
        'root': os.path.realpath(root),
        'extensions': list(extensions),
        'exclude': list(exclude),
        # The encoding decides which strings the bytes of file names become.
        'encoding': sys.getfilesystemencoding(),
    }
    path = _place(index, about)
    if path is None:
        return list_tree(root, extensions, progress, exclude)
    may_write = True
    try:
        listing = _read(path, root, about)
    except FileNotFoundError:
        pass
    except _Unusable as error:
        # Do not overwrite a file that the user named by mistake and that is not an index.
        may_write = index == AUTO or _was_index(path)
        stays = '' if may_write else ', and it stays as it is'
        _log.warning(f'the index {path} {error}: the files are listed anew{stays}')
    except OSError as error:
        # With 'auto', writing may still work; if it fails too, `_keep` says so.
        may_write = index == AUTO
        if not may_write:
            _log.warning(
                f'the index {path} cannot be read ({error.strerror}): the files are listed anew'
            )
    else:
        # A user who misses a file can see here that the list comes from an index.
        _log.info(
            f'{len(listing.files):,} files of {root}, as listed in {path}: no folder has changed'
        )
        return listing
    started = time.time_ns()
    listing = list_tree(root, extensions, progress, exclude)
    if may_write and len(listing.files) >= (KEPT_FROM if index == AUTO else 1):
        _keep(path, root, about, listing, started)
    return listing


def _place(index: str, about: dict[str, Any]) -> Path | None:
    """The path of the index file; None if 'auto' finds no place for it.

    Raises:
      UserError: the path is in a folder that is listed: writing the file would change the folder.
    """
    if index != AUTO:
        path = Path(index).expanduser()
        if _within(path, about['root']):
            raise UserError(
                f'data.index={index} lies in {about["root"]}, whose files it is to list: it would '
                'be out of date as soon as it is written. Give a file elsewhere.'
            )
        return path
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = Path(cache) / 'byol_jax' / f'{name}.index'
    # Without a home folder there is no cache folder either.
    return path if path.is_absolute() and not _within(path, about['root']) else None


def _within(path: Path, root: str) -> bool:
    """Whether a file lies in one of the folders that are listed for `root`; ignores links."""
    steps = os.path.relpath(os.path.realpath(path.parent), root).split(os.sep)
    return steps == ['.'] or not any(step.startswith('.') for step in steps)


def _read(path: Path, root: Path, about: dict[str, Any]) -> Listing:
    """Reads the listing from an index file.

    Raises:
      _Unusable: the file is damaged, out of date, or of another folder.
      OSError: the file cannot be read.
    """
    content = memoryview(path.read_bytes())
    start = len(_MAGIC) + _DIGEST
    if content[: len(_MAGIC)] != _MAGIC:
        old = content[: len(_FORMAT)] == _FORMAT
        raise _Unusable('is of another version' if old else 'is damaged or something else')
    if hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
        raise _Unusable('is damaged')
    length = int.from_bytes(content[start : start + 8], 'little')
    start += 8
    try:
        header = parse_json(bytes(content[start : start + length]), str(path))
    except UserError as error:
        raise _Unusable('is damaged') from error
    start += length
    if header['about'] != about:
        raise _Unusable(f'is of other files, in {header["about"]["root"]}')
    arrays = []
    for size in header['bytes']:
        arrays.append(bytes(content[start : start + size]))
        start += size
    files, files_starts, folders, folders_starts, times = arrays
    listing = Listing(
        Names(files, np.frombuffer(files_starts, '<i8')),
        Names(folders, np.frombuffer(folders_starts, '<i8')),
        np.frombuffer(times, '<i8').reshape(-1, 2),
        [(link, target) for link, target in header['links']],
        header['loose'],
        *(
            {kind: Others(*found) for kind, found in header[name].items()}
            for name in ('others', 'left_out')
        ),
    )
    changed = _changed(listing, root)
    if changed is not None:
        raise _Unusable(f'is out of date ({changed} has changed)')
    return listing


def _changed(listing: Listing, root: Path) -> str | None:
    """The path of the first folder or link that has changed since it was listed, or None."""
    for folder, times in zip(listing.folders, listing.times.tolist(), strict=True):
        path = os.path.join(root, folder) if folder else str(root)
        try:
            status = os.stat(path)
        except OSError:
            return path
        if [status.st_mtime_ns, status.st_ctime_ns] != times:
            return path
    for link, target in listing.links:
        if os.path.realpath(os.path.join(root, link)) != target:
            return os.path.join(root, link)
    for link in listing.loose:
        if os.path.isdir(os.path.join(root, link)):
            return os.path.join(root, link)
    return None


def _keep(path: Path, root: Path, about: dict[str, Any], listing: Listing, started: int) -> None:
    """Writes an index file, or logs why it does not.

    Args:
      path: path of the index file.
      root: the folder that was listed.
      about: root, extensions and encoding of the listing.
      listing: the listing.
      started: when listing began, nanoseconds since the epoch.
    """
    if (listing.times <= 0).any():
        _log.warning(f'no index of {root} is kept: its file system keeps no times of folders')
        return
    latest = int(listing.times[:, 0].argmax())
    if listing.times[latest, 0] > started - _TICK_NS:
        folder = os.path.join(root, listing.folders[latest])
        _log.info(f'no index of {root} is kept this time: {folder} has only just changed')
        return
    arrays = (
        listing.files.block,
        listing.files.starts.astype('<i8').tobytes(),
        listing.folders.block,
        listing.folders.starts.astype('<i8').tobytes(),
        listing.times.astype('<i8').tobytes(),
    )
    header = json.dumps(
        {
            'about': about,
            'bytes': [len(array) for array in arrays],
            'links': listing.links,
            'loose': listing.loose,
            'others': listing.others,
            'left_out': listing.left_out,
        }
    ).encode()
    parts = (len(header).to_bytes(8, 'little'), header, *arrays)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)

    def write(partial: Path) -> None:
        with partial.open('wb') as file:
            file.writelines((_MAGIC, digest.digest(), *parts))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other processes, also on other hosts, may write the same index file at the same time.
        write_whole(path, write, f'{os.uname().nodename}.{os.getpid()}')
    except OSError as error:
        _log.warning(
            f'the index {path} of {root} cannot be written ({error.strerror}): every start lists '
            "the files anew. data.index=FILE keeps it elsewhere, data.index='' keeps none."
        )


def _was_index(path: Path) -> bool:
    """Whether a file begins like an index file, or is a cut-off beginning of one."""
    with path.open('rb') as file:
        return _FORMAT.startswith(file.read(len(_FORMAT)))
