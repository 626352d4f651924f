"""The comparison in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from byol_jax.app.report.compare_tables import Row, Table

# Letters of a cell or heading, at most: what is longer is cut in the middle, and whole on the page.
_CELL, _HEADING = 40, 40
_GAP = '  '


def text_of(names: Sequence[str], tables: Sequence[Table], width: int) -> str:
    """Tables as text.

    Args:
      names: of the runs, the columns.
      tables: to write.
      width: letters a line; runs that do not fit in it follow below. One always stands.
    """
    parts = []
    for table in tables:
        lines = [table.title.upper()]
        if table.rows:
            lines += _blocks(names, table.rows, width)
        if table.note:
            lines.append(table.note)
        parts.append('\n'.join(lines))
    return '\n\n'.join(parts)


def _blocks(names: Sequence[str], rows: Sequence[Row], width: int) -> list[str]:
    headings = [_cut(row.heading, _HEADING) for row in rows]
    first = max(map(len, headings))
    columns = [
        [_cut(name, _CELL), *(_cut(row.cells[i], _CELL) for row in rows)]
        for i, name in enumerate(names)
    ]
    lines: list[str] = []
    while columns:
        count, used = 0, first
        for column in columns:
            used += len(_GAP) + max(map(len, column))
            if count and used > width:
                break
            count += 1
        shown, columns = columns[:count], columns[count:]
        widths = [max(map(len, column)) for column in shown]
        if lines:
            lines.append('')
        for number, heading in enumerate(['', *headings]):
            cells = [
                f'{column[number]:>{each}}' for column, each in zip(shown, widths, strict=True)
            ]
            lines.append(_GAP.join([f'{heading:<{first}}', *cells]).rstrip())
    return lines


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head = (most - 3) // 2
    return f'{text[:head]}...{text[len(text) - (most - 3 - head) :]}'
