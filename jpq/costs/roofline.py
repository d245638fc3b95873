"""How long a layer with a mask would take: modelled, never measured.

    ms = max(MACs * density * (1 + LANES / w) / MACS_A_MS,  weights * density * (1 + INDEX / w) / BYTES_A_MS)

w is how many weights one look-up of an index serves (`together`); without a mask it is infinite. Both terms fall as w
grows, so a coarser variant at the same density is never slower. Form: Y. Gong et al., arXiv:2111.11581, `MACs * density
* eta(scheme, block) + o(scheme, block)`, as the larger of computing (eta) and reading (o). The paper's phone model is
unknown: the numbers below are chosen, for one core with eight 8-bit lanes. They rank block sizes; no phone's speed
follows from them.
"""

from __future__ import annotations

from torch import Size

from jpq.structures import KernelPattern, Structure

MACS_A_MS = 8e6  # eight a nanosecond
BYTES_A_MS = 4e6
LANES = 8.0  # multiply-accumulates that one look-up takes the time of
INDEX = 2.0  # bytes of one index; a weight has one byte


def together(structure: Structure, weight: Size) -> float:
    """w: weights that one look-up serves, on average.

    Of a partition the weights of a unit. A kernel's pattern serves its positions in all filters that have the same one:
    kernels that read one channel are sorted by pattern (W. Niu et al., PatDNN, arXiv:2001.00138).
    """
    sizes = structure.sizes(weight)
    mean = float(sizes.sum() / (sizes > 0).sum())
    if isinstance(structure, KernelPattern):
        _, outputs, _, _ = structure.layout.sides(weight)
        return mean * max(1.0, outputs / len(structure.patterns))
    return mean


def roofline(macs: int, weight: Size, structure: Structure | None, density: float) -> float:
    """Milliseconds of one sample. `density`: the share of the weights that stays; 1 is meant without a structure."""
    w = float("inf") if structure is None else together(structure, weight)
    share = 1.0 if structure is None else density
    compute = macs * share * (1 + LANES / w) / MACS_A_MS
    return max(compute, weight.numel() * share * (1 + INDEX / w) / BYTES_A_MS)
