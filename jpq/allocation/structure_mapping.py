"""The mapping of a run's layers to mask structures (by name, rules or search), and its record, `schemes.json`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jpq.allocation.structure_latency import Latency, latency_source, layer_ms, mapping_ms
from jpq.allocation.structure_rules import apply_rules, cheapest_mapping, is_hard_task
from jpq.config import RULES, SEARCH
from jpq.files import untrusted
from jpq.files.atomic import replace_file
from jpq.methods.compatibility import is_allowed
from jpq.methods.structures import parse_layers
from jpq.methods.table import Method
from jpq.tracing.network import Network
from jpq.types import DENSE, JpqError, unknown

MAPPING_FILE = "schemes.json"


def map_structures(
    method: Method,
    network: Network,
    example: Any,
    density: float,
    skip: Collection[str] = (),
    latency: Latency = layer_ms,
) -> dict[str, str] | None:
    """Choose the mapping {layer: structure} of a method with a structure per layer; None where all have the same.

    Before a search the mapping is the cheapest there is, which tells whether a target is possible.
    Raises JpqError for a layer that the model does not have.
    """
    allowed = is_allowed(method)
    if method.structure == RULES:
        hard_task = is_hard_task(network, example)
        return apply_rules(network, density, hard_task, is_allowed=allowed, skip=skip, latency=latency)
    if method.structure == SEARCH:
        return cheapest_mapping(network, density, is_allowed=allowed, skip=skip)
    structures = parse_layers(method.structure)
    names = [layer.name for layer in network.layers]
    for name in structures:
        if name not in names:
            raise unknown("layer", name, names)
    return {name: structures.get(name, DENSE) for name in names} if structures else None


def mapping_record(
    network: Network, mapping: Mapping[str, str], density: float | Mapping[str, float], chosen_by: str
) -> dict[str, Any]:
    """The record of a mapping as plain data: every layer's structure and latency in ms, and the latency's source.

    Args:
        density: the density to prune to, or, by layer, the share of the weights that stayed.
        chosen_by: "rules", "search" or the setting that gave the mapping.
    """
    latencies = mapping_ms(network, mapping, density)
    dense = mapping_ms(network, {}, 1.0)
    return {
        "by": chosen_by,
        "latency": latency_source(network, mapping),
        "ms": sum(latencies.values()),
        "dense_ms": sum(dense.values()),
        "layers": {name: {"structure": mapping.get(name, DENSE), "ms": latencies[name]} for name in latencies},
    }


def save_mapping(path: Path, record: Mapping[str, Any]) -> None:
    """Write a mapping's record as JSON, for the reader and for a run that is resumed."""
    replace_file(path, lambda part: part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))


def read_mapping(path: Path) -> dict[str, str]:
    """Read the mapping, layer -> structure, of a record. Raises JpqError for a file that is no record."""
    try:
        layers = untrusted.as_dict(
            untrusted.as_dict(untrusted.parse_json(untrusted.read_text(path), str(path)))["layers"]
        )
        return {name: untrusted.as_str(untrusted.as_dict(layer)["structure"]) for name, layer in layers.items()}
    except (JpqError, ValueError, KeyError) as error:
        raise JpqError(f"{path} is not a mapping of schemes that jpq wrote; start anew without --resume.") from error
