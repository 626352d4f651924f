"""A cache of decoded pictures on disk: each picture is decoded once for all runs.

Each picture has its own file, an entry, which is mapped into memory when it is used. An entry has a
header of 4096 bytes (magic, sha256, height, width) and the pixels, uint8 [height, width, 3]. The
sha256 covers the source file's path, size and modification time, the decoders' versions, and the
picture's size. Every use compares the sha256 and the entry's size with the present ones; an entry
that differs is ignored.

One process at a time writes entries. It holds a lock, which the operating system frees when the
process ends. An entry is written to a temporary file beside it and renamed when complete, so an
entry is whole or absent.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import mmap
import os
import shutil
import struct
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np
import PIL

from byol_jax.errors import BadPicture, UserError
from byol_jax.files import lock_file, write_whole
from byol_jax.sources.base import Cached, Source, Wrapped

_MAGIC = b'byol_jax pixels\n'
_HEADER = struct.Struct(f'<{len(_MAGIC)}s32sII')
HEADER_BYTES = 4096  # one page, so the pixels begin at the next
SUFFIX = '.pixels'


def _decoders() -> str:
    """The decoders with their versions, since another version may give other pixels."""
    return f'2 Pillow {PIL.__version__} OpenCV {cv2.__version__}'


class Entry:
    """One decoded picture, in its own file."""

    def __init__(self, folder: Path, picture: str, version: str):
        """Reads and writes nothing yet.

        Args:
          folder: the cache's folder.
          picture: identity of the picture, from `Source.stamp`.
          version: version of the picture, from `Source.stamp`; an entry of another version is
            ignored.
        """
        name = hashlib.sha256(os.fsencode(picture)).hexdigest()[:40]
        # Subfolders, because some file systems are slow with a million files in one folder.
        self.path = folder / name[:2] / (name + SUFFIX)
        self._of = os.fsencode(f'{picture}\n{version}\n{_decoders()}')

    def _header(self, height: int, width: int) -> bytes:
        digest = hashlib.sha256(self._of + struct.pack('<II', height, width)).digest()
        return _HEADER.pack(_MAGIC, digest, height, width)

    def _size(self, file: IO[bytes]) -> tuple[int, int] | None:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return None
        height, width = _HEADER.unpack(head)[2:]
        whole = os.fstat(file.fileno()).st_size == HEADER_BYTES + height * width * 3
        return (height, width) if whole and head == self._header(height, width) else None

    def size(self) -> tuple[int, int] | None:
        """(height, width) of the picture; None if there is no valid entry."""
        try:
            with self.path.open('rb') as file:
                return self._size(file)
        except OSError:
            return None

    def read(self) -> np.ndarray | None:
        """The picture, mapped and read-only: uint8 [H, W, 3]; None if there is no valid entry."""
        try:
            with self.path.open('rb') as file:
                size = self._size(file)
                if size is None:
                    return None
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:
            return None
        return np.frombuffer(mapped, np.uint8, offset=HEADER_BYTES).reshape(*size, 3)

    def write(self, picture: np.ndarray) -> int:
        """Writes the entry, and returns its number of bytes.

        Raises:
          OSError: it cannot be written.
        """
        header = self._header(*picture.shape[:2]).ljust(HEADER_BYTES, b'\0')
        self.path.parent.mkdir(exist_ok=True)

        def write(partial: Path) -> None:
            with partial.open('wb') as file:
                file.write(header)
                file.write(np.ascontiguousarray(picture).data)
                file.flush()
                # Without this, a power cut could leave a file with a name but without pixels.
                os.fsync(file.fileno())

        write_whole(self.path, write)
        return HEADER_BYTES + picture.nbytes


_LOCK_SECONDS = 0.2


class Filled(NamedTuple):
    """How much of a cache has been filled.

    Attributes:
      done: how many of `total` pictures have been decoded or found bad.
      total: how many pictures had no entry at the beginning.
      written: how many bytes have been written.
      bad: how many pictures cannot be read, and so have no entry.
      waiting: whether another process holds the cache's lock.
    """

    done: int
    total: int
    written: int = 0
    bad: int = 0
    waiting: bool = False


class DiskCached(Wrapped):
    """Another source, whose decoded pictures are kept in a folder.

    A picture without an entry is decoded, as without the cache; `fill` writes all missing entries.

    Only the pages that are used of a cached picture are read from disk. They stay in the operating
    system's page cache; this process holds no copy.
    """

    def __init__(
        self,
        source: Source,
        folder: str | Path,
        memory_bytes: int = 0,
        max_megapixels: float = math.inf,
    ):
        """Reads and writes nothing yet.

        Args:
          source: the source whose pictures are kept; it must have stamps (`Source.stamp`).
          folder: the cache's folder; other sources may use it too.
          memory_bytes: how many bytes of decoded pictures without an entry are kept in memory.
          max_megapixels: larger pictures are never taken from the cache; the source refuses them.

        Raises:
          UserError: the source has no stamps.
        """
        super().__init__(Cached(source, memory_bytes))
        self.folder = Path(folder).expanduser()
        self._decoded = source
        self._max_megapixels = max_megapixels
        self._sizes: dict[tuple[int, str], tuple[int, int]] = {}
        if not source.own_files and type(source).stamp is Source.stamp:
            raise UserError(
                f'data.cache={folder} keeps the decoded pictures of image files, of TFDS data '
                'sets and of sources of your own with a `stamp`; this one has none. Leave it out.'
            )

    def load(self, index: int, key: str) -> np.ndarray:
        entry = self._entry(index, key)
        picture = None if entry is None else entry.read()
        if picture is None or picture.shape[0] * picture.shape[1] / 1e6 > self._max_megapixels:
            return self.source.load(index, key)
        return picture

    def size(self, index: int, key: str) -> tuple[int, int]:
        if self._decoded.own_files:
            return self._decoded.size(index, key)
        # Other sources must read a whole record to find a size; the entry's header is shorter.
        if (index, key) not in self._sizes:
            entry = self._entry(index, key)
            size = None if entry is None else entry.size()
            self._sizes[index, key] = size or self.source.size(index, key)
        return self._sizes[index, key]

    def _entry(self, index: int, key: str) -> Entry | None:
        """The entry of a picture, written or not; None if the picture has no stamp."""
        try:
            stamp = self._decoded.stamp(index, key)
        except OSError:
            return None  # `load` says what is wrong.
        return None if stamp is None else Entry(self.folder, *stamp)

    def fill(self, keys: tuple[str, ...], workers: int) -> Iterator[Filled]:
        """Decodes every picture that has no entry, and writes its entry.

        At most `workers` decoded pictures, and their files, are in memory at a time.

        Args:
          keys: which pictures of each example to keep.
          workers: how many pictures are decoded at a time.

        Yields:
          The progress, after every picture and while another process holds the lock.

        Raises:
          UserError: the disk is too small for all entries, or an entry cannot be written. Entries
            that are written stay, and the next call continues from there.
        """
        if not self._missing(keys):
            yield Filled(0, 0)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / '.lock').open('w') as lock:
                while not _locked(lock):
                    yield Filled(0, 0, waiting=True)
                    time.sleep(_LOCK_SECONDS)
                # Closing the file frees the lock, and so does the end of the process.
                yield from self._build(self._missing(keys), workers)
        except OSError as error:
            raise UserError(
                f'data.cache={self.folder} cannot be written: {error.filename or ""} '
                f'{error.strerror or error}. What is in it stays, and the same command goes on '
                'from there; or leave data.cache out.'
            ) from error

    def _missing(self, keys: tuple[str, ...]) -> list[tuple[int, str]]:
        """(index, key) of the pictures without an entry."""
        found = []
        for index, key in itertools.product(range(len(self)), dict.fromkeys(keys)):
            entry = self._entry(index, key)
            if entry is None or entry.size() is None:
                found.append((index, key))
        return found

    def _build(self, missing: list[tuple[int, str]], workers: int) -> Iterator[Filled]:
        for partial in self.folder.glob(f'*/*{SUFFIX}.partial'):
            partial.unlink()  # A killed process left it.
        self._check_room(missing)
        done = written = bad = 0
        places = iter(missing)
        under_way: set[Future[int | None]] = set()
        with _pool(workers) as pool:
            while True:
                for place in itertools.islice(places, workers - len(under_way)):
                    under_way.add(pool.submit(self._write, *place))
                if not under_way:
                    return
                finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    size = future.result()
                    done, written, bad = done + 1, written + (size or 0), bad + (size is None)
                    yield Filled(done, len(missing), written, bad)

    def _write(self, index: int, key: str) -> int | None:
        """Writes the entry of a picture; returns its number of bytes, or None for a bad picture."""
        # Stamped before the file is read: if the file changes meanwhile, the entry is invalid.
        entry = self._entry(index, key)
        try:
            picture = self._decoded.load(index, key)
        except BadPicture:
            return None
        return None if entry is None else entry.write(picture)

    def _check_room(self, missing: list[tuple[int, str]]) -> None:
        needed = 0
        for index, key in missing:
            try:
                height, width = self.size(index, key)
            except BadPicture:
                continue
            needed += HEADER_BYTES + height * width * 3
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f'data.cache={self.folder} needs {_amount(needed)} for the {len(missing):,} '
                f'pictures that are not in it yet, decoded, and its disk has {_amount(free)} '
                'free. Free some, give a folder on another disk, or leave data.cache out.'
            )


def _amount(number: int) -> str:
    return f'{number / 1e9:,.1f} GB' if number >= 1e9 else f'{number / 1e6:,.1f} MB'


def _locked(file: IO[str]) -> bool:
    """Takes the lock of an open file; returns False if another process has it.

    Where the file system has no locks, two processes may decode the same pictures; each entry is
    written whole all the same.
    """
    return lock_file(file.fileno()) is not False


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that drops the waiting tasks when the block ends."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
