"""Pictures of the run: the view pairs, and curves and thumbnails for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from byol_jax.files import write_whole

_GAP = 6
_HEADER = 16

# Curves of the report: metric, title, what to read from it.
CURVES = (
    ('loss', 'Loss', '0 to 8; falling alone proves nothing, see feature std'),
    ('feature_std', 'Feature std', 'of unit-length projections; collapse drives it to 0'),
    ('learning_rate', 'Learning rate', 'linear warm-up, then cosine to 0'),
    ('tau', 'tau', 'of the target network; rises to 1'),
    ('images_per_second', 'Images per second', 'pairs of views, over all devices'),
    ('input_wait_fraction', 'Input wait', 'share of the time without a batch to work on'),
)


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
    """A picture as a data: address for an HTML page."""
    buffer = io.BytesIO()
    image.save(buffer, 'PNG', optimize=True)
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def curve_svg(
    records: Sequence[Mapping[str, Any]], metric: str, reference: float | None = None
) -> str:
    """An SVG drawing of one metric over the steps; `reference` adds a dashed level."""
    points = [(r['step'], r[metric]) for r in records if metric in r]
    figure = Figure(figsize=(4.6, 2.2), layout='constrained')
    axes = figure.add_subplot()
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color='#2563a8', linewidth=1.6)
    if reference is not None:
        axes.axhline(reference, color='#888888', linewidth=1, linestyle='--')
    if metric in ('input_wait_fraction', 'feature_std', 'loss'):
        axes.set_ylim(bottom=0)
    axes.set_xlabel('step')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25)
    with matplotlib.rc_context({'svg.hashsalt': metric}):
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', metadata={'Date': None})
    svg = buffer.getvalue()
    return svg[svg.index('<svg') :]


def save_picture(image: Image.Image, path: Path) -> None:
    """Writes a PNG, replacing an old one as a whole."""
    write_whole(path, lambda partial: image.save(partial, 'PNG'))
