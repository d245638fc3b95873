"""Lazy imports of a package's public names and modules, so that `jpq --help` does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names are imported at their first use (PEP 562).

    Args:
        package: `__name__` of the package.
        homes: public name -> module of the package that defines it, or "module:name" where the name differs there.

    Modules of the package are attributes too. Anything else raises AttributeError.
    """

    def get(name: str) -> Any:
        if name in homes:
            module, _, attribute = homes[name].partition(":")
            return getattr(import_module(f"{package}.{module}"), attribute or name)
        if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    def names() -> list[str]:
        return sorted(homes)

    return get, names
