"""Pages: a template of templates/ filled in, and written as one HTML file that loads nothing."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from byol_jax.files import write_whole


def render(template: str, **values: Any) -> str:
    """A template filled in; values are escaped unless they are `Markup`.

    Args:
      template: its file in templates/.
      values: what it names. A name that is not given is an error, not an empty string.
    """
    return _TEMPLATES.get_template(template).render(values)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Writes a page as a whole; characters that are no UTF-8 (in the name of a file) are escaped.

    Args:
      path: of the page.
      template: its file in templates/.
      values: what it names.

    Raises:
      OSError: it could not be written; what was there still is.
    """
    encoded = render(template, **values).encode(errors='backslashreplace')
    write_whole(path, lambda partial: partial.write_bytes(encoded))


def data_uri(image: Image.Image) -> str:
    """A picture as a data: address, as JPEG (a tenth of the size of a photograph's PNG)."""
    buffer = io.BytesIO()
    image.convert('RGB').save(buffer, 'JPEG', quality=85, optimize=True)
    return 'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode()


def breakable(name: str) -> Markup:
    """A name that may be broken into lines after '_', '.' and '/'."""
    return Markup(re.sub('([_./])', r'\1<wbr>', str(escape(name))))


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader('byol_jax.app.report'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters['breakable'] = breakable
