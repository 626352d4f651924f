"""Draws docs/images/house.svg, which part of byol_jax imports which, from the imports themselves.

Run it when tests/test_docs.py says that the drawing is out of date: python docs/site/house.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / 'byol_jax'
DRAWING = ROOT / 'docs' / 'images' / 'house.svg'

# From the top down, with what each is for.
PARTS = {
    'app': 'flags, modes, the loop, hooks, pages',
    'evaluation': 'features, protocols, monitors',
    'interop': 'encoders in and out',
    'training': 'state, step, optimizers',
    'methods': 'what is learned',
    'input': 'order, batches, workers, device feed',
    'models': 'networks, heads, the tap',
    'views': 'operations, and how they are drawn',
    'sources': 'where pictures come from',
    'settings': 'typed, checked config sections',
    'names': 'one rule for every name',
    'files': 'writing whole files or none',
    'errors': 'messages for people',
    'lazy': 'public names, imported when used',
}
LIBRARIES = ('jax', 'flax', 'optax', 'tensorflow', 'orbax', 'sklearn', 'cv2', 'PIL')
ROW, COLUMN, LEFT, TOP = 44, 46, 330, 116


def imports(part: str) -> set[str]:
    """The parts and libraries that the files of a part import, anywhere in them."""
    folder = PACKAGE / part
    files = folder.rglob('*.py') if folder.is_dir() else [PACKAGE / f'{part}.py']
    found: set[str] = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f'{node.module}.{alias.name}' for alias in node.names]
            for name in names:
                first, *rest = name.split('.')
                found.add(rest[0] if first == 'byol_jax' and rest else first)
    return found - {part}


def draw() -> str:
    """The drawing as SVG: a row a part, a dot for each part or library that it imports."""
    parts = [part for part in PARTS if (PACKAGE / part).is_dir() or _file(part).is_file()]
    columns = [*parts[1:], *LIBRARIES]
    places = [
        LEFT + i * COLUMN + (20 if name in LIBRARIES else 0) for i, name in enumerate(columns)
    ]
    width, height = places[-1] + COLUMN, TOP + len(parts) * ROW + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="15">',
        '<title>What each part of byol_jax imports</title>',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        f'<text x="16" y="{TOP - 66}" font-size="20" font-weight="600">byol_jax</text>',
        f'<text x="16" y="{TOP - 42}" fill="#5b6472">a dot: the part on the left imports</text>',
        f'<text x="16" y="{TOP - 22}" fill="#5b6472">what the column names</text>',
    ]
    for x, name in zip(places, columns, strict=True):
        ink = '#8a4b08' if name in LIBRARIES else '#1f3a8a'
        lines.append(
            f'<text transform="translate({x + 5} {TOP - 12}) rotate(-55)" fill="{ink}">'
            f'{name}</text>'
        )
        lines.append(f'<path d="M{x} {TOP}V{height - 16}" stroke="#e6e9ef"/>')
    for row, part in enumerate(parts):
        y = TOP + row * ROW
        name = f'{part}/' if (PACKAGE / part).is_dir() else f'{part}.py'
        lines += [
            f'<rect x="12" y="{y + 3}" width="{LEFT - 40}" height="{ROW - 6}" rx="5" '
            'fill="#eef2fb" stroke="#b8c4e0"/>',
            f'<text x="22" y="{y + 19}" font-weight="600" fill="#1f3a8a">{name}</text>',
            f'<text x="22" y="{y + 35}" font-size="13" fill="#3a4252">{PARTS[part]}</text>',
        ]
        used = imports(part)
        for x, column in zip(places, columns, strict=True):
            if column in used:
                ink = '#c2660a' if column in LIBRARIES else '#2f55c8'
                lines.append(f'<circle cx="{x}" cy="{y + ROW // 2}" r="7" fill="{ink}"/>')
    return '\n'.join([*lines, '</svg>', ''])


def _file(part: str) -> Path:
    return PACKAGE / f'{part}.py'


if __name__ == '__main__':
    DRAWING.write_text(draw())
    print(DRAWING)
