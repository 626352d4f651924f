"""The pictures of a run: views.png, thumbnails, the sheet of neighbours and the map."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from byol_jax.app.build import Run
from byol_jax.files import write_whole
from byol_jax.input.feed import shown_views
from byol_jax.input.stream import Stream
from byol_jax.sources.bad_files import BadFile

# Number of rows of views.png.
_ROWS = 8
# Pixels between the cells of views.png, and above them for the headings.
_VIEWS_GAP, _VIEWS_HEADER = 6, 16

# The neighbours' sheet: pixels between cells, width of a cell's border, and its colour by whether
# the label is that of the query (None: not known).
_SHEET_GAP, _SHEET_BORDER = 4, 3
_FRAMES = {True: '#2b8a57', False: '#c2452d', None: 'white'}

# The map: side of a cell, width of its border and space between two cells, in pixels.
CELL, BORDER, _GAP = 44, 3, 2
# Number of labels that get a colour; the rarest labels beyond that share a grey.
_MOST_COLOURS = 20
# Colours for up to ten labels, easily told apart (Tableau 10).
_TEN = (
    *('#4e79a7', '#f28e2b', '#e15759', '#76b7b2', '#59a14f'),
    *('#edc948', '#b07aa1', '#ff9da7', '#9c755f', '#bab0ac'),
)
_GREY = '#9aa4ae'


class Thumbnail(NamedTuple):
    """A small picture with a caption.

    Attributes:
      picture: the picture, of any size.
      caption: text below it.
      same: whether its label is that of the query; None if not known.
    """

    picture: Image.Image
    caption: str
    same: bool | None = None


# A query and the pictures found for it.
Row = tuple[Thumbnail, Sequence[Thumbnail]]


class Legend(NamedTuple):
    """Colours of labels.

    Attributes:
      of_example: the colour of each example, '#rrggbb'.
      names: (label, colour), the most frequent label first.
    """

    of_example: list[str]
    names: list[tuple[str, str]]


def draw_views(run: Run, workdir: Path) -> list[BadFile]:
    """Writes views.png: the original, view 1 and view 2 of the run's first examples.

    There are two originals if the views are made from two pictures.

    Args:
      run: the run.
      workdir: folder to write views.png to.

    Returns:
      The files that could not be read. As in training, other pictures are shown instead.
    """
    stream = Stream(run.data.train, run.views, run.config.seed)
    positions = _first_of_each_label(stream)
    titles = ['original']
    if any(first != second for first, second in map(stream.pictures, positions)):
        keys = tuple(run.config.data.pair_keys)
        titles = [f'original {n}' for n in (keys if keys[0] != keys[1] else (1, 2))]
    loaded = [stream.load(position) for position in positions]
    bad = [file for each in loaded for file in each.bad]
    pictures = [each.pictures for each in loaded]
    shown = shown_views(stream, positions, pictures, run.config.views.on)
    rows = [
        (*originals[: len(titles)], *views)
        for originals, views in zip(pictures, shown, strict=True)
    ]
    side = min(224, max(96, run.config.views.image_size))
    save_picture(views_picture(rows, (*titles, 'view 1', 'view 2'), side), workdir / 'views.png')
    return list(dict.fromkeys(bad))


def _first_of_each_label(stream: Stream) -> list[int]:
    """Positions in the stream to show: the first of each label, then the next ones."""
    source = stream.source
    labels = source.labels if source.labels_at_hand else None
    positions = list(range(min(len(source), 64 * _ROWS)))
    if labels is not None:
        seen: set[int] = set()
        first = []
        for position in positions:
            label = int(labels[stream.example(position)[1]])
            if label not in seen:
                seen.add(label)
                first.append(position)
        positions = first + [p for p in positions if p not in first]
    return positions[:_ROWS]


def views_picture(
    rows: Sequence[tuple[np.ndarray, ...]], columns: Sequence[str], side: int
) -> Image.Image:
    """Draws a grid of pictures with a heading over each column.

    Args:
      rows: for each row a picture per column, uint8 [H, W, 3] of any size.
      columns: headings of the columns.
      side: side of a cell in pixels; pictures are scaled to fit, never cropped.
    """
    width = _VIEWS_GAP + len(columns) * (side + _VIEWS_GAP)
    sheet = Image.new('RGB', (width, _VIEWS_HEADER + len(rows) * (side + _VIEWS_GAP)), 'white')
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((_VIEWS_GAP + column * (side + _VIEWS_GAP), 2), title, fill='black')
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            cell = fit(picture, side)
            left = _VIEWS_GAP + column * (side + _VIEWS_GAP) + (side - cell.width) // 2
            top = _VIEWS_HEADER + row * (side + _VIEWS_GAP) + (side - cell.height) // 2
            sheet.paste(cell, (left, top))
    return sheet


def fit(picture: np.ndarray, side: int) -> Image.Image:
    """Scales a picture, uint8 [H, W, 3], so that its longer side has `side` pixels."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Enlarge without smoothing, to show the very pixels that the network gets.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return Image.fromarray(np.ascontiguousarray(picture)).resize(size, method)


def save_picture(image: Image.Image, path: Path) -> None:
    """Writes a PNG, replacing an existing file."""
    write_whole(path, lambda partial: image.save(partial, 'PNG'))


def neighbours_picture(rows: Sequence[Row], side: int) -> Image.Image:
    """Draws queries and their neighbours as one picture, a row per query.

    Args:
      rows: queries with their neighbours.
      side: side of a cell in pixels; thumbnails must not be larger.
    """
    columns = 1 + max(len(found) for _, found in rows)
    frame_side = side + 2 * _SHEET_BORDER
    cell = frame_side + _SHEET_GAP
    sheet = Image.new('RGB', (_SHEET_GAP + columns * cell, _SHEET_GAP + len(rows) * cell), 'white')
    for row, (query, found) in enumerate(rows):
        for column, thumbnail in enumerate([query, *found]):
            left, top = _SHEET_GAP + column * cell, _SHEET_GAP + row * cell
            frame = Image.new('RGB', (frame_side, frame_side), _FRAMES[thumbnail.same])
            picture = thumbnail.picture
            frame.paste(
                picture,
                ((frame.width - picture.width) // 2, (frame.height - picture.height) // 2),
            )
            sheet.paste(frame, (left, top))
    return sheet


def grid_cells(places: np.ndarray) -> tuple[np.ndarray, int]:
    """Assigns each place a cell of a square grid near it; no cell is used twice.

    The grid has about two cells per place, so that groups and the gaps between them are visible.
    Each axis spans the 2 % to 98 % quantiles, and places outside go to the edge; otherwise one
    outlier would push all others together. The assignment is greedy: of all pairs of place and
    cell the nearest are taken first.

    Args:
      places: float [N, 2], x to the right and y up; finite, N at least 1.

    Returns:
      The row (from the top) and column of each place, int [N, 2], and the cells per side.
    """
    count = len(places)
    side = max(1, math.ceil(math.sqrt(2 * count)))
    low, high = np.quantile(places, [0.02, 0.98], axis=0)
    spread = np.where(high > low, high - low, 1)
    scaled = np.clip((places - low) / spread, 0, 1) * (side - 1)
    wanted = np.stack([side - 1 - scaled[:, 1], scaled[:, 0]], axis=1)
    cells = np.stack(np.divmod(np.arange(side**2), side), axis=1)
    distances = np.sum((wanted[:, None] - cells) ** 2, axis=-1)
    chosen: dict[int, int] = {}
    taken: set[int] = set()
    for pair in np.argsort(distances, axis=None, kind='stable').tolist():
        place, cell = divmod(pair, side**2)
        if place not in chosen and cell not in taken:
            chosen[place] = cell
            taken.add(cell)
            if len(chosen) == count:
                break
    return cells[[chosen[place] for place in range(count)]], side


def map_picture(
    thumbnails: Sequence[Image.Image], places: np.ndarray, colours: Sequence[str] | None = None
) -> Image.Image:
    """Draws the map: each thumbnail in the cell of its place.

    Args:
      thumbnails: N pictures of any size, cropped to the square in their middle.
      places: float [N, 2], see `grid_cells`.
      colours: colours of the borders, '#rrggbb'; None for no borders.
    """
    cells, side = grid_cells(places)
    pitch = CELL + _GAP
    sheet = Image.new('RGB', (side * pitch + _GAP, side * pitch + _GAP), '#f3f6f9')
    inner = CELL - 2 * BORDER if colours else CELL
    for number, (thumbnail, (row, column)) in enumerate(zip(thumbnails, cells, strict=True)):
        tile = Image.new('RGB', (CELL, CELL), colours[number] if colours else 'white')
        tile.paste(_square(thumbnail, inner), ((CELL - inner) // 2, (CELL - inner) // 2))
        sheet.paste(tile, (_GAP + int(column) * pitch, _GAP + int(row) * pitch))
    return sheet


def legend(labels: np.ndarray, names: Sequence[str]) -> Legend:
    """Chooses a colour for each label that occurs.

    Args:
      labels: int [N], labels of the examples.
      names: the name of every label.
    """
    found, counts = np.unique(labels, return_counts=True)
    order = found[np.argsort(-counts, kind='stable')]
    many = len(order) > _MOST_COLOURS
    own = order[: _MOST_COLOURS - 1] if many else order
    drawn: Sequence[str] = (
        _TEN if len(own) <= len(_TEN) else [_hue(n, len(own)) for n in range(len(own))]
    )
    colours = {int(label): colour for label, colour in zip(own, drawn, strict=False)}
    listed = [(str(names[label]), colour) for label, colour in colours.items()]
    if many:
        listed.append((f'{len(order) - len(own):,} other labels', _GREY))
    return Legend([colours.get(int(label), _GREY) for label in labels], listed)


def _hue(number: int, of: int) -> str:
    """Hue `number` of `of` evenly spaced ones, alternately dark and light."""
    red, green, blue = colorsys.hls_to_rgb(number / of, (0.42, 0.6)[number % 2], 0.75)
    return f'#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}'


def _square(picture: Image.Image, side: int) -> Image.Image:
    """The square in the middle of a picture, scaled to `side` pixels."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    method = Image.Resampling.NEAREST if edge < side else Image.Resampling.BICUBIC
    return picture.resize((side, side), method, (left, top, left + edge, top + edge))
