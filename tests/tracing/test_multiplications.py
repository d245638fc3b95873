"""Every multiplication of a graph is counted: against torch's own counter, and again on the finalized model."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from multiplying_nets import IMAGE, NETS, ROWS, TOKENS, Code
from support.independent_count import count_macs
from thinned import thinned
from torch import Tensor, nn
from torchvision.ops import DeformConv2d
from traces import traced
from zoo import ZOO

import jpq
from jpq import costs
from jpq.compression.attach import attach
from jpq.export.count import measure
from jpq.export.rebuild import rebuild
from jpq.export.verify import difference
from jpq.methods.gates import Frozen
from jpq.methods.quantizers import Fixed
from jpq.tracing.forward import batch_size
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError

HARDEST = (
    *("gru", "lstm_projected", "sdpa", "windows", "matmul", "standardised", "low_rank", "encoder", "einsum_three"),
    *("read_past_module", "tied_convolution", "two_ways"),
)

CASES = thinned(NETS, lambda _, name: name in HARDEST)


def built(name: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    make, example = NETS[name]
    return make().eval(), example


def counted(model: nn.Module, example: object, name: str) -> int:
    """MACs of one sample by torch's own counter; where work depends on no input, of the first sample alone."""
    if name == "low_rank":
        example = example[:1]  # type: ignore[index]
    return count_macs(model, example) // batch_size(example)


@pytest.mark.parametrize("name", [name for name in NETS if name != "pruned"])
def test_macs_are_those_of_torchs_own_counter(name: str) -> None:
    model, example = built(name)
    assert trace(model, example).macs == counted(model, example, name)


@pytest.mark.parametrize("name", [name for name in ZOO if "unpacked" not in name])
def test_macs_of_zoo_nets_are_those_of_torchs_own_counter(name: str) -> None:
    model, example, network = traced(f"zoo_{name}")
    assert network.macs == counted(model, example, name)


@pytest.mark.parametrize("name", CASES)
def test_macs_of_the_decomposed_model_too(name: str) -> None:
    model, example = built(name)
    model = jpq.decompose(model, example)
    assert trace(model, example).macs == counted(model, example, name)


def landed(model: nn.Module, example: object, seed: int) -> tuple[list[costs.LayerUse], nn.Module]:
    """(uses under a plan of random units at random widths, the rebuilt model)."""
    network = trace(model, example)
    draw = torch.Generator().manual_seed(seed)

    def width() -> Fixed:
        return Fixed(int(torch.randint(2, 9, (), generator=draw)))

    def gate(rows: int, n: int) -> Frozen:
        keep = (torch.rand(rows, n, generator=draw) < 0.6).float()
        keep[:, 0] = 1
        return Frozen(keep)

    net = attach(model, network, channels(network), gate, lambda layer: (width(), width()), [example], "test")
    plan = net.plan()
    net.freeze(plan)
    return net.exact_usage(plan), rebuild(net, model)[0]


@pytest.mark.parametrize("decomposed", [False, True], ids=["as it is", "decomposed"])
@pytest.mark.parametrize("name", CASES)
def test_the_rebuilt_model_costs_what_its_plan_says(name: str, decomposed: bool) -> None:
    model, example = built(name)
    if decomposed or name == "pruned":
        model = jpq.decompose(model, example)
    uses, small = landed(model, example, 1)
    measured = measure(small, example)
    assert (measured["macs"], measured["bops"]) == (costs.macs(uses), costs.bops(uses))
    in_float = [u for u in uses if u.w_bits == 32]
    assert measured["float_macs"] == costs.macs(in_float)
    assert measured["macs"] == counted(small, example, name), "brevitas computes no other products"


@pytest.mark.parametrize("name", ["attention", "attention_by_hand", "attention_rigid", "transformer", "tokens"])
def test_products_shrink_with_heads(name: str) -> None:
    model, example, _ = traced(f"zoo_{name}")
    for seed in range(3):
        uses, small = landed(jpq.decompose(model), example, seed)
        assert measure(small, example)["bops"] == costs.bops(uses)


@pytest.mark.parametrize(
    ("net", "example", "macs"),
    [  # torch's own counter leaves these out
        (Code(lambda s, x: s.b(x, 2 * x), b=nn.Bilinear(12, 12, 5)), ROWS, 12 * 12 * 5 + 12 * 5),
        (Code(lambda s, x: torch.cdist(x, s.book), book=(40, 12)), TOKENS, 6 * 40 * 14),
        (Code(lambda s, x: torch.linalg.multi_dot([x, s.a, s.b]), a=(12, 9), b=(9, 3)), ROWS, 12 * 9 * 3 + 12 * 3),
        (Code(lambda s, x: s.d(x, s.o(x)), d=DeformConv2d(3, 4, 1), o=nn.Conv2d(3, 2, 1)), IMAGE, 81 * (3 * 2 + 3 * 4)),
        (Code(lambda s, x: x * s.g, g=(12,)), ROWS, 0),
    ],
    ids=["bilinear", "distances", "chain", "deformable", "elementwise"],
)
def test_other_ops_are_counted_alike_in_the_graph_and_while_running(net: nn.Module, example: Tensor, macs: int) -> None:
    assert trace(net.eval(), example).macs == measure(net, example)["macs"] == macs


def test_half_of_the_heads_make_half_of_the_products() -> None:
    model, example = built("sdpa")
    model = jpq.decompose(model, example)
    net = jpq.compress(model, example, bops="90%").net
    site = next(site for site in net.sites if site.n == 4)
    full = {u.name: u for u in net.exact_usage()}
    plan = net.plan()
    half = {**plan.kept, site.name: (True, False, True, False)}
    uses = {u.name: u for u in net.exact_usage(replace(plan, kept=half))}
    for name in ("q@k", "weights@v"):
        assert costs.layer_macs(uses[name]) == Fraction(1, 2) * costs.layer_macs(full[name]) == 5 * 5 * 16 // 2
        assert costs.layer_bops(uses[name]) == costs.layer_macs(uses[name]) * 1024


def test_soft_and_exact_uses_agree_and_gradients_reach_the_products() -> None:
    model, example = built("sdpa")
    joint = jpq.compress(model, example, bops="60%", steps=10)
    soft, exact = joint.net.soft_usage(), joint.net.exact_usage()
    assert [u.name for u in soft] == [u.name for u in exact]
    assert float(costs.bops(soft)) == pytest.approx(float(costs.bops(exact)), rel=1e-5)
    products = [u for u in soft if u.part == "product"]
    costs.macs(products).backward()
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in joint.net.decisions()["gates"])


def test_work_on_constants_is_done_once_for_all_samples() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.randn(1, 3, 3, 2))
            self.query = nn.Parameter(torch.randn(4, 6))
            self.embed, self.read, self.ask = nn.Linear(2, 6), nn.Linear(6, 5), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            query = self.ask(self.query.expand(len(x), 4, 6))  # as many as there are samples
            return self.read(x + self.embed(self.places).mean((1, 2)) + query.mean(1))

    model = Positions().eval()
    of_one = 9 * 2 * 6 + 6 * 5 + 4 * 6 * 6
    assert count_macs(model, torch.randn(1, 6)) == of_one
    for samples in (1, 2, 3):
        example = torch.randn(samples, 6)
        assert trace(model, example).macs == of_one == measure(model, example)["macs"]


def test_two_sines_are_no_batch_of_two() -> None:
    class Fourier(nn.Module):
        def __init__(self, of_batch: bool) -> None:
            super().__init__()
            self.of_batch, self.embed, self.read = of_batch, nn.Conv2d(8, 6, 1), nn.Conv2d(3, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.zeros(len(x) if self.of_batch else 1, 4, 4) + torch.arange(4.0)
            angles = rows[..., None] / torch.arange(1.0, 5.0)
            waves = torch.stack([angles.sin(), angles.cos()], dim=4).flatten(3)  # [1, 4, 4, 8], by way of a size of 2
            return self.read(x) + self.embed(waves.permute(0, 3, 1, 2))

    for of_batch in (False, True):
        model = Fourier(of_batch).eval()
        of_one = count_macs(model, torch.randn(1, 3, 4, 4))
        assert of_one == 16 * 6 * (8 + 3)
        for samples in (1, 2, 3):
            example = torch.randn(samples, 3, 4, 4)
            assert trace(model, example).macs == of_one == measure(model, example)["macs"]


def test_layers_with_bare_and_computed_weights_have_names() -> None:
    def names(name: str) -> list[str]:
        return [layer.name for layer in trace(*built(name)).layers]

    assert names("two_bare_weights") == ["up", "down"]
    assert names("packed_weight") == [f"in_proj_weight[{i}]" for i in range(3)]
    assert names("addmm") == ["0", "2", "3"]
    assert names("tied_transpose") == names("tied_convolution") == ["e", "m", "e.weight"]
    assert names("read_past_module") == ["m", "m.weight", "o"]
    assert names("two_ways") == ["w", "m", "w#2"]
    assert names("multihead") == ["a.in_proj_weight", "a.out_proj"] or names("multihead") == ["a", "a.out_proj"]


@pytest.mark.parametrize("name", ["tied_transpose", "read_past_module", "tied_convolution", "two_ways"])
def test_a_weight_that_code_applies_again_stays_at_32_bits_there(name: str) -> None:
    model, example = built(name)
    session = jpq.compress(model, example, "uniform", bops="98%", steps=1)
    again = next(layer for layer in session.net.network.layers if layer.float_reason)
    if name != "tied_transpose":
        assert again.float_reason == f"'{again.weight}' is applied in another way by another call"
    small = session.finalize()
    assert difference(session.net, small, example) <= 1e-9
    assert measure(small, example)["bops"] == costs.bops(session.net.exact_usage())


@pytest.mark.parametrize(("scale", "words"), [(None, "with a bare parameter"), (0.5, "with a computed weight")])
def test_learned_queries_are_named_as_what_they_are(scale: float | None, words: str) -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Parameter(torch.randn(5, 16)), nn.Linear(6, 16)

        def forward(self, x: Tensor) -> Tensor:
            query = self.query if scale is None else (self.query * scale).tanh()
            query, key = (t.unflatten(-1, (4, 4)).transpose(-2, -3) for t in (query, self.key(x)))
            return query @ key.mT

    layers = {layer.name: layer for layer in trace(Queries().eval(), torch.randn(2, 3, 6)).layers}
    assert layers["query"].float_reason == f"aten.matmul {words}"
    assert layers["query"].macs == 5 * 16 * 3


def test_products_are_named_after_their_module() -> None:
    network = trace(*built("windows"))
    assert [(p.name, p.macs) for p in network.products] == [("matmul", 4 * 2 * 16 * 16 * 4), ("matmul_2", 8192)]
    assert [p.name for p in trace(*built("sdpa")).products] == ["q@k", "weights@v"]
    assert [p.name for p in trace(*built("gru")).products] == ["cell.cell"]


def test_the_size_counts_parameters_that_no_layer_owns_once() -> None:
    for name, tables in {
        "windows": {"table": 2 * 16 * 16},
        "low_rank": {"a": 16, "b": 24},
        "tied_transpose": {},
    }.items():
        model, example = built(name)
        network = trace(model, example)
        assert {t.name: t.numbers for t in network.tables} == tables
        wide = sum(p.numel() for p in model.parameters() if p.dim() > 1)
        assert sum(layer.weights for layer in network.layers) + sum(t.numbers for t in network.tables) == wide


def test_a_target_below_the_work_at_32_bits_is_refused_by_its_name() -> None:
    model, example = built("sdpa")
    with pytest.raises(JpqError, match=r"are at 32 bits, which jpq cannot lower: 2 products.*q@k"):
        jpq.compress(model, example, bops="1%")


def test_a_target_below_layers_that_were_kept_at_32_bits_names_the_flag() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    with pytest.raises(JpqError) as caught:
        jpq.compress(model, torch.randn(4, 8), bops="1%", keep_float=["2"])
    assert "are at 32 bits because --keep-float, or 32/32 in --bits, says so: 1 layer" in caught.value.command_line
    assert "keep fewer layers in floating point (--keep-float, --bits)" in caught.value.command_line
    assert "jpq cannot lower" not in caught.value.command_line


def test_compress_warns_of_work_at_32_bits() -> None:
    model, example = built("sdpa")
    with pytest.warns(UserWarning, match=r"stays at 32 bits: 2 products, .* % of the MACs: q@k, weights@v"):
        jpq.compress(model, example, bops="60%")
