"""Latency of layers under mask structures: by a measured table, else by a roofline model of compute and memory.

    ms = max(macs * density * (1 + LOOKUP_MACS / w) / MACS_PER_MS,
             weights * density * (1 + INDEX_BYTES / w) / BYTES_PER_MS)

w is the number of weights that share one look-up of an index (`weights_per_lookup`), infinite without a mask. Both
terms fall as w grows, so a coarser structure at the same density is never slower. Form: Y. Gong et al.,
arXiv:2111.11581, `MACs * density * eta(scheme, block) + o(scheme, block)`, as the larger of computing (eta) and
reading (o). The paper's phone model is unknown: the numbers below are chosen, for one core with eight 8-bit lanes. They
rank block sizes; no phone's speed follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

from torch import Size

from jpq.allocation.structure_projection import kept_share
from jpq.costs.latency import NS
from jpq.costs.latency_table import MODELLED
from jpq.methods.structures import KernelPattern, Structure, parse_structure
from jpq.tracing.network import Layer, Network
from jpq.tracing.sites import weight_layout
from jpq.types import DENSE

Latency = Callable[[Layer, str, float], float]  # (layer, structure, share of weights that stays) -> ms of one sample

MACS_PER_MS = 8e6
BYTES_PER_MS = 4e6
LOOKUP_MACS = 8.0  # multiply-accumulates that take as long as one look-up of an index
INDEX_BYTES = 2.0  # bytes of one index; a weight has one byte


def layer_ms(layer: Layer, structure: str, share: float) -> float:
    """Latency of a layer at 8 bits, in ms of one sample, by its table of latencies; by the roofline where it has none.

    For structures that the table has no measured lines of: the dense layer's time, times the gain by the roofline.

    share: of the weights that stays.
    """
    if layer.clock is None:
        return modelled_ms(layer, structure, share)
    measured = layer.clock.measured(structure)
    time_ns = layer.clock(1, 1, Fraction(share) if measured else 1, 8, 8, structure if measured else DENSE)
    gain = 1.0 if measured else modelled_ms(layer, structure, share) / modelled_ms(layer, DENSE, 1.0)
    return float(time_ns) / NS * gain


def modelled_ms(layer: Layer, structure: str, share: float) -> float:
    """Modelled latency of a layer by the roofline, in ms of one sample; share: of the weights that stays."""
    mask_structure = None if structure == DENSE else parse_structure(structure, weight_layout(layer))
    return roofline_ms(layer.macs, Size(layer.weight_shape), mask_structure, share)


def roofline_ms(macs: int, weight: Size, structure: Structure | None, density: float) -> float:
    """Roofline latency of one sample in ms: the larger of compute and memory time.

    density: share of the weights that stays; taken as 1 without a structure.
    """
    w = float("inf") if structure is None else weights_per_lookup(structure, weight)
    share = 1.0 if structure is None else density
    compute = macs * share * (1 + LOOKUP_MACS / w) / MACS_PER_MS
    return max(compute, weight.numel() * share * (1 + INDEX_BYTES / w) / BYTES_PER_MS)


def weights_per_lookup(structure: Structure, weight: Size) -> float:
    """w: mean number of weights that share one look-up of an index.

    In a partition these are the weights of a unit. A kernel's pattern serves its positions in all filters with the same
    pattern: kernels that read one channel are sorted by pattern (W. Niu et al., PatDNN, arXiv:2001.00138).
    """
    sizes = structure.sizes(weight)
    mean = float(sizes.sum() / (sizes > 0).sum())
    if isinstance(structure, KernelPattern):
        _, outputs, _, _ = structure.layout.sides(weight)
        return mean * max(1.0, outputs / len(structure.patterns))
    return mean


def mapping_ms(
    network: Network, mapping: Mapping[str, str], density: float | Mapping[str, float], latency: Latency = layer_ms
) -> dict[str, float]:
    """Latency of each layer under a mapping, in ms of one sample; layers that it leaves out are dense.

    density: the density to prune to, or, by layer, the share of the weights that stayed.
    """
    latencies = {}
    for layer in network.layers:
        structure = mapping.get(layer.name, DENSE)
        share = density[layer.name] if isinstance(density, Mapping) else kept_share(layer, structure, density)
        latencies[layer.name] = latency(layer, structure, share)
    return latencies


def latency_source(network: Network, mapping: Mapping[str, str]) -> str:
    """Source of a mapping's latencies: "measured", "modelled", or "measured layers, modelled masks"."""
    clocks = [(layer.clock, mapping.get(layer.name, DENSE)) for layer in network.layers]
    if any(clock is None for clock, _ in clocks):
        return MODELLED
    measured = all(clock is not None and clock.measured(structure) for clock, structure in clocks)
    return "measured" if measured else "measured layers, modelled masks"
