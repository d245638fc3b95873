"""Strict readers for files that others wrote: bounded text, JSON, and typed values; nothing is executed.

The getters `as_int`, `as_float`, `as_bool`, `as_str`, `as_dict` and `as_list` take values of a parsed JSON or TOML
tree. They raise ValueError, whose text says what was found and what belongs there; a reader names its file.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from jpq.files.paths import expand_home, is_windows_path
from jpq.types import JpqError

LARGEST = 2**28  # default limit of a text file in bytes; enough for masks of 10^9 weights


def check_file(path: str | Path, what: str = "file") -> int:
    """The size of a regular file in bytes. Raises JpqError for anything else: pipes and devices may never end."""
    path = expand_home(path)
    try:
        exists, regular = path.exists(), path.is_file()
        size = path.stat().st_size if regular else 0
    except (OSError, ValueError) as error:  # no permission; a name with a null byte
        raise JpqError(f"Cannot read the {what} {path}: {error}.") from error
    if not regular:
        raise JpqError(f"Cannot read the {what} {path}: {'it is no plain file' if exists else 'there is none'}.")
    return size


def read_text(path: str | Path, what: str = "file", largest: int = LARGEST) -> str:
    """The content of a UTF-8 file. Raises JpqError for other content, and for more than `largest` bytes."""
    path = expand_home(path)
    if check_file(path, what) > largest:
        raise JpqError(f"The {what} {path} is larger than {largest / 2**20:g} MB: jpq wrote none of that size.")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise JpqError(f"Cannot read the {what} {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise JpqError(f"Cannot read the {what} {path}: it is no text (byte {error.start} is not UTF-8).") from error


def parse_json(text: str, source: str) -> Any:
    """The value of a JSON text. Raises JpqError for other text, repeated keys, deep nests, NaN and infinity."""
    try:
        return load_json(text)
    except ValueError as error:
        raise JpqError(f"{source} is not JSON that jpq wrote ({error}).") from error


def load_json(text: str) -> Any:
    """The value of a JSON text, as `parse_json`; raises ValueError in place of JpqError."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("it nests deeper than anything that jpq writes") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys: set[str] = set()
        for name, _ in pairs:
            if name in keys:
                raise ValueError(f"key {name[:40]!r} twice")
            keys.add(name)
    return tree


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return float(text)


KINDS = {  # what is named -> kinds before a colon that are no module
    "model": ("timm", "smp", "hf", "torchvision"),
    "data": ("folder", "text", "table", "sklearn", "series", "coco", "hf-dataset"),
}


def names_code(name: str, what: str = "model") -> bool:
    """Whether the name of a "model", of "data" or of a "task" is `module:callable`, which imports and runs code."""
    kind, colon, _ = name.partition(":")
    return bool(colon) and kind not in KINDS.get(what, ()) and not is_windows_path(name)


def check_no_code(what: str, name: str, source: Path | str, way_out: str) -> None:
    """Raise JpqError where a file names code to run: only the user of jpq may ask for that."""
    if names_code(name, what):
        raise JpqError(
            f"{source} names code to run for its {what}, {name[:80]}, and files are not trusted with that. "
            f"If you do, {way_out}."
        )


def as_int(value: Any, low: int, high: int) -> int:
    """A whole number in [low, high]. Raises ValueError for anything else, such as true, 1.5 and "3"."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{_shown(value)} where a whole number from {low} to {high} belongs")
    return value


def as_float(value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A number in [low, high], whole or not. Raises ValueError for anything else, such as NaN, true and "3"."""
    number = math.nan
    if type(value) in (int, float):
        with suppress(OverflowError):
            number = float(value)
    if not low <= number <= high:
        raise ValueError(f"{_shown(value)} where a number from {low:g} to {high:g} belongs")
    return number


def as_bool(value: Any) -> bool:
    """True or false. Raises ValueError for anything else."""
    if type(value) is not bool:
        raise ValueError(f"{_shown(value)} where true or false belongs")
    return value


def as_str(value: Any, longest: int = 1000) -> str:
    """A text of at most `longest` characters. Raises ValueError for anything else."""
    if type(value) is not str or len(value) > longest:
        raise ValueError(f"{_shown(value)} where text of at most {longest} characters belongs")
    return value


def as_dict(value: Any) -> dict[str, Any]:
    """A JSON object or TOML table. Raises ValueError for anything else."""
    if type(value) is not dict:
        raise ValueError(f"{_shown(value)} where a table belongs")
    return value


def as_list(value: Any) -> list[Any]:
    """A JSON or TOML array. Raises ValueError for anything else."""
    if type(value) is not list:
        raise ValueError(f"{_shown(value)} where a list belongs")
    return value


def _shown(value: Any) -> str:
    """The beginning of a plain value; the type of another one, which may nest and take long to print."""
    plain = isinstance(value, str | int | float | None)
    return repr(str(value)[:40]) if plain else f"a {type(value).__name__}"
