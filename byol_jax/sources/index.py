"""The index file of a folder: its list of files, kept until one of its folders changes.

It begins with a line that names the format, then the sha256 of all the rest: the length of a JSON
header, the header, and the arrays of a `Listing`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from byol_jax.errors import UserError
from byol_jax.files import write_whole
from byol_jax.sources.listing import Listing, list_tree
from byol_jax.sources.names import Names

# data.index: the user's cache folder, for folders of so many files that listing them takes a while.
AUTO = 'auto'
KEPT_FROM = 10_000

_FORMAT = b'byol_jax list of files, '
_MAGIC = _FORMAT + b'version 1\n'
_DIGEST = hashlib.sha256().digest_size

# A folder that changed less than this before it was listed may change again without its time
# telling: FAT counts in steps of 2 seconds, other file systems in finer ones.
_TICK_NS = 2 * 10**9


class _Unusable(Exception):
    """Why an index file cannot be used, in words that follow its name."""


def listed(root: Path, extensions: tuple[str, ...], index: str) -> Listing:
    """`list_tree`, from an index file if there is one that still holds; else one is written.

    It holds as long as no folder's times (mtime, ctime) are others than when it was listed, and
    every link leads where it led. Whatever keeps it from being read or written is said on stderr
    and nothing worse: the files are listed anew.

    Args:
      root: an existing folder.
      extensions: as `list_tree`.
      index: data.index: '' for none; AUTO; or the file.

    Raises:
      UserError: as `list_tree`, or the index file is to lie in a folder that it lists.
    """
    if not index:
        return list_tree(root, extensions)
    about = {
        'root': os.path.realpath(root),
        'extensions': list(extensions),
        # The same bytes are other strings to a process with another one.
        'encoding': sys.getfilesystemencoding(),
    }
    path = _place(index, about)
    if path is None:
        return list_tree(root, extensions)
    may_write = True
    try:
        listing = _read(path, root, about)
    except FileNotFoundError:
        pass
    except _Unusable as error:
        # A file of the user's that was never an index stays what it is.
        may_write = index == AUTO or _was_index(path)
        stays = '' if may_write else ', and it stays as it is'
        _say(f'the index {path} {error}: the files are listed anew{stays}')
    except OSError as error:
        # Where 'auto' cannot write either, that is said, if the folder is large enough to matter.
        may_write = index == AUTO
        if not may_write:
            _say(f'the index {path} cannot be read ({error.strerror}): the files are listed anew')
    else:
        # Said, so that whoever misses a file knows where to look.
        _say(f'{len(listing.files):,} files of {root}, as listed in {path}: no folder has changed')
        return listing
    started = time.time_ns()
    listing = list_tree(root, extensions)
    if may_write and len(listing.files) >= (KEPT_FROM if index == AUTO else 1):
        _keep(path, root, about, listing, started)
    return listing


def _place(index: str, about: dict[str, Any]) -> Path | None:
    """Where the index file is; None where there can be none.

    Raises:
      UserError: in a folder that it lists, and so changes when it is written.
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
    """Whether a file lies in a folder that is listed with `root`, as far as no link leads there."""
    steps = os.path.relpath(os.path.realpath(path.parent), root).split(os.sep)
    return steps == ['.'] or not any(step.startswith('.') for step in steps)


def _read(path: Path, root: Path, about: dict[str, Any]) -> Listing:
    """The listing in an index file.

    Raises:
      _Unusable: it is damaged, is of something else, or does not hold any more.
      OSError: it cannot be read.
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
    header = json.loads(bytes(content[start : start + length]))
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
        header['others'],
    )
    changed = _changed(listing, root)
    if changed is not None:
        raise _Unusable(f'is out of date ({changed} has changed)')
    return listing


def _changed(listing: Listing, root: Path) -> str | None:
    """A folder or link that is not as it was when it was listed, if there is one."""
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
    """Writes an index file, or says why not.

    Args:
      started: when the search began, nanoseconds.
    """
    if (listing.times <= 0).any():
        _say(f'no index of {root} is kept: its file system keeps no times of folders')
        return
    latest = int(listing.times[:, 0].argmax())
    if listing.times[latest, 0] > started - _TICK_NS:
        folder = os.path.join(root, listing.folders[latest])
        _say(f'no index of {root} is kept this time: {folder} has only just changed')
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
        # Other processes, on other hosts too, may be writing theirs.
        write_whole(path, write, f'{os.uname().nodename}.{os.getpid()}')
    except OSError as error:
        _say(
            f'the index {path} of {root} cannot be written ({error.strerror}): every start lists '
            "the files anew. data.index=FILE keeps it elsewhere, data.index='' keeps none."
        )


def _was_index(path: Path) -> bool:
    """Whether a file begins as an index file does, as far as it goes."""
    with path.open('rb') as file:
        return _FORMAT.startswith(file.read(len(_FORMAT)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
