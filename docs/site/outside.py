"""MkDocs hook: files outside of docs/ that a page links to become pages too, and the config's keys
become a table.

Links in docs/ are those of the repository, so that they also work where its files are read as they
are. CONTRIBUTING.md, CHANGELOG.md and benchmarks/RESULTS.md are shown as they stand; code is shown
as code.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / 'docs'
# A link to a file: what stands before it, the file, and the place in it.
_LINK = re.compile(r'(\]\(|<img [^>]*src=")([^)#"\s:]+)(#[^)"\s]*)?(?=[)"])')
_KEYS = '<!-- every key -->'
_LANGUAGES = {'.py': 'python', '.sh': 'bash', '.ipynb': 'json', '.toml': 'toml'}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of all files outside of docs/ that can be reached by links."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    waiting += [ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md', ROOT / 'benchmarks' / 'RESULTS.md']
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        if not path.is_relative_to(DOCS):
            shown = InclusionLevel.INCLUDED if path.suffix == '.md' else InclusionLevel.NOT_IN_NAV
            uri, content = _uri(path), _content(path)
            files.append(File.generated(config, uri, content=content, inclusion=shown))
        if path.suffix == '.md':
            links = _LINK.finditer(path.read_text())
            waiting += [_target(path, link[2]) for link in links]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links at where the files stand in the site."""
    source = _source(page.file.src_uri)
    if source.suffix != '.md':
        return markdown
    if _KEYS in markdown:
        markdown = markdown.replace(_KEYS, _table_of_keys())

    def moved(link: re.Match[str]) -> str:
        path = _target(source, link[2])
        if not path.is_file():
            return link[0]  # MkDocs warns.
        start = posixpath.dirname(page.file.src_uri) or '.'
        return f'{link[1]}{posixpath.relpath(_uri(path), start)}{link[3] or ""}'

    return _LINK.sub(moved, markdown)


def _target(source: Path, link: str) -> Path:
    return Path(os.path.normpath(source.parent / link))


def _uri(path: Path) -> str:
    """Where a file of the repository stands in the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    return name if path.suffix in ('.md', '.png', '.svg') else f'{name}.md'


def _source(uri: str) -> Path:
    """The file of the repository that a page of the site shows."""
    if (DOCS / uri).is_file():
        return DOCS / uri
    return ROOT / uri if (ROOT / uri).is_file() else ROOT / uri.removesuffix('.md')


def _content(path: Path) -> str | bytes:
    if path.suffix == '.md':
        return path.read_text()
    if path.suffix in ('.png', '.svg'):
        return path.read_bytes()
    name = path.relative_to(ROOT).as_posix()
    return f'# {name}\n\n````{_LANGUAGES.get(path.suffix, "text")}\n{path.read_text()}\n````\n'


def _table_of_keys() -> str:
    """One table a section: every key of configs/default.py, its default, the comment beside it."""
    sys.path.insert(0, str(ROOT))
    from configs import default

    config = default.get_config()
    comments = {}
    for line in (ROOT / 'configs' / 'default.py').read_text().splitlines():
        match = re.match(r'    (\w+)\.([\w.]+) = .*?  # (.*)', line)
        if match:
            section = {'config': '', 'view': 'views.view1.'}.get(match[1], f'{match[1]}.')
            comments[section + match[2]] = match[3]
    rows: dict[str, list[str]] = {}
    for key, value in _flat(config):
        if key.startswith('views.view2.'):
            continue
        shown = f'`{value!r}`'
        if key.startswith('views.view1.'):
            other = config.views.view2[key.rpartition('.')[2]]
            shown += '' if other == value else f', `view2`: `{other!r}`'
        section = key.rpartition('.')[0]
        comment = html.escape(comments.get(key, '')).replace('|', '\\|')
        rows.setdefault(section, []).append(f'| `{key}` | {shown} | {comment} |')
    return '\n\n'.join(
        (f'### {section}\n\n' if section else '')
        + '| key | default | |\n|---|---|---|\n'
        + '\n'.join(rows[section])
        for section in rows
    )


def _flat(config: Any, prefix: str = '') -> list[tuple[str, Any]]:
    """Keys, dotted, and values; sections after the keys that stand beside them."""
    keys = sorted(config, key=lambda key: hasattr(config[key], 'keys'))
    found: list[tuple[str, Any]] = []
    for key in keys:
        value = config[key]
        if hasattr(value, 'keys') and len(value):
            found += _flat(value, f'{prefix}{key}.')
        else:
            found.append((prefix + key, dict(value) if hasattr(value, 'keys') else value))
    return found
