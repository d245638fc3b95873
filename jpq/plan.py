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

from jpq.files import untrusted
from jpq.types import JpqError, Units

FORMAT = 1

MOST_UNITS = 2**32  # of all masks together

WIDEST = 2**24  # channels of one layer


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

    def check(self) -> None:
        """Raises ValueError for bits that are not of as many units as declared; makes no room for them."""
        size, found, inflate = (self.rows * self.n + 7) // 8, 0, zlib.decompressobj()
        data = base64.b64decode(self.bits, validate=True)
        try:
            while data and found <= size and not inflate.eof:
                found += len(inflate.decompress(data, 2**20))
                data = inflate.unconsumed_tail
        except zlib.error as error:
            raise ValueError(f"a mask's bits cannot be inflated: {error}") from error
        if found != size or not inflate.eof or inflate.unused_data:
            raise ValueError(f"a mask of {self.rows} x {self.n} units has {size} bytes")

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
        tree = untrusted.as_dict(untrusted.parsed(text))
        if tree.pop("format") != FORMAT:
            raise JpqError(f"{source} was written by another version of jpq (format {str(tree.get('format'))[:20]}).")
        return Plan(
            method=untrusted.as_str(tree["method"]),
            layers={name: _layer(value) for name, value in untrusted.as_dict(tree["layers"]).items()},
            kept={
                name: tuple(untrusted.as_bool(u) for u in untrusted.as_list(units))
                for name, units in untrusted.as_dict(tree["kept"]).items()
            },
            masks=_masks(untrusted.as_dict(tree.get("masks", {}))),
            structures=_structures(tree),
            slices={
                name: {_dim(dim): _indices(index) for dim, index in untrusted.as_dict(dims).items()}
                for name, dims in untrusted.as_dict(tree["slices"]).items()
            },
            selects={name: _indices(index) for name, index in untrusted.as_dict(tree.get("selects", {})).items()},
            ends={name: _end(value) for name, value in untrusted.as_dict(tree.get("ends", {})).items()},
            model=_model(untrusted.as_dict(tree["model"])),
        )
    except (ValueError, KeyError) as error:
        raise JpqError(f"{source} is not a plan that jpq wrote ({type(error).__name__}: {error}).") from error


def _layer(value: Any) -> LayerPlan:
    layer = untrusted.as_dict(value)
    w_bits, a_bits = (untrusted.as_int(layer[name], 1, 32) for name in ("w_bits", "a_bits"))
    return LayerPlan(w_bits, a_bits, untrusted.as_bool(layer["signed"]))


def _end(value: Any) -> EndPlan:
    given = untrusted.as_dict(value)
    return EndPlan(untrusted.as_int(given["bits"], 2, 8), untrusted.as_bool(given["signed"]))


def _masks(tree: Mapping[str, Any]) -> dict[str, MaskPlan]:
    """By layer. Bits are deflated: all that they declare is added up before any of them is inflated."""
    found = {name: _mask(value) for name, value in tree.items()}
    untrusted.as_int(sum(mask.rows * mask.n for mask in found.values()), 0, MOST_UNITS)
    for mask in found.values():
        mask.check()
    return found


def _mask(value: Any) -> MaskPlan:
    given = untrusted.as_dict(value)
    rows, n = (untrusted.as_int(given[name], 1, MOST_UNITS) for name in ("rows", "n"))
    return MaskPlan(rows, n, untrusted.as_str(given["bits"], untrusted.MOST))


def _dim(text: str) -> int:
    if text not in ("0", "1", "2", "3", "4"):
        raise ValueError(f"{text[:40]!r} where a dim belongs")
    return int(text)


def _indices(value: Any) -> list[int]:
    """Places of channels: each once, in any order."""
    found = [untrusted.as_int(i, 0, WIDEST) for i in untrusted.as_list(value)]
    if len(set(found)) < len(found):
        raise ValueError("a channel is kept twice")
    return found


def _model(tree: dict[str, Any]) -> dict[str, Any]:
    for name, value in tree.items():
        if name in ("classes", "channels"):
            untrusted.as_int(value, 1, WIDEST)
        elif name == "name":
            untrusted.as_str(value)
    return tree


def _structures(tree: Mapping[str, Any]) -> dict[str, str]:
    """By layer; plans of before schemes were mapped name one structure for all masks."""
    masked = list(tree.get("masks", {}))
    if "structures" not in tree:
        return dict.fromkeys(masked, untrusted.as_str(tree.get("structure", "")))
    found = {name: untrusted.as_str(text) for name, text in untrusted.as_dict(tree["structures"]).items()}
    if found.keys() != set(masked):
        raise ValueError(f"structures of layers {sorted(found)}, masks of {sorted(masked)}")
    return found


def read(path: Path) -> Plan:
    """The plan in a file."""
    return from_json(untrusted.read_text(path, "plan"), str(path))
