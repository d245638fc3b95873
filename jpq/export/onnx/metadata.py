"""Metadata of an ONNX file: how its inputs are prepared, what its outputs mean, and how it was made.

| key | value |
|---|---|
| `jpq_version`, `method` | how the file was made |
| `budget` | the targets, JSON: {"bops": "1%"} |
| `task` | such as classification |
| `input_size` | JSON: [channels, height, width], or the shape of one sample |
| `mean`, `std` | JSON lists: an input is (x - mean) / std for each channel, where bytes count as x / 255 |
| `colour_order` | RGB or grey |
| `class_names` | JSON list, by class number |

A key whose value is not known is left out. Text is stored as it is, everything else as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from jpq.export.origin import origin_of
from jpq.types import JpqError

Metadata = Mapping[str, Any]


def gather_metadata(model: nn.Module, given: Metadata | None = None) -> dict[str, str]:
    """Metadata of a model's file as text: what is noted on the model, then what the caller gives.

    Raises JpqError for values that JSON cannot hold.
    """
    origin = origin_of(model)
    known: dict[str, Any] = {"jpq_version": _version()}
    if origin is not None:
        known |= {"method": origin.plan.method, **origin.about}
    known |= given or {}
    return {str(key): _as_text(str(key), value) for key, value in known.items() if not _is_unknown(value)}


def _is_unknown(value: Any) -> bool:
    """Whether a value is None or an empty text or collection."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def _as_text(key: str, value: Any) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise JpqError(
            f"Metadata '{key}' is a {type(value).__name__} that JSON cannot hold ({error}): give text, finite numbers, "
            "lists or dicts of them."
        ) from error


def _version() -> str:
    """The version of jpq that is installed; "" where it is not."""
    try:
        return version("jpq")
    except PackageNotFoundError:
        return ""


def store_metadata(file: onnx.ModelProto, texts: Mapping[str, str]) -> None:
    """Put metadata into an ONNX model, in place; keys that it has already get the new values."""
    for entry in [p for p in file.metadata_props if p.key in texts]:
        file.metadata_props.remove(entry)
    for key, text in texts.items():
        file.metadata_props.add(key=key, value=text)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of an ONNX file: lists and dicts where the text is one in JSON, else the text, also of numbers.

    Raises JpqError for a file that is no ONNX model.
    """
    try:
        file = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf has an error of its own for every kind of damage
        raise JpqError(f"{path} is no ONNX file that can be read ({' '.join(str(error).split())[:100]}).") from error
    return {entry.key: _parse(entry.value) for entry in file.metadata_props}


def _parse(text: str) -> Any:
    if text[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
