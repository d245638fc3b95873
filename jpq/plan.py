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

ALL_LEVELS, NARROW = "all", "narrow"  # `Plan.weight_levels`

MOST_UNITS = 2**32  # largest number of units of all masks together

MOST_CHANNELS = 2**24  # largest number of channels of one layer

MOST_DIMS = 25  # largest number of dims of a tensor


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
class RoutedCall:
    """How a product in a module's own code follows from the layer that computes it (`jpq.tracing.products`)."""

    operand: int = 0  # which of the two operands is the layer's input
    summed: tuple[int, ...] = ()  # dims of the input that are summed over, from the last (-1); (): as the layer does
    sizes: tuple[int, ...] = ()  # sizes of the dims that the outputs stand for, where several
    order: tuple[int, ...] = ()  # of the dims of the result, where outputs do not come last


@dataclass(frozen=True)
class WeightSource:
    """The parameters of a module from which a tensor of a routed layer comes, and how.

    With one parameter and sizes it is a view of that parameter, by strides; else code computes it.
    """

    parameters: tuple[str, ...]
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class LayerRoute:
    """Products in a module's own code that a plain layer computes, which becomes a child of the module."""

    module: str  # dotted path of the module
    child: str  # name of the layer in it
    kind: str  # its class in torch.nn
    shape: tuple[int, ...]  # of its weight
    weight: WeightSource
    bias: WeightSource | None
    calls: Mapping[str, RoutedCall]  # own call of the module, such as "matmul:0" -> how the layer computes it
    options: Mapping[str, Any] = field(default_factory=dict)  # of a convolution: stride, padding, dilation, groups ...
    skipped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # call that made the weight -> its shape


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
    routes: tuple[LayerRoute, ...] = ()  # layers that the model's own code was given before it was sliced
    weight_levels: str = NARROW  # levels of the weights' grids: all 2^b of them, or 2^b - 1 around 0

    def to_json(self) -> str:
        """The JSON text that `from_json` reads."""
        tree = asdict(self)
        for name, default in (("routes", ()), ("weight_levels", NARROW)):  # as version 0.1 wrote them
            if tree[name] == default:
                del tree[name]
        return json.dumps({"format": FORMAT, **tree}, indent=1)


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
            routes=tuple(_route(value) for value in untrusted.as_list(tree.get("routes", []))),
            weight_levels=_weight_levels(tree.get("weight_levels", NARROW)),
        )
    except (ValueError, KeyError) as error:
        raise JpqError(f"{source} is not a plan that jpq wrote ({type(error).__name__}: {error}).") from error


def _layer(value: Any) -> LayerPlan:
    layer = untrusted.as_dict(value)
    w_bits, a_bits = (untrusted.as_int(layer[name], 1, 32) for name in ("w_bits", "a_bits"))
    return LayerPlan(w_bits, a_bits, untrusted.as_bool(layer["signed"]))


def _weight_levels(value: Any) -> str:
    if value not in (ALL_LEVELS, NARROW):
        raise ValueError(f"weight_levels are {ALL_LEVELS} or {NARROW}, not {str(value)[:40]!r}")
    return str(value)


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
        if name in ("classes", "channels", "vocabulary", "length"):
            untrusted.as_int(value, 1, MOST_CHANNELS)
        elif name == "name":
            untrusted.as_str(value)
    return tree


def _route(value: Any) -> LayerRoute:
    route = untrusted.as_dict(value)
    module, child, kind = (untrusted.as_str(route[name]) for name in ("module", "child", "kind"))
    return LayerRoute(
        module=module,
        child=child,
        kind=kind,
        shape=_sizes(route["shape"]),
        weight=_source(route["weight"]),
        bias=None if route["bias"] is None else _source(route["bias"]),
        calls={untrusted.as_str(key): _routed_call(call) for key, call in untrusted.as_dict(route["calls"]).items()},
        options={untrusted.as_str(key): _option(v) for key, v in untrusted.as_dict(route["options"]).items()},
        skipped={untrusted.as_str(key): _sizes(shape) for key, shape in untrusted.as_dict(route["skipped"]).items()},
    )


def _routed_call(value: Any) -> RoutedCall:
    call = untrusted.as_dict(value)
    summed = tuple(untrusted.as_int(dim, -MOST_DIMS, -1) for dim in untrusted.as_list(call["summed"]))
    return RoutedCall(untrusted.as_int(call["operand"], 0, 1), summed, _sizes(call["sizes"]), _sizes(call["order"]))


def _source(value: Any) -> WeightSource:
    source = untrusted.as_dict(value)
    names = tuple(untrusted.as_str(name) for name in untrusted.as_list(source["parameters"]))
    offset = untrusted.as_int(source["offset"], 0, MOST_UNITS)
    return WeightSource(names, _sizes(source["size"]), _sizes(source["stride"]), offset)


def _option(value: Any) -> Any:
    """An option of a convolution: a size, a size per dim, or "same"."""
    if isinstance(value, list):
        return _sizes(value)
    return untrusted.as_str(value) if isinstance(value, str) else untrusted.as_int(value, 0, MOST_CHANNELS)


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(untrusted.as_int(size, 0, MOST_UNITS) for size in untrusted.as_list(value))
    if len(sizes) > MOST_DIMS:
        raise ValueError(f"{len(sizes)} dims")
    return sizes


def _structures(tree: Mapping[str, Any]) -> dict[str, str]:
    """Structures by masked layer; plans of the first version name one structure for all masks."""
    masked = list(tree.get("masks", {}))
    if "structures" not in tree:
        return dict.fromkeys(masked, untrusted.as_str(tree.get("structure", "")))
    structures = {name: untrusted.as_str(text) for name, text in untrusted.as_dict(tree["structures"]).items()}
    if structures.keys() != set(masked):
        raise ValueError(f"structures of layers {sorted(structures)}, masks of {sorted(masked)}")
    return structures


def read(path: str | Path) -> Plan:
    """The plan in a file. Raises JpqError where it cannot be read, or is not a plan."""
    return from_json(untrusted.read_text(path, "plan"), str(path))
