"""Measurements of claims on methods that mask weights inside layers; each function states its rule.

claims.py runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from statistics import mean

import torch
from support.trial import (
    EIGHT_BITS,
    SEARCH_STEPS,
    SEEDS,
    SGD,
    TUNE_STEPS,
    Measurement,
    OptimizerRecipe,
    accuracy_after_tuning,
    accuracy_percent,
    compare_by_seed,
    float_model,
    join_numbers,
    register_variant,
    start_compression,
    train,
    verdict,
)
from torch import Tensor

from jpq.methods.gates import Feedback, Gate

SPARSE = 0.05  # density at which it matters which weights stay


class NoFeedback(Feedback):
    """DPF's masks without its feedback: weights that they drop get no gradient."""

    straight_through = False


@cache
def dpf(seed: int, feedback: bool, recipe: OptimizerRecipe) -> tuple[float, float, float]:
    """(accuracy, share of all weights that came back, share in another state than after the first decision)."""
    name = "dpf" if feedback else register_variant("dpf", NoFeedback)
    session = start_compression(name, seed, SEARCH_STEPS, density=SPARSE, **EIGHT_BITS)
    masks: list[Tensor] = []

    def observe() -> None:
        mask = torch.cat([gate.kept.flatten() for gate in session.net.gates])
        if not bool(mask.all()) and not (masks and torch.equal(mask, masks[-1])):
            masks.append(mask)

    train(session, seed, SEARCH_STEPS, observe, recipe)
    history = torch.stack(masks) > 0
    returned = history & ((~history).cumsum(0) > 0)
    accuracy = accuracy_after_tuning(session, seed, TUNE_STEPS, recipe)
    return accuracy, _mean(returned.any(0)), _mean(history[0] != history[-1])


def dpf_returns() -> Measurement:
    """Yes from 1 % of all weights on, partly from 0.1 %."""
    returned, changed = ([100 * dpf(s, True, SGD)[i] for s in SEEDS] for i in (1, 2))
    without = [100 * dpf(s, False, SGD)[1] for s in SEEDS]
    text = (
        f"{mean(returned):.2f} % of all weights were dropped and came back ({mean(without):.2f} % without feedback); "
        f"{mean(changed):.1f} % changed state between the first and the last decision"
    )
    return Measurement(text, verdict(mean(returned) >= 1, mean(returned) >= 0.1), len(SEEDS))


def dpf_feedback(recipe: OptimizerRecipe) -> Measurement:
    """Better with every seed, or on the mean."""
    feedback, masked = ([dpf(s, f, recipe)[0] for s in SEEDS] for f in (True, False))
    text = f"accuracy at density {SPARSE}: {join_numbers(feedback)} with feedback, "
    text += f"{join_numbers(masked)} with the gradient masked"
    return Measurement(text, compare_by_seed(feedback, masked), len(SEEDS))


def pdp_parameters() -> Measurement:
    """Yes if gates have no parameter at all."""
    counts = {
        method: sum(p.numel() for p in start_compression(method, 0, 1, **EIGHT_BITS).net.gates.parameters())
        for method in ("pdp", "smart")
    }
    weights = sum(p.numel() for p in float_model(0).parameters())
    text = f"{counts['pdp']} mask parameters beside {weights} weights (smart, which has scores: {counts['smart']})"
    return Measurement(text, verdict(counts["pdp"] == 0), 1)


def pdp_boundary() -> Measurement:
    """Yes if |w| / t of the weight with the largest |dm/dw| is within 10 % of 1 in every layer, partly within 25 %."""
    places = []
    for seed in SEEDS:
        session = start_compression("pdp", seed, SEARCH_STEPS, density=0.2, **EIGHT_BITS)
        for sample in train(session, seed, SEARCH_STEPS // 2).net.draws:
            sample.show_weights()
            weight = sample.gate.squares.detach().sqrt().requires_grad_(True)
            sample.gate.squares = weight.square()
            (slope,) = torch.autograd.grad(sample.gate.relaxed().sum(), weight)
            place = float((weight.detach() / sample.gate.threshold().sqrt()).flatten()[slope.abs().argmax()])
            places += [place] if place == place else []  # a layer that drops nothing has no threshold
    worst = max(abs(p - 1) for p in places)
    text = f"the largest |dm/dw| of a layer is at |w| = {min(places):.3f} to {max(places):.3f} thresholds"
    return Measurement(f"{text} ({len(places)} layers)", verdict(worst <= 0.1, worst <= 0.25), len(places))


@cache
def smart(seed: int) -> tuple[float, float, float]:
    """(largest |sum s f - K| / K over all steps, shares of half-open units after the first and the last step)."""
    density = 0.3
    session = start_compression("smart", seed, SEARCH_STEPS, density=density, **EIGHT_BITS)
    gates = list(session.net.gates)
    sizes = torch.cat([g.sizes.flatten() for g in gates]).double()
    deviations, half_open = [], []

    @torch.no_grad()
    def observe() -> None:
        f = torch.cat([gate.relaxed().flatten() for gate in gates]).double()
        deviations.append(abs(float((sizes * f).sum() / (density * sizes.sum())) - 1))
        half_open.append(100 * float(((f > 0.01) & (f < 0.99)).double().mean()))

    train(session, seed, SEARCH_STEPS, observe)
    return max(deviations), half_open[0], half_open[-1]


def smart_exact() -> Measurement:
    """Yes up to 1e-6 of K (f is rounded to float32), partly up to 1 %."""
    worst, steps = max(smart(s)[0] for s in SEEDS), len(SEEDS) * SEARCH_STEPS
    text = f"largest |weights kept - K| / K over {steps} steps: {worst:.1e}"
    return Measurement(text, verdict(worst <= 1e-6, worst <= 0.01), steps)


def smart_closes() -> Measurement:
    """Yes if at most 1 % of the blocks are between 0.01 and 0.99 at the end, partly if fewer than at the start."""
    start, end = ([smart(s)[i] for s in SEEDS] for i in (1, 2))
    text = f"blocks with 0.01 < f < 0.99: {join_numbers(start, '.1f')} % after one step, "
    text += f"{join_numbers(end, '.1f')} % at the end"
    return Measurement(text, verdict(max(end) <= 1, max(end) < min(start)), len(SEEDS))


@cache
def dpp(seed: int, bits: int) -> tuple[float, dict[str, float], dict[str, float], int, int]:
    """(accuracy, metrics at the start, at the end, rows drawn, largest deviation from k of 0/1 in any of them)."""
    density, steps = 0.25, SEARCH_STEPS // 2
    widths = {"w_bits": (bits, bits), "a_bits": (8, 8)}
    session = start_compression("dpp", seed, steps, density=density, bops="6.3%", **widths)
    start, deviations = average_metrics(session.net.gates), []

    def observe() -> None:
        for sample in session.net.draws:
            ones = (sample.z == 1).sum(1)
            between = ((sample.z != 0) & (sample.z != 1)).sum(1)
            deviations.append((ones - sample.gate.count(density)).abs() + between)

    train(session, seed, steps, observe)
    end, every = average_metrics(session.net.gates), torch.cat(deviations)
    return accuracy_after_tuning(session, seed, TUNE_STEPS), start, end, len(every), int(every.max())


def average_metrics(gates: Sequence[Gate]) -> dict[str, float]:
    """Every metric of the gates, averaged over layers."""
    metrics = [gate.metrics() for gate in gates]
    return {name: mean(m[name] for m in metrics) for name in metrics[0]}


def dpp_exact() -> Measurement:
    """Yes if no row of any draw deviates."""
    rows, worst = sum(dpp(s, 8)[3] for s in SEEDS), max(dpp(s, 8)[4] for s in SEEDS)
    return Measurement(f"largest deviation from k ones over {rows} drawn rows: {worst}", verdict(worst == 0), rows)


def dpp_bits() -> Measurement:
    """Yes if the mean accuracy at 2 bits is at most 1 point below that at 8, partly at most 3."""
    accuracies = {bits: [dpp(s, bits)[0] for s in SEEDS] for bits in (2, 4, 8)}
    loss = mean(accuracies[8]) - mean(accuracies[2])
    text = "; ".join(f"{join_numbers(a)} at W{bits}A8" for bits, a in accuracies.items())
    return Measurement(f"accuracy at density 0.25: {text}", verdict(loss <= 1, loss <= 3), len(SEEDS))


def dpp_metrics() -> Measurement:
    """Yes if, with every seed, confidence rises and diversity ends above 0.01; partly if confidence rises."""
    start, end = ([dpp(s, 8)[i] for s in SEEDS] for i in (1, 2))
    text = "; ".join(
        f"{name} {join_numbers([m[name] for m in start], '.3f')} -> {join_numbers([m[name] for m in end], '.3f')}"
        for name in ("confidence", "diversity")
    )
    rises = all(b["confidence"] > a["confidence"] for a, b in zip(start, end, strict=True))
    differ = min(m["diversity"] for m in end) > 0.01
    return Measurement(text, verdict(rises and differ, rises), len(SEEDS))


def codeq_density() -> Measurement:
    """Yes if, with every seed, layers end at densities and at bits that differ; partly if one of the two does."""
    plans = [codeq(s) for s in SEEDS]
    spread = [max(d) - min(d) for d, _ in plans]
    widths = [len(set(bits)) for _, bits in plans]
    text = "per layer, density @ weight bits: " + "; ".join(
        ", ".join(f"{d:.2f} @ {b}" for d, b in zip(*plan, strict=True)) for plan in plans
    )
    sparse, wide = min(spread) >= 0.05, min(widths) > 1
    return Measurement(f"{text} (0.5 % of the BOPs)", verdict(sparse and wide, sparse or wide), len(SEEDS))


def codeq_ends() -> Measurement:
    """Yes if, with every seed, the first and the last layer both keep more than any between; partly if one does."""
    densities = [codeq(s)[0] for s in SEEDS]
    both = all(min(d[0], d[-1]) > max(d[1:-1]) for d in densities)
    one = all(max(d[0], d[-1]) > max(d[1:-1]) for d in densities)
    text = "first and last layer against the densest between: " + "; ".join(
        f"{d[0]:.2f} and {d[-1]:.2f} against {max(d[1:-1]):.2f}" for d in densities
    )
    return Measurement(text, verdict(both, one), len(SEEDS))


@cache
def codeq(seed: int) -> tuple[list[float], list[int]]:
    """(density, weight bits) of each layer after a search that was told neither."""
    session = train(start_compression("codeq", seed, SEARCH_STEPS, bops="0.5%"), seed, SEARCH_STEPS)
    plan = session.discretize()
    names = [layer.name for layer in session.net.network.layers]
    share = {name: _mean(mask.units()) for name, mask in plan.masks.items()}
    return [share.get(name, 1.0) for name in names], [plan.layers[name].w_bits for name in names]


@cache
def admm(seed: int) -> tuple[list[float], list[float]]:
    """(residual ||W - Z|| / ||W||, accuracy of the projected network), each before and after the search."""
    session = start_compression("admm", seed, SEARCH_STEPS, **EIGHT_BITS)
    net = session.net
    accuracies, residuals = [accuracy_percent(net.eval())], [average_metrics(net.gates)["residual"]]
    train(session, seed, SEARCH_STEPS)
    return [*residuals, average_metrics(net.gates)["residual"]], [*accuracies, accuracy_percent(net.eval())]


def admm_approaches() -> Measurement:
    """Yes if the residual falls below 0.1 with every seed, partly if it falls."""
    pairs = [admm(s)[0] for s in SEEDS]
    text = "||W - Z|| / ||W||: " + ", ".join(f"{a:.2f} -> {b:.3f}" for a, b in pairs)
    falls = all(b < a for a, b in pairs)
    return Measurement(text, verdict(falls and max(b for _, b in pairs) < 0.1, falls), len(SEEDS))


def admm_projection() -> Measurement:
    """Better with every seed, or on the mean."""
    before, after = ([admm(s)[1][i] for s in SEEDS] for i in (0, 1))
    text = f"accuracy of the projected network: {join_numbers(before)} at once, "
    text += f"{join_numbers(after)} after ADMM (no fine-tuning)"
    return Measurement(text, compare_by_seed(after, before), len(SEEDS))


def _mean(mask: Tensor) -> float:
    """Share of the entries that are true."""
    return float(mask.float().mean())
