"""Decoded pictures kept on disk, so that each is decoded once for all runs.

A picture is kept in a file of its own, an entry, which is mapped into memory when it is used: a
header of 4096 bytes (magic, a sha256, height, width) and the pixels, uint8 [height, width, 3]. The
sha256 is of the source file's path, size and time of change, and of the decoders' versions. Every
use compares it, and the entry's size, with what they are now; an entry that does not fit is not
used.

Entries are written by one process at a time, which holds a lock that ends with it. Each is written
beside its place and moved there when complete, so that it is there whole or not at all.
"""

from __future__ import annotations

import fcntl
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
from byol_jax.files import write_whole
from byol_jax.sources.base import Cached, Source, Wrapped

_MAGIC = b'byol_jax pixels\n'
_HEADER = struct.Struct(f'<{len(_MAGIC)}s32sII')
HEADER_BYTES = 4096  # so that pixels begin at a page
SUFFIX = '.pixels'


def _decoders() -> str:
    """The decoders and their versions: another version may give other pixels."""
    return f'1 Pillow {PIL.__version__} OpenCV {cv2.__version__}'


class Entry:
    """A decoded picture in a file of its own."""

    def __init__(self, folder: Path, picture: str, version: str):
        """Reads and writes nothing yet.

        Args:
          folder: of the cache.
          picture: which picture it is (see `Source.stamp`).
          version: of the picture; an entry of another version is not used.
        """
        name = hashlib.sha256(os.fsencode(picture)).hexdigest()[:40]
        # In subfolders: some file systems are slow if a folder holds a million files.
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
        """(height, width) of the picture; None if there is no entry that can be used."""
        try:
            with self.path.open('rb') as file:
                return self._size(file)
        except OSError:
            return None

    def read(self) -> np.ndarray | None:
        """The picture, mapped and read-only: uint8 [H, W, 3]; None as for `size`."""
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
                # After a power cut the file could else have its name and not its pixels.
                os.fsync(file.fileno())

        write_whole(self.path, write)
        return HEADER_BYTES + picture.nbytes


_LOCK_SECONDS = 0.2


class Filled(NamedTuple):
    """How far a cache is built.

    Attributes:
      done: pictures that are decoded or found bad, of `total`.
      total: pictures that had no entry at the beginning.
      written: bytes written.
      bad: pictures that cannot be read, and so have no entry.
      waiting: whether another process holds the cache's lock.
    """

    done: int
    total: int
    written: int = 0
    bad: int = 0
    waiting: bool = False


class DiskCached(Wrapped):
    """Another source, whose pictures are read from a folder of decoded ones if they are there.

    Those that are not are decoded, as without the cache; `fill` decodes all of them.

    Of a picture in the cache only the pages that are used are read from disk. The operating system
    keeps and drops them; this process holds no copy.
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
          source: whose pictures are kept; it must have stamps (`Source.stamp`).
          folder: of the cache; other sources may use it too.
          memory_bytes: of decoded pictures that are kept in memory while they are not on disk.
          max_megapixels: larger pictures are always asked of the source, which refuses them.

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
        # Other sources must read a whole record for it: the entry's header is less.
        if (index, key) not in self._sizes:
            entry = self._entry(index, key)
            size = None if entry is None else entry.size()
            self._sizes[index, key] = size or self.source.size(index, key)
        return self._sizes[index, key]

    def _entry(self, index: int, key: str) -> Entry | None:
        """The entry of a picture, written or not; None if the picture's file is not there."""
        try:
            stamp = self._decoded.stamp(index, key)
        except OSError:
            return None  # `load` says what is wrong.
        return None if stamp is None else Entry(self.folder, *stamp)

    def fill(self, keys: tuple[str, ...], workers: int) -> Iterator[Filled]:
        """Decodes every picture that has no entry and writes one.

        At most `workers` decoded pictures, and their files, are in memory at a time.

        Args:
          keys: the pictures of an example to keep.
          workers: how many pictures are decoded at a time.

        Yields:
          How far it is, after every picture and while it waits for another process.

        Raises:
          UserError: the disk has no room for all, or an entry cannot be written. What was written
            until then stays, and the next call continues from there.
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
                # Closing the file, or the end of the process, frees the lock.
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
        """Decodes a picture and writes its entry; returns its bytes, or None if it is bad."""
        # Before the file is read: if it changes meanwhile, the entry does not fit it afterwards.
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
    """Takes the lock, if no other process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that start no waiting task after the caller has left."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
