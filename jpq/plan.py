"""The decisions, as plain data: which units stay, and how many bits each tensor gets."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jpq.types import JpqError, Units

FORMAT = 1


@dataclass(frozen=True)
class LayerPlan:
    """Bits of one layer: of its weight and of its input."""

    w_bits: int
    a_bits: int
    signed: bool  # whether the input's grid reaches below zero


@dataclass(frozen=True)
class MaskPlan:
    """Which units of a mask site stay, one bit each: there may be as many as there are weights."""

    rows: int
    n: int
    bits: str  # base64 of deflated bits, row after row, the first unit in the highest bit

    @classmethod
    def of(cls, keep: Units) -> MaskPlan:
        """From `[rows, n]` units, 0 or 1."""
        packed = np.packbits(keep.detach().bool().cpu().numpy().ravel())
        return cls(keep.shape[0], keep.shape[1], base64.b64encode(zlib.compress(packed.tobytes(), 9)).decode())

    def units(self) -> Units:
        """`[rows, n]`, bool. Raises ValueError for bits that are not of that many units."""
        size = (self.rows * self.n + 7) // 8
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(self.bits, validate=True), size + 1)  # never more than was declared
        if len(raw) != size or not inflate.eof:
            raise ValueError(f"a mask of {self.rows} x {self.n} units has {size} bytes")
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=self.rows * self.n)
        return torch.from_numpy(bits.astype(bool)).reshape(self.rows, self.n)


@dataclass(frozen=True)
class EndPlan:
    """The grid that a module's result is rounded to."""

    bits: int
    signed: bool


@dataclass(frozen=True)
class Plan:
    """Everything that training decided."""

    method: str
    layers: Mapping[str, LayerPlan]
    kept: Mapping[str, tuple[bool, ...]]  # channel site -> unit -> kept
    masks: Mapping[str, MaskPlan] = field(default_factory=dict)  # layer -> which of its weights' units stay
    structures: Mapping[str, str] = field(default_factory=dict)  # masked layer -> what its units are, for `parse`
    slices: Mapping[str, Mapping[int, list[int]]] = field(default_factory=dict)  # parameter -> dim -> kept indices
    selects: Mapping[str, list[int]] = field(default_factory=dict)  # layer -> inputs it reads, where that is a part
    ends: Mapping[str, EndPlan] = field(default_factory=dict)  # module -> what its result is rounded to
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
            masks={name: _mask(value) for name, value in tree.get("masks", {}).items()},
            structures=_structures(tree),
            slices={
                name: {int(dim): [int(i) for i in index] for dim, index in dims.items()}
                for name, dims in tree["slices"].items()
            },
            selects={name: [int(i) for i in index] for name, index in tree.get("selects", {}).items()},
            ends={str(name): _end(value) for name, value in tree.get("ends", {}).items()},
            model=dict(tree["model"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise JpqError(f"{source} is not a plan that jpq wrote ({type(error).__name__}: {error}).") from error


def _layer(value: Mapping[str, Any]) -> LayerPlan:
    layer = LayerPlan(int(value["w_bits"]), int(value["a_bits"]), bool(value["signed"]))
    if not (1 <= layer.w_bits <= 32 and 1 <= layer.a_bits <= 32):
        raise ValueError(f"{layer.w_bits} and {layer.a_bits} bits lie outside 1 to 32")
    return layer


def _end(value: Mapping[str, Any]) -> EndPlan:
    end = EndPlan(int(value["bits"]), bool(value["signed"]))
    if not 2 <= end.bits <= 8:
        raise ValueError(f"a result of {end.bits} bits lies outside 2 to 8")
    return end


def _mask(value: Mapping[str, Any]) -> MaskPlan:
    mask = MaskPlan(int(value["rows"]), int(value["n"]), str(value["bits"]))
    if mask.rows < 1 or mask.n < 1 or mask.rows * mask.n > 2**34:
        raise ValueError(f"a mask of {mask.rows} x {mask.n} units")
    mask.units()
    return mask


def _structures(tree: Mapping[str, Any]) -> dict[str, str]:
    """By layer; plans of before schemes were mapped name one structure for all masks."""
    masked = list(tree.get("masks", {}))
    if "structures" not in tree:
        return dict.fromkeys(masked, str(tree.get("structure", "")))
    found = {str(name): str(text) for name, text in tree["structures"].items()}
    if found.keys() != set(masked):
        raise ValueError(f"structures of layers {sorted(found)}, masks of {sorted(masked)}")
    return found


def read(path: Path) -> Plan:
    """The plan in a file."""
    try:
        return from_json(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise JpqError(f"Cannot read the plan {path}: {error}.") from error
