"""Weights of every kind of layer, structures that fit them, and which unit each weight belongs to, by plain loops."""

from itertools import product
from math import ceil, prod

from torch import Size

from jpq.methods.structures import WeightLayout, parse_structure
from jpq.types import JpqError

WEIGHTS = {  # name: (size, layout)
    "linear": ((6, 10), WeightLayout()),
    "narrow": ((5, 3), WeightLayout()),
    "conv1d": ((4, 6, 5), WeightLayout()),
    "conv": ((6, 7, 3, 3), WeightLayout()),
    "first": ((8, 3, 3, 3), WeightLayout()),
    "pointwise": ((5, 9, 1, 1), WeightLayout()),
    "oblong": ((3, 5, 1, 4), WeightLayout()),
    "conv3d": ((3, 5, 2, 3, 2), WeightLayout()),
    "grouped": ((6, 5, 3, 3), WeightLayout(groups=2)),
    "depthwise": ((7, 1, 3, 3), WeightLayout(groups=7)),
    "transposed": ((7, 4, 3, 3), WeightLayout(transposed=True)),
    "transposed1d": ((5, 3, 4), WeightLayout(transposed=True)),
    "transposed-grouped": ((10, 3, 3, 3), WeightLayout(transposed=True, groups=2)),
}
SPECS = [
    "elementwise",
    "per-output",
    "per-output:2",
    "kernels",
    "filters",
    "inputs",
    "2:4",
    "1:4",
    "1:2",
    "3:5",
    "2:100",
    "block:1x1",
    "block:2x3",
    "block:4x4",
    "block:*x1",
    "block:1x*",
    "block:100x7",
    "block:5x2",
    "punched:2x4",
    "punched:4x2",
    "punched:*x1",
    "punched:3x*",
    "pattern",
    "pattern:2",
    "pattern:3x3:0.8/4/1.2.3.5.6.7",
]


def cases():
    """(spec, name of a weight, structure, size) of all that is legal."""
    for spec, (name, (size, layout)) in product(SPECS, WEIGHTS.items()):
        structure = parse_structure(spec, layout)
        try:
            structure.shape(Size(size))
        except JpqError:
            continue
        yield spec, name, structure, Size(size)


def refused():
    """(spec, name of a weight) of all that is not."""
    legal = {(spec, name) for spec, name, *_ in cases()}
    return set(product(SPECS, WEIGHTS)) - legal


def coordinates(size, layout):
    """{index of a weight: (group, output in it, input in it, tap)}, from the layouts that torch documents."""
    kernel = size[2:]
    found = {}
    for index in product(*map(range, size)):
        first, second, *at = index
        tap = 0
        for i, n in zip(at, kernel, strict=True):
            tap = tap * n + i
        per = size[0] // layout.groups
        group, own = divmod(first, per)
        out, inn = (second, own) if layout.transposed else (own, second)
        found[index] = (group, out, inn, tap)
    return found


def units(spec, size, layout):
    """{index of a weight: (row, column)} for structures that are partitions."""
    where = coordinates(size, layout)
    outs, ins, taps = (1 + max(c[d] for c in where.values()) for d in (1, 2, 3))
    name, _, rest = spec.partition(":")
    if name.isdigit():
        name = "window"
    sides = [None if s == "*" else int(s) for s in rest.split("x")] if rest else []
    unit_of = (_tile_of if name in ("block", "punched") else _line_of)(name, sides, outs, ins, taps)
    found = {index: unit_of(flat, *at) for flat, (index, at) in enumerate(where.items())}
    assert len(found) == prod(size)
    return found


def _line_of(name, sides, outs, ins, taps):
    """(row, column) of a weight, from its place in memory and its (group, output, input, tap): units along dims."""

    def unit(flat, group, out, inn, tap):
        neuron = group * outs + out
        if name == "elementwise":
            return 0, flat
        if name == "per-output":
            return divmod(neuron * ins * taps + inn * taps + tap, ins * taps // (sides[0] if sides else 1))
        if name == "kernels":
            return neuron, inn
        if name == "filters":
            return 0, neuron
        if name == "inputs":
            return 0, group * ins + inn
        assert name == "window"
        width = min(sides[0], ins)
        return (neuron * taps + tap) * ceil(ins / width) + inn // width, inn % width

    return unit


def _tile_of(name, sides, outs, ins, taps):
    """The same for tiles of so many outputs and inputs: over all taps (block) or at each tap (punched)."""

    def unit(flat, group, out, inn, tap):
        column, columns = (inn * taps + tap, ins * taps) if name == "block" else (inn, ins)
        height, width = sides[0] or outs, sides[1] or columns
        tile = (group * ceil(outs / height) + out // height) * ceil(columns / width) + column // width
        return 0, tile if name == "block" else tile * taps + tap

    return unit
