"""Plain JPEGs by OpenCV, which takes two thirds of Pillow's time for the same pixels.

OpenCV also decodes some damaged files that Pillow refuses. So only a file that is whole as far as
its markers say is left to it: of 4,000 files damaged at random it then refused none that Pillow
reads and read none that Pillow refuses, with equal pixels (`tests/test_jpeg.py` tries some).
"""

from __future__ import annotations

import re
from typing import NamedTuple

import cv2
import numpy as np

# ITU-T T.81, Table B.1, and JFIF. Others, such as EXIF (APP1), Adobe's colours (APP14) or
# progressive pictures, are left to Pillow.
_START, _END = b'\xff\xd8', b'\xff\xd9'
_FRAME, _SCAN = 0xC0, 0xDA
_KNOWN = {_FRAME, _SCAN, 0xC4, 0xDB, 0xDD, 0xE0}  # and DHT, DQT, DRI, APP0

# What cannot be in the data of a scan: any marker but a restart (Section B.1.1.5).
_MARKER = re.compile(rb'\xff[^\x00\xff\xd0-\xd7]')

# Below the limit of OpenCV (CV_IO_MAX_IMAGE_PIXELS, 2^30).
_MOST_PIXELS = 2**28


class Header(NamedTuple):
    """Sides in pixels."""

    width: int
    height: int


def plain_jpeg(data: bytes) -> Header | None:
    """The header of a whole baseline JPEG of one scan, grey or of three components; else None."""
    if not (data.startswith(_START) and data.endswith(_END)):
        return None
    at, header, components = len(_START), None, 0
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] in _KNOWN:
        kind, end = data[at + 1], at + 2 + _uint16(data, at + 2)
        body, at = data[at + 4 : end], end
        if kind == _FRAME and len(body) > 5:
            header = Header(_uint16(body, 3), _uint16(body, 1))
            components = body[5]
        if kind == _SCAN:
            if header is None or components not in (1, 3) or body[:1] != bytes([components]):
                return None
            found = _MARKER.search(data, at)
            whole = found is not None and found.start() == len(data) - len(_END)
            return header if whole and 0 < header.width * header.height <= _MOST_PIXELS else None
    return None


def decode_plain(data: bytes) -> np.ndarray | None:
    """Decodes what `plain_jpeg` knows: uint8 [H, W, 3], or None if that fails."""
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def _uint16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], 'big')
