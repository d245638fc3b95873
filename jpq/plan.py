"""`Plan`, the decisions as plain data: kept units, bit-widths, and how the small model is built; its JSON file."""

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

FORMAT = 1  # version of the JSON file

MOST_UNITS = 2**32  # largest number of units of all masks together

MOST_CHANNELS = 2**24  # largest number of channels of one layer


@dataclass(frozen=True)
class LayerPlan:
    """Bit-widths of one layer: of its weight and of its input."""

    w_bits: int
    a_bits: int
    signed: bool  # whether the grid of the input has negative values


@dataclass(frozen=True)
class MaskPlan:
    """Kept units of one mask, packed to a bit each: there may be as many units as weights."""

    rows: int
    n: int
    bits: str  # base64 of deflated bits, row by row, the first unit in the highest bit

    @classmethod
    def of(cls, keep: Units) -> MaskPlan:
        """The plan of a mask over `[rows, n]` units, 0 or 1."""
        packed = np.packbits(keep.detach().bool().cpu().numpy().ravel())
        return cls(keep.shape[0], keep.shape[1], base64.b64encode(zlib.compress(packed.tobytes(), 9)).decode())

    def check(self) -> None:
        """Raise ValueError unless the bits are of as many units as declared; never holds more than 1 MB of them."""
        size, length, inflate = (self.rows * self.n + 7) // 8, 0, zlib.decompressobj()
        data = base64.b64decode(self.bits, validate=True)
        try:
            while data and length <= size and not inflate.eof:
                length += len(inflate.decompress(data, 2**20))
                data = inflate.unconsumed_tail
        except zlib.error as error:
            raise ValueError(f"a mask's bits cannot be inflated: {error}") from error
        if length != size or not inflate.eof or inflate.unused_data:
            raise ValueError(f"a mask of {self.rows} x {self.n} units has {size} bytes")

    def units(self) -> Units:
        """The kept units, `[rows, n]`, bool. Raises ValueError for bits that are not of that many units."""
        size = (self.rows * self.n + 7) // 8
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(self.bits, validate=True), size + 1)  # at most the declared length
        if len(raw) != size or not inflate.eof:
            raise ValueError(f"a mask of {self.rows} x {self.n} units has {size} bytes")
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=self.rows * self.n)
        return torch.from_numpy(bits.astype(bool)).reshape(self.rows, self.n)


@dataclass(frozen=True)
class EndPlan:
    """The grid to which the output of a module is rounded."""

    bits: int
    signed: bool


@dataclass(frozen=True)
class Plan:
    """All decisions of a compressed model."""

    method: str
    layers: Mapping[str, LayerPlan]
    kept: Mapping[str, tuple[bool, ...]]  # channel site -> unit -> kept
    masks: Mapping[str, MaskPlan] = field(default_factory=dict)  # layer -> kept units of its mask
    structures: Mapping[str, str] = field(default_factory=dict)  # masked layer -> structure of its mask, for `parse`
    slices: Mapping[str, Mapping[int, list[int]]] = field(default_factory=dict)  # parameter -> dim -> kept indices
    selects: Mapping[str, list[int]] = field(default_factory=dict)  # layer -> input channels it reads, where not all
    ends: Mapping[str, EndPlan] = field(default_factory=dict)  # module -> grid of its output
    model: Mapping[str, Any] = field(default_factory=dict)  # how to build the dense model: name, classes, channels

    def to_json(self) -> str:
        """The JSON text that `from_json` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


def from_json(text: str, source: str) -> Plan:
    """The plan in a JSON text. Raises JpqError where it is not a plan; nothing in it is executed."""
    try:
        tree = untrusted.as_dict(untrusted.load_json(text))
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
    end = untrusted.as_dict(value)
    return EndPlan(untrusted.as_int(end["bits"], 2, 8), untrusted.as_bool(end["signed"]))


def _masks(tree: Mapping[str, Any]) -> dict[str, MaskPlan]:
    """Masks by layer; their declared sizes are added up before any of them is inflated."""
    masks = {name: _mask(value) for name, value in tree.items()}
    untrusted.as_int(sum(mask.rows * mask.n for mask in masks.values()), 0, MOST_UNITS)
    for mask in masks.values():
        mask.check()
    return masks


def _mask(value: Any) -> MaskPlan:
    mask = untrusted.as_dict(value)
    rows, n = (untrusted.as_int(mask[name], 1, MOST_UNITS) for name in ("rows", "n"))
    return MaskPlan(rows, n, untrusted.as_str(mask["bits"], untrusted.LARGEST))


def _dim(text: str) -> int:
    if text not in ("0", "1", "2", "3", "4"):
        raise ValueError(f"{text[:40]!r} where a dim belongs")
    return int(text)


def _indices(value: Any) -> list[int]:
    """Indices of channels, each once, in any order."""
    indices = [untrusted.as_int(i, 0, MOST_CHANNELS) for i in untrusted.as_list(value)]
    if len(set(indices)) < len(indices):
        raise ValueError("a channel is kept twice")
    return indices


def _model(tree: dict[str, Any]) -> dict[str, Any]:
    for name, value in tree.items():
        if name in ("classes", "channels"):
            untrusted.as_int(value, 1, MOST_CHANNELS)
        elif name == "name":
            untrusted.as_str(value)
    return tree


def _structures(tree: Mapping[str, Any]) -> dict[str, str]:
    """Structures by masked layer; plans of the first version name one structure for all masks."""
    masked = list(tree.get("masks", {}))
    if "structures" not in tree:
        return dict.fromkeys(masked, untrusted.as_str(tree.get("structure", "")))
    structures = {name: untrusted.as_str(text) for name, text in untrusted.as_dict(tree["structures"]).items()}
    if structures.keys() != set(masked):
        raise ValueError(f"structures of layers {sorted(structures)}, masks of {sorted(masked)}")
    return structures


def read(path: Path) -> Plan:
    """The plan in a file. Raises JpqError where it cannot be read, or is not a plan."""
    return from_json(untrusted.read_text(path, "plan"), str(path))
