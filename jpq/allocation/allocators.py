"""ALLOCATORS: how much stays where, in channels and in bits, for methods that decide before they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import optuna
import torch
from torch import Tensor

from jpq import costs
from jpq.allocation import channels
from jpq.allocation.bit_sensitivity import Key, bits_by_noise, sensitivities
from jpq.allocation.channels import AllocationProblem, Allocator, Margins, in_order
from jpq.allocation.ranking.evidence import Batches
from jpq.allocation.ranking.rank import order, quantiles, rank, scored
from jpq.allocation.reinforce import Counts, Policy, learn
from jpq.compression import discretize
from jpq.compression.model import CompressedModel
from jpq.config import MASKED
from jpq.costs.target import Target, all_met
from jpq.methods.compatibility import any_of
from jpq.methods.quantizers import BitWidth, Learned
from jpq.methods.scores import Score
from jpq.methods.table import METHODS
from jpq.plan import Plan
from jpq.types import JpqError, unknown

Bounds = tuple[int, int]

LOOKED = 8  # batches in which the noise is measured

TRIALS = 40  # of the search baseline, once for channels and once for bits

REACH_BITS = 2.0  # largest offset of a width that the search baseline tries

MEASURING = ("reinforce", "sampled")  # those that try plans on held-out images
REACH = 0.5  # largest offset, in shares of a layer's units (or in bits, times `scale`)


def reinforced(problem: AllocationProblem) -> Margins:
    """Units in the order in which a learned distribution over layers lets them go; what is left follows by share."""
    ranks = [group.scores.argsort(descending=True, stable=True) for group in problem.groups]
    full = problem.macs([torch.ones(len(r)) for r in ranks])

    def kept(gone: Counts) -> list[Tensor]:
        return [torch.zeros(len(r)).index_fill(0, r[: len(r) - int(n)], 1.0) for r, n in zip(ranks, gone, strict=True)]

    def quality(gone: Counts) -> tuple[float, float]:
        now = kept(gone)
        return problem.measured(now), problem.macs(now) / full

    path = learn([len(r) for r in ranks], quality, lambda gone: problem.enough(kept(gone)), Policy(), problem.seed)
    went: list[tuple[int, int]] = []
    gone = np.zeros(len(ranks), np.int64)
    for now in path:
        for g, r in enumerate(ranks):
            went += [(g, int(u)) for u in r[len(r) - int(now[g]) : len(r) - int(gone[g])].flip(0)]
        gone = now
    stay = [(g, int(u), i / len(r)) for g, r in enumerate(ranks) for i, u in enumerate(r[: len(r) - int(gone[g])])]
    stay.sort(key=lambda entry: entry[2])  # the best of each group first
    return in_order(problem, [(g, u) for g, u, _ in stay] + went[::-1])


def sampled(problem: AllocationProblem) -> Margins:
    """Each group's places plus an offset that a search over held-out accuracy chooses."""
    places = [quantiles(group.scores) for group in problem.groups]

    def margins(offsets: Mapping[str, float]) -> Margins:
        moved = [p + offsets[g.name] for p, g in zip(places, problem.groups, strict=True)]
        return list(quantiles(torch.cat(moved)).split([len(p) for p in moved]))

    def accuracy(offsets: Mapping[str, float]) -> float:
        return problem.measured(fewest_removed(problem, margins(offsets)))

    return margins(sample_plans([g.name for g in problem.groups], accuracy, TRIALS, problem.seed)) if places else []


def fewest_removed(problem: AllocationProblem, margins: Margins) -> list[Tensor]:
    """The units that stay where as few as needed go, in the order of their margins; one of each group at least."""
    flat = torch.cat(margins).sort().values

    def kept(cut: int) -> list[Tensor]:
        out = [(m > flat[cut - 1]).float() if cut else torch.ones(len(m)) for m in margins]
        for keep, m in zip(out, margins, strict=True):
            keep[m.argmax()] = 1.0
        return out

    low, high = 0, len(flat)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.enough(kept(middle)) else (middle + 1, high)
    return kept(low)


ALLOCATORS: Mapping[str, Allocator] = {
    "uniform": channels.uniform,
    "threshold": channels.threshold,
    "greedy": channels.greedy,
    "reinforce": reinforced,
    "sampled": sampled,
}


def pick_allocator(name: str) -> Allocator | None:
    """The allocator of that name; None for an empty one (as the score allows); or the closest names."""
    if name and name not in ALLOCATORS:
        raise unknown("allocator", name, ALLOCATORS)
    return ALLOCATORS[name] if name else None


@dataclass(frozen=True, eq=False)
class PlanEvaluator:
    """What allocators look at beside the network: training batches, and a way to measure a plan."""

    batches: Callable[[], Batches]  # (inputs, labels or None) pairs, from the start at every call
    accuracy: Callable[[Plan], float] | None = None
    seed: int = 0


def place(
    net: CompressedModel,
    score: Score,
    allocator: str,
    judge: PlanEvaluator,
    share: float = 1.0,
    goal: Target | None = None,
) -> None:
    """Write an allocator's order into the margins of `Ranked` gates, for landing to cut.

    Without an allocator the score says what competes (`rank`): all units of the network where it may be compared
    between layers, else the units of each layer.

    Args:
        share: of the units of each site, how many are about to stay, as `rank` has it.
        goal: what the units may cost, for allocators that work towards it.

    Raises JpqError for an unknown name, for units that are no channels, and where the evidence cannot be had.
    """
    chosen = pick_allocator(allocator)
    if chosen is None:
        rank(net, score, judge.batches(), share)
        return
    if allocator in MEASURING and judge.accuracy is None:
        raise JpqError(
            f"Allocator {allocator} measures accuracy and needs data: use `jpq optimize`, or choose "
            "uniform, threshold or greedy."
        )
    groups = scored(net, score, judge.batches(), share)
    order(net, groups, chosen(AllocationProblem(net, groups, score.everywhere, goal, judge.accuracy, judge.seed)))


def bit_widths(
    net: CompressedModel,
    allocator: str,
    judge: PlanEvaluator,
    plan: Plan,
    targets: Sequence[Target],
    w_bits: Bounds,
    a_bits: Bounds,
) -> dict[Key, BitWidth] | None:
    """Soft widths of every tensor for landing to shift, given what `plan` keeps; None: the same everywhere."""
    if allocator in ("", "uniform"):
        return None
    bounds = {"w": w_bits, "a": a_bits}
    if allocator in ("threshold", "greedy"):
        inputs = [x for x, _ in islice(judge.batches(), LOOKED)]
        return bits_by_noise(net, sensitivities(net, inputs, judge.seed), plan, w_bits, a_bits)
    if judge.accuracy is None:
        raise JpqError(
            f"Allocator {allocator} measures accuracy and needs data: use `jpq optimize`, or choose "
            "uniform, threshold or greedy."
        )
    measure = judge.accuracy
    free = [
        (layer.name, side)
        for layer in net.network.layers
        for side in "wa"
        if layer.name in plan.layers and not (side == "a" and layer.reads_input)
    ]
    if allocator == "sampled":
        ranking = replace(discretize.soft_decisions(net), plan=plan, margins={})

        def soft(offsets: Mapping[str, float]) -> dict[Key, BitWidth]:
            return {(n, s): Learned(4.0 + offsets[f"{n} {s}"], *bounds[s]) for n, s in free}

        def accuracy(offsets: Mapping[str, float]) -> float:
            widths = {**ranking.widths, **soft(offsets)}
            return measure(discretize.discretize(net, targets, replace(ranking, widths=widths)))

        return soft(sample_plans([f"{n} {s}" for n, s in free], accuracy, TRIALS, judge.seed, REACH_BITS))
    full = float(costs.bops(net.exact_usage(with_bits(plan, {key: bounds[key[1]][1] for key in free}))))

    def at(gone: Counts) -> Plan:
        return with_bits(plan, {key: bounds[key[1]][1] - int(n) for key, n in zip(free, gone, strict=True)})

    def quality(gone: Counts) -> tuple[float, float]:
        now = at(gone)
        return measure(now), float(costs.bops(net.exact_usage(now))) / full

    steps = [bounds[side][1] - bounds[side][0] + 1 for _, side in free]
    path = learn(steps, quality, lambda gone: all_met(targets, net.exact_usage(at(gone))), Policy(), judge.seed)
    last = path[-1] if path else np.zeros(len(free), np.int64)
    return {key: Learned(bounds[key[1]][1] - int(n), *bounds[key[1]]) for key, n in zip(free, last, strict=True)}


def with_bits(plan: Plan, bits: Mapping[Key, int]) -> Plan:
    """The plan with other widths."""
    layers = {
        name: replace(layer, w_bits=bits.get((name, "w"), layer.w_bits), a_bits=bits.get((name, "a"), layer.a_bits))
        for name, layer in plan.layers.items()
    }
    return replace(plan, layers=layers)


def sample_plans(
    names: Sequence[str], accuracy: Callable[[dict[str, float]], float], trials: int, seed: int, reach: float = REACH
) -> dict[str, float]:
    """The offsets, one for each name in [-reach, reach], with the best accuracy of so many trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed % 2**32, multivariate=True)
    )
    study.enqueue_trial(dict.fromkeys(names, 0.0))
    study.optimize(
        lambda trial: accuracy({name: trial.suggest_float(name, -reach, reach) for name in names}), n_trials=trials
    )
    return {name: float(study.best_params[name]) for name in names}


def check_allocator(method: str, allocator: str) -> None:
    """Raises JpqError for an allocator of an unknown name, or with a method that does not take one."""
    if allocator and method == MASKED:
        raise JpqError(f"--allocator {allocator}: --mask says which weights are dropped. Leave --allocator out.")
    pick_allocator(allocator)
    takes = [name for name, m in METHODS.items() if m.score and not m.searches]
    if allocator and method not in takes:
        raise JpqError(
            f"--allocator {allocator}: method {method} learns how much stays where, or is told. Choose --method "
            f"{any_of(takes)}."
        )
