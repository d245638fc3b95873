"""Module decomposition: attention and weight norms as plain layers with equal outputs, heads as units, up to ONNX."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from outputs import gap
from thinned import thinned
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from traces import traced_network
from zoo import randomised
from zoo.attention import PACKED, Vision

import jpq
from jpq.compression.attach import attach
from jpq.config import Budget, Config, Run, Task, Train
from jpq.export.float_equivalence import check_equivalence, float64_outputs, relative_difference
from jpq.export.runtimes import Session
from jpq.export.verify import compare
from jpq.methods.gates import HardConcrete
from jpq.methods.quantizers import Fixed
from jpq.tracing.attention import Attention, Encoder
from jpq.tracing.decompose import decompose
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError

B, L, S = 3, 4, 6


def attention(heads: int = 4, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, heads, dtype=torch.double, **options).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


G = torch.Generator().manual_seed(1)
HIDDEN, PADDED = torch.rand(L, S, generator=G) < 0.3, torch.rand(B, S, generator=G) < 0.3
HIDDEN[:, 0] = PADDED[:, 0] = False
UPPER = torch.full((L, S), float("-inf"), dtype=torch.double).triu(1)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "truth": {"attn_mask": HIDDEN},
    "numbers": {"attn_mask": torch.randn(L, S, generator=G, dtype=torch.double)},
    "each head": {},
    "causal": {"attn_mask": UPPER, "is_causal": True},
    "padding": {"key_padding_mask": PADDED},
    "padding by numbers": {"key_padding_mask": torch.randn(B, S, generator=G, dtype=torch.double)},
    "both": {"attn_mask": HIDDEN, "key_padding_mask": PADDED},
    "causal and padding": {"attn_mask": UPPER, "is_causal": True, "key_padding_mask": PADDED.double()},
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"kdim": 7, "vdim": 5},
    {"kdim": 7, "vdim": 5, "bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5},
]


# fast: every mask and every option, half of their pairs
@pytest.mark.parametrize(
    ("kind", "options"), thinned(itertools.product(MASKS, OPTIONS), lambda i, _: i % 2 == 0), ids=str
)
def test_attention_computes_what_torch_computes(kind: str, options: dict[str, Any]) -> None:
    for heads, batch_first, weights, average in itertools.product((1, 4), (True, False), (True, False), (True, False)):
        theirs = attention(heads, batch_first=batch_first, **options)
        ours = decompose(theirs)
        assert type(ours) is Attention
        assert ours.num_heads == heads
        g = torch.Generator().manual_seed(2)
        inputs = [
            torch.randn(B, n, d, generator=g, dtype=torch.double)
            for n, d in ((L, 8), (S, theirs.kdim), (S, theirs.vdim))
        ]
        inputs = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
        arguments = {"need_weights": weights, "average_attn_weights": average, **MASKS[kind]}
        if kind == "each head":
            arguments["attn_mask"] = torch.randn(B * heads, L, S, generator=g, dtype=torch.double)
        expected, actual = theirs(*inputs, **arguments), ours(*inputs, **arguments)
        assert relative_difference([expected[0]], [actual[0]]) < 1e-12
        assert actual[1] is None if not weights else relative_difference([expected[1]], [actual[1]]) < 1e-12


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_without_a_batch_dim(batch_first: bool) -> None:
    theirs = attention(batch_first=batch_first)
    x, padded = torch.randn(S, 8).double(), torch.arange(S) > 3
    for expected, actual in zip(*(m(x, x, x, padded) for m in (theirs, decompose(theirs))), strict=True):
        assert relative_difference([expected], [actual]) < 1e-12


def test_attention_learns_as_torch_does() -> None:
    theirs = attention(batch_first=True).train()
    ours, x = decompose(theirs), torch.randn(B, S, 8).double()
    for m in (theirs, ours):
        m(x, x, x)[0].square().sum().backward()
    assert ours.training
    split = torch.cat([ours.q_proj.weight.grad, ours.k_proj.weight.grad, ours.v_proj.weight.grad])
    assert relative_difference([theirs.in_proj_weight.grad], [split]) < 1e-12
    assert relative_difference([theirs.out_proj.bias.grad], [ours.out_proj.bias.grad]) < 1e-12


def test_attention_drops_out() -> None:
    ours, x = decompose(attention(batch_first=True, dropout=0.9).train()), torch.randn(B, S, 8).double()
    for weights in (True, False):
        assert not torch.equal(ours(x, x, x, need_weights=weights)[0], ours(x, x, x, need_weights=weights)[0])


def test_attention_refuses_a_hint_without_its_mask() -> None:
    x = torch.randn(B, S, 8).double()
    with pytest.raises(JpqError, match="give that mask"):
        decompose(attention())(x, x, x, is_causal=True)


@pytest.mark.parametrize("name", PACKED)
def test_unpacked_computes_the_same(name: str) -> None:
    make, example = PACKED[name]
    torch.manual_seed(0)
    model = randomised(make())
    for p in model.parameters():
        p.requires_grad_(False)
    before = float64_outputs(model, example)
    new = decompose(model)
    assert relative_difference(before, float64_outputs(new, example)) < 1e-12
    assert relative_difference(before, float64_outputs(model, example)) == 0.0, "the model itself must stay as it is"
    assert not any(p.requires_grad for p in new.parameters())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_padding_is_as_without_the_fast_path(kind: str) -> None:
    torch.manual_seed(0)
    part: Any = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, nn.LayerNorm(8))
    if kind == "decoder":
        part = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2)
    part = randomised(part)
    x, padded = torch.randn(2, 5, 8).double(), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    inputs = (x,) if kind == "encoder" else (x, x)
    masks = {"src_key_padding_mask" if kind == "encoder" else "tgt_key_padding_mask": padded}
    decomposed = decompose(part)
    slow = part(*inputs, **masks)  # torch takes the fast path only where no gradient is asked for
    with torch.no_grad():
        fast = part(*inputs, **masks)
        plain = decomposed(*inputs, **masks)
    assert relative_difference([slow], [plain]) < 1e-12
    assert relative_difference([fast[~padded]], [plain[~padded]]) < 1e-12


def test_a_quantized_encoder_layer_takes_no_fast_path() -> None:
    layer = decompose(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval())
    called = []
    layer.linear1.register_forward_pre_hook(lambda *_: called.append(1))
    layer.linear1._forward_pre_hooks, hooks = {}, layer.linear1._forward_pre_hooks  # torch looks for hooks
    layer.activation = lambda x: (called.append(1), F.relu(x))[1]
    with torch.no_grad():
        layer(torch.randn(2, 3, 8))
    assert called
    assert hooks


def test_shared_stays_shared_and_watched_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = attention()
            self.b, self.c, self.d = self.a, attention(), attention()
            self.d.in_proj_weight = self.c.in_proj_weight
            self.e = attention()
            self.e.register_forward_hook(lambda *_: None)

    model = decompose(Twice())
    assert type(model.a) is Attention
    assert model.b is model.a
    for kept in (model.c, model.d, model.e):
        assert type(kept) is nn.MultiheadAttention
    assert model.d.in_proj_weight is model.c.in_proj_weight


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm]
)
def test_norms_are_folded(norm: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(32, 4))).double()
    x = torch.randn(2, 3, 4, 4).double()
    model(x).sum().backward()  # hooks leave a computed weight behind, which copy.deepcopy alone would refuse
    new = decompose(model)
    assert [type(m) for m in new] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert set(new.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert all(p.requires_grad for p in new.parameters())
    assert new.training
    expected = model.eval()(x)
    assert torch.equal(new.eval()(x), expected)
    assert [s.n for s in channels(trace(new, x))] == [8]
    assert torch.equal(model(x), expected), "the model itself must stay as it is"


@pytest.mark.parametrize("ran", [False, True])
def test_masks_of_torch_prune_are_folded(ran: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "bias", 3)
    prune.ln_structured(model[2], "weight", 0.25, n=2, dim=0)
    prune.l1_unstructured(model[2], "weight", 0.5)  # two masks of one weight
    x = torch.randn(2, 3, 8, 8)
    if ran:
        model(x).sum().backward()
    expected = model(x)
    new = decompose(model)
    assert set(new.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert (new[0].weight == 0).sum() == new[0].weight.numel() // 2
    assert all(p.requires_grad and p.is_leaf for p in new.parameters())
    assert torch.equal(new(x), expected)
    assert torch.equal(model(x), expected), "the model itself must stay as it is"
    assert prune.is_pruned(model)
    read = [trace(m, x) for m in (model, new)]
    assert [layer.macs for layer in read[0].layers] == [layer.macs for layer in read[1].layers]
    net = jpq.compress(model, x, bops="20%", steps=1)
    assert set(net.finalize().state_dict()) >= {"0.weight", "2.weight"}
    with pytest.raises(JpqError, match=r"prune\.remove"):
        attach(model, read[0], [], HardConcrete, lambda _: (Fixed(8), Fixed(8)), [x], "djpq")


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class LowRank(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(size, 2)), nn.Parameter(torch.randn(2, size))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.a @ self.b


@pytest.mark.parametrize("steps", ["orthogonal, spectral", "symmetric", "low rank", "buffer"])
def test_all_parametrizations_are_folded(steps: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    if steps == "orthogonal, spectral":
        parametrizations.spectral_norm(parametrizations.orthogonal(layer))
    elif steps == "buffer":
        layer = nn.BatchNorm1d(8)  # type: ignore[assignment]
        parametrize.register_parametrization(layer, "running_var", nn.Softplus(), unsafe=True)
    else:
        parametrize.register_parametrization(layer, "weight", Symmetric() if steps == "symmetric" else LowRank(8))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(8, 8)
    expected = model(x)
    new = decompose(model)
    assert not any(parametrize.is_parametrized(m) for m in new.modules())
    assert set(new[2].state_dict()) == set((nn.BatchNorm1d(8) if steps == "buffer" else nn.Linear(8, 8)).state_dict())
    assert torch.equal(new(x), expected)
    assert torch.equal(model(x), expected), "the model itself must stay as it is"
    session = jpq.compress(model, x, bops="20%", steps=1)
    small = session.finalize()
    session.eval()
    assert relative_difference(session.double()(x.double()), small.double()(x.double())) < 1e-12


def test_a_model_under_compression_is_refused() -> None:
    x = torch.randn(8, 4)
    session = jpq.compress(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), x, bops="50%", steps=1)
    with pytest.raises(JpqError):
        jpq.compress(session.net.model, x, bops="50%")


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_norms_by_hooks_leave_nothing_that_asks_for_their_parameters(norm: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(32, 4)))
    x = torch.randn(8, 3, 4, 4)
    new = decompose(model)
    new.load_state_dict(new.state_dict())
    assert set(jpq.compress(model, x, bops="20%", steps=1).finalize().state_dict()) >= {"0.weight", "3.weight"}


def torchvision_model(name: str, size: int) -> tuple[nn.Module, Tensor]:
    kw: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, **kw)
    return randomised(model), torch.randn(2, 3, size, size, dtype=torch.double)


def small_vit() -> tuple[nn.Module, Tensor]:
    vit = torchvision.models.VisionTransformer(32, 16, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=48)
    return randomised(vit), torch.randn(2, 3, 32, 32, dtype=torch.double)


@pytest.mark.parametrize(
    ("name", "size", "heads", "hidden"),
    [
        ("small vit", 32, [4] * 3, 3),
        pytest.param("swin_t", 64, [3, 3, 6, 6, *[12] * 6, 24, 24], 12, marks=pytest.mark.slow),
        pytest.param("vit_b_16", 32, [12] * 12, 12, marks=pytest.mark.slow),
        pytest.param("swin_v2_t", 64, [3, 3, 6, 6, *[12] * 6, 24, 24], 12, marks=pytest.mark.slow),
        pytest.param("maxvit_t", 224, [*[2] * 4, *[4] * 4, *[8] * 10, *[16] * 4], 22, marks=pytest.mark.slow),
    ],
)
def test_torchvision_heads(name: str, size: int, heads: list[int], hidden: int) -> None:
    torch.manual_seed(0)
    packed, example = small_vit() if name == "small vit" else torchvision_model(name, size)
    model = decompose(packed)
    assert relative_difference(float64_outputs(packed, example), float64_outputs(model, example)) < 1e-12
    network = trace(model, example)
    sites = channels(network)
    assert [s.n for s in sites if s.producers[0].endswith(("q_proj", "qkv"))] == heads
    assert len([s.n for s in sites if "mlp" in s.name]) == hidden
    assert network.unknown_ops == ()
    check = check_equivalence(model, network, sites, example, seed=0)
    assert check.difference < 1e-9
    assert check.dropped > 50


@pytest.mark.parametrize("name", ["transformer", "one_head", "windows", "relative", "video"])
def test_the_work_is_counted_as_before(name: str) -> None:
    make, example = PACKED[name]
    networks = trace(make(), example), traced_network(f"zoo_{name}_unpacked")
    before, after = (sum(layer.macs for layer in network.layers) for network in networks)
    assert before == after


def images(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(4, (n,), generator=g)
    return F.one_hot(y, 4).float().repeat_interleave(2, 1)[:, None, :, None] + torch.rand(n, 1, 8, 8, generator=g), y


@pytest.mark.slow  # the next test exports one as well
def test_compress_a_vision_transformer_and_export_it(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, (x, y) = Vision(4, 1, depth=1), images(512)
    keys = set(model.state_dict())
    net = jpq.compress(model.eval(), x[:64], method="djpq", bops="7%", steps=160)
    optimizer = torch.optim.Adam(net.groups(lr=3e-3))
    net.train()
    for step in range(160):
        at = torch.arange(64) + 64 * (step % 8)
        loss = F.cross_entropy(net(x[at]), y[at]) + net.pressure()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.step()
    small = net.finalize()
    assert gap(copy.deepcopy(net.net).double().eval()(x.double()), copy.deepcopy(small).double()(x.double())) < 1e-9
    assert set(net.net.plan().layers) == {layer.name for layer in net.net.network.layers}, "every layer is quantized"
    assert {s.n for s in net.net.sites} == {4, 32}
    counted = jpq.measure(small, x[:2])
    uses = net.net.exact_usage()
    assert counted["bops"] == jpq.costs.bops(uses) <= 0.07 * jpq.costs.baseline(uses)["bops"]
    assert type(small.blocks) is Encoder
    jpq.export_onnx(small, x[:2], tmp_path / "vit.onnx")
    comparison = compare(small, Session(tmp_path / "vit.onnx", optimised=False), [(x, y)])
    assert comparison["argmax_differs"] == 0
    assert len(small(x).argmax(1).unique()) > 1, "a constant answer shows nothing"
    assert set(model.state_dict()) == keys


def test_optimize_saves_and_loads_a_vision_transformer(tmp_path: Any) -> None:
    task, train = Task(model="zoo.attention:Vision", limit=200), Train(epochs=2, float_epochs=1, lr=3e-3)
    config = Config(task=task, budget=Budget(target_bops="7%"), train=train, run=Run(out=tmp_path, device="cpu"))
    result = jpq.optimize(config)
    assert result.verified["masked_vs_rebuilt_float64"] <= 1e-9
    names = sorted(part["name"] for part in result.float_work["parts"])
    assert names == sorted(
        f"blocks.layers.{i}.self_attn.{product}" for i in range(2) for product in ("q@k", "weights@v")
    ), "no layer stays at 32 bits"
    small, plan = jpq.load(result.folder, run_code=True)
    assert "blocks.layers.0.self_attn.q_proj" in plan.layers
    x = jpq.tasks.data.load("digits").example
    assert gap(small(x), Session(result.folder / "model.onnx", optimised=False)(x)) < 1e-3


def test_weights_of_the_original_load_before_unpacking(tmp_path: Any) -> None:
    original, x = Vision(10, 1).eval(), torch.randn(3, 1, 8, 8)
    torch.save(original.state_dict(), tmp_path / "w.pth")
    model = jpq.tasks.models.build("zoo.attention:Vision", 10, 1).eval()
    jpq.tasks.models.load_weights(model, tmp_path / "w.pth")
    assert gap(original(x), decompose(model)(x)) < 1e-5
