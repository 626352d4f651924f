"""Nearest neighbours of a few pictures, for the report and TensorBoard."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from byol_jax.app.report.pictures import data_uri

_GAP, _BORDER = 4, 3
_COLOURS = {True: '#2b8a57', False: '#c2452d', None: 'white'}


class Thumbnail(NamedTuple):
    """A small picture with a caption; `same` says whether its label is the query's."""

    picture: Image.Image
    caption: str
    same: bool | None = None


# A query and the pictures found for it.
Row = tuple[Thumbnail, Sequence[Thumbnail]]


def neighbours_section(rows: Sequence[Row]) -> str:
    """Each query with what was found, as HTML."""
    drawn = ''.join(
        '<div class="neighbours">'
        + _thumbnail(query, 'query')
        + ''.join(_thumbnail(t, {True: 'same', False: 'other', None: ''}[t.same]) for t in found)
        + '</div>'
        for query, found in rows
    )
    labelled = any(t.same is not None for _, found in rows for t in found)
    colours = '; green for the same label, red for another' if labelled else ''
    return (
        '<h2>Nearest neighbours</h2><p class="note">First a query, with its name; then the '
        f'training pictures the trained encoder finds most alike, with their cosine{colours}.</p>'
        f'{drawn}'
    )


def neighbours_picture(rows: Sequence[Row], side: int) -> Image.Image:
    """The same as one picture: a row a query, cells of `side` pixels, the query first."""
    columns = 1 + max(len(found) for _, found in rows)
    cell = side + 2 * _BORDER + _GAP
    sheet = Image.new('RGB', (_GAP + columns * cell, _GAP + len(rows) * cell), 'white')
    for row, (query, found) in enumerate(rows):
        for column, thumbnail in enumerate([query, *found]):
            left, top = _GAP + column * cell, _GAP + row * cell
            frame = Image.new('RGB', (cell - _GAP, cell - _GAP), _COLOURS[thumbnail.same])
            picture = thumbnail.picture
            frame.paste(
                picture,
                ((frame.width - picture.width) // 2, (frame.height - picture.height) // 2),
            )
            sheet.paste(frame, (left, top))
    return sheet


def _thumbnail(thumbnail: Thumbnail, style: str) -> str:
    return (
        f'<div class="{style}"><img src="{data_uri(thumbnail.picture)}" '
        f'alt="{html.escape(thumbnail.caption)}"><br>{html.escape(thumbnail.caption)}</div>'
    )
