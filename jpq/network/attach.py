"""Put gates and quantizers on a model: from here on the trainer sees one `Compressed` module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from jpq.costs import LayerUse
from jpq.gates import Decided, Gate
from jpq.network.shares import Shares
from jpq.network.sites import Site
from jpq.network.trace import Layer, Network
from jpq.plan import LayerPlan, Plan
from jpq.quantizers import Fixed, Integer, Width, act_quantizer, can_quantize, fit_threshold, quantize_layer, weight_quantizer
from jpq.structures import Structure
from jpq.types import NONE, JpqError, Weight

SAMPLES = 2**16  # activations per layer that calibration looks at
FLOAT_BITS = 32  # of layers that cannot be quantized


class Draw:
    """What one gate's decision is in this forward pass: every tap sees the same."""

    def __init__(self, gate: Gate):
        self.gate = gate
        self.again()

    def again(self) -> None:
        """A new draw, at the start of a forward pass."""
        self.z = self.gate.multiplier()
        self._noise: dict[int, Tensor | None] = {}

    def noise(self, batch: int) -> Tensor | None:
        """`[batch, n]`, the same for every consumer in one forward pass."""
        if batch not in self._noise:
            self._noise[batch] = self.gate.jitter(batch)
        return self._noise[batch]


class Masked(nn.Module):
    """Parametrization of a weight: times the mask of every tap on it."""

    def __init__(self, taps: Sequence[tuple[Draw, Structure]]):
        super().__init__()
        self.taps = list(taps)

    def forward(self, weight: Weight) -> Weight:
        """weight * expand(z) for each tap."""
        for draw, structure in self.taps:
            weight = weight * structure.expand(draw.z, weight.shape)
        return weight


class Jitter:
    """Noise per sample that multiplies the input of one layer, gathered from the gates that it reads."""

    def __init__(self, taps: Sequence[tuple[Draw, Any]], channel_dim: int):
        self.taps, self.channel_dim = list(taps), channel_dim

    def __call__(self, x: Tensor) -> Tensor | None:
        """A tensor that broadcasts to x, or None."""
        total = None
        for draw, axis in self.taps:
            noise = draw.noise(x.shape[0])
            if noise is None:
                continue
            index = torch.as_tensor(axis.index, device=x.device)
            padded = torch.cat([noise, noise.new_ones(len(noise), 1)], 1)
            part = padded[:, torch.where(index == NONE, axis.n, index)]
            total = part if total is None else total * part
        if total is None:
            return None
        shape = [1] * x.dim()
        shape[0], shape[self.channel_dim] = x.shape[0], -1
        return total.reshape(shape)


class Compressed(nn.Module):
    """A model under compression. The trainer sees this and nothing of gates or quantizers.

    Args:
        model: attached model (see `attach`).
        network, sites: what is known of the float model.
        gates: one per site, in the same order.
    """

    def __init__(self, model: nn.Module, network: Network, sites: Sequence[Site], gates: Iterable[Gate], method: str):
        super().__init__()
        self.model, self.network, self.sites, self.method = model, network, tuple(sites), method
        self.gates = nn.ModuleList(gates)
        self.draws: list[Draw] = []
        self.shares = Shares(network, self.sites)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output under the decisions as they stand; a fresh draw of every gate."""
        for draw in self.draws:
            draw.again()
        return self.model(*args, **kwargs)

    def layer(self, name: str) -> nn.Module:
        """The module of that name inside the attached model."""
        return self.model.get_submodule(name)

    def quantizers(self, name: str) -> tuple[Integer, Integer] | None:
        """(weight, input) quantizers of a layer; None where it stays in floating point."""
        layer = self.layer(name)
        return (weight_quantizer(layer), act_quantizer(layer)) if hasattr(layer, "weight_quant") else None

    def uses(self) -> list[LayerUse]:
        """What each layer uses now: values whole (hard decisions), gradients soft."""
        alive = [_hard(g.keep(), g.alive()) for g in self.gates]
        inputs, outputs = self.shares.soft(alive)
        return [
            _use(layer, inputs[i], outputs[i], *self._widths(layer.name))
            for i, layer in enumerate(self.network.layers)
        ]

    @torch.no_grad()
    def exact(self, plan: Plan | None = None) -> list[LayerUse]:
        """What each layer uses under a plan (default: as things stand), in whole numbers and fractions."""
        return exact_uses(self.network, self.shares, plan or self.plan())

    def _widths(self, name: str) -> tuple[Any, Any]:
        pair = self.quantizers(name)
        return (pair[0].width(), pair[1].width()) if pair else (FLOAT_BITS, FLOAT_BITS)

    def penalty(self) -> Tensor:
        """The gates' own regulariser, averaged over all units (nats per unit)."""
        parts = [p for p in (g.penalty() for g in self.gates) if p is not None]
        units = sum(g.n * g.rows for g in self.gates)
        device = next(self.model.parameters()).device
        return sum((p.sum() for p in parts), torch.zeros((), device=device)) / max(1, units)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Let gates anneal and widths return into their bounds; once after every optimiser step."""
        for gate in self.gates:
            gate.after_step(progress)
        for width in self.widths():
            width.after_step()

    def widths(self) -> list[Width]:
        """Every bit-width."""
        return [m for m in self.model.modules() if isinstance(m, Width)]

    def decisions(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that decide: "gates" and "bits"."""
        return {
            "gates": list(self.gates.parameters()),
            "bits": [p for width in self.widths() for p in width.parameters()],
        }

    def weights(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that compute: "decayed" (weights of two or more dims) and "plain" (biases, norms, ranges)."""
        ranges = {id(m.log_threshold) for m in self.model.modules() if isinstance(m, Integer)}
        deciding = {id(p) for group in self.decisions().values() for p in group}
        own = [p for p in self.model.parameters() if id(p) not in deciding]
        decayed = [p for p in own if p.dim() > 1 and id(p) not in ranges]
        plain = [p for p in own if p.dim() <= 1 or id(p) in ranges]
        return {"decayed": decayed, "plain": plain}

    @torch.no_grad()
    def plan(self) -> Plan:
        """The decisions as they stand."""
        layers = {}
        for layer in self.network.layers:
            pair = self.quantizers(layer.name)
            if pair:
                layers[layer.name] = LayerPlan(round(float(pair[0].width())), round(float(pair[1].width())), pair[1].signed)
        kept = {s.name: tuple(g.keep()[0].bool().tolist()) for s, g in zip(self.sites, self.gates, strict=True)}
        return Plan(self.method, layers, kept)

    @torch.no_grad()
    def settle(self, plan: Plan) -> None:
        """Take the plan's decisions for good: gates become 0/1 with their scale folded in, widths become fixed.

        Under a plan that equals the decisions as they stand, evaluation before and after agrees exactly.
        """
        for draw, site, gate in zip(self.draws, self.sites, self.gates, strict=True):
            for tap in site.taps:
                weight = _original(self.model, self.network.layer(tap.layer))
                weight.mul_(tap.structure.expand(gate.scale(), weight.shape))
            kept = torch.tensor([plan.kept[site.name]], dtype=gate.keep().dtype, device=gate.keep().device)
            draw.gate = Decided(kept)
            draw.again()
        self.gates = nn.ModuleList(draw.gate for draw in self.draws)
        for layer in self.network.layers:
            pair = self.quantizers(layer.name)
            if not pair:
                continue
            decided = plan.layers[layer.name]
            self._fix(layer, pair[0], decided.w_bits)
            pair[1].width = _fixed(pair[1].width, decided.a_bits)
        self.model.train(self.training)

    def _fix(self, layer: Layer, quantizer: Integer, bits: int) -> None:
        """Fix the weight's width; where that changes it, fit its range anew."""
        changed = bits != round(float(quantizer.width()))
        quantizer.width = _fixed(quantizer.width, bits)
        if changed:
            weight = self.layer(layer.name).weight
            per_channel = quantizer.log_threshold.dim() > 0
            quantizer.log_threshold.copy_(fit_threshold(weight, bits, True, per_channel).clamp_min(1e-8).log())


def _hard(keep: Tensor, alive: Tensor) -> Tensor:
    return keep + (alive - alive.detach())


def _fixed(width: Width, bits: int) -> Fixed:
    return Fixed(bits, width.choices).to(next(iter(width.state_dict().values())).device)


def _use(layer: Layer, inputs: Any, outputs: Any, w_bits: Any, a_bits: Any) -> LayerUse:
    weights = 1
    for side in layer.weight_shape:
        weights *= side
    return LayerUse(layer.name, layer.macs, weights, len(layer.outputs), inputs, outputs, 1, w_bits, a_bits)


def exact_uses(network: Network, shares: Shares, plan: Plan) -> list[LayerUse]:
    """What each layer uses under a plan, in whole numbers and fractions."""
    inputs, outputs = shares.exact(plan.kept)
    uses = []
    for i, layer in enumerate(network.layers):
        bits = plan.layers.get(layer.name)
        w, a = (bits.w_bits, bits.a_bits) if bits else (FLOAT_BITS, FLOAT_BITS)
        uses.append(_use(layer, Fraction(*inputs[i]), Fraction(*outputs[i]), w, a))
    return uses


def _original(model: nn.Module, layer: Layer) -> Tensor:
    """The trainable weight behind the mask."""
    owner, _, name = layer.weight.rpartition(".")
    module = model.get_submodule(owner)
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original  # type: ignore[index,union-attr,return-value]
    return getattr(module, name)


Batches = Iterable[Any]
MakeWidth = Callable[[Layer], tuple[Width, Width]]


def attach(
    model: nn.Module,
    network: Network,
    sites: Sequence[Site],
    gate: Callable[[int, int], Gate],
    widths: MakeWidth,
    calibration: Batches,
    method: str,
) -> Compressed:
    """A copy of `model` with a gate for each site and quantizers on each layer, ranges fitted to `calibration`.

    Args:
        model: the float model.
        network, sites: of that model (`trace`, `channels`).
        gate: (rows, n) -> gate.
        widths: layer -> (width of its weight, width of its input).
        calibration: a few batches of inputs (a tensor, a tuple of positional arguments, or a dict of keywords each).
        method: recorded in the plan.
    """
    if any(parametrize.is_parametrized(m) for m in model.modules()):
        raise JpqError("The model already carries parametrizations; remove them before compressing it.")
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    seen = observe(model, network, calibration)
    compressed = Compressed(model, network, sites, [gate(s.rows, s.n).to(device) for s in sites], method)
    compressed.draws = [Draw(g) for g in compressed.gates]  # type: ignore[arg-type]
    taps: dict[str, list[tuple[Draw, Structure]]] = {}
    for draw, site in zip(compressed.draws, sites, strict=True):
        for tap in site.taps:
            taps.setdefault(tap.layer, []).append((draw, tap.structure))
    for layer in network.layers:
        quantize(model, layer, widths(layer), seen.get(layer.name))
        if layer.name in taps:
            owner, _, name = layer.weight.rpartition(".")
            parametrize.register_parametrization(model.get_submodule(owner), name, Masked(taps[layer.name]), unsafe=True)
            pair = compressed.quantizers(layer.name)
            if pair:
                pair[1].jitter = Jitter(taps[layer.name], -1 if layer.kind == "linear" else 1)
    return compressed


def quantize(model: nn.Module, layer: Layer, widths: tuple[Width, Width], seen: Tensor | None) -> None:
    """Replace one layer of `model` by its quantized twin, ranges fitted to its weight and to `seen` inputs."""
    module = model.get_submodule(layer.name)
    if not can_quantize(module) or layer.weight != f"{layer.name}.weight":
        return
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr,operator]
    x = seen if seen is not None and seen.numel() else torch.ones(1, device=weight.device)
    signed = bool(x.min() < -1e-6 * x.abs().max())
    w = Integer(fit_threshold(weight, widths[0].soft(), True, layer.kind != "conv_transpose"), widths[0], True)
    a = Integer(fit_threshold(x, widths[1].soft(), signed, False), widths[1], signed)
    new = quantize_layer(module, w.to(weight), a.to(weight))
    owner, _, name = layer.name.rpartition(".")
    setattr(model.get_submodule(owner), name, new)


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a tensor, a tuple of positional arguments, or a dict of keywords."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@torch.no_grad()
def observe(model: nn.Module, network: Network, batches: Batches) -> dict[str, Tensor]:
    """Up to SAMPLES of the values that each layer reads, spread evenly over `batches`; the model runs in eval mode."""
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in network.layers}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                flat = args[0].detach().flatten()
                seen[name].append(flat[:: max(1, flat.numel() // SAMPLES)])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in seen]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            call(model, batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    joined = {name: torch.cat(parts) for name, parts in seen.items() if parts}
    return {name: x[:: max(1, len(x) // SAMPLES)] for name, x in joined.items()}
