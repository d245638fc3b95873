"""`trace`: layers, MACs, label classes, reasons of frozen channels, errors."""

from __future__ import annotations

import json
import re
import time
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from traces import traced_network
from zoo import IMAGE, TOKENS, ZOO, Head, Residual, conv

from jpq.costs.latency_table import KINDS
from jpq.tasks import models
from jpq.tracing.channel_labels import ChannelClasses
from jpq.tracing.export_graph import export_graph
from jpq.tracing.network import LayerKind, Network, latency_shape
from jpq.tracing.op_call import Dims, OpCall, TraceState
from jpq.tracing.rules import RULES, rule
from jpq.tracing.shrink import remove_channels
from jpq.tracing.sites import channels
from jpq.tracing.trace import build_network, propagate_labels, trace
from jpq.types import NONE, JpqError


def zoo(name: str) -> Network:
    return traced_network(f"zoo_{name}")


def units(name: str) -> dict[str, int]:
    return {site.name: site.n for site in channels(zoo(name))}


def reasons(network: Network, layer: str) -> set[str]:
    return {network.frozen.get(int(c), "") for c in network.layer(layer).outputs}


@pytest.mark.parametrize(
    ("name", "macs"),
    [  # torchvision's documentation gives 1.81, 4.09 and 0.30 GFLOPS for these, counting a multiply-add once
        ("resnet18", 1_814_073_344),
        pytest.param("resnet50", 4_089_184_256, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 300_774_272, marks=pytest.mark.slow),
    ],
)
def test_macs_of_torchvision(name: str, macs: int) -> None:
    model = torchvision.models.get_model(name, weights=None)
    for batch in (1, 3):
        network = trace(model, torch.zeros(batch, 3, 224, 224))
        assert sum(layer.macs for layer in network.layers) == macs


@pytest.mark.parametrize(("name", "macs"), [("resnet20", 40_551_040), ("vgg7", 615_917_568)])
def test_macs_of_our_models(name: str, macs: int) -> None:
    network = trace(models.build(name, 10, 3), torch.zeros(1, 3, 32, 32))
    assert sum(layer.macs for layer in network.layers) == macs


def test_layers_in_execution_order() -> None:
    network = zoo("residual")
    assert [layer.name for layer in network.layers] == ["stem.0", "a.0", "b.0", "head.2"]
    a = network.layer("a.0")
    assert (a.weight, a.kind, a.weight_shape, a.groups, a.calls) == ("a.0.weight", LayerKind.CONV, (5, 8, 3, 3), 1, 1)
    assert a.macs == 5 * 8 * 9 * 16
    assert np.array_equal(a.inputs, network.layer("stem.0").outputs)
    assert np.array_equal(a.inputs, network.layer("b.0").outputs), "the residual sum ties both ends"
    assert (network.layer("stem.0").inputs == NONE).all()
    with pytest.raises(JpqError, match=r"Did you mean a\.0"):
        network.layer("a.00")


def test_a_shared_layer_counts_every_call() -> None:
    b = zoo("shared").layer("b.0")
    assert (b.calls, b.macs) == (3, 3 * 8 * 8 * 9 * 16)


@pytest.mark.parametrize("name", ["grouped", "transposed", "attention", "volume", "signal"])
def test_dims_of_a_kind_are_those_of_the_weight(name: str) -> None:
    for layer in zoo(name).layers:
        inner, outer = (layer.weight_shape[d] for d in (layer.kind.input_dim, layer.kind.output_dim))
        groups = (1, layer.groups) if layer.kind is LayerKind.CONV_TRANSPOSE else (layer.groups, 1)
        assert (inner * groups[0], outer * groups[1]) == (len(layer.inputs), len(layer.outputs))
        assert latency_shape(layer).kind in KINDS
    assert {kind.value for kind in LayerKind} < set(KINDS), "latency tables know every kind"
    assert json.dumps(list(LayerKind)) == '["conv", "conv_transpose", "linear"]'


def test_macs_by_kind() -> None:
    assert zoo("depthwise").layer("1.0").macs == 8 * 9 * 16
    assert zoo("grouped").layer("1.0").macs == 2 * 12 * 9 * 16
    assert zoo("transposed").layer("1").macs == 8 * 6 * 4 * 16, "every input position writes a 2x2 window"
    assert zoo("attention").layer("qkv").macs == 5 * 10 * 36, "tokens are positions"
    assert zoo("signal").layer("0").macs == 2 * 6 * 3 * 14


def test_macs_of_an_example_without_batch() -> None:
    network = trace(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)), IMAGE[0])
    assert [layer.macs for layer in network.layers] == [3 * 6 * 9 * 4, 6 * 4 * 4]
    assert [site.n for site in channels(network)] == [6]


def test_axes_name_every_parameter_that_shrinks() -> None:
    network = zoo("residual")
    stem = network.layer("stem.0").outputs
    for name in ("stem.1.weight", "stem.1.bias", "stem.1.running_mean", "b.1.running_var"):
        assert np.array_equal(network.axes[name][0], stem)
    assert np.array_equal(network.axes["head.2.weight"][1], stem)
    tokens = zoo("tokens")
    columns = tokens.embeddings["table"]
    assert np.array_equal(tokens.axes["token"][2], columns)
    assert np.array_equal(tokens.axes["scale"][0], columns)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {"0.0": 8, "1.0": 6}),
        ("flat", {"0.0": 6, "2": 10}),
        ("flat_view", {"a.0": 6, "b.0": 4}),
        ("residual", {"stem.0": 8, "a.0": 5}),
        ("chunk", {"a.0": 4, "b.0": 4}),
        ("split", {"a.0": 4, "b.0": 6}),
        ("split_fixed", {"a.0": 4, "b.0": 6}),
        ("grouped", {"0.0": 2, "1.0": 3, "2.0": 3}),
        ("group_norms", {"a": 2}),
        ("shuffle", {"a.0": 4, "b.0": 6}),
        ("attention", {"embed": 10, "qkv": 4, "out": 8}),
        ("attention_rigid", {"embed": 10, "qkv": 4, "out": 8}),
        ("attention_by_hand", {"q": 4}),
        ("transformer", {"mlp.0": 12}),
        ("transformer_unpacked", {"attend.q_proj": 2, "mlp.0": 12}),
        ("weighing_unpacked", {"first": 8, "attend.out_proj": 8}),
        ("one_head_unpacked", {"first": 8, "attend.v_proj": 8, "attend.out_proj": 8}),
        ("windows_unpacked", {"plain.qkv": 3, "shifted.qkv": 4}),
        ("windows_v2_unpacked", {"plain.qkv": 3, "shifted.qkv": 4}),
        ("video_unpacked", {"shifted.qkv": 4}),
        ("relative_unpacked", {"attend.qkv": 3}),
        ("gated_unpacked", {"a": 6, "b": 5, "c": 3}),
        ("normed_unpacked", {"0": 8, "2": 6, "5": 7}),
        ("padded_shortcut", {"stem.0": 4, "a.0": 6, "b.0": 4}),
        ("padded_by_hand", {"stem.0": 4, "a.0": 6, "b.0": 4}),
    ],
)
def test_sites(name: str, expected: dict[str, int]) -> None:
    assert units(name) == expected


def test_a_flattened_channel_owns_all_its_features() -> None:
    site = channels(zoo("flat"))[0]
    (tap,) = site.taps
    assert tap.layer == "2"
    assert Counter(tap.structure.index.tolist()) == dict.fromkeys(range(6), 16)


def test_taps_cover_every_reader() -> None:
    network = zoo("squeeze_excite")
    site = next(s for s in channels(network) if s.name == "a.0")
    assert [tap.layer for tap in site.taps] == ["gate.1", "b.0"]
    assert site.producers == ("a.0", "gate.3"), "what scales a channel is made with it"


def test_skip() -> None:
    network = zoo("residual")
    assert [s.name for s in channels(network, skip=["b.0"])] == ["a.0"]
    with pytest.raises(JpqError, match="Unknown layer 'b'"):
        channels(network, skip=["b"])


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("plain", "2.2", "reaches the model's output"),
        ("two_outputs", "b.0", "reaches the model's output"),
        ("transformer", "patch", "aten.add joins it with|LayerNorm's average"),
        ("transformer", "attend", "inside nn.MultiheadAttention"),
        ("transformer", "attend", "jpq.decompose frees it"),
        ("weighing_unpacked", "attend.q_proj", "inside the average or extremum of aten.mean"),
        ("averages", "a.0", "inside GroupNorm's average"),
        ("averages", "b.0", "inside the average or extremum of aten.mean"),
    ],
)
def test_frozen_for_a_reason(name: str, layer: str, reason: str) -> None:
    network = zoo(name)
    assert all(re.search(reason, r) for r in reasons(network, layer))
    assert any(reasons(network, layer))


def test_reads_input() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.ones(1, 3, 1, 1))
            self.a, self.b, self.c, self.head = conv(3, 4), conv(3, 4), conv(3, 4), Head(4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.pad((x - self.mean) / 0.2, (1, 1, 1, 1))
            return self.head(self.a(x) + self.b(torch.cat([x[:, 1:], x[:, :1]], 1)) + self.c(x.relu()))

    assert [layer.name for layer in trace(Normalised(), IMAGE).layers if layer.reads_input] == ["a.0", "b.0"]
    assert [layer.name for layer in zoo("two_inputs").layers if layer.reads_input] == ["a.0", "b.0", "c"]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 4), conv(4, 5), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.cosh(self.a(x))))


def test_an_op_without_a_rule_freezes_and_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    network = trace(Odd(), IMAGE)
    assert network.unknown_ops == ("aten.cosh",)
    assert reasons(network, "a.0") == {"op aten.cosh has no rule; add one with jpq.tracing.rules"}
    assert [s.name for s in channels(network)] == ["b.0"]

    monkeypatch.setitem(RULES, "aten.cosh", None)

    @rule("aten.cosh")
    def cosh(call: OpCall) -> Dims:
        return call.x

    network = trace(Odd(), IMAGE)
    assert network.unknown_ops == ()
    assert [s.name for s in channels(network)] == ["a.0", "b.0"]


def test_a_computed_weight_is_frozen() -> None:
    model = Residual()
    nn.utils.parametrizations.weight_norm(model.a[0])
    network = trace(model, IMAGE)
    assert "a.0" not in [layer.name for layer in network.layers]
    assert "with a weight that is computed" in reasons(network, "stem.0").pop()


class Gate(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.n, self.head = conv(3, 4), n, Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        assert x.shape[1] == self.n, "fixed in the code"
        return self.head(x)


class Skipping(nn.Module):
    """Two gated layers of a WaveNet: of the last one only what it adds to the result is read, not its skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 1)
        self.gates = nn.ModuleList(nn.Conv1d(8, 6, 3, padding=1) for _ in range(2))
        self.skips = nn.ModuleList(nn.Conv1d(6, 8, 1) for _ in range(2))
        self.last = nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), 0
        for gate, skip in zip(self.gates, self.skips, strict=True):
            y = gate(x).tanh()
            total, x = total + y, x + skip(y)
        return self.last(total)


def test_a_layer_that_is_computed_in_vain_counts_and_follows() -> None:
    model, x = Skipping().eval(), torch.randn(2, 3, 8)
    network = trace(model, x)
    assert network.macs == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv1d)) * 8
    assert network.layer("skips.1").macs == 8 * 6 * 8
    assert not network.idle
    assert [(site.name, site.n) for site in channels(network)] == [("first", 8), ("gates.0", 6)]
    small = remove_channels(model, network, [c for s in channels(network) for c in s.labels[:3].tolist()])
    assert small(x).shape == (2, 4, 8)


def test_an_assertion_on_shapes_freezes() -> None:
    network = trace(Gate(4), IMAGE)
    assert channels(network) == ()
    assert "fixed sizes" in reasons(network, "a.0").pop()


def test_trace_leaves_the_model_as_it_was() -> None:
    model = ZOO["shuffle"][0]().train()
    model.a.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    trace(model, IMAGE)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_model_that_cannot_be_exported() -> None:
    class Steered(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(JpqError, match=r"cannot read Steered at .*test_network.py:\d+, `return .*torch.where"):
        trace(Steered(), IMAGE)


def test_a_wrong_example() -> None:
    with pytest.raises(
        JpqError, match=r"Residual does not run on the example \(x \[2, 5, 6\]\): .*expects 3 channels, got 2 "
    ):
        trace(Residual(), TOKENS)


def test_classes() -> None:
    classes = ChannelClasses()
    a, b, c = classes.fresh(3), classes.fresh(3), classes.fresh(3)
    classes.union(a, b[::-1], "never")
    classes.union(b, np.array([c[0], NONE, c[2]]), "meets nothing")
    assert classes.find(b).tolist() == [2, 1, 0]
    assert classes.find(np.array([c[2], NONE, c[1]])).tolist() == [0, NONE, 7]
    assert classes.frozen() == {1: "meets nothing"}


@pytest.mark.slow
def test_labelling_is_fast() -> None:
    model = torchvision.models.densenet201(weights=None).eval()
    program = export_graph(model, (torch.zeros(1, 3, 64, 64),), {})
    start = time.process_time()
    state, unknown_ops = propagate_labels(TraceState(model), program)
    network = build_network(state, unknown_ops, batch=1)
    seconds = time.process_time() - start
    assert seconds < 1.0, f"densenet201 took {seconds:.2f} s of CPU time"
    assert len(channels(network)) == 200
