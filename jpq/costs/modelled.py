"""What masks might gain where nobody measured a kernel for them: a model, never a measurement.

    ms(scheme, density) = ms_dense * min(1, density * (1 + SLOW / b) + INDEX / b)

b is the number of weights that one index stands for: those of a unit (of block:8x4, 32), times the units of a row where
a structure counts them (2:4, 4; a pattern's choices). Larger blocks are never slower at the same density; a mask that
would not pay runs dense. Masks that no device is known to skip gain nothing. The form is that of the scheme mapping
sheet, `MACs * density * eta(block) + o(block)`; both constants are ours, and no speed-up may be claimed from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Size

from jpq.costs.base import DENSE
from jpq.costs.table import MODELLED, Entry, Shape, Table
from jpq.structures import Layout, parse
from jpq.types import JpqError

SLOW = 4.0  # how much longer a single weight takes that is found by an index of its own
INDEX = 0.5  # reading all indices, as a share of the dense time
DENSITIES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


def modelled(table: Table, schemes: Sequence[str]) -> Table:
    """The table with lines for masks of these schemes where it has none; their column `source` says "modelled".

    A scheme that makes no sense for a layer (patterns on 1x1 kernels) gets no line there.
    Raises JpqError for a scheme that is no structure.
    """
    known = {(e.shape, e.scheme) for e in table.entries}
    more = []
    for scheme in schemes:
        parse(scheme)
        for e in table.entries:
            share = _weights_per_index(scheme, e) if e.scheme == DENSE and (e.shape, scheme) not in known else None
            if share is None:
                continue
            for density in DENSITIES:
                ratio = min(1.0, density * (1 + SLOW / share) + INDEX / share)
                more.append(replace(e, scheme=scheme, density=density, ms=e.ms * ratio, notes={"source": MODELLED}))
    return replace(table, entries=(*table.entries, *more))


def _weights_per_index(scheme: str, e: Entry) -> float | None:
    """b; None where the mask gains nothing or makes no sense."""
    size = _weight(e.shape, e.inputs, e.outputs)
    transposed = e.shape.kind == "conv_transpose"
    groups = e.inputs if e.shape.kind == "depthwise" else e.shape.groups
    structure = parse(scheme, Layout(groups=groups, transposed=transposed))
    try:
        structure.shape(size)
        units = structure.sizes(size)
    except JpqError:
        return None
    if not structure.regular:
        return None
    row = units.shape[1] if structure.quota() is not None else 1
    return max(1.0, float(units.max())) * row


def _weight(shape: Shape, inputs: int, outputs: int) -> Size:
    if shape.kind == "depthwise":
        return Size((outputs, 1, *shape.kernel))
    if shape.kind == "conv_transpose":
        return Size((inputs, max(1, outputs // shape.groups), *shape.kernel))
    return Size((outputs, max(1, inputs // shape.groups), *shape.kernel))
