"""The bit-packed file format: quantized weights at their widths, masks in the fewest bits, nothing executable.

A safetensors file of bytes. Each layer has `layers/NAME/values`, the integers of the kept weights in the order of
`weight.flatten()`, at `bits` bits each (signed ones plus 2^(bits - 1)), and `layers/NAME/mask`, the kept units of its
structure (see jpq/methods/structures/mask_encoding.py). Other tensors (scales, biases) are stored as they are, as
`tensors/NAME`. The metadata `jpq` is a JSON text that describes every stream, with a checksum; `crc32` is its own.

    bytes on disk = header_bytes(path) + packed_bytes(layers, tensors)         packed_bytes: ceil(bits / 8) per stream
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Size, Tensor

from jpq.files.atomic import replace_file
from jpq.files.untrusted import as_bool, as_int, check_file, parse_json
from jpq.methods.structures import Structure, WeightLayout, mask_encoding, parse_structure
from jpq.methods.structures.mask_encoding import Bytes, Flags
from jpq.types import JpqError

FORMAT = "jpq packed 1"

MAX_WEIGHTS = 2**28  # default limit of a reader for weights, or units of one mask

MAX_BITS = 16  # largest width of a value

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)}


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A layer's integer weights and, where it is masked, its structure and kept units."""

    weight: Tensor  # integers, 0 where dropped
    bits: int  # 1 to 16
    signed: bool = True  # from -2^(bits-1) to 2^(bits-1) - 1; unsigned from 0 to 2^bits - 1
    structure: Structure | None = None  # None: nothing is dropped
    kept: Tensor | None = None  # 0 or 1, [rows, n] units of the structure; read back as bool, False in the padding


def packed_bits(structure: Structure | None, kept: Tensor | None, weight: Size, width: int) -> tuple[int, int]:
    """(bits of the values, bits of the mask) of a packed weight: exactly what is written, before whole bytes.

    Args:
        structure: of the mask; None for none.
        kept: its units, [rows, n].
        weight: size of the weight.
        width: bits of each kept value.

    Raises JpqError where the units do not belong to the structure and weight.
    """
    if structure is None:
        return weight.numel() * width, 0
    flags, valid = _checked_units(structure, kept, weight)
    return int(_kept_weights(structure, flags, weight).sum()) * width, _smallest_form(flags, valid).bits


def packed_bytes(layers: Mapping[str, PackedLayer], tensors: Mapping[str, Tensor] | None = None) -> int:
    """Bytes of all streams: the size of the file without its header."""
    streams = [b for p in layers.values() for b in packed_bits(p.structure, p.kept, p.weight.shape, p.bits)]
    return sum(mask_encoding.length(b, 1) for b in streams) + sum(
        t.numel() * t.element_size() for t in (tensors or {}).values()
    )


def header_bytes(path: str | Path) -> int:
    """Bytes of a file's header, which stands before the streams."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return 8 + int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise JpqError(f"Cannot read {path}: {error.strerror or error}.") from error


def save_packed(
    path: str | Path, layers: Mapping[str, PackedLayer], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write layers and other tensors in one step. Raises JpqError, naming the layer, where a layer is inconsistent."""
    streams: dict[str, Tensor] = {}
    description: dict[str, Any] = {"format": FORMAT, "layers": {}, "tensors": {}}
    for name, packed in layers.items():
        try:
            values, mask, entry = _encode(packed)
        except JpqError as error:
            raise JpqError(f"Layer '{name}': {error}") from error
        streams[f"layers/{name}/values"] = torch.from_numpy(values)
        streams[f"layers/{name}/mask"] = torch.from_numpy(mask)
        description["layers"][name] = entry
    for name, tensor in (tensors or {}).items():
        stored = tensor.detach().cpu().contiguous().clone()
        streams[f"tensors/{name}"] = stored
        description["tensors"][name] = _describe(stored)
    text = json.dumps(description, separators=(",", ":"))
    metadata = {"jpq": text, "crc32": str(zlib.crc32(text.encode()))}
    replace_file(path, lambda part: part.write_bytes(_sort_metadata(serialized(streams, metadata))))


def _sort_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: safetensors writes them in a random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def load_packed(path: str | Path, max_weights: int = MAX_WEIGHTS) -> tuple[dict[str, PackedLayer], dict[str, Tensor]]:
    """Read (layers, other tensors), equal bit for bit to what `save_packed` was given.

    Raises JpqError for a file that is missing, damaged, foreign, or that declares more than `max_weights` weights (or
    units of a mask): no room is made for more, whatever the file says.
    """
    path = Path(path)
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            description = _read_description(file)
            layers, room = {}, max_weights
            for name, entry in description["layers"].items():
                streams = [file.get_tensor(f"layers/{name}/{s}") for s in ("values", "mask")]
                layers[name] = _decode(entry, streams, room, max_weights)
                room -= layers[name].weight.numel()
            tensors = {name: file.get_tensor(f"tensors/{name}") for name in description["tensors"]}
            if any(_describe(tensors[name]) != entry for name, entry in description["tensors"].items()):
                raise JpqError("a tensor does not match its checksum")
    except JpqError as error:
        raise JpqError(f"Cannot read {path}: {str(error).rstrip('.')}.") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise JpqError(f"Cannot read {path}: {' '.join(str(error).split())[:160] or type(error).__name__}.") from error
    return layers, tensors


def _read_description(file: Any) -> dict[str, Any]:
    """The description of the streams in an open file. Raises JpqError where it is damaged, foreign or incomplete."""
    metadata, names = file.metadata() or {}, set(file.keys())
    text = metadata.get("jpq", "")
    if metadata.get("crc32") != str(zlib.crc32(text.encode())):
        raise JpqError("it was not written by jpq, or its header is damaged")
    description: dict[str, Any] = parse_json(text, "its header")
    if description.get("format") != FORMAT:
        raise JpqError(f"its format is {description.get('format')!r}, not {FORMAT!r}: use the jpq that wrote it")
    listed = {f"layers/{n}/{s}" for n in description["layers"] for s in ("values", "mask")}
    if names != listed | {f"tensors/{n}" for n in description["tensors"]}:
        raise JpqError("its streams are not those that its header lists")
    return description


def _encode(layer: PackedLayer) -> tuple[Bytes, Bytes, dict[str, Any]]:
    """(values, mask, description) of a layer."""
    weight = layer.weight.detach().cpu()
    if weight.dtype not in DTYPES.values():
        raise JpqError(f"Packed weights are whole numbers ({', '.join(DTYPES)}), not {weight.dtype}.")
    if not 1 <= layer.bits <= MAX_BITS:
        raise JpqError(f"Values take 1 to {MAX_BITS} bits, not {layer.bits}.")
    integers = weight.flatten().numpy().astype(np.int64)
    entry: dict[str, Any] = {"size": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    entry |= {"bits": layer.bits, "signed": layer.signed, "structure": None}
    mask = np.zeros(0, np.uint8)
    if layer.structure is not None:
        mask, kept_weights, mask_entry = _encode_mask(layer.structure, layer.kept, weight.shape)
        if integers[~kept_weights].any():
            raise JpqError("Weights that the mask drops are not zero: multiply by the mask first.")
        integers, entry = integers[kept_weights], entry | mask_entry
    low = -(2 ** (layer.bits - 1)) if layer.signed else 0
    if integers.size and not low <= integers.min() <= integers.max() < low + 2**layer.bits:
        raise JpqError(
            f"Weights from {integers.min()} to {integers.max()} do not fit {layer.bits} "
            f"{'' if layer.signed else 'un'}signed bits, which hold {low} to {low + 2**layer.bits - 1}."
        )
    values = mask_encoding.pack(integers - low, layer.bits)
    return values, mask, entry | {"crc32": [_checksum(values), _checksum(mask)]}


def _encode_mask(structure: Structure, kept: Tensor | None, size: Size) -> tuple[Bytes, Flags, dict[str, Any]]:
    """(mask, which weights are kept, description) of the kept units on a weight."""
    flags, valid = _checked_units(structure, kept, size)
    form = _smallest_form(flags, valid)
    entry = {"structure": structure.spec(), "transposed": structure.layout.transposed}
    entry |= {"groups": structure.layout.groups, "encoding": form.encoding, "even": form.even, "most": form.most}
    return mask_encoding.encode(flags, valid, form), _kept_weights(structure, flags, size), entry


def _decode(entry: Mapping[str, Any], streams: list[Tensor], room: int, max_units: int) -> PackedLayer:
    """A layer from its description and its two streams, with at most `room` weights and `max_units` units."""
    if any(s.dtype != torch.uint8 or s.dim() != 1 for s in streams):
        raise JpqError("a stream is not made of bytes")
    values, mask = (s.numpy() for s in streams)
    if [_checksum(values), _checksum(mask)] != entry["crc32"]:
        raise JpqError("a layer does not match its checksum")
    size = Size([as_int(n, 0, room) for n in entry["size"][:9]])
    as_int(prod(size), 0, room)
    bits, signed = as_int(entry["bits"], 1, MAX_BITS), as_bool(entry["signed"])
    structure = kept = kept_weights = None
    if entry["structure"] is not None:
        structure, kept, kept_weights = _decode_mask(entry, mask, size, room, max_units)
    elif len(mask):
        raise JpqError("a layer without a structure has a mask")
    dtype = DTYPES[entry["dtype"]]
    count = prod(size) if kept_weights is None else int(kept_weights.sum())
    integers = mask_encoding.unpack(values, bits, count) - (2 ** (bits - 1) if signed else 0)
    limits = torch.iinfo(dtype)
    if integers.size and not limits.min <= integers.min() <= integers.max() <= limits.max:
        raise JpqError(f"a layer holds values that {entry['dtype']} does not")
    weight = torch.zeros(prod(size), dtype=dtype)
    weight[slice(None) if kept_weights is None else torch.from_numpy(kept_weights)] = torch.from_numpy(integers).to(
        dtype
    )
    return PackedLayer(weight.reshape(size), bits, signed, structure, kept)


def _decode_mask(
    entry: Mapping[str, Any], mask: Bytes, size: Size, room: int, max_units: int
) -> tuple[Structure, Tensor, Flags]:
    """(structure, kept units, which weights are kept) of a layer with a mask."""
    layout = WeightLayout(as_bool(entry["transposed"]), as_int(entry["groups"], 1, room))
    structure = parse_structure(entry["structure"], layout)
    rows, n = structure.shape(size)
    as_int(rows * n, 0, max_units)
    even = None if entry["even"] is None else as_int(entry["even"], 0, n)
    form = mask_encoding.Form(entry["encoding"], even, as_int(entry["most"], 0, n), 0)
    if form.encoding not in mask_encoding.ENCODINGS:
        raise JpqError(f"it has an unknown encoding of masks, {form.encoding!r}")
    kept = torch.from_numpy(mask_encoding.decode(mask, _valid_units(structure, size), form))
    flags, valid = _checked_units(structure, kept, size)
    if replace(_smallest_form(flags, valid), bits=0) != form:
        raise JpqError("a mask is not in its smallest form: jpq writes no other")
    return structure, kept, _kept_weights(structure, flags, size)


def _checked_units(structure: Structure, kept: Tensor | None, weight: Size) -> tuple[Flags, Flags]:
    """(kept, valid) units, [rows, n]. Raises JpqError where they are no decision about this weight."""
    shape = structure.shape(weight)
    if kept is None or tuple(kept.shape) != shape:
        size = "none" if kept is None else tuple(kept.shape)
        raise JpqError(f"{structure.spec()} has {shape} units on a weight {tuple(weight)}; the kept ones are {size}.")
    units = kept.detach().cpu()
    if bool(((units != 0) & (units != 1)).any()):
        raise JpqError("Kept units are 0 or 1: take the decision (gate.keep()) before packing.")
    valid = _valid_units(structure, weight)
    flags = units.bool().numpy() & valid
    quota = structure.quota()
    if quota is not None and bool((flags.sum(1) > quota).any()):
        raise JpqError(f"{structure.spec()} keeps at most {quota} in each row; a dense layer is packed without it.")
    return flags, valid


def _valid_units(structure: Structure, weight: Size) -> Flags:
    """Mask of the units that are no padding, `[rows, n]`."""
    valid = structure.valid(weight)
    return np.ones(structure.shape(weight), np.bool_) if valid is None else valid.numpy()


def _smallest_form(flags: Flags, valid: Flags) -> mask_encoding.Form:
    """The smallest encoding of kept units."""
    return mask_encoding.choose(flags.shape[1], valid.sum(1), flags.sum(1))


def _kept_weights(structure: Structure, flags: Flags, weight: Size) -> Flags:
    """Mask of the kept weights, `[weights]`."""
    mask = structure.expand(torch.from_numpy(flags).to(torch.uint8), weight)
    return mask.expand(weight).flatten().numpy().astype(np.bool_)


def _describe(tensor: Tensor) -> list[Any]:
    """Dtype, size and checksum of a stream."""
    return [str(tensor.dtype), list(tensor.shape), _checksum(tensor.reshape(-1).view(torch.uint8).numpy())]


def _checksum(data: Bytes) -> int:
    """CRC-32 of a stream."""
    return zlib.crc32(data.data)
