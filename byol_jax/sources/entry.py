"""One decoded picture on disk, in a raw file that is mapped into memory.

An entry is a header of 4096 bytes (magic, sha256 of what it is an entry of, height, width) and the
pixels, uint8 [height, width, 3]. It is of one source file as it was: its path, size and time of
change, and the decoders' versions. Every use compares them with the file as it is now, and the
entry's size with its header; an entry that does not fit counts as none.

Entries are written beside their place and moved there when complete, so that one is there whole or
not at all, whatever is killed when.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import PIL

from byol_jax.files import write_whole

_MAGIC = b'byol_jax pixels\n'
_HEADER = struct.Struct(f'<{len(_MAGIC)}s32sII')
HEADER_BYTES = 4096  # so that pixels begin at a page
SUFFIX = '.pixels'


def _decoders() -> str:
    """What decodes files: another version may give other pixels of the same one."""
    return f'1 Pillow {PIL.__version__} OpenCV {cv2.__version__}'


class Entry:
    """A decoded picture in a file of its own."""

    def __init__(self, folder: Path, picture: str, version: str):
        """Args:
        folder: of the cache.
        picture: which it is: there is one entry of each.
        version: of it; an entry of another one does not fit.
        """
        name = hashlib.sha256(os.fsencode(picture)).hexdigest()[:40]
        # Some file systems are slow where a folder holds a million files.
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
        """(height, width) of the picture; None if there is no entry that fits."""
        try:
            with self.path.open('rb') as file:
                return self._size(file)
        except OSError:
            return None

    def read(self) -> np.ndarray | None:
        """The picture, mapped, not to be written to: uint8 [H, W, 3]; None as `size`."""
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
        """Writes the entry in place of what is there, and returns its bytes. Raises OSError."""
        header = self._header(*picture.shape[:2]).ljust(HEADER_BYTES, b'\0')
        self.path.parent.mkdir(exist_ok=True)

        def write(partial: Path) -> None:
            with partial.open('wb') as file:
                file.write(header)
                file.write(np.ascontiguousarray(picture).data)
                file.flush()
                # Else after a power cut the name may be there without the pixels.
                os.fsync(file.fileno())

        write_whole(self.path, write)
        return HEADER_BYTES + picture.nbytes
