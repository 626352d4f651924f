"""Pictures of the run: the view pairs, thumbnails, and how a page holds them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from byol_jax.files import write_whole

_GAP = 6
_HEADER = 16


def views_picture(
    rows: Sequence[tuple[np.ndarray, ...]], columns: Sequence[str], side: int
) -> Image.Image:
    """A grid of pictures with a heading over each column.

    Args:
      rows: pictures of any size, uint8 [H, W, 3], as many in each row as there are columns.
      columns: the headings.
      side: of each cell, pixels; pictures are fitted in, never cut.
    """
    width = _GAP + len(columns) * (side + _GAP)
    sheet = Image.new('RGB', (width, _HEADER + len(rows) * (side + _GAP)), 'white')
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((_GAP + column * (side + _GAP), 2), title, fill='black')
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            cell = fit(picture, side)
            left = _GAP + column * (side + _GAP) + (side - cell.width) // 2
            top = _HEADER + row * (side + _GAP) + (side - cell.height) // 2
            sheet.paste(cell, (left, top))
    return sheet


def fit(picture: np.ndarray, side: int) -> Image.Image:
    """A picture, uint8 [H, W, 3], scaled so that its longer side is `side` pixels."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Enlarged pixels stay sharp: what the network sees is what is shown.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return Image.fromarray(np.ascontiguousarray(picture)).resize(size, method)


def data_uri(image: Image.Image) -> str:
    """A picture as a data: address for an HTML page, as JPEG (a tenth of a photograph's PNG)."""
    buffer = io.BytesIO()
    image.convert('RGB').save(buffer, 'JPEG', quality=85, optimize=True)
    return 'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode()


def save_picture(image: Image.Image, path: Path) -> None:
    """Writes a PNG, replacing an old one as a whole."""
    write_whole(path, lambda partial: image.save(partial, 'PNG'))
