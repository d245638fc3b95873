"""The decisions, as plain data: which units stay, and how many bits each tensor gets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jpq.types import JpqError

FORMAT = 1


@dataclass(frozen=True)
class LayerPlan:
    """Bits of one layer: of its weight and of its input."""

    w_bits: int
    a_bits: int
    signed: bool  # whether the input's grid reaches below zero


@dataclass(frozen=True)
class Plan:
    """Everything that training decided."""

    method: str
    layers: Mapping[str, LayerPlan]
    kept: Mapping[str, tuple[bool, ...]]  # site -> unit -> kept
    slices: Mapping[str, Mapping[int, list[int]]] = field(default_factory=dict)  # parameter -> dim -> kept indices
    selects: Mapping[str, list[int]] = field(default_factory=dict)  # layer -> inputs it reads, where that is a part
    model: Mapping[str, Any] = field(default_factory=dict)  # how to build the dense model: name, classes, channels

    def to_json(self) -> str:
        """As text that `from_json` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


def from_json(text: str, source: str) -> Plan:
    """The plan in `text`. Raises JpqError where it is not one; nothing in it is executed."""
    try:
        tree = json.loads(text)
        if tree.pop("format") != FORMAT:
            raise JpqError(f"{source} was written by another version of jpq (format {tree.get('format')}).")
        return Plan(
            method=str(tree["method"]),
            layers={name: _layer(value) for name, value in tree["layers"].items()},
            kept={name: tuple(bool(u) for u in units) for name, units in tree["kept"].items()},
            slices={
                name: {int(dim): [int(i) for i in index] for dim, index in dims.items()}
                for name, dims in tree["slices"].items()
            },
            selects={name: [int(i) for i in index] for name, index in tree.get("selects", {}).items()},
            model=dict(tree["model"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JpqError(f"{source} is not a plan that jpq wrote ({type(error).__name__}: {error}).") from error


def _layer(value: Mapping[str, Any]) -> LayerPlan:
    layer = LayerPlan(int(value["w_bits"]), int(value["a_bits"]), bool(value["signed"]))
    if not (1 <= layer.w_bits <= 32 and 1 <= layer.a_bits <= 32):
        raise ValueError(f"{layer.w_bits} and {layer.a_bits} bits lie outside 1 to 32")
    return layer


def read(path: Path) -> Plan:
    """The plan in a file."""
    try:
        return from_json(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise JpqError(f"Cannot read the plan {path}: {error}.") from error
