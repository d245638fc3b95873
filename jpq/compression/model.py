"""`CompressedModel`: a model with gates and quantizers on its layers, the trainer's only view of compression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jpq.compression.channel_counts import allowed_counts
from jpq.compression.hypernetwork import bake_hypernetwork
from jpq.compression.masking import GateSample, original
from jpq.compression.usage import FLOAT_BITS, NO_MASK, Densities, exact_usage, layer_use, other_uses, straight_through
from jpq.costs import LayerUse
from jpq.methods.gates import Frozen, Gate
from jpq.methods.quantizers import (
    BitWidth,
    IntegerQuantizer,
    act_quantizer,
    fit_threshold,
    is_quantized,
    result_quantizer,
    weight_quantizer,
)
from jpq.plan import ALL_LEVELS, NARROW, EndPlan, LayerPlan, MaskPlan, Plan
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.checkpointing import without_reentrant_checkpoints
from jpq.tracing.forward import restore_modes
from jpq.tracing.network import Layer, Network
from jpq.tracing.open_norms import opened_units
from jpq.tracing.sites import Site

Trainable = Literal["both", "weights", "decisions"]

DECIDED_AT = 0.9  # progress of the search at which every gate with a fixed count has decided


class CompressedModel(nn.Module):
    """A model with gates and quantizers on its layers; the trainer sees this and neither gates nor quantizers.

    Args:
        model: the model with quantized layers and masked weights (see `attach`).
        network, sites: layers and pruning groups of the float model.
        gates: one per site, in the same order.
        method: name of the method, for the plan.
        multiple: discretization keeps multiples of so many channels at each site.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        sites: Sequence[Site],
        gates: Iterable[Gate],
        method: str,
        multiple: int = 1,
    ):
        super().__init__()
        self.multiple = multiple
        self.model, self.network, self.sites, self.method = model, network, tuple(sites), method
        self.gates: Any = nn.ModuleList(gates)  # of Gate
        self.draws: list[GateSample] = []
        self.calibration_samples: dict[str, Tensor] = {}  # layer -> samples of its input
        self.shares = ChannelShares(network, [s for s in self.sites if not s.is_mask])
        self.opened = opened_units(network, self.sites)  # above 0 the rebuilt model computes something else
        self.densities = Densities(network, self.sites)
        self.scheduled_pruning: Callable[[float], None] | None = None  # closes units at this progress, by a ranking
        self.progress: Tensor
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))  # of the search
        self._untrained: list[nn.Parameter] = []  # switched off by `set_trainable`

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output under the present decisions, with a new sample of every gate."""
        for draw in self.draws:
            draw.resample()
        with without_reentrant_checkpoints():
            return self.model(*args, **kwargs)

    def layer(self, name: str) -> Any:
        """The module of a layer in the attached model; None where its weight belongs to no module of that name."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def quantizers(self, name: str) -> tuple[IntegerQuantizer, IntegerQuantizer] | None:
        """The quantizers of a layer's weight and of its input; None where it stays in floating point."""
        layer = self.layer(name)
        return (weight_quantizer(layer), act_quantizer(layer)) if is_quantized(layer) else None

    def counts(self, site: Site) -> tuple[int, ...]:
        """Numbers of units that discretization may keep of a site, ascending."""
        return allowed_counts(self.network, site, self.multiple)

    def used_weight(self, layer: Layer) -> Tensor:
        """A layer's weight in the forward pass: masked by the last sample of the gates, then quantized."""
        owner, _, name = layer.weight.rpartition(".")
        weight: Tensor = getattr(self.model.get_submodule(owner), name)
        pair = self.quantizers(layer.name)
        return pair[0](weight)[0] if pair else weight

    def unit_decisions(self) -> list[Tensor]:
        """The present decisions of each gate, `[rows, n]` of 0 and 1, with the gradients of soft ones."""
        return [g.keep() if g.fixed_count else straight_through(g.keep(), g.keep_probability()) for g in self.gates]

    def soft_usage(self, decisions: Sequence[Tensor] | None = None) -> list[LayerUse]:
        """The present use of each layer, product and table: values of hard decisions, gradients of soft ones.

        decisions: the `unit_decisions`, where the caller differentiates by them.
        """
        keep_probabilities = self.unit_decisions() if decisions is None else decisions
        channels = [a for a, s in zip(keep_probabilities, self.sites, strict=True) if not s.is_mask]
        inputs, outputs = self.shares.soft_shares(channels)
        work = self.shares.soft_work(channels)
        density = self.densities.soft_densities(keep_probabilities)
        layers = [
            layer_use(
                layer,
                inputs[i],
                outputs[i],
                density.get(layer.name, NO_MASK),
                *self._widths(layer.name),
                positions=work.positions[i],
            )
            for i, layer in enumerate(self.network.layers)
        ]
        return layers + other_uses(self.network, work)

    @torch.no_grad()
    def exact_usage(self, plan: Plan | None = None) -> list[LayerUse]:
        """The use of each layer, product and table under a plan (default: the present decisions), in exact numbers."""
        return exact_usage(self.network, self.shares, plan or self.plan(), self.densities)

    def _widths(self, name: str) -> tuple[Any, Any]:
        pair = self.quantizers(name)
        return (pair[0].width(), pair[1].width()) if pair else (FLOAT_BITS, FLOAT_BITS)

    def penalty(self) -> Tensor:
        """The regulariser of gates that is not priced, averaged over all units (nats per unit)."""
        parts = [p for p in (g.penalty() for g in self.gates if not g.priced_penalty) if p is not None]
        units = sum(g.n * g.rows for g in self.gates)
        device = next(self.model.parameters()).device
        return sum((p.sum() for p in parts), torch.zeros((), device=device)) / max(1, units)

    def priced_penalty(self, weighted_cost: Tensor, decisions: Sequence[Tensor]) -> Tensor:
        """The regulariser of gates with `priced_penalty`, each unit's times its price: a scalar.

        Args:
            weighted_cost: what the costs weigh in the loss, as a differentiable function of `decisions`. Its derivative
                by a unit's decision is the unit's price in nats, whether the unit is open or closed at present.
            decisions: the `unit_decisions`.
        """
        total = torch.zeros((), device=next(self.model.parameters()).device)
        pairs = [(g, d) for g, d in zip(self.gates, decisions, strict=True) if g.priced_penalty]
        if not pairs or not weighted_cost.requires_grad:
            return total
        prices = torch.autograd.grad(weighted_cost, [d for _, d in pairs], retain_graph=True, allow_unused=True)
        for (gate, _), price in zip(pairs, prices, strict=True):
            penalty = gate.penalty()
            if penalty is not None and price is not None:
                total = total + (price.clamp_min(0.0) * penalty).sum()
        return total

    def metrics(self) -> dict[str, dict[str, float]]:
        """Site -> named numbers about its gate's decisions, for the report; only of gates that have any."""
        metrics = {site.name: gate.metrics() for site, gate in zip(self.sites, self.gates, strict=True)}
        return {name: numbers for name, numbers in metrics.items() if numbers}

    def own_loss(self) -> Tensor:
        """The gates' unscaled terms of the loss (augmented Lagrangians), a scalar."""
        parts = [p for p in (g.own_loss() for g in self.gates) if p is not None]
        return sum(parts, torch.zeros((), device=next(self.model.parameters()).device))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Anneal gates and clip widths to their bounds; called after every optimizer step."""
        self.progress.fill_(progress)
        for gate in self.gates:
            gate.after_step(progress)
        for width in self.widths():
            width.after_step()
        if self.scheduled_pruning is not None:
            self.scheduled_pruning(progress)

    @torch.no_grad()
    def finish_search(self) -> None:
        """Let gates take their final decisions, those with a fixed count also where the search ended too early."""
        if self.scheduled_pruning is not None:
            self.scheduled_pruning(1.0)
        early = float(self.progress) < DECIDED_AT
        for draw in self.draws:
            draw.show_weights()
            if early and draw.gate.fixed_count:
                draw.gate.after_step(1.0)
        for gate in self.gates:
            gate.finish()
        if early:
            for draw in self.draws:
                draw.resample()

    def widths(self) -> list[BitWidth]:
        """All bit-widths of the model."""
        return [m for m in self.model.modules() if isinstance(m, BitWidth)]

    def decisions(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of the decisions: "gates" and "bits"."""
        return {
            "gates": [p for gate in self.gates if not gate.self_updating for p in gate.parameters()],
            "bits": [p for width in self.widths() for p in width.parameters()],
        }

    def weights(self) -> dict[str, list[nn.Parameter]]:
        """All other parameters: "decayed" (weights of two or more dims) and "plain" (biases, norms, ranges)."""
        ranges = {id(m.log_threshold) for m in self.model.modules() if isinstance(m, IntegerQuantizer)}
        deciding = {id(p) for group in self.decisions().values() for p in group}
        weights = [p for p in self.model.parameters() if id(p) not in deciding]
        decayed = [p for p in weights if p.dim() > 1 and id(p) not in ranges]
        plain = [p for p in weights if p.dim() <= 1 or id(p) in ranges]
        return {"decayed": decayed, "plain": plain}

    @property
    def bilevel(self) -> bool:
        """Whether decisions learn on other batches than the weights (bi-level optimization)."""
        return any(gate.bilevel for gate in self.gates)

    def set_trainable(self, side: Trainable) -> None:
        """Let only the weights, only the decisions, or both get gradients until the next call.

        The gradients of the others are removed: an optimizer leaves parameters without a gradient as they are, bit for
        bit, whatever their momentum and decay.
        """
        for p in self._untrained:
            p.requires_grad_(True)
        groups = {"both": {}, "weights": self.decisions(), "decisions": self.weights()}[side]
        self._untrained = [p for group in groups.values() for p in group if p.requires_grad]
        for p in self._untrained:
            p.requires_grad_(False)
            p.grad = None

    @torch.no_grad()
    def plan(self) -> Plan:
        """The present decisions."""
        layers = {}
        for layer in self.network.layers:
            pair = self.quantizers(layer.name)
            if pair:
                layers[layer.name] = LayerPlan(
                    round(float(pair[0].width())), round(float(pair[1].width())), pair[1].signed
                )
        for draw in self.draws:
            draw.show_weights()
        pairs = list(zip(self.sites, self.gates, strict=True))
        kept = {s.name: tuple(g.keep()[0].bool().tolist()) for s, g in pairs if not s.is_mask}
        masks = {s.taps[0].layer: MaskPlan.of(g.keep()) for s, g in pairs if s.is_mask}
        structures = {s.taps[0].layer: s.taps[0].structure.spec() for s in self.sites if s.is_mask}
        ends = {
            name: EndPlan(round(float(grid.width())), grid.signed)
            for name, module in self.model.named_modules()
            if (grid := result_quantizer(module)) is not None
        }
        return Plan(self.method, layers, kept, masks, structures, ends=ends, weight_levels=self._weight_levels())

    def _weight_levels(self) -> str:
        """Which levels of their grids weights use, as the plan says it."""
        pairs = [self.quantizers(layer.name) for layer in self.network.layers]
        return ALL_LEVELS if any(pair and pair[0].all_levels for pair in pairs) else NARROW

    @torch.no_grad()
    def freeze(self, plan: Plan) -> None:
        """Fix the decisions of a plan: gates become 0 or 1 with their scales folded into the weights, widths fixed.

        Under a plan of the present decisions, evaluation before and after agrees exactly. Modules stay in their modes.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.set_trainable("both")
        self.scheduled_pruning = None
        for layer in self.network.layers:
            bake_hypernetwork(self.model, layer)
        for draw, site, gate in zip(self.draws, self.sites, self.gates, strict=True):
            draw.show_weights()
            for tap in site.taps:
                owner, _, name = self.network.layer(tap.layer).weight.rpartition(".")
                weight = original(self.model.get_submodule(owner), name)
                # some gates have scale 0 for units that discretization opened again: their weights stay as they are
                scale = torch.where(gate.keep() > 0, gate.scale(), torch.ones_like(gate.scale()))
                weight.mul_(tap.structure.expand(scale, weight.shape))
            mask = site.is_mask
            kept = plan.masks[site.taps[0].layer].units() if mask else torch.tensor([plan.kept[site.name]])
            draw.gate = Frozen(kept.to(gate.keep()))
            draw.resample()
        self.gates = nn.ModuleList(draw.gate for draw in self.draws)
        for layer in self.network.layers:
            pair = self.quantizers(layer.name)
            if not pair:
                continue
            bits = plan.layers[layer.name]
            self._fix_weight(layer, pair[0], bits.w_bits)
            self._fix_input(layer, pair[1], bits.a_bits)
        restore_modes(self.model, {**modes, self.model: self.training})

    def _fix_input(self, layer: Layer, quantizer: IntegerQuantizer, bits: int) -> None:
        """Fix the width of the input; where that changes it, refit its range to the samples of calibration."""
        changed = bits != round(float(quantizer.width()))
        quantizer.fix(bits)
        if changed and layer.name in self.calibration_samples:
            samples = self.calibration_samples[layer.name].to(quantizer.log_threshold)
            threshold = fit_threshold(samples, bits, quantizer.signed, False)
            quantizer.log_threshold.copy_(threshold.clamp_min(1e-8).log())

    def _fix_weight(self, layer: Layer, quantizer: IntegerQuantizer, bits: int) -> None:
        """Fix the width of the weight; where that changes it, refit its range."""
        changed = bits != round(float(quantizer.width()))
        quantizer.fix(bits)
        if changed:
            quantizer.refit(self.layer(layer.name).weight, bits)
