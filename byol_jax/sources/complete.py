"""Whether a video file is all there, by the sizes that its container declares."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from byol_jax.errors import UserError
from byol_jax.files import not_a_file

# First bytes of Matroska and WebM (RFC 8794, Section 8.1), and the Segment that holds all the rest
# (RFC 9559, Section 5.1).
_EBML = b'\x1a\x45\xdf\xa3'
_SEGMENT = b'\x18\x53\x80\x67'
# Boxes that an MP4 or QuickTime file may begin with (ISO/IEC 14496-12, Section 4.2), and those
# without which frames are missing. Others may be what some program left behind the end.
_FIRST_BOXES = (b'ftyp', b'moov', b'mdat', b'free', b'skip', b'wide')
_NEEDED_BOXES = (b'moov', b'mdat', b'moof')


def check_complete(path: Path) -> None:
    """Raises UserError if an MP4, QuickTime, Matroska or WebM file is cut short, or unreadable.

    Decoders end at the last whole frame of such a file as if nothing were missing. Of other
    formats, and of files whose sizes were left open by what wrote them, nothing is known here.
    """
    try:
        status = path.stat()
        what = not_a_file(status)
        if what:
            # The reader of a pipe waits for a writer, and some devices never end.
            raise UserError(f'{path} is no file but {what}. Remove it.')
        size = status.st_size
        with path.open('rb') as file:
            head = file.read(8)
            declared = 0
            if head.startswith(_EBML):
                declared = _matroska_end(file)
            elif head[4:] in _FIRST_BOXES:
                declared = _boxes_end(file, size)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}.') from error
    if declared > size:
        raise UserError(
            f'{path} is cut short: it has {size:,} of the {declared:,} bytes it declares. Fetch or '
            'make it again, or remove it.'
        )


def _boxes_end(file: IO[bytes], size: int) -> int:
    """Where the last box that is needed ends, as far as the file of `size` bytes shows."""
    start = end = 0
    while start + 8 <= size:
        file.seek(start)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], 'big'), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], 'big')
        if length < 8:
            break  # 0: up to the end of the file, wherever that is.
        if kind in _NEEDED_BOXES:
            end = start + length
        start += length
    return end


def _matroska_end(file: IO[bytes]) -> int:
    """Where the Segment ends; 0 if its size was left open, as in a live stream."""
    file.seek(len(_EBML))
    length = _variable_size(file)
    if length is None:
        return 0
    file.seek(length, 1)
    if file.read(4) != _SEGMENT:
        return 0
    length = _variable_size(file)
    return 0 if length is None else file.tell() + length


def _variable_size(file: IO[bytes]) -> int | None:
    """A number of 1 to 8 bytes whose leading zero bits say how many (RFC 8794, Section 4).

    Returns None if all its bits are set: the size is not known.
    """
    first = file.read(1)
    if not first or first == b'\0':
        return None
    more = 8 - first[0].bit_length()
    bits = 7 * (more + 1)
    number = int.from_bytes(first + file.read(more), 'big') & ((1 << bits) - 1)
    return None if number == (1 << bits) - 1 else number
