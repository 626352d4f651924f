"""The pictures of a run: views.png, thumbnails, and the sheets of neighbours and of the map."""

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

# Rows of views.png.
_ROWS = 8
# Pixels around the cells of views.png, and above them for the headings.
_VIEWS_GAP, _VIEWS_HEADER = 6, 16

# Pixels between the cells of the neighbours' sheet, and of a cell's border.
_SHEET_GAP, _SHEET_BORDER = 4, 3
_FRAMES = {True: '#2b8a57', False: '#c2452d', None: 'white'}

# Pixels of a cell of the map, its border and the room between two cells.
CELL, BORDER, _GAP = 44, 3, 2
# Labels with a colour of their own; the rarest ones share a grey.
_MOST_COLOURS = 20
# For up to ten labels: colours that are easily told apart (Tableau 10).
_TEN = (
    *('#4e79a7', '#f28e2b', '#e15759', '#76b7b2', '#59a14f'),
    *('#edc948', '#b07aa1', '#ff9da7', '#9c755f', '#bab0ac'),
)
_GREY = '#9aa4ae'


class Thumbnail(NamedTuple):
    """A small picture with a caption.

    Attributes:
      picture: of any size.
      caption: below it.
      same: whether its label is the query's; None if that is not known.
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
      names: each label with its colour, the most frequent first.
    """

    of_example: list[str]
    names: list[tuple[str, str]]


def draw_views(run: Run, workdir: Path) -> list[BadFile]:
    """Writes views.png: for the first examples of the run, the original(s), view 1 and view 2.

    There are two originals where the views are made from two pictures.

    Args:
      run: to show.
      workdir: of the run.

    Returns:
      The files that could not be read; as in training, other pictures are in their place.
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
    """Positions of the stream to show: the first of each label, then the next ones."""
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
    """A grid of pictures with a heading over each column.

    Args:
      rows: pictures of any size, uint8 [H, W, 3], one for each column.
      columns: the headings.
      side: of each cell, pixels; pictures are scaled to fit, never cropped.
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
    """A picture, uint8 [H, W, 3], scaled so that its longer side is `side` pixels."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Enlarged pixels stay sharp: what the network sees is what is shown.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return Image.fromarray(np.ascontiguousarray(picture)).resize(size, method)


def save_picture(image: Image.Image, path: Path) -> None:
    """Writes a PNG, replacing an old one as a whole."""
    write_whole(path, lambda partial: image.save(partial, 'PNG'))


def neighbours_picture(rows: Sequence[Row], side: int) -> Image.Image:
    """Queries and what was found for them as one picture, a row for each query.

    Args:
      rows: the query comes first.
      side: of each cell, pixels; thumbnails must fit in.
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
    """A cell of a square grid for each place: near to it, and no two places in one cell.

    The grid has about two cells per place, so that groups and the gaps between them can be seen.
    Each axis spans the 2 % to 98 % quantiles; places outside go to the edge, or one outlier would
    push all others together. Greedy: the pairs of place and cell are taken by their distance, the
    nearest first.

    Args:
      places: float [N, 2], x to the right and y up; finite, N at least 1.

    Returns:
      Rows (from the top) and columns, int [N, 2], and the number of cells per side.
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
    """The map: each thumbnail in the cell of its place.

    Args:
      thumbnails: N pictures of any size; cropped to a square in the middle.
      places: float [N, 2].
      colours: of their borders; None: no borders.
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
    """A colour for each label that occurs.

    Args:
      labels: int [N].
      names: of all labels, by number.
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
    """A hue of `of` evenly spaced ones; neighbours in the list are dark and light in turn."""
    red, green, blue = colorsys.hls_to_rgb(number / of, (0.42, 0.6)[number % 2], 0.75)
    return f'#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}'


def _square(picture: Image.Image, side: int) -> Image.Image:
    """The middle of a picture, `side` x `side`."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    method = Image.Resampling.NEAREST if edge < side else Image.Resampling.BICUBIC
    return picture.resize((side, side), method, (left, top, left + edge, top + edge))
