"""JPEG files without their metadata, and whether one holds all of its pixels."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import IO, NamedTuple

from byol_jax.sources.containers import Bare, orientation

# ITU-T T.81, B.1 and B.2: markers, 0xFF and a kind. Most begin a segment: its length, two bytes
# which count themselves, and its data.
_END, _SCAN, _RESTARTS, _COMMENT = 0xD9, 0xDA, 0xDD, 0xFE
_BASELINE = 0xC0
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Application segments: JFIF's, EXIF or XMP, Adobe's. These and the comment are metadata, but for
# the first and the last, which say how colours are stored.
_JFIF, _EXIF, _ADOBE = 0xE0, 0xE1, 0xEE
_METADATA = {*range(0xE0, 0xF0), _COMMENT} - {_JFIF, _ADOBE}
_EXIF_PREFIX, _XMP_PREFIX = b'Exif\0\0', b'http://ns.adobe.com/xap/1.0/\0'

# Segments of a plain JPEG. DHT and DQT are Huffman codes and quantization.
_PLAIN = {_BASELINE, _SCAN, 0xC4, 0xDB, _RESTARTS, _JFIF}

# The data of a scan holds no marker but restarts (B.1.1.5).
_MARKER = re.compile(rb'\xff[^\x00\xff\xd0-\xd7]')
_RESTART = re.compile(rb'\xff[\xd0-\xd7]')

# Put in place of the end of the image, so that a decoder stops where the data of a scan ends. At
# that end libjpeg would make up what is missing, in grey, and say so to nobody. These are ones,
# which begin no code (T.81, C.2), as many as libjpeg reads ahead: it makes two blocks of them.
_NO_MORE = b'\xff\0' * 9


class _Frame(NamedTuple):
    """What the header of a frame says.

    Attributes:
      kind: its marker.
      width: pixels.
      height: pixels.
      sampling: by component, in how many parts a square is divided, across and down.
    """

    kind: int
    width: int
    height: int
    sampling: Mapping[int, tuple[int, int]]

    @classmethod
    def of(cls, kind: int, body: bytes) -> _Frame | None:
        if len(body) < 9 or len(body) < 6 + 3 * body[5] or not body[5]:
            return None
        parts = (body[place : place + 2] for place in range(6, 6 + 3 * body[5], 3))
        sampling = {name: (max(both >> 4, 1), max(both & 15, 1)) for name, both in parts}
        return cls(kind, _uint16(body, 3), _uint16(body, 1), sampling)

    def squares(self) -> int:
        """What one scan of all components consists of (MCUs, A.2)."""
        across, down = 8, 8
        if len(self.sampling) > 1:
            across *= max(x for x, _ in self.sampling.values())
            down *= max(y for _, y in self.sampling.values())
        return math.ceil(self.width / across) * math.ceil(self.height / down)


class _Scan(NamedTuple):
    """What the header of a scan says.

    Attributes:
      components: whose coefficients it has.
      first: of the coefficients; 0 is the mean.
      last: likewise.
    """

    components: bytes
    first: int
    last: int

    @classmethod
    def of(cls, body: bytes) -> _Scan:
        count = body[0] if body else 0
        first, last = (body[1 + 2 * count :] + b'\0\0')[:2]
        return cls(body[1 : 1 + 2 * count : 2], first, last)


def bare_jpeg(file: IO[bytes], header: bool) -> Bare:
    """Reads a JPEG without its metadata.

    What the pixels need stays as it is, for the decoder to say what is wrong with it. `plain` are
    baseline files of one scan, of one or three components, and of the usual segments only.

    Where all pixels are in one scan, `data` has no end of the image: a decoder then fails over a
    scan that ends early, by more than its last square of 8 or 16 pixels a side.

    Args:
      file: at its beginning.
      header: read only what precedes the pixels.
    """
    kept, exif, xmp = [file.read(2)], b'', b''
    frame, scan, interval, plain = None, None, 0, True
    while scan is None:
        kind, length, body = _segment(file)
        if kind == _EXIF and body.startswith(_EXIF_PREFIX):
            exif += body.removeprefix(_EXIF_PREFIX)
        elif kind == _EXIF and body.startswith(_XMP_PREFIX):
            xmp = body.removeprefix(_XMP_PREFIX)
        if kind in _METADATA:
            continue
        kept.append((b'' if kind is None else bytes([0xFF, kind])) + length + body)
        plain = plain and kind in _PLAIN
        if kind is None:
            break
        if kind in _FRAMES:
            frame = _Frame.of(kind, body)
        elif kind == _RESTARTS:
            interval = _uint16(body, 0)
        elif kind == _SCAN:
            scan = _Scan.of(body)
    pixels = b'' if header and scan is not None else file.read()
    found = Bare(b''.join([*kept, pixels]), orientation(exif, xmp))
    if frame is None or scan is None or header:
        return found
    end = _MARKER.search(pixels)
    if end is None or frame.kind not in _SEQUENTIAL or pixels[end.start() + 1] != _END:
        return found._replace(lacks=_unscanned(frame, _scans(scan, pixels, end)))
    kept += [pixels[: end.start()], _NO_MORE]
    usual = plain and len(frame.sampling) == len(scan.components) and len(frame.sampling) in (1, 3)
    return found._replace(
        data=b''.join(kept),
        plain=(frame.width, frame.height) if usual else None,
        lacks=_unscanned(frame, [scan]) or _unrestarted(frame, interval, kept[-2]),
    )


def _segment(file: IO[bytes]) -> tuple[int | None, bytes, bytes]:
    """(kind, length as it stands there, data) of the next segment.

    The kind is None where no segment begins; the bytes read are then in the other two.
    """
    head = file.read(2)
    while head == b'\xff\xff':  # Markers may have more of them in front (B.1.1.2).
        head = head[1:] + file.read(1)
    if len(head) < 2 or head[0] != 0xFF or not (0xC0 <= head[1] < 0xFF) or 0xD0 <= head[1] < _SCAN:
        return None, head, b''
    length = file.read(2)
    if len(length) < 2 or _uint16(length, 0) < 2:
        return None, head, length
    return head[1], length, file.read(_uint16(length, 0) - 2)


def _scans(scan: _Scan, pixels: bytes, end: re.Match[bytes] | None) -> list[_Scan]:
    """All scans of a file; none if it is cut off, which its decoder sees by itself.

    Args:
      scan: the first.
      pixels: what follows its header.
      end: of its data.
    """
    scans = [scan]
    while end is not None and pixels[end.start() + 1] != _END:
        at = end.start()
        after = at + 2 + _uint16(pixels, at + 2)
        if pixels[at + 1] == _SCAN:
            scans.append(_Scan.of(pixels[at + 4 : after]))
        end = _MARKER.search(pixels, after)
    return [] if end is None else scans


def _unscanned(frame: _Frame, scans: list[_Scan]) -> str:
    """Which scans are not there, a phrase, or ''.

    T.81 asks for no more than the mean of each component's blocks; but no encoder leaves out all
    details of the first component, and a file without may be cut off in the means.
    """
    if not scans:
        return ''
    means = {name for scan in scans if scan.first == 0 for name in scan.components}
    missing = len(frame.sampling.keys() - means)
    if missing:
        return f'ends before {missing} of its {len(frame.sampling)} components'
    luma = next(iter(frame.sampling))
    if not any(scan.last > 0 and luma in scan.components for scan in scans):
        return 'ends before the details of its picture'
    return ''


def _unrestarted(frame: _Frame, interval: int, data: bytes) -> str:
    """How many restarts are not there, a phrase, or ''.

    Args:
      frame: of the file.
      interval: squares between two restarts; 0 for none.
      data: of its only scan.
    """
    expected = math.ceil(frame.squares() / interval) - 1 if interval else 0
    found = min(len(_RESTART.findall(data)), expected) if expected > 0 else expected
    if found == expected:
        return ''
    return f'lacks {expected - found:,} of its {expected:,} restart markers'


def _uint16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], 'big')
