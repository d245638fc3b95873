"""A config as a TOML file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from jpq.config import Config, to_tree
from jpq.types import JpqError, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def from_tree(tree: Mapping[str, Any], source: str) -> Config:
    """The config that these tables describe; what they leave out keeps its default."""
    config = Config()
    known = {f.name for f in fields(config)}
    for section, table in tree.items():
        if section not in known:
            raise unknown(f"section in {source}", section, known)
        if not isinstance(table, Mapping):
            raise JpqError(f"{source}: '{section}' must be a table of settings, such as [{section}].")
        part = getattr(config, section)
        types = {f.name: f.type for f in fields(part)}
        values = {}
        for key, value in table.items():
            if key not in types:
                raise unknown(f"setting in [{section}] of {source}", key, types)
            values[key] = _typed(value, str(types[key]), f"{source}: {section}.{key}")
        config = replace(config, **{section: replace(part, **values)})
    return config


def _typed(value: Any, kind: str, where: str) -> Any:
    """A TOML value as the field's type, or an error that says what was expected."""
    if kind.startswith("Path") and isinstance(value, str):
        return Path(value)
    if kind == "tuple[int, int]" and isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value):
        return tuple(value)
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    plain: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}
    want = plain.get(kind.split(" | ")[0])
    if want is not None and isinstance(value, want) and (kind == "bool") == isinstance(value, bool):
        return float(value) if kind.startswith("float") else value
    raise JpqError(f"{where} is {value!r}; expected {kind}.")


def read(path: Path) -> Config:
    """The config in a TOML file."""
    try:
        return from_tree(tomllib.loads(path.read_text()), str(path))
    except OSError as error:
        raise JpqError(f"Cannot read the config file {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JpqError(f"{path} is not valid TOML: {error}.") from error


def write(config: Config, path: Path) -> None:
    """Save the config as TOML."""
    path.write_text(tomli_w.dumps(to_tree(config)))
