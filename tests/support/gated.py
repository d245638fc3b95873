"""Small networks with gates on them, for the tests of single methods: made, settled, rebuilt and exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map
from traces import traced_network
from zoo import ZOO, randomised

from jpq import costs
from jpq.compression.attach import attach
from jpq.compression.ladders import Ladders
from jpq.compression.model import CompressedModel
from jpq.compression.soft_decisions import NATS, soft_decisions
from jpq.costs.target import Target, all_met
from jpq.export import runtimes
from jpq.export.onnx.export import export_onnx
from jpq.export.rebuild import rebuild
from jpq.export.verify import compare
from jpq.methods.gates import VIB, Gate, Ranked
from jpq.methods.quantizers import BitWidth, Fixed, Learned
from jpq.plan import Plan
from jpq.tracing.forward import call_model
from jpq.tracing.network import Layer, Network
from jpq.tracing.sites import channels

Sites = Callable[[Network], Any]
Net = tuple[nn.Module, CompressedModel, Any]  # float model, the same with gates and quantizers, example


def gated(name: str, gate: Callable[..., Gate], seed: int = 0, sites: Sites = channels) -> Net:
    """A net of the zoo with a gate at each of `sites(network)` and 8 bits everywhere."""
    torch.manual_seed(seed)
    make, example = ZOO[name]
    model = make().eval()
    network = traced_network(f"zoo_{name}")
    net = attach(model, network, sites(network), gate, lambda layer: (Fixed(8), Fixed(8)), [example], "test")
    return model, net, example


def attached(
    name: str,
    gate: Callable[..., Gate],
    widths: Callable[..., Any],
    sites: Sites = channels,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Net:
    """The same with random statistics, behind which no channel can hide, and widths of one's own."""
    torch.manual_seed(seed)
    make, example = ZOO[name]
    model = randomised(make(), seed).to(dtype)
    example = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, example)
    network = traced_network(f"zoo_{name}")
    return model, attach(model, network, sites(network), gate, widths, [example], "test").to(dtype), example


def learned_widths(layer: Layer) -> tuple[BitWidth, BitWidth]:
    """Learned widths of 6 bits for the weights and 5 for the activations; the image keeps 8."""
    return Learned(6, 2, 8), Fixed(8) if layer.reads_input else Learned(5, 2, 8)


def compressed(
    name: str, gate: Callable[..., Gate] = VIB, seed: int = 0, dtype: torch.dtype = torch.float64, fewer: float = 4
) -> Net:
    """A zoo net with gates and quantizers, its decisions drawn at random; each width loses up to `fewer` bits."""
    model, net, example = attached(name, gate, learned_widths, seed=seed, dtype=dtype)
    for p in net.gates.parameters():
        p.data.add_(torch.randn_like(p) * 5)
    for p in net.decisions()["bits"]:
        p.data.sub_(torch.rand_like(p) * fewer)
    net.after_step(0.5)
    for gate in net.gates:  # no site may lose everything
        if isinstance(gate, Ranked):  # a ranking decides, no parameter
            gate.margins.copy_(torch.linspace(1, -1, gate.n))
        for p in gate.parameters():
            p.data[0, -1] = 4.0 if p is getattr(gate, "log_var", None) else -4.0  # dropped
            p.data[0, 0] = -9.0 if p is getattr(gate, "log_var", None) else 1.0  # kept
        getattr(gate, "last", torch.zeros(1)).fill_(1.0)  # -4 is a step beyond 0
        gate.after_step(0.5)
    return model, net.eval(), example


def scatter(net: CompressedModel, seed: int) -> None:
    """Decisions far apart: gates on both sides of their thresholds, real-valued widths from end to end."""
    torch.manual_seed(seed)
    for p in net.gates.parameters():
        p.data.normal_(0, 3)
    for width in net.widths():
        for p in width.parameters():
            p.data.uniform_(0, 10)
    net.after_step(1.0)


def check_no_step_fits(net: CompressedModel, targets: Sequence[Target], plan: Plan) -> None:
    """What a plan leaves of the targets pays for no single step: one more bit, or the next units of a site."""
    ladders = Ladders(soft_decisions(net), NATS)
    positions = ladders.positions(plan)
    for i in set(ladders.steps(positions, forward=True)[1].tolist()):
        one_more = [p + (k == i) for k, p in enumerate(positions)]
        assert not all_met(targets, net.exact_usage(ladders.plan(plan, one_more, [i])))


class Rebuilt(NamedTuple):
    """A network before and after it settles on its plan, and the rebuilt model: they give and cost the same."""

    soft: Any  # output before
    bops: float  # before
    plan: Plan
    settled: Any  # output after
    rebuilt: Any  # output of the rebuilt model
    model: nn.Module
    complete: Plan  # of the rebuilt model


@torch.no_grad()
def rebuilt(model: nn.Module, net: CompressedModel, example: Any) -> Rebuilt:
    soft, bops, plan = call_model(net, example), float(costs.bops(net.soft_usage())), net.plan()
    net.freeze(plan)
    settled = call_model(net, example)
    small, complete = rebuild(net, model)
    return Rebuilt(soft, bops, plan, settled, call_model(small, example), small, complete)


def compare_exported(model: nn.Module, net: CompressedModel, example: Any, path: Path) -> dict[str, Any]:
    """How far the settled network, rebuilt, is apart from its ONNX file on 64 random samples."""
    net.freeze(net.plan())
    small, _ = rebuild(net, model)
    export_onnx(small, example, path)
    x = torch.randn(64, *example.shape[1:])
    return compare(small, runtimes.Session(path), [(x, torch.zeros(64))])
