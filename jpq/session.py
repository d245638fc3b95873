"""Three lines inside somebody's own training loop: `compress`, `pressure`, `finalize`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jpq.allocation import two_stage
from jpq.allocation.allocators import PlanEvaluator, bit_widths, check_allocator, place
from jpq.allocation.procedures import decide
from jpq.allocation.ranking.evidence import Batches
from jpq.allocation.ranking.scheduled_pruning import ScheduledPruning, macs_limit, uniform_keep_share
from jpq.allocation.structure_search import map_structures
from jpq.allocation.uniform_bits import start_bits
from jpq.compression import discretize, external_mask
from jpq.compression.attach import attach
from jpq.compression.build import fixed_share, gate_factory, method_sites, width_factory
from jpq.compression.calibration import recalibrate
from jpq.compression.channel_counts import channel_multiple as multiple_of
from jpq.compression.model import CompressedModel, Trainable
from jpq.compression.usage import exact_usage
from jpq.config import BOPS, MASKED
from jpq.costs.latency_table import LatencyTable
from jpq.costs.target import Controller, parse_targets
from jpq.export.rebuild import rebuild
from jpq.methods.compatibility import SEARCH, compose
from jpq.methods.gates import Ranked
from jpq.methods.schedules import pick_schedule
from jpq.methods.scores import pick_score
from jpq.plan import Plan
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.decompose import decompose
from jpq.tracing.network import with_times
from jpq.tracing.open_norms import require_opened
from jpq.tracing.trace import trace
from jpq.training.loop import pressure
from jpq.types import JpqError, unknown

Bounds = tuple[int, int]


class CompressionSession(nn.Module):
    """A model under compression, for use like any module: call it, add `pressure()` to the loss, call `step()`.

    Made by `compress`. The search lasts `steps` optimiser steps; the budget is reached before it ends.

    With a bi-level method (`dais`) steps alternate by themselves: in one only the weights get gradients, in the next
    only the decisions, and `turn` says which. Split the training samples into two fixed halves (`Batches.halves`, or
    by index) and take each batch from the half of `turn`; use a single optimiser that leaves parameters without a
    gradient alone, as torch's do after `zero_grad()`.
    """

    def __init__(
        self,
        net: CompressedModel,
        model: nn.Module,
        controller: Controller | None,
        steps: int,
        gate_weight: float,
        second: Callable[[], None] | None = None,
        recalibrate: Callable[[], None] | None = None,
    ):
        super().__init__()
        self.net = net
        self._dense = [model]  # in a list: it is not part of what trains
        self.controller, self.steps, self.gate_weight = controller, steps, gate_weight
        self.recalibrate = recalibrate  # observes what layers read when the search has ended
        self.second = second  # what `land` does where everything is planned already
        self.done = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output under the decisions as they stand."""
        if self.training:
            self.net.set_trainable(self.turn)
        return self.net(*args, **kwargs)

    @property
    def progress(self) -> float:
        """Position in the search, in [0, 1]."""
        return min(1.0, self.done / self.steps)

    @property
    def turn(self) -> Trainable:
        """What learns from the next batch: "both", or with a bi-level method "weights" and "decisions" in turn."""
        if self.controller is None or not self.net.bilevel:
            return "both"
        return "decisions" if self.done % 2 else "weights"

    def groups(
        self, lr: float = 1e-3, gate_lr: float = 0.05, bit_lr: float = 0.02, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser (Adam's kind); decisions need larger rates than weights."""
        weights, decisions = self.net.weights(), self.net.decisions()
        groups = [
            {"params": weights["decayed"], "lr": lr, "weight_decay": weight_decay},
            {"params": weights["plain"], "lr": lr, "weight_decay": 0.0},
            {"params": decisions["gates"], "lr": gate_lr, "weight_decay": 0.0},
            {"params": decisions["bits"], "lr": bit_lr, "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    def pressure(self) -> Tensor:
        """What the budget and the gates add to the loss, a scalar; 0 once landed, and where only weights learn."""
        if self.controller is None or self.turn == "weights":
            return torch.zeros((), device=next(self.parameters()).device)
        return pressure(self.net, self.controller, self.progress, self.gate_weight)

    def step(self) -> None:
        """After every `optimizer.step()`."""
        self.net.after_step(self.progress)
        self.done += 1

    def share(self, cost: str = "bops") -> float:
        """Cost of the decisions as they stand over the fp32 model's."""
        from jpq.costs import COSTS, baseline

        uses = self.net.exact_usage()
        return float(COSTS[cost](uses)) / baseline(uses)[cost]

    def discretize(self) -> Plan:
        """Take the decisions for good, within the budget. Go on training with a new optimiser to fine-tune."""
        if self.controller is not None:
            self.net.finish_search()
            plan = discretize.discretize(self.net, self.controller.targets)
            if self.recalibrate is not None:
                self.recalibrate()
            self.net.freeze(plan)
            self.controller, self.recalibrate = None, None
        if self.second is not None:
            self.second()
            self.second = None
        return self.net.plan()

    def finalize(self) -> nn.Module:
        """The small model: an ordinary module in eval mode, physically smaller, with brevitas layers.

        It computes what this one does, unless averages were opened (`open_norms`): then go on training it.
        """
        self.discretize()
        self.net.eval()
        return rebuild(self.net, self._dense[0])[0]


def compress(
    model: nn.Module,
    example_inputs: Any,
    method: str = "djpq",
    *,
    bops: str | None = None,
    size: str | None = None,
    macs: str | None = None,
    cost: str = "bops",
    steps: int = 1000,
    w_bits: Bounds = (2, 8),
    a_bits: Bounds = (2, 8),
    image_bits: int = 8,
    skip: Collection[str] = (),
    structure: str = "",
    width: str = "",
    density: float = 0.5,
    gate_weight: float = 0.03,
    open_norms: bool = False,
    score: str = "",
    schedule: str = "",
    classes: str = "",
    evidence: Batches | None = None,
    allocator: str = "",
    latency: str | None = None,
    table: LatencyTable | None = None,
    mask: str | Path | None = None,
    output_bits: int = 0,
    channel_multiple: int = 1,
) -> CompressionSession:
    """A trainable copy of a trained `model`, with gates and quantizers, that will end within its budget.

    Args:
        model: trained, in floating point; it is not changed.
        example_inputs: one real batch (a tensor, a tuple of positional arguments, or a dict of keywords): it fits the
            ranges too.
        method: a name in METHODS. With "two-stage" train the pruned network first; `land` then quantizes it.
        bops, size, macs: targets such as "1%", "12M", "50KB"; at least one.
        cost: how `bops` are counted: "bops", or "bops-structured" (zeros that lie anywhere count as work).
        steps: optimiser steps that the search may take.
        w_bits, a_bits: smallest and largest width of weights and activations.
        image_bits: width of the model's input.
        skip: layers whose channels or weights are not pruned.
        structure: where zeros may lie ("channels", "elementwise", "2:4", ...), "rules" for a structure that suits each
            layer, or one for each by name ("conv1=pattern,fc=block:8x1"); default: the method's.
        width: how bits are chosen, a name in methods.quantizers.WIDTHS; default: the method's. "fixed": the largest of
            w_bits and a_bits everywhere, so that only pruning can reach the targets.
        density: share of the weights that stay, for methods that are told how many; of the MACs, for those that rank
            channels by a score (but for "upscale").
        gate_weight: weight of the gates' own regulariser.
        open_norms: also prune channels inside the averages of LayerNorm, RMSNorm and GroupNorm. What `finalize` gives
            is then not what was trained, since the averages miss those channels: go on training it.
        score: a name in jpq.methods.scores.SCORES, for methods that rank channels by one; default: the method's.
        schedule: when ranked channels close, a name in jpq.methods.schedules.SCHEDULES; default: the method's.
        classes: the only ones that score "catro" has to tell apart, such as "0,3,5".
        evidence: training batches for scores that look at data, (inputs, classes) pairs, iterated at each decision
            (a list, a DataLoader); default: the example inputs, without classes.
        allocator: how much stays where, for "two-stage" and "upscale": a name in jpq.allocation.ALLOCATORS that
            measures no accuracy; default: as the score allows.
        latency: a target such as "3ms" or "50%", by `table`: measured layers (`layer_table.read_table`).
        mask: a mask to hold instead of a method: the folder of `jpq prune-private`, whose weights then are the start,
            or a mask's file alone. Leave `method`, `structure` and `skip` out.
        output_bits: also round convolutions' results before sums and poolings to so many bits, so that integer kernels
            compute them (8 is a good choice); 0: leave them in floating point.
        channel_multiple: channels stay in multiples of so many (8 and 16 suit integer kernels).

    Raises JpqError for unknown names, for what does not go together (`compatibility.incompatibility`), and for targets
    that are malformed or cannot be met.
    """
    example_inputs = tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs
    if cost not in BOPS:
        raise unknown("cost", cost, BOPS)
    if output_bits and not 2 <= output_bits <= 8:
        raise JpqError(f"output_bits {output_bits} is outside 2 to 8; 0 leaves results in floating point.")
    if table is not None and not isinstance(table, LatencyTable):
        raise JpqError(
            "table must be a Table of latencies: read one with jpq.export.timing.layer_table.read_table(Path(...))."
        )
    asked = {cost: bops, "size": size, "macs": macs, "latency": latency}
    if not any(asked.values()):
        raise JpqError('No target: give bops="1%" (or "12M"), size="50KB", macs="50%" or latency="3ms".')
    given = external_mask.read(Path(mask)) if mask else None
    if given and (structure or skip):
        raise JpqError("mask says which weights are dropped, and where: leave structure and skip out.")
    if given and method not in ("djpq", MASKED):
        raise JpqError(f"mask says what is pruned, and method {method} would too. Leave one of them out.")
    method = MASKED if given else method
    if method == MASKED and not given:
        raise JpqError("Method masked: there is no mask to hold. Give one as mask=..., or choose a method.")
    how = compose(method, structure, width, score, schedule, classes)
    check_allocator(method, allocator)
    multiple = multiple_of(method, how, channel_multiple)
    by = pick_score(how.score or "l1", classes)
    labelled = [(example_inputs, None)] if evidence is None else evidence
    judge = PlanEvaluator(lambda: labelled)
    if how.structure == SEARCH:
        raise JpqError(
            'structure="search" judges mappings on held-out data, which compress has not: use jpq.optimize, '
            'or structure="rules".'
        )
    model = decompose(model)
    example = example_inputs if isinstance(example_inputs, (tuple, dict)) else (example_inputs,)
    network = trace(model, example, open_norms=open_norms)
    if open_norms:
        require_opened(network, how.gate is not None)
    if table is not None:
        network = with_times(network, table)
    schemes = None if given else map_structures(how, network, example, density, skip)
    sites = given.sites(network) if given else method_sites(how, network, skip, schemes)
    targets = parse_targets(asked, exact_usage(network, ChannelShares(network, ()), Plan(method, {}, {})))
    left = given.share_left(network, sites) if given else fixed_share(sites, how, density)
    start = start_bits(network, targets, w_bits, a_bits, image_bits, left)
    make = width_factory(how, w_bits, a_bits, image_bits, start)
    first = given.start(model, sites) if given else model
    net = attach(
        first, network, sites, gate_factory(how, density), make, [example_inputs], method, output_bits, multiple
    )
    net = given.put(net) if given else net
    if how.stages:
        place(
            net,
            by,
            allocator,
            judge,
            uniform_keep_share(net, macs_limit(net, density)),
            discretize.density_target(net, density),
        )
        plan = two_stage.decide_two_stage(
            net,
            targets,
            w_bits,
            a_bits,
            density,
            lambda kept: bit_widths(net, allocator, judge, kept, targets, w_bits, a_bits),
        )
        net.freeze(two_stage.pruned(net, plan))
        return CompressionSession(
            net, model, None, steps, 0.0, partial(two_stage.quantize, net, plan, [example_inputs])
        )
    if not how.searches:
        net.freeze(decide(net, targets, w_bits, a_bits, by, judge, allocator))
        return CompressionSession(net, model, None, steps, 0.0)
    discretize.check_reachable(net, targets)
    controller = Controller(targets)
    if how.gate is Ranked:
        net.scheduled_pruning = ScheduledPruning(net, by, pick_schedule(how.schedule), density, lambda _: labelled)
        net.scheduled_pruning(0.0)
    controller.begin(net.exact_usage())
    look = partial(recalibrate, net, [example_inputs])
    return CompressionSession(net, model, controller, max(1, steps), gate_weight, recalibrate=look)
