"""State of a search beside its tensors, as bytes in a state dict: settings, progress, history and decisions.

The record is JSON in a tensor of bytes, because every writer of checkpoints stores tensors (safetensors stores nothing
else), and nothing in it is executed when it is read. It is padded with spaces, so that its size is the same all through
a search, as writers that load into tensors in place need it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from jpq.compression.model import CompressedModel
from jpq.config import Budget, Decide
from jpq.files import untrusted
from jpq.types import JpqError

FORMAT = 1  # version of the record

PADDING = 4096  # the record's size is a multiple of so many bytes


def describe_settings(net: CompressedModel, decide: Decide, budget: Budget, steps: int) -> dict[str, Any]:
    """What must be equal where a state is loaded, in JSON's types: settings, and the network's layers and grids."""
    settings = {**asdict(decide), **asdict(budget), "steps": steps}
    for path in ("mask", "latency_table", "sensitivity"):  # a file may lie elsewhere
        settings.pop(path)
    for names in ("skip", "keep_float"):  # in any order, as sets have none
        settings[names] = sorted(settings[names])
    layers = {}
    for layer in net.network.layers:
        pair = net.quantizers(layer.name)
        layers[layer.name] = [list(layer.weight_shape), None if pair is None else pair[1].signed]
    record: dict[str, Any] = json.loads(json.dumps({"settings": settings, "layers": layers}, default=str))
    return record


def encode(record: Mapping[str, Any]) -> Tensor:
    """A record as bytes, uint8."""
    text = json.dumps({"format": FORMAT, **record}).encode()
    return torch.frombuffer(bytearray(text.ljust(-(-len(text) // PADDING) * PADDING)), dtype=torch.uint8)


def decode(state: Any) -> dict[str, Any]:
    """The record in bytes of `encode`. Raises JpqError for anything else."""
    try:
        if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
            raise ValueError("no bytes")
        record = untrusted.as_dict(untrusted.load_json(bytes(state.cpu().numpy()).decode()))
        if record.get("format") != FORMAT:
            raise ValueError(f"format {str(record.get('format'))[:20]}")
        untrusted.as_int(record["done"], 0, 2**62)
        untrusted.as_bool(record["searching"])
        untrusted.as_str(record.get("history", ""), untrusted.LARGEST)
        for name in ("plan", "second_plan"):
            if record[name] is not None:
                untrusted.as_str(record[name], untrusted.LARGEST)
        for name in ("settings", "layers"):
            untrusted.as_dict(record[name])
        return record
    except (ValueError, KeyError) as error:
        raise JpqError(
            f"The state dict holds no state of a CompressionSession that jpq wrote ({type(error).__name__}: {error})."
        ) from error


def check_same_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise JpqError where a state was saved under other settings, or of another network."""
    settings, other = own["settings"], saved["settings"]
    missing = object()
    # a setting that only one version of jpq knows is taken for equal
    different = [n for n, v in settings.items() if other.get(n, v) != v]
    if different:
        name, short = different[0], different[0].removeprefix("target_")
        raise JpqError(
            f"The state dict is of a session with {short}={other[name]!r}, and this one has "
            f"{short}={settings[name]!r}: make the session with the settings that it was saved with."
        )
    layers, other = own["layers"], saved["layers"]
    names = [name for name in {**layers, **other} if layers.get(name, missing) != other.get(name, missing)]
    if names:
        raise JpqError(
            f"The state dict is of a session of another network or example (layer '{names[0][:80]}' differs): make the "
            "session with the model and the example inputs that it was saved with."
        )
