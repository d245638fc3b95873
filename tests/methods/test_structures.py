"""Laws of the structures, over the table and every kind of weight; each against plain loops; what they refuse."""

import time
from itertools import combinations

import numpy as np
import pytest
import torch
from masks import SPECS, WEIGHTS, cases, coordinates, refused, units
from torch import Size, nn

from jpq.methods.structures import (
    STRUCTURES,
    Axis,
    Block,
    BlockPunched,
    KernelPattern,
    Kernels,
    WeightLayout,
    Window,
    parse_structure,
)
from jpq.testing import check_structure
from jpq.types import NONE, JpqError

CASES = list(cases())
each = pytest.mark.parametrize(
    ("spec", "structure", "size"), [(s, x, z) for s, _, x, z in CASES], ids=[f"{s}-{n}" for s, n, *_ in CASES]
)


def check_against_plain_loops(spec, structure, size):
    """Every weight carries the unit that plain loops over the layer's coordinates find for it."""
    z = torch.randn(structure.shape(size), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = structure.expand(z, size).expand(size)
    if isinstance(structure, KernelPattern):
        for index, (g, o, i, t) in coordinates(size, structure.layout).items():
            _, outs, ins, _ = structure.layout.sides(size)
            row = z[(g * outs + o) * ins + i]
            want = sum(row[p] for p, kept in enumerate(structure.patterns) if t in kept)
            assert mask[index] == pytest.approx(float(want), abs=1e-12)
        return
    for index, unit in units(spec, size, structure.layout).items():
        assert mask[index] == z[unit]


@each
def test_every_structure_on_every_weight_it_takes(spec, structure, size):
    """The laws of `jpq.testing`, and the oracle of plain loops."""
    check_structure(structure, [tuple(size)])
    check_against_plain_loops(spec, structure, size)
    assert parse_structure(structure.spec(), structure.layout) == structure


def test_every_name_of_the_table_is_tested_on_every_kind_of_weight_it_takes():
    assert {"window" if s[0].isdigit() else s.partition(":")[0] for s in SPECS} == set(STRUCTURES)
    flat = {"linear", "narrow"}
    for spec, name in refused():
        kind = spec.partition(":")[0]
        size, layout = WEIGHTS[name]
        _, _, ins, taps = layout.sides(Size(size))
        if kind in ("kernels", "punched"):
            assert name in flat
        elif kind == "pattern":
            assert tuple(size[2:]) != (3, 3)
        elif kind == "per-output":
            assert ins * taps % 2
        else:
            assert kind.isdigit(), (spec, name)
            assert ins <= int(kind)


def test_windows_run_over_input_channels_at_one_kernel_position():
    """What a sparse tensor core reads of a channels-last product [out, kernel, in]: four neighbours, two kept."""
    torch.manual_seed(0)
    size = Size((8, 12, 3, 3))
    window = Window(2, 4)
    weight = torch.randn(size)
    rows = window.pool(weight)
    assert torch.equal(rows, weight.permute(0, 2, 3, 1).reshape(-1, 4))
    best = rows.abs().argsort(1, descending=True)[:, :2]
    mask = window.expand(torch.zeros_like(rows).scatter(1, best, 1.0), size)
    assert bool((mask.permute(0, 2, 3, 1).reshape(-1, 4).sum(1) == 2).all())
    assert not bool((mask.flatten(1).reshape(-1, 4).sum(1) == 2).all())  # in torch's own order it is no 2:4


def test_a_ragged_window_is_what_padding_the_channels_gives():
    size = Size((2, 7, 3, 3))
    window = Window(2, 4)
    assert window.shape(size) == (2 * 9 * 2, 4)
    assert window.valid(size).sum(1).tolist() == [4, 3] * 18
    assert window.valid(Size((2, 8, 3, 3))) is None
    assert Window(2, 4).shape(Size((2, 3))) == (2, 3)  # a window is never wider than the inputs


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_layer_is_masked_like_the_convolution_that_it_undoes(groups):
    """Output neuron (g, j) of a transposed layer reads weight[g's inputs, j]: seen through the layer itself."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    layout = WeightLayout(transposed=True, groups=groups)
    for o in range(6):
        z = torch.zeros(1, 6)
        z[0, o] = 1
        mask = parse_structure("filters", layout).expand(z, layer.weight.shape)
        out = nn.functional.conv_transpose2d(torch.randn(1, 4, 5, 5), layer.weight * mask, groups=groups)
        assert out.abs().sum((0, 2, 3)).nonzero().flatten().tolist() == [o]
    for i in range(4):
        z = torch.ones(1, 4)
        z[0, i] = 0
        mask = parse_structure("inputs", layout).expand(z, layer.weight.shape)
        x = torch.zeros(1, 4, 5, 5)
        x[0, i] = 1.0
        assert not nn.functional.conv_transpose2d(x, layer.weight * mask, groups=groups).any()


class TestPatterns:
    def test_the_worked_example_of_the_sheet(self):
        kernel = torch.tensor([[0.1, 0.9, 0.2], [0.3, 1.0, 0.8], [0.2, 0.4, 0.1]])[None, None]
        pattern = KernelPattern()
        energy = pattern.pool(kernel.square())[0].tolist()  # without down, right, left, up
        assert energy == pytest.approx([2.54, 2.06, 2.61, 1.89])
        z = torch.eye(4)[[energy.index(max(energy))]]
        kept = kernel * pattern.expand(z, kernel.shape)
        assert torch.equal(kept[0, 0], torch.tensor([[0, 0.9, 0], [0, 1.0, 0.8], [0, 0.4, 0]]))
        assert (kernel - kept).square().sum() == pytest.approx(0.19)

    def test_a_pattern_then_connectivity_is_the_nearest_of_all(self):
        torch.manual_seed(1)
        weight, keep = torch.randn(1, 3, 3, 3), 2
        size, pattern, kernels = weight.shape, KernelPattern(), Kernels()
        z = torch.eye(4)[pattern.pool(weight.square()).argmax(1)]
        patterned = weight * pattern.expand(z, size)
        norms = kernels.pool(patterned.square())
        best = torch.zeros_like(norms).scatter(1, norms.topk(keep).indices, 1.0)
        mask = pattern.expand(z, size) * kernels.expand(best, size)
        assert torch.equal(mask, pattern.expand(z * best.reshape(-1, 1), size))  # a row of zeros says the same
        least = min(
            (weight - weight * pattern.expand(torch.eye(4)[list(choice)], size) * kernels.expand(open_, size))
            .square()
            .sum()
            for choice in np.ndindex(4, 4, 4)
            for open_ in (torch.zeros(1, 3).index_fill(1, torch.tensor(c), 1.0) for c in combinations(range(3), keep))
        )
        assert (weight - weight * mask).square().sum() == pytest.approx(float(least))

    def test_libraries(self):
        assert len(KernelPattern.centred(4).patterns) == 56
        assert all(len(p) == 4 and 4 in p for p in KernelPattern.centred(4).patterns)
        weight = torch.zeros(5, 2, 3, 3)
        weight[:3, :, 0, :] = 1.0  # six kernels like the upper row
        weight[3:, :, 2, :] = -1.0  # four like the lower one
        weight[:, :, 1, 1] = 0.01
        found = KernelPattern.frequent([torch.randn(4, 4, 1, 1), weight], k=4, n=2)
        assert found.patterns == ((0, 1, 2, 4), (4, 6, 7, 8))
        assert len(KernelPattern.frequent([weight], k=4, n=8).patterns) == 2
        for bad in (lambda: KernelPattern.frequent([torch.ones(2, 2)]), lambda: KernelPattern(((0, 9),))):
            with pytest.raises(JpqError):
                bad()


def test_punched_blocks_and_blocks_coincide_where_the_kernel_is_one_point():
    size = Size((6, 10, 1, 1))
    z = torch.randn(BlockPunched(4, 3).shape(size))
    assert torch.equal(BlockPunched(4, 3).expand(z, size), Block(4, 3).expand(z, size))


def test_axis_keeps_the_contract():
    axis = Axis(1, np.array([0, 1, NONE, 0, 2]), 3)
    size = Size((4, 5, 3, 3))
    assert axis.valid(size) is None
    assert axis.sizes(size).tolist() == [[72, 36, 36]]
    assert axis.quota() is None
    with pytest.raises(JpqError, match="traced network"):
        axis.spec()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("blok:8x4", "Did you mean block"),
        ("per_output", "per-output"),
        ("", "Choose from"),
        ("2:5:3", "Unknown structure '2'"),
        ("4:4", "is not a window"),
        ("0:4", "is not a window"),
        ("block", "block:AxB"),
        ("block:8", "block:AxB"),
        ("block:0x4", "no area"),
        ("block:8x-4", "block:AxB"),
        ("window:*:4", "N:M"),
        ("kernels:2", "write kernels"),
        ("per-output:9999999999", "write per-output"),
        ("pattern:9", "1 to 8"),
        ("pattern:3x3:", "Cannot read"),
        ("pattern:3x3:1.1", "different sets"),
        ("pattern:3x3:1.2/2.1", "different sets"),
        ("pattern:99x99:1", "at most"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_write(text, match):
    with pytest.raises(JpqError, match=match):
        parse_structure(text)


@pytest.mark.parametrize(
    ("spec", "size", "layout", "match"),
    [
        ("2:4", (8, 1, 3, 3), WeightLayout(groups=8), "Leave this layer dense"),
        ("kernels", (8, 4), WeightLayout(), "use per-output"),
        ("punched:8x4", (8, 4), WeightLayout(), "use block"),
        ("pattern", (8, 4, 5, 5), WeightLayout(), "3 x 3"),
        ("per-output:4", (8, 6), WeightLayout(), "choose a divisor"),
        ("filters", (8,), WeightLayout(), "2 to 5 dims"),
        ("elementwise", (0, 4), WeightLayout(), "none empty"),
        ("block:2x2", (8, 4, 3, 3), WeightLayout(groups=3), "3 groups"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(spec, size, layout, match):
    with pytest.raises(JpqError, match=match):
        parse_structure(spec, layout).shape(Size(size))


@pytest.mark.parametrize("spec", [s for s in SPECS if s != "per-output:2"])
def test_cheap_on_a_large_layer(spec):
    """512 x 512 x 3 x 3: a tenth of a second, where a loop over units takes minutes (processor time)."""
    weight = torch.randn(512, 512, 3, 3)
    structure = parse_structure(spec)
    z = torch.rand(structure.shape(weight.shape), requires_grad=True)
    start = time.process_time()
    (structure.expand(z, weight.shape) * weight).sum().backward()
    structure.pool(weight)
    assert time.process_time() - start < 5
