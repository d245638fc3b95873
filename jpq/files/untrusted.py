"""Text that others wrote, read as data: bounded, strict, and nothing in it is executed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jpq.types import JpqError

MOST = 2**28  # bytes of a text file, unless a reader says otherwise: the masks of a net of a thousand million weights


def check_file(path: Path, what: str = "file") -> int:
    """The size of a regular file in bytes. Raises JpqError for anything else: pipes and devices may never end."""
    try:
        there, plain = path.exists(), path.is_file()
        size = path.stat().st_size if plain else 0
    except (OSError, ValueError) as error:  # no right to look; a name with a null byte
        raise JpqError(f"Cannot read the {what} {path}: {error}.") from error
    if not plain:
        raise JpqError(f"Cannot read the {what} {path}: {'it is no plain file' if there else 'there is none'}.")
    return size


def read_text(path: Path, what: str = "file", most: int = MOST) -> str:
    """What a UTF-8 file holds. Raises JpqError where it cannot be read, is no text, or is larger than `most` bytes."""
    if check_file(path, what) > most:
        raise JpqError(f"The {what} {path} is larger than {most / 2**20:g} MB: jpq wrote none of that size.")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise JpqError(f"Cannot read the {what} {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise JpqError(f"Cannot read the {what} {path}: it is no text (byte {error.start} is not UTF-8).") from error


def parse_json(text: str, source: str) -> Any:
    """The tree in JSON text. Raises JpqError for what is no JSON, and for keys twice, deep nests, NaN and infinity."""
    try:
        return parsed(text)
    except ValueError as error:
        raise JpqError(f"{source} is not JSON that jpq wrote ({error}).") from error


def parsed(text: str) -> Any:
    """The same; raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("it nests deeper than anything that jpq writes") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name[:40]!r} twice")
            seen.add(name)
    return found


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return float(text)


def names_code(name: str) -> bool:
    """Whether the name of a model or data set is module:callable, which imports and runs that code."""
    kind, colon, _ = name.partition(":")
    return bool(colon) and kind not in ("torchvision", "folder")


def check_no_code(what: str, name: str, source: Path | str, way_out: str) -> None:
    """Raise JpqError where a file names code to run: only who works with jpq may do that."""
    if names_code(name):
        raise JpqError(
            f"{source} names code to run for its {what}, {name[:80]}, and files are not trusted with that. "
            f"If you do, {way_out}."
        )


def as_int(value: Any, low: int, high: int) -> int:
    """A whole number within bounds. Raises ValueError for anything else: true, 1.5, "3"."""
    if type(value) is not int or not low <= value <= high:
        plain = isinstance(value, str | int | float | None)  # others may nest, and take ever to spell out
        seen = repr(str(value)[:40]) if plain else f"a {type(value).__name__}"
        raise ValueError(f"{seen} where a whole number from {low} to {high} belongs")
    return value


def as_bool(value: Any) -> bool:
    """True or false. Raises ValueError for anything else."""
    if type(value) is not bool:
        raise ValueError(f"{str(value)[:40]!r} where true or false belongs")
    return value


def as_str(value: Any, most: int = 1000) -> str:
    """A string that a name or a short text may be. Raises ValueError for anything else."""
    if type(value) is not str or len(value) > most:
        raise ValueError(f"{str(value)[:40]!r} where text of at most {most} characters belongs")
    return value


def as_dict(value: Any) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else."""
    if type(value) is not dict:
        raise ValueError(f"{str(value)[:40]!r} where a table belongs")
    return value


def as_list(value: Any) -> list[Any]:
    """A JSON array. Raises ValueError for anything else."""
    if type(value) is not list:
        raise ValueError(f"{str(value)[:40]!r} where a list belongs")
    return value
