"""Claims on methods that mask weights inside layers; each function measures one and states its rule. See claims.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from statistics import mean

import torch
from torch import Tensor
from trial import (
    EIGHT,
    SEEDS,
    SGD,
    STEPS,
    TUNE,
    Found,
    accuracy,
    better,
    float_model,
    landed,
    listed,
    started,
    trained,
    variant,
    verdict,
)

from jpq.methods.gates import Feedback, Gate

SPARSE = 0.05  # density at which it matters which weights stay


class NoFeedback(Feedback):
    """The same masks; what they drop gets no gradient."""

    straight_through = False


@cache
def dpf(seed: int, feedback: bool, by: tuple) -> tuple[float, float, float]:
    """(accuracy, share of all weights that came back, share in another state than after the first decision)."""
    net = started("dpf" if feedback else variant("dpf", NoFeedback), seed, STEPS, density=SPARSE, **EIGHT)
    masks: list[Tensor] = []

    def watch() -> None:
        now = torch.cat([gate.kept.flatten() for gate in net.net.gates])
        if not bool(now.all()) and not (masks and torch.equal(now, masks[-1])):
            masks.append(now)

    trained(net, seed, STEPS, watch, by)
    history = torch.stack(masks) > 0
    returned = history & ((~history).cumsum(0) > 0)
    share = lambda x: float(x.float().mean())  # noqa: E731
    return landed(net, seed, TUNE, by), share(returned.any(0)), share(history[0] != history[-1])


def dpf_returns() -> Found:
    """Yes from 1 % of all weights on, partly from 0.1 %."""
    returned, changed = ([100 * dpf(s, True, SGD)[i] for s in SEEDS] for i in (1, 2))
    without = [100 * dpf(s, False, SGD)[1] for s in SEEDS]
    text = (
        f"{mean(returned):.2f} % of all weights were dropped and came back ({mean(without):.2f} % without feedback); "
        f"{mean(changed):.1f} % changed state between the first and the last decision"
    )
    return Found(text, verdict(mean(returned) >= 1, mean(returned) >= 0.1), len(SEEDS))


def dpf_feedback(by: tuple) -> Found:
    """Better with every seed, or on the mean."""
    ours, theirs = ([dpf(s, f, by)[0] for s in SEEDS] for f in (True, False))
    text = f"accuracy at density {SPARSE}: {listed(ours)} with feedback, {listed(theirs)} with the gradient masked"
    return Found(text, better(ours, theirs), len(SEEDS))


def pdp_parameters() -> Found:
    """Yes if gates have no parameter at all."""
    counts = {m: sum(p.numel() for p in started(m, 0, 1, **EIGHT).net.gates.parameters()) for m in ("pdp", "smart")}
    weights = sum(p.numel() for p in float_model(0).parameters())
    text = f"{counts['pdp']} mask parameters beside {weights} weights (smart, which has scores: {counts['smart']})"
    return Found(text, verdict(counts["pdp"] == 0), 1)


def pdp_boundary() -> Found:
    """Yes if |w| / t of the weight with the largest |dm/dw| is within 10 % of 1 in every layer, partly within 25 %."""
    places = []
    for seed in SEEDS:
        for draw in trained(started("pdp", seed, STEPS, density=0.2, **EIGHT), seed, STEPS // 2).net.draws:
            draw.show_weights()
            weight = draw.gate.seen.detach().sqrt().requires_grad_(True)
            draw.gate.seen = weight.square()
            (slope,) = torch.autograd.grad(draw.gate.relaxed().sum(), weight)
            place = float((weight.detach() / draw.gate.threshold().sqrt()).flatten()[slope.abs().argmax()])
            places += [place] if place == place else []  # a layer that drops nothing has no threshold
    worst = max(abs(p - 1) for p in places)
    text = f"the largest |dm/dw| of a layer is at |w| = {min(places):.3f} to {max(places):.3f} thresholds"
    return Found(f"{text} ({len(places)} layers)", verdict(worst <= 0.1, worst <= 0.25), len(places))


@cache
def smart(seed: int) -> tuple[float, float, float]:
    """(largest |sum s f - K| / K over all steps, shares of half-open units after the first and the last step)."""
    density = 0.3
    net = started("smart", seed, STEPS, density=density, **EIGHT)
    gates = list(net.net.gates)
    sizes = torch.cat([g.sizes.flatten() for g in gates]).double()
    apart, half = [], []

    @torch.no_grad()
    def watch() -> None:
        f = torch.cat([gate.relaxed().flatten() for gate in gates]).double()
        apart.append(abs(float((sizes * f).sum() / (density * sizes.sum())) - 1))
        half.append(100 * float(((f > 0.01) & (f < 0.99)).double().mean()))

    trained(net, seed, STEPS, watch)
    return max(apart), half[0], half[-1]


def smart_exact() -> Found:
    """Yes up to 1e-6 of K (f is rounded to float32), partly up to 1 %."""
    worst = max(smart(s)[0] for s in SEEDS)
    text = f"largest |weights kept - K| / K over {len(SEEDS) * STEPS} steps: {worst:.1e}"
    return Found(text, verdict(worst <= 1e-6, worst <= 0.01), len(SEEDS) * STEPS)


def smart_closes() -> Found:
    """Yes if at most 1 % of the blocks are between 0.01 and 0.99 at the end, partly if fewer than at the start."""
    first, last = ([smart(s)[i] for s in SEEDS] for i in (1, 2))
    text = f"blocks with 0.01 < f < 0.99: {listed(first, '.1f')} % after one step, {listed(last, '.1f')} % at the end"
    return Found(text, verdict(max(last) <= 1, max(last) < min(first)), len(SEEDS))


@cache
def dpp(seed: int, bits: int) -> tuple[float, dict[str, float], dict[str, float], int, int]:
    """(accuracy, metrics at the start, at the end, rows drawn, largest deviation from k of 0/1 in any of them)."""
    density, steps = 0.25, STEPS // 2
    net = started("dpp", seed, steps, density=density, bops="6.3%", w_bits=(bits, bits), a_bits=(8, 8))
    start, deviations = averages(net.net.gates), []

    def watch() -> None:
        for draw in net.net.draws:
            ones = (draw.z == 1).sum(1)
            deviations.append((ones - draw.gate.count(density)).abs() + ((draw.z != 0) & (draw.z != 1)).sum(1))

    trained(net, seed, steps, watch)
    end, every = averages(net.net.gates), torch.cat(deviations)
    return landed(net, seed, TUNE), start, end, len(every), int(every.max())


def averages(gates: Sequence[Gate]) -> dict[str, float]:
    """Every metric, averaged over layers."""
    metrics = [gate.metrics() for gate in gates]
    return {name: mean(m[name] for m in metrics) for name in metrics[0]}


def dpp_exact() -> Found:
    """Yes if no row of any draw deviates."""
    rows, worst = sum(dpp(s, 8)[3] for s in SEEDS), max(dpp(s, 8)[4] for s in SEEDS)
    return Found(f"largest deviation from k ones over {rows} drawn rows: {worst}", verdict(worst == 0), rows)


def dpp_bits() -> Found:
    """Yes if the mean accuracy at 2 bits is at most 1 point below that at 8, partly at most 3."""
    found = {bits: [dpp(s, bits)[0] for s in SEEDS] for bits in (2, 4, 8)}
    loss = mean(found[8]) - mean(found[2])
    text = "accuracy at density 0.25: " + "; ".join(f"{listed(a)} at W{bits}A8" for bits, a in found.items())
    return Found(text, verdict(loss <= 1, loss <= 3), len(SEEDS))


def dpp_metrics() -> Found:
    """Yes if, with every seed, confidence rises and diversity ends above 0.01; partly if confidence rises."""
    start, end = ([dpp(s, 8)[i] for s in SEEDS] for i in (1, 2))
    shown = lambda name: f"{name} {listed([m[name] for m in start], '.3f')} -> {listed([m[name] for m in end], '.3f')}"  # noqa: E731
    rises = all(b["confidence"] > a["confidence"] for a, b in zip(start, end, strict=True))
    differ = min(m["diversity"] for m in end) > 0.01
    return Found(f"{shown('confidence')}; {shown('diversity')}", verdict(rises and differ, rises), len(SEEDS))


def codeq_density() -> Found:
    """Yes if, with every seed, layers end at densities and at bits that differ; partly if one of the two does."""
    plans = [codeq(s) for s in SEEDS]
    spread = [max(d) - min(d) for d, _ in plans]
    widths = [len(set(bits)) for _, bits in plans]
    text = "per layer, density @ weight bits: " + "; ".join(
        ", ".join(f"{d:.2f} @ {b}" for d, b in zip(*plan, strict=True)) for plan in plans
    )
    sparse, wide = min(spread) >= 0.05, min(widths) > 1
    return Found(f"{text} (0.5 % of the BOPs)", verdict(sparse and wide, sparse or wide), len(SEEDS))


def codeq_ends() -> Found:
    """Yes if, with every seed, the first and the last layer both keep more than any between; partly if one does."""
    held = [(min(d[0], d[-1]) > max(d[1:-1]), max(d[0], d[-1]) > max(d[1:-1])) for d, _ in map(codeq, SEEDS)]
    text = "first and last layer against the densest between: " + "; ".join(
        f"{d[0]:.2f} and {d[-1]:.2f} against {max(d[1:-1]):.2f}" for d, _ in map(codeq, SEEDS)
    )
    return Found(text, verdict(all(both for both, _ in held), all(one for _, one in held)), len(SEEDS))


@cache
def codeq(seed: int) -> tuple[list[float], list[int]]:
    """(density, weight bits) of each layer after a search that was told neither."""
    net = trained(started("codeq", seed, STEPS, bops="0.5%"), seed, STEPS)
    plan = net.discretize()
    names = [layer.name for layer in net.net.network.layers]
    share = {name: float(mask.units().float().mean()) for name, mask in plan.masks.items()}
    return [share.get(name, 1.0) for name in names], [plan.layers[name].w_bits for name in names]


@cache
def admm(seed: int) -> tuple[list[float], list[float]]:
    """(residual ||W - Z|| / ||W||, accuracy of the projected network) before and after the search."""
    net = started("admm", seed, STEPS, **EIGHT)
    accuracies, residuals = [accuracy(net.net.eval())], [averages(net.net.gates)["residual"]]
    trained(net, seed, STEPS)
    return [*residuals, averages(net.net.gates)["residual"]], [*accuracies, accuracy(net.net.eval())]


def admm_approaches() -> Found:
    """Yes if the residual falls below 0.1 with every seed, partly if it falls."""
    pairs = [admm(s)[0] for s in SEEDS]
    text = "||W - Z|| / ||W||: " + ", ".join(f"{a:.2f} -> {b:.3f}" for a, b in pairs)
    falls = all(b < a for a, b in pairs)
    return Found(text, verdict(falls and max(b for _, b in pairs) < 0.1, falls), len(SEEDS))


def admm_projection() -> Found:
    """Better with every seed, or on the mean."""
    before, after = ([admm(s)[1][i] for s in SEEDS] for i in (0, 1))
    text = f"accuracy of the projected network: {listed(before)} at once, {listed(after)} after ADMM (no fine-tuning)"
    return Found(text, better(after, before), len(SEEDS))
