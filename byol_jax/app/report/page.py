"""Renders templates/ to HTML pages, each a single file that loads no other."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from byol_jax.errors import printable
from byol_jax.files import write_whole


def render(template: str, **values: Any) -> str:
    """Renders a template; values are escaped unless they are `Markup`.

    Args:
      template: name of a file in templates/.
      **values: values of the template's variables. A missing one is an error, not an empty string.
    """
    return _TEMPLATES.get_template(template).render(values)


def page_bytes(template: str, **values: Any) -> bytes:
    """A template filled in, as UTF-8; what is none (in the name of a file) is escaped.

    Args:
      template: its file in templates/.
      values: what it names.
    """
    return printable(render(template, **values), keep='\n').encode()


def write_page(path: Path, template: str, **values: Any) -> None:
    """Renders a template and writes the page, replacing an existing file.

    Control characters, and what UTF-8 cannot encode (both occur in names of files), are escaped.

    Args:
      path: file to write.
      template: name of a file in templates/.
      **values: values of the template's variables.

    Raises:
      OSError: it cannot be written; an older file of that name is kept.
    """
    encoded = page_bytes(template, **values)
    write_whole(path, lambda partial: partial.write_bytes(encoded))


def data_uri(image: Image.Image) -> str:
    """A picture as a data: URI of a JPEG, which takes a tenth of the size of a PNG."""
    buffer = io.BytesIO()
    image.convert('RGB').save(buffer, 'JPEG', quality=85, optimize=True)
    return 'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode()


def breakable(name: str) -> Markup:
    """A name in which lines may break after '_', '.' and '/'."""
    return Markup(re.sub('([_./])', r'\1<wbr>', str(escape(name))))


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader('byol_jax.app.report'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters['breakable'] = breakable
