"""ALLOCATORS by name, and channels and bits by an allocator for methods that decide before they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from torch import Tensor

from jpq import costs
from jpq.allocation import channels
from jpq.allocation.bit_sensitivity import Key, bits_by_noise, sensitivities
from jpq.allocation.channels import NEEDS_DATA, AllocationProblem, Allocator, Margins, margins_of_sequence
from jpq.allocation.measured.calibration import Measurement
from jpq.allocation.ranking.evidence import Batches, Loss
from jpq.allocation.ranking.rank import quantiles, rank_units, score_units, write_margins
from jpq.allocation.reinforce import Counts, Policy, learn_allocation
from jpq.compression import discretize
from jpq.compression.model import CompressedModel
from jpq.compression.soft_decisions import soft_decisions
from jpq.config import MASKED
from jpq.costs.target import Target, all_met
from jpq.methods.compatibility import any_of
from jpq.methods.quantizers import BitWidth, Learned
from jpq.methods.scores import Score
from jpq.methods.table import METHODS
from jpq.plan import Plan
from jpq.types import JpqError, unknown

Bounds = tuple[int, int]  # smallest and largest width, in bits

NOISE_BATCHES = 8  # batches in which the quantization noise is measured

TRIALS = 40  # trials of "sampled", once for channels and once for bits

CHANNEL_OFFSET = 0.5  # largest offset that "sampled" tries for channels, in shares of a layer's units

BIT_OFFSET = 2.0  # largest offset that "sampled" tries for a width, in bits

MEASURING = ("reinforce", "sampled")  # allocators that measure plans on held-out images


def reinforced(problem: AllocationProblem) -> Margins:
    """Allocate by a learned distribution over layers: units in the order of removal; the rest follow by share."""
    orders = [group.scores.argsort(descending=True, stable=True) for group in problem.groups]
    full_macs = problem.macs([torch.ones(len(r)) for r in orders])

    def kept(removed: Counts) -> list[Tensor]:
        return [
            torch.zeros(len(r)).index_fill(0, r[: len(r) - int(n)], 1.0) for r, n in zip(orders, removed, strict=True)
        ]

    def quality(removed: Counts) -> tuple[float, float]:
        units = kept(removed)
        return problem.measure(units), problem.macs(units) / full_macs

    path = learn_allocation(
        [len(r) for r in orders], quality, lambda removed: problem.meets_target(kept(removed)), Policy(), problem.seed
    )
    removals: list[tuple[int, int]] = []  # (group, unit), first removed first
    removed = np.zeros(len(orders), np.int64)
    for after in path:
        for g, r in enumerate(orders):
            removals += [(g, int(u)) for u in r[len(r) - int(after[g]) : len(r) - int(removed[g])].flip(0)]
        removed = after
    rest = [(g, int(u), i / len(r)) for g, r in enumerate(orders) for i, u in enumerate(r[: len(r) - int(removed[g])])]
    rest.sort(key=lambda entry: entry[2])  # the best of each group first
    return margins_of_sequence(problem, [(g, u) for g, u, _ in rest] + removals[::-1])


def sampled(problem: AllocationProblem) -> Margins:
    """Allocate by search: units by rank in their group plus an offset per group, chosen by held-out accuracy."""
    ranks = [quantiles(group.scores) for group in problem.groups]

    def margins(offsets: Mapping[str, float]) -> Margins:
        moved = [r + offsets[g.name] for r, g in zip(ranks, problem.groups, strict=True)]
        return list(quantiles(torch.cat(moved)).split([len(r) for r in moved]))

    def accuracy(offsets: Mapping[str, float]) -> float:
        return problem.measure(fewest_removed(problem, margins(offsets)))

    names = [g.name for g in problem.groups]
    return margins(search_offsets(names, accuracy, TRIALS, problem.seed, CHANNEL_OFFSET)) if ranks else []


def fewest_removed(problem: AllocationProblem, margins: Margins) -> list[Tensor]:
    """Keep masks, `[n]` a group, that remove as few units as meet the target, by margin; at least one of each stays."""
    flat = torch.cat(margins).sort().values

    def kept(cut: int) -> list[Tensor]:
        masks = [(m > flat[cut - 1]).float() if cut else torch.ones(len(m)) for m in margins]
        for mask, m in zip(masks, margins, strict=True):
            mask[m.argmax()] = 1.0
        return masks

    low, high = 0, len(flat)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.meets_target(kept(middle)) else (middle + 1, high)
    return kept(low)


ALLOCATORS: Mapping[str, Allocator] = {
    "uniform": channels.uniform,
    "threshold": channels.threshold,
    "greedy": channels.greedy,
    "reinforce": reinforced,
    "sampled": sampled,
}


def pick_allocator(name: str) -> Allocator | None:
    """The allocator of that name; None for an empty name. Raises JpqError with the closest names for others."""
    if name and name not in ALLOCATORS:
        raise unknown("allocator", name, ALLOCATORS)
    return ALLOCATORS[name] if name else None


def check_allocator(method: str, allocator: str) -> None:
    """Raise JpqError for an allocator of an unknown name, or with a method that does not take one."""
    if allocator and method == MASKED:
        raise JpqError(f"--allocator {allocator}: --mask says which weights are dropped. Leave --allocator out.")
    pick_allocator(allocator)
    methods = [name for name, m in METHODS.items() if m.score and m.procedure in ("one-shot", "two-stage")]
    if allocator and method not in methods:
        raise JpqError(
            f"--allocator {allocator}: method {method} learns how much stays where, or is told. Choose --method "
            f"{any_of(methods)}."
        )


@dataclass(frozen=True, eq=False)
class PlanEvaluator:
    """Data for allocators: training batches, and the held-out accuracy of any plan."""

    batches: Callable[[], Batches]  # (inputs, labels or None) pairs, from the start at every call
    accuracy: Callable[[Plan], float] | None = None  # in [0, 1]; None where there are no held-out data
    seed: int = 0
    loss: Loss = F.cross_entropy  # loss that scores differentiate: (output, labels) -> mean over the batch
    measurement: Measurement | None = None  # what sensitivities are measured on; None: they cannot be

    def require_accuracy(self, allocator: str) -> Callable[[Plan], float]:
        """The held-out accuracy of a plan. Raises JpqError, naming the allocator, where nothing measures it."""
        if self.accuracy is None:
            raise JpqError(f"Allocator {allocator} {NEEDS_DATA}")
        return self.accuracy


def allocate_channels(
    net: CompressedModel,
    score: Score,
    allocator: str,
    evaluator: PlanEvaluator,
    share: float = 1.0,
    target: Target | None = None,
) -> None:
    """Write an allocator's order of units into the margins of `Ranked` gates, for discretization to cut.

    Without an allocator the score says which units compete (`rank_units`): all units of the network where it may be
    compared between layers, else the units of each layer.

    Args:
        share: share of the units of each site that is about to stay, as for `rank_units`.
        target: limit of the units' cost, for allocators that work towards one.

    Raises JpqError for an unknown name, for units that are no channels, and where the evidence cannot be collected.
    """
    allocate = pick_allocator(allocator)
    if allocate is None:
        rank_units(net, score, evaluator.batches(), share, evaluator.loss)
        return
    if allocator in MEASURING:
        evaluator.require_accuracy(allocator)
    groups = score_units(net, score, evaluator.batches(), share, evaluator.loss)
    problem = AllocationProblem(net, groups, score.everywhere, target, evaluator.accuracy, evaluator.seed)
    write_margins(net, groups, allocate(problem))


def allocate_bits(
    net: CompressedModel,
    allocator: str,
    evaluator: PlanEvaluator,
    plan: Plan,
    targets: Sequence[Target],
    w_bits: Bounds,
    a_bits: Bounds,
) -> dict[Key, BitWidth] | None:
    """Soft widths of every tensor for discretization to shift, for the units that `plan` keeps.

    None: the same width everywhere.
    Raises JpqError for an allocator that measures accuracy where nothing measures it.
    """
    if allocator in ("", "uniform"):
        return None
    if allocator in ("threshold", "greedy"):
        inputs = [x for x, _ in islice(evaluator.batches(), NOISE_BATCHES)]
        return bits_by_noise(net, sensitivities(net, inputs, evaluator.seed), plan, w_bits, a_bits)
    bounds = {
        (layer.name, side): side_bounds
        for layer in net.network.layers
        for side, side_bounds in (("w", w_bits), ("a", a_bits))
        if layer.name in plan.layers and not (side == "a" and layer.reads_input)
    }
    accuracy = evaluator.require_accuracy(allocator)
    allocate = _sampled_bits if allocator == "sampled" else _reinforced_bits
    return allocate(net, accuracy, evaluator.seed, plan, targets, bounds)


def _sampled_bits(
    net: CompressedModel,
    accuracy: Callable[[Plan], float],
    seed: int,
    plan: Plan,
    targets: Sequence[Target],
    bounds: Mapping[Key, Bounds],
) -> dict[Key, BitWidth]:
    """Four bits plus an offset for each tensor, chosen by a search over held-out accuracy within the targets."""
    decisions = replace(soft_decisions(net), plan=plan, margins={})

    def widths(offsets: Mapping[str, float]) -> dict[Key, BitWidth]:
        return {(name, side): Learned(4.0 + offsets[f"{name} {side}"], *b) for (name, side), b in bounds.items()}

    def accuracy_of(offsets: Mapping[str, float]) -> float:
        shifted = replace(decisions, widths={**decisions.widths, **widths(offsets)})
        return accuracy(discretize.discretize(net, targets, shifted))

    names = [f"{name} {side}" for name, side in bounds]
    return widths(search_offsets(names, accuracy_of, TRIALS, seed, BIT_OFFSET))


def _reinforced_bits(
    net: CompressedModel,
    accuracy: Callable[[Plan], float],
    seed: int,
    plan: Plan,
    targets: Sequence[Target],
    bounds: Mapping[Key, Bounds],
) -> dict[Key, BitWidth]:
    """Bits taken from the widest by a learned distribution over tensors, until the targets are met."""
    full_bops = float(costs.bops(net.exact_usage(with_bits(plan, {key: high for key, (_, high) in bounds.items()}))))

    def plan_without(removed: Counts) -> Plan:
        return with_bits(plan, {key: b[1] - int(n) for (key, b), n in zip(bounds.items(), removed, strict=True)})

    def quality(removed: Counts) -> tuple[float, float]:
        narrower = plan_without(removed)
        return accuracy(narrower), float(costs.bops(net.exact_usage(narrower))) / full_bops

    steps = [high - low + 1 for low, high in bounds.values()]
    path = learn_allocation(
        steps, quality, lambda removed: all_met(targets, net.exact_usage(plan_without(removed))), Policy(), seed
    )
    removed = path[-1] if path else np.zeros(len(bounds), np.int64)
    return {key: Learned(b[1] - int(n), *b) for (key, b), n in zip(bounds.items(), removed, strict=True)}


def with_bits(plan: Plan, bits: Mapping[Key, int]) -> Plan:
    """A copy of a plan with other widths for the given tensors."""
    layers = {
        name: replace(layer, w_bits=bits.get((name, "w"), layer.w_bits), a_bits=bits.get((name, "a"), layer.a_bits))
        for name, layer in plan.layers.items()
    }
    return replace(plan, layers=layers)


def search_offsets(
    names: Sequence[str], accuracy: Callable[[dict[str, float]], float], trials: int, seed: int, largest: float
) -> dict[str, float]:
    """Search the offsets in [-largest, largest], one for each name, with the best accuracy: the search baseline.

    The sampler is a tree-structured Parzen estimator (J. Bergstra et al., NeurIPS 2011), seeded; the first trial has
    all offsets at 0, which is the uniform allocation. Every trial meets the budget: trials differ in where units or
    bits are removed, not in how many.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed % 2**32, multivariate=True)
    )
    study.enqueue_trial(dict.fromkeys(names, 0.0))
    study.optimize(
        lambda trial: accuracy({name: trial.suggest_float(name, -largest, largest) for name in names}),
        n_trials=trials,
    )
    return {name: float(study.best_params[name]) for name in names}
