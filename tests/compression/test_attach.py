"""The law with gates and quantizers on: soft == settled == rebuilt == exported, over the zoo."""

import copy
from itertools import product

import pytest
import torch
from gated import compressed, learned_widths, rebuilt
from outputs import flat, gap
from thinned import thinned
from torch import nn
from zoo import ZOO

from jpq import costs
from jpq.compression.attach import attach
from jpq.compression.calibration import observe_activations
from jpq.export import runtimes
from jpq.export.count import measure
from jpq.export.onnx.export import export_onnx
from jpq.export.rebuild import rebuild
from jpq.export.verify import compare, verify
from jpq.methods.gates import GATES, VIB
from jpq.methods.quantizers import Fixed
from jpq.tracing.forward import call_model
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError

FREE = [
    gate for _, gate in sorted(GATES.items()) if not (gate.fixed_count or gate.self_updating or gate.elementwise_only)
]


def pairs_of_net_and_gate():
    """All pairs; fast is every net with one gate, so that each gate has as many of the nets."""
    for i, (name, (j, gate)) in enumerate(product(sorted(ZOO), enumerate(FREE))):
        fast = j == i // len(FREE) % len(FREE)
        yield pytest.param(name, gate, marks=() if fast else pytest.mark.slow)


# test_latent, test_mask_gates and test_codeq have the other gates
@pytest.mark.parametrize(("name", "gate"), pairs_of_net_and_gate())
def test_soft_settled_and_rebuilt_agree(name, gate):
    model, net, example = compressed(name, gate)
    found = rebuilt(model, net, example)
    assert gap(found.soft, found.settled) <= 1e-10
    assert gap(found.settled, found.rebuilt) <= 1e-10
    assert net.plan() == found.plan
    exact = costs.bops(net.exact_usage(found.complete))
    assert exact.denominator == 1
    assert found.bops == pytest.approx(float(exact), rel=1e-5)
    kept = sum(sum(units) for units in found.plan.kept.values())
    every = sum(len(units) for units in found.plan.kept.values())
    assert not every or kept < every  # the draw really dropped something


def test_counted_on_the_rebuilt_model():
    for name in ("residual", "depthwise", "flat"):
        model, net, example = compressed(name)
        net.freeze(net.plan())
        small, plan = rebuild(net, model)
        counted = measure(small, example)
        uses = net.exact_usage(plan)
        assert counted["bops"] == costs.bops(uses)
        assert counted["macs"] == costs.macs(uses)


@pytest.mark.parametrize(
    "name",
    thinned(
        ["plain", "residual", "concat", "depthwise"]
        + [f"{packed}_unpacked" for packed in ("transformer", "windows", "windows_v2", "relative")],
        lambda _, name: name in ("residual", "depthwise", "concat", "relative_unpacked", "transformer_unpacked"),
    ),
)
def test_exported_file_computes_the_same(name, tmp_path):
    for seed in range(30):  # a net that its quantizers have silenced shows nothing
        model, net, example = compressed(name, dtype=torch.float32, seed=seed, fewer=1)
        net.freeze(net.plan())
        small, _ = rebuild(net, model)
        x = 3 * torch.randn(64, *example.shape[1:])
        if float(small(x).std(0).max()) > 0:
            break
    else:
        pytest.fail("every draw of the decisions gives a constant output")
    export_onnx(small, example, tmp_path / "m.onnx")
    found = compare(small, runtimes.Session(tmp_path / "m.onnx", optimised=False), [(x, torch.zeros(64))])
    assert found["images"] == 64
    assert found["argmax_differs"] <= found["at_a_rounding_boundary"]
    assert found["at_a_rounding_boundary"] <= 3


def test_an_export_that_computes_something_else_is_found(tmp_path):
    model, net, example = compressed("plain", dtype=torch.float32, seed=1)
    net.freeze(net.plan())
    net.eval()
    small, _ = rebuild(net, model)
    export_onnx(small, example, tmp_path / "good.onnx")
    x = torch.randn(64, *example.shape[1:])
    batches = [(x, torch.zeros(64))]
    verify(net, small, tmp_path / "good.onnx", batches, example)
    other = copy.deepcopy(small)
    with torch.no_grad():
        [m for m in other.modules() if hasattr(m, "weight_quant")][-1].weight.mul_(0.7)
    export_onnx(other, example, tmp_path / "bad.onnx")
    with pytest.raises(JpqError, match="onnxruntime and the rebuilt model differ"):
        verify(net, small, tmp_path / "bad.onnx", batches, example)
    with pytest.raises(JpqError, match="not the masked one"):
        verify(net, other, tmp_path / "good.onnx", batches, example)


def test_gradients_reach_weights_ranges_bits_and_gates():
    _, net, example = compressed("residual" if "residual" in ZOO else "Residual", dtype=torch.float32)
    net.train()
    loss = flat(call_model(net, example)).square().mean() + costs.bops(net.soft_usage()).log() + net.penalty()
    loss.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
    groups = {**net.weights(), **net.decisions()}
    assert sum(len(g) for g in groups.values()) == len(list(net.parameters()))


def test_every_consumer_sees_the_same_noise():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            y = torch.relu(self.a(x))
            return self.b(y) - self.c(y)

    model = Twice()
    model.c.load_state_dict(model.b.state_dict())
    network = trace(model, torch.randn(2, 4))
    net = attach(model, network, channels(network), VIB, lambda _: (Fixed(8), Fixed(8)), [torch.randn(50, 4)], "djpq")
    net.gates[0].log_var.data.fill_(0.0)
    net.train()
    x = torch.randn(5, 4)
    assert float(net(x).abs().max()) < 1e-6
    one, other = net.layer("b")(torch.ones(2, 6)), net.layer("b")(torch.ones(2, 6))
    assert torch.equal(one, other)  # within a forward pass
    net(x)
    assert not torch.equal(one, net.layer("b")(torch.ones(2, 6)))  # a new draw in the next


def test_parametrized_models_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    network = trace(model, torch.randn(1, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(JpqError, match="parametrizations"):
        attach(model, network, (), VIB, learned_widths, [torch.randn(1, 3)], "djpq")


def test_layers_whose_module_is_never_called_stay_in_floating_point():
    class ByFunction(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(torch.relu(nn.functional.linear(x, self.a.weight, self.a.bias)))

    model = ByFunction()
    network = trace(model, torch.randn(2, 4))
    net = attach(model, network, (), VIB, lambda _: (Fixed(4), Fixed(4)), [torch.randn(50, 4)], "uniform")
    assert set(net.plan().layers) == {"b"}
    assert {u.name: u.w_bits for u in net.exact_usage()} == {"a": 32, "b": 4}


class Grouped(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )


def test_grouped_layers_train_with_noise_on_every_group():
    model, x = Grouped(), torch.randn(5, 3, 6, 6)
    network = trace(model, x)
    net = attach(model, network, channels(network), VIB, learned_widths, [x], "djpq")
    net.train()
    assert net(x).shape == (5, 4, 6, 6)
    assert any(tap.layer == "2" for site in net.sites for tap in site.taps)


def test_transposed_layers_are_counted_where_the_kernel_is_applied():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2)),
        torch.randn(2, 3, 5, 5),
    )
    network = trace(model, x)
    net = attach(model, network, (), VIB, lambda _: (Fixed(4), Fixed(4)), [x], "uniform")
    net.freeze(net.plan())
    small, plan = rebuild(net, model)
    assert measure(small, x)["bops"] == costs.bops(net.exact_usage(plan))


def test_modules_under_two_names_stay_one_and_tied_weights_are_refused():
    class Twice(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 3)
            self.b = nn.Linear(4, 4) if tied else self.a
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    x = torch.randn(20, 4)
    model = Twice(tied=False)
    network = trace(model, x)
    net = attach(model, network, channels(network), VIB, lambda _: (Fixed(4), Fixed(4)), [x], "djpq")
    assert net.model.a is net.model.b
    net.freeze(net.plan())
    small, plan = rebuild(net.eval(), model)
    assert measure(small, x)["bops"] == costs.bops(net.exact_usage(plan))
    tied = Twice(tied=True)
    network = trace(tied, x)
    net = attach(tied, network, channels(network), VIB, lambda _: (Fixed(4), Fixed(4)), [x], "djpq")
    net.freeze(net.plan())
    small, plan = rebuild(net.eval(), tied)
    assert small.a.weight is small.b.weight
    assert measure(small, x)["bops"] == costs.bops(net.exact_usage(plan))


def test_calibration_sees_every_column_and_both_ends():
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return self.a(x)

    model = Columns()
    x = torch.arange(64.0).expand(4096, 1, 1, 64).contiguous()
    x[77, 0, 0, 3] = -5.0
    seen = observe_activations(model, trace(model, x[:2]), [x])["a"]
    assert len(seen.round().unique()) == 65
    assert seen.min() == -5
