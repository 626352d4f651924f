"""Public names of a package that are imported when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(
    package: str, modules: Mapping[str, Sequence[str]], packages: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes the `__getattr__`, `__dir__` and `__all__` of a package (PEP 562).

    Args:
      package: the `__name__` of the package.
      modules: the public names of each module; the modules are relative to the package.
      packages: modules of the package that are public themselves.

    Returns:
      (`__getattr__`, `__dir__`, `__all__`).
    """
    where = {name: module for module, names in modules.items() for name in names}
    public = sorted([*where, *packages])

    def get(name: str) -> Any:
        if name in where:
            return getattr(importlib.import_module(f'{package}.{where[name]}'), name)
        if name in packages:
            return importlib.import_module(f'{package}.{name}')
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return get, lambda: public, public
