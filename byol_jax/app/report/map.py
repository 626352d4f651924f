"""The map of the embeddings: pictures laid out by their features, so that none hides another."""

from __future__ import annotations

import colorsys
import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from byol_jax.app.report.pictures import data_uri

# Pixels of a cell, its border and the room between two cells.
CELL, BORDER, _GAP = 44, 3, 2
# Labels with a colour of their own; the rest, the rarest, share a grey.
_MOST_COLOURS = 20
# Of few labels colours that are easily told apart (Tableau 10).
_TEN = (
    *('#4e79a7', '#f28e2b', '#e15759', '#76b7b2', '#59a14f'),
    *('#edc948', '#b07aa1', '#ff9da7', '#9c755f', '#bab0ac'),
)
_GREY = '#9aa4ae'


class Map(NamedTuple):
    """A picture of all thumbnails; `title` says how they were laid out, `note` what to know.

    `name` is one word, for programs.
    """

    name: str
    title: str
    note: str
    picture: Image.Image


class Legend(NamedTuple):
    """Colours of labels.

    Attributes:
      of_example: the colour of each example, '#rrggbb'.
      names: each label with its colour, the most frequent first.
    """

    of_example: list[str]
    names: list[tuple[str, str]]


def grid_cells(places: np.ndarray) -> tuple[np.ndarray, int]:
    """A cell of a square grid for each place: near to it, and no two in one.

    The grid has about two cells a place, so that groups and the gaps between them can be seen. Each
    axis is stretched until all but its outermost 2 % on either side fit in; those go to the edge,
    or one far away would push all others together. Of all pairs of a place and a cell, the nearest
    is settled first.

    Args:
      places: float [N, 2], x to the right and y up; finite, N at least 1.

    Returns:
      Rows (from the top) and columns, int [N, 2], and the number of cells a side.
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
    """All thumbnails where their places are.

    Args:
      thumbnails: N pictures of any size; cut to a square in the middle.
      places: float [N, 2].
      colours: of their borders; None: there are no borders.
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
      labels: int [N]. names: of all labels.
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


def map_section(maps: Sequence[Map], colours: Legend | None, missing: str = '') -> str:
    """The maps as HTML.

    Args:
      maps: to show. colours: of the borders. missing: a line on what could not be made, or ''.
    """
    parts = ['<h2>Map of the embeddings</h2>']
    if colours is not None:
        chips = ''.join(
            f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
            for name, colour in colours.names
        )
        parts.append(f'<p class="legend">{chips}</p>')
    for each in maps:
        parts.append(
            f'<h3>{html.escape(each.title)}</h3><p class="note">{html.escape(each.note)}</p>'
            f'<div class="scroll"><img class="map" src="{data_uri(each.picture)}" '
            f'alt="{html.escape(each.title)}"></div>'
        )
    if missing:
        parts.append(f'<p class="note">{html.escape(missing)}</p>')
    return ''.join(parts)


def _hue(number: int, of: int) -> str:
    """Colours evenly round the circle, neighbours in the list dark and light in turn."""
    red, green, blue = colorsys.hls_to_rgb(number / of, (0.42, 0.6)[number % 2], 0.75)
    return f'#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}'


def _square(picture: Image.Image, side: int) -> Image.Image:
    """The middle of a picture, `side` x `side`."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    method = Image.Resampling.NEAREST if edge < side else Image.Resampling.BICUBIC
    return picture.resize((side, side), method, (left, top, left + edge, top + edge))
