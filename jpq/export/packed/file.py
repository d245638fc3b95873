"""Masked quantized weights in one file: values at their learned widths, masks in the fewest bits, nothing executable.

A safetensors file of bytes. Each layer has `layers/NAME/values`, the integers of the kept weights in the order of
`weight.flatten()`, at `bits` bits each (signed ones plus 2^(bits - 1)), and `layers/NAME/mask`, the kept units of its
structure (see structures/encoding.py). Other tensors (scales, biases) are stored as they are, as `tensors/NAME`. The
metadata `jpq` is the JSON of what a reader needs, with a checksum of every stream; `crc32` is its own.

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
from jpq.methods.structures import Structure, WeightLayout, mask_encoding, parse
from jpq.types import JpqError

FORMAT = "jpq packed 1"

MOST = 2**28  # weights, or units of one mask, that a reader makes room for unless it is told otherwise

WIDEST = 16

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)}


@dataclass(frozen=True, eq=False)
class Packed:
    """One layer's integer weights and, where it is masked, the structure and the units that are kept."""

    weight: Tensor  # integers, 0 where dropped
    bits: int  # 1 to 16
    signed: bool = True  # from -2^(bits-1) to 2^(bits-1) - 1; unsigned from 0 to 2^bits - 1
    structure: Structure | None = None  # None: nothing is dropped
    kept: Tensor | None = None  # 0 or 1, [rows, n] units of the structure; read back as bool, False in the padding


def packed_bits(structure: Structure | None, kept: Tensor | None, weight: Size, width: int) -> tuple[int, int]:
    """(bits of the values, bits of the mask) that a weight takes: exactly what is written, before whole bytes.

    Args:
        structure, kept: the mask, `[rows, n]` units; None for none.
        weight: size of the weight.
        width: bits of each kept value.

    Raises JpqError where the units do not belong to the structure and weight.
    """
    if structure is None:
        return weight.numel() * width, 0
    flags, valid = _units(structure, kept, weight)
    return int(_mask(structure, flags, weight).sum()) * width, _form(flags, valid).bits


def packed_bytes(layers: Mapping[str, Packed], tensors: Mapping[str, Tensor] | None = None) -> int:
    """Bytes of all streams: the size of the file without its header."""
    streams = [b for p in layers.values() for b in packed_bits(p.structure, p.kept, p.weight.shape, p.bits)]
    return sum(mask_encoding.length(b, 1) for b in streams) + sum(
        t.numel() * t.element_size() for t in (tensors or {}).values()
    )


def header_bytes(path: Path) -> int:
    """Bytes of a file's header: what stands before the streams."""
    try:
        with path.open("rb") as file:
            return 8 + int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise JpqError(f"Cannot read {path}: {error.strerror or error}.") from error


def save_packed(path: Path, layers: Mapping[str, Packed], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write the file, beside and renamed. Raises JpqError where a layer is not what it claims, naming it."""
    streams: dict[str, Tensor] = {}
    about: dict[str, Any] = {"format": FORMAT, "layers": {}, "tensors": {}}
    for name, packed in layers.items():
        try:
            values, mask, entry = _encode(packed)
        except JpqError as error:
            raise JpqError(f"Layer '{name}': {error}") from error
        streams[f"layers/{name}/values"] = torch.from_numpy(values)
        streams[f"layers/{name}/mask"] = torch.from_numpy(mask)
        about["layers"][name] = entry
    for name, tensor in (tensors or {}).items():
        stored = tensor.detach().cpu().contiguous().clone()
        streams[f"tensors/{name}"] = stored
        about["tensors"][name] = _describe(stored)
    text = json.dumps(about, separators=(",", ":"))
    about_it = {"jpq": text, "crc32": str(zlib.crc32(text.encode()))}
    replace_file(path, lambda part: part.write_bytes(_ordered(serialized(streams, about_it))))


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: safetensors writes them in an order that chance decides."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def load_packed(path: Path, most: int = MOST) -> tuple[dict[str, Packed], dict[str, Tensor]]:
    """(layers, other tensors), equal bit for bit to what `save_packed` was given.

    Raises JpqError for a file that is missing, damaged, foreign, or that declares more than `most` weights (or units of
    a mask): no room is made for more, whatever the file says.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            about, names = file.metadata() or {}, set(file.keys())
            text = about.get("jpq", "")
            if about.get("crc32") != str(zlib.crc32(text.encode())):
                raise JpqError("it was not written by jpq, or its header is damaged")
            entries = parse_json(text, "its header")
            if entries.get("format") != FORMAT:
                raise JpqError(f"its format is {entries.get('format')!r}, not {FORMAT!r}: use the jpq that wrote it")
            wanted = {f"layers/{n}/{s}" for n in entries["layers"] for s in ("values", "mask")}
            if names != wanted | {f"tensors/{n}" for n in entries["tensors"]}:
                raise JpqError("its streams are not those that its header lists")
            layers, room = {}, most
            for name, entry in entries["layers"].items():
                streams = [file.get_tensor(f"layers/{name}/{s}") for s in ("values", "mask")]
                layers[name] = _decode(entry, streams, room, most)
                room -= layers[name].weight.numel()
            tensors = {name: file.get_tensor(f"tensors/{name}") for name in entries["tensors"]}
            if any(_describe(tensors[name]) != entry for name, entry in entries["tensors"].items()):
                raise JpqError("a tensor does not match its checksum")
    except JpqError as error:
        raise JpqError(f"Cannot read {path}: {str(error).rstrip('.')}.") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise JpqError(f"Cannot read {path}: {' '.join(str(error).split())[:160] or type(error).__name__}.") from error
    return layers, tensors


def _encode(packed: Packed) -> tuple[mask_encoding.Bytes, mask_encoding.Bytes, dict[str, Any]]:
    """(values, mask, what a reader needs)."""
    weight = packed.weight.detach().cpu()
    if weight.dtype not in DTYPES.values():
        raise JpqError(f"Packed weights are whole numbers ({', '.join(DTYPES)}), not {weight.dtype}.")
    if not 1 <= packed.bits <= WIDEST:
        raise JpqError(f"Values take 1 to {WIDEST} bits, not {packed.bits}.")
    flat = weight.flatten().numpy().astype(np.int64)
    entry: dict[str, Any] = {"size": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    entry |= {"bits": packed.bits, "signed": packed.signed, "structure": None}
    mask = np.zeros(0, np.uint8)
    if packed.structure is not None:
        structure = packed.structure
        flags, valid = _units(structure, packed.kept, weight.shape)
        form = _form(flags, valid)
        mask = mask_encoding.encode(flags, valid, form)
        stays = _mask(structure, flags, weight.shape)
        if flat[~stays].any():
            raise JpqError("Weights that the mask drops are not zero: multiply by the mask first.")
        flat = flat[stays]
        entry |= {"structure": structure.spec(), "transposed": structure.layout.transposed}
        entry |= {"groups": structure.layout.groups, "encoding": form.encoding, "even": form.even, "most": form.most}
    low = -(2 ** (packed.bits - 1)) if packed.signed else 0
    if flat.size and not low <= flat.min() <= flat.max() < low + 2**packed.bits:
        raise JpqError(
            f"Weights from {flat.min()} to {flat.max()} do not fit {packed.bits} {'' if packed.signed else 'un'}signed "
            f"bits, which hold {low} to {low + 2**packed.bits - 1}."
        )
    values = mask_encoding.pack(flat - low, packed.bits)
    return values, mask, entry | {"crc32": [_crc(values), _crc(mask)]}


def _decode(entry: Mapping[str, Any], streams: list[Tensor], room: int, most: int) -> Packed:
    """One layer from its entry and its two streams, at most `room` weights and `most` units."""
    if any(s.dtype != torch.uint8 or s.dim() != 1 for s in streams):
        raise JpqError("a stream is not made of bytes")
    values, mask = (s.numpy() for s in streams)
    if [_crc(values), _crc(mask)] != entry["crc32"]:
        raise JpqError("a layer does not match its checksum")
    size = Size([as_int(n, 0, room) for n in entry["size"][:9]])
    as_int(prod(size), 0, room)
    width, signed = as_int(entry["bits"], 1, WIDEST), as_bool(entry["signed"])
    stays, structure, kept = np.ones(0, np.bool_), None, None
    if entry["structure"] is not None:
        layout = WeightLayout(as_bool(entry["transposed"]), as_int(entry["groups"], 1, room))
        structure = parse(entry["structure"], layout)
        rows, n = structure.shape(size)
        as_int(rows * n, 0, most)
        even = None if entry["even"] is None else as_int(entry["even"], 0, n)
        form = mask_encoding.Form(entry["encoding"], even, as_int(entry["most"], 0, n), 0)
        if form.encoding not in mask_encoding.ENCODINGS:
            raise JpqError(f"it has an unknown encoding of masks, {form.encoding!r}")
        kept = torch.from_numpy(mask_encoding.decode(mask, _valid(structure, size), form))
        flags, valid = _units(structure, kept, size)
        if replace(_form(flags, valid), bits=0) != form:
            raise JpqError("a mask is not in its smallest form: jpq writes no other")
        stays = _mask(structure, flags, size)
    elif len(mask):
        raise JpqError("a layer without a structure has a mask")
    count = prod(size) if structure is None else int(stays.sum())
    dtype = DTYPES[entry["dtype"]]
    found = mask_encoding.unpack(values, width, count) - (2 ** (width - 1) if signed else 0)
    if count and not torch.iinfo(dtype).min <= found.min() <= found.max() <= torch.iinfo(dtype).max:
        raise JpqError(f"a layer holds values that {entry['dtype']} does not")
    weight = torch.zeros(prod(size), dtype=dtype)
    weight[torch.from_numpy(stays) if structure is not None else slice(None)] = torch.from_numpy(found).to(dtype)
    return Packed(weight.reshape(size), width, signed, structure, kept)


def _valid(structure: Structure, weight: Size) -> mask_encoding.Flags:
    valid = structure.valid(weight)
    return np.ones(structure.shape(weight), np.bool_) if valid is None else valid.numpy()


def _units(structure: Structure, kept: Tensor | None, weight: Size) -> tuple[mask_encoding.Flags, mask_encoding.Flags]:
    """(kept, real) units. Raises JpqError where they are no decision about this weight."""
    shape = structure.shape(weight)
    if kept is None or tuple(kept.shape) != shape:
        found = "none" if kept is None else tuple(kept.shape)
        raise JpqError(f"{structure.spec()} has {shape} units on a weight {tuple(weight)}; the kept ones are {found}.")
    units = kept.detach().cpu()
    if bool(((units != 0) & (units != 1)).any()):
        raise JpqError("Kept units are 0 or 1: take the decision (gate.keep()) before packing.")
    valid = _valid(structure, weight)
    flags = units.bool().numpy() & valid
    quota = structure.quota()
    if quota is not None and bool((flags.sum(1) > quota).any()):
        raise JpqError(f"{structure.spec()} keeps at most {quota} in each row; a dense layer is packed without it.")
    return flags, valid


def _form(flags: mask_encoding.Flags, valid: mask_encoding.Flags) -> mask_encoding.Form:
    return mask_encoding.choose(flags.shape[1], valid.sum(1), flags.sum(1))


def _mask(structure: Structure, flags: mask_encoding.Flags, weight: Size) -> mask_encoding.Flags:
    """Which weights stay, `[weights]`."""
    mask = structure.expand(torch.from_numpy(flags).to(torch.uint8), weight)
    return mask.expand(weight).flatten().numpy().astype(np.bool_)


def _describe(tensor: Tensor) -> list[Any]:
    """Dtype, size, checksum."""
    return [str(tensor.dtype), list(tensor.shape), _crc(tensor.reshape(-1).view(torch.uint8).numpy())]


def _crc(data: mask_encoding.Bytes) -> int:
    return zlib.crc32(data.data)
