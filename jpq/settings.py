"""A config as a TOML file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from jpq import foreign
from jpq.config import Config, to_tree
from jpq.files import replace_file
from jpq.types import JpqError, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
PAIRS = {"tuple[int, int]": (int,), "tuple[float, float]": (int, float), "tuple[str, str]": (str,)}
LARGEST = 2**20  # bytes of a file of settings


def from_tree(tree: Mapping[str, Any], source: str) -> Config:
    """The config that these tables describe; what they leave out keeps its default."""
    config = Config()
    known = {f.name for f in fields(config)}
    for section, table in tree.items():
        if section not in known:
            raise unknown(f"section in {source}", section, known)
        if not isinstance(table, Mapping):
            raise JpqError(f"{source}: '{section}' must be a table of settings, such as [{section}].")
        config = replace(config, **{section: filled(getattr(config, section), section, table, source)})
    return config


def filled(part: T, section: str, table: Mapping[str, Any], source: str) -> T:
    """The settings `part` with the values of one table of a file; `part` is a frozen dataclass."""
    known: Any = part
    types = {f.name: f.type for f in fields(known)}
    values = {}
    for key, value in table.items():
        if key not in types:
            raise unknown(f"setting in [{section}] of {source}", key, types)
        values[key] = _typed(value, str(types[key]), f"{source}: {section}.{key}")
    made: T = replace(known, **values)
    return made


def _typed(value: Any, kind: str, where: str) -> Any:
    """A TOML value as the field's type, or an error that says what was expected."""
    if kind.startswith("Path") and isinstance(value, str) and "\0" not in value:
        return Path(value)
    if kind in PAIRS and isinstance(value, list) and len(value) == 2 and all(_fits(v, PAIRS[kind]) for v in value):
        return tuple(value)
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    plain: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}
    want = plain.get(kind.split(" | ")[0])
    if want is not None and isinstance(value, want) and (kind == "bool") == isinstance(value, bool):
        if isinstance(value, str) or kind == "bool":
            return value
        if _number(value):
            return float(value) if kind.startswith("float") else value
    raise JpqError(f"{where} is {repr(value)[:60]}; expected {kind}.")


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether it is one of the kinds, and no number that torch cannot count with."""
    return type(value) in kinds and (type(value) is str or _number(value))


def _number(value: Any) -> bool:
    """Whether it is a number that torch can count with."""
    return type(value) is float or (type(value) is int and -(2**63) <= value < 2**63)


def read(path: Path) -> Config:
    """The config in a TOML file."""
    return from_tree(tables(path), str(path))


def tables(path: Path) -> dict[str, Any]:
    """What a TOML file holds."""
    try:
        return tomllib.loads(foreign.text_of(path, "config file", LARGEST))
    except RecursionError as error:
        raise JpqError(f"{path} nests deeper than any settings do.") from error
    except ValueError as error:  # of TOML, and of numbers with thousands of digits
        raise JpqError(f"{path} is not valid TOML: {error}.") from error


def write(config: Config, path: Path) -> None:
    """Save the config as TOML."""
    text = tomli_w.dumps(to_tree(config))
    replace_file(path, lambda part: part.write_text(text))
