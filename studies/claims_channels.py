"""Claims on methods that drop channels, columns or kernels; each function measures one and states its rule."""

from __future__ import annotations

from functools import cache
from statistics import mean

import torch
from torch import Tensor
from trial import EIGHT, SEEDS, STEPS, TUNE, Found, accuracy, better, landed, listed, started, trained, variant, verdict

from jpq.compression.hypernetwork import Generated, generate
from jpq.methods.gates import Annealed, Lasso
from jpq.methods.quantizers import Gated


@cache
def spp(seed: int) -> tuple[float, float]:
    """Per cent of the units whose probability ever rose; of those, per cent that came back to 0 and stayed."""
    net = started("spp", seed, STEPS, density=0.5, **EIGHT)
    gates, rose = list(net.net.gates), []
    trained(net, seed, STEPS, lambda: rose.append(torch.cat([g.p.flatten() > 0 for g in gates])))
    ever = torch.stack(rose).any(0)
    kept = torch.cat([g.keep().flatten() > 0 for g in gates])
    return 100 * float(ever.float().mean()), 100 * float(kept[ever].float().mean())


def spp_recovers() -> Found:
    """Yes if at least 1 % of the units that had a probability to be pruned lost it again, partly if any did."""
    rose, back = ([spp(s)[i] for s in SEEDS] for i in (0, 1))
    text = f"probabilities of {listed(rose, '.1f')} % of the columns ever rose; {listed(back, '.1f')} % of these stayed"
    return Found(text, verdict(min(back) >= 1, min(back) > 0), len(SEEDS))


@cache
def gdp(seed: int) -> tuple[float, float, float, float]:
    """(share of gates < 1e-2 or > 0.5, share exactly 0 or > 0.95, accuracy before and after the small ones are 0)."""
    net = trained(started("gdp", seed, STEPS, bops="1%"), seed, STEPS).net.eval()
    g = torch.cat([gate.relaxed().detach().flatten() for gate in net.gates])
    share = lambda x: 100 * float(x.float().mean())  # noqa: E731
    soft = within(net, lambda gate: gate.relaxed().detach())
    return share((g < 1e-2) | (g > 0.5)), share((g == 0) | (g > 0.95)), soft, accuracy(net)


def within(net: torch.nn.Module, z: object) -> float:
    """Accuracy of the attached model while `z(gate)` multiplies its channels."""
    for draw in net.draws:
        draw.z = z(draw.gate)
    return accuracy(net.model)


def gdp_polarises() -> Found:
    """Yes if all gates are < 0.01 or > 0.5 with every seed, partly if 90 % are."""
    apart = [gdp(s)[0] for s in SEEDS]
    text = f"gates < 0.01 or > 0.5 at the end: {listed(apart, '.1f')} %"
    return Found(text, verdict(min(apart) == 100, min(apart) >= 90), len(SEEDS))


def gdp_exact_zeros() -> Found:
    """Yes if 95 % of the gates are exactly 0 or above 0.95 with every seed, partly if 80 %."""
    ends = [gdp(s)[1] for s in SEEDS]
    return Found(
        f"gates exactly 0 or > 0.95: {listed(ends, '.1f')} %", verdict(min(ends) >= 95, min(ends) >= 80), len(ends)
    )


def gdp_drops_for_nothing() -> Found:
    """Yes if dropping moves accuracy by at most 0.25 points with every seed, partly by at most 1."""
    before, after = ([gdp(s)[i] for s in SEEDS] for i in (2, 3))
    worst = max(abs(a - b) for a, b in zip(before, after, strict=True))
    text = f"accuracy with all gates as they are {listed(before)}, with those below 1e-3 dropped {listed(after)}"
    return Found(text, verdict(worst <= 0.25, worst <= 1), len(SEEDS))


class Warm(Annealed):
    """The same indicators at T = 1 throughout."""

    def after_step(self, progress: float) -> None:
        """No cooling."""


@cache
def dais(seed: int, annealed: bool) -> tuple[float, float, float]:
    """(mean |I - 1[alpha > 0]| at the start, at the end, points of accuracy between soft and hard at the end)."""
    net = started("dais" if annealed else variant("dais", Warm), seed, STEPS, bops="1%")
    gap = lambda: mean(float((g.relaxed() - g.keep()).detach().abs().mean()) for g in net.net.gates)  # noqa: E731
    start = gap()
    trained(net, seed, STEPS)
    inner = net.net.eval()
    soft, hard = (within(inner, z) for z in (lambda g: g.relaxed().detach(), lambda g: g.keep()))
    return start, gap(), abs(soft - hard)


def dais_gap() -> Found:
    """Yes if the mean gap ends below 0.01 and a tenth of what it is without annealing, partly if it falls."""
    ours, warm = ([dais(s, a) for s in SEEDS] for a in (True, False))
    end = max(d[1] for d in ours)
    text = (
        f"mean |I - hard I|: {listed([d[0] for d in ours])} -> {listed([d[1] for d in ours], '.4f')} (without "
        f"annealing {listed([d[1] for d in warm], '.4f')})"
    )
    holds = verdict(end < 0.01 and end < 0.1 * min(d[1] for d in warm), end < min(d[0] for d in ours))
    return Found(text, holds, len(SEEDS))


def dais_accuracy() -> Found:
    """Yes if hard indicators move accuracy by at most 0.25 points with every seed, partly if less than without it."""
    ours, warm = ([dais(s, a)[2] for s in SEEDS] for a in (True, False))
    text = f"|accuracy soft - hard|, points: {listed(ours)} (without annealing {listed(warm)})"
    return Found(text, verdict(max(ours) <= 0.25, mean(ours) < mean(warm)), len(SEEDS))


def dhp_slices() -> Found:
    """Yes up to 1e-12 (relative, float64), for random latents and biases and every second draw of the channels."""
    net = started("dhp", 0, 1, **EIGHT).net.double()
    made = [m for m in net.modules() if isinstance(m, Generated)]
    random = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.double)  # noqa: E731
    apart = []
    for hyper in made * 5:
        c, n = hyper.b0.shape
        z_in, z_out, b0, b1 = normal(c), normal(n), normal(c, n), normal(*hyper.b1.shape)
        ins, outs = (torch.randperm(k, generator=random)[: max(1, k // 2)] for k in (c, n))
        cut = lambda t, i=ins, o=outs: t[i][:, o]  # noqa: E731
        whole: Tensor = generate(z_in, z_out, b0, hyper.w1, b1, hyper.w2)[outs][:, ins]
        sliced = generate(z_in[ins], z_out[outs], cut(b0), cut(hyper.w1), cut(b1), cut(hyper.w2))
        apart.append(float(((whole - sliced).abs().max() / whole.abs().max()).detach()))
    text = f"largest relative difference {max(apart):.1e} over {len(apart)} draws in {len(made)} layers"
    return Found(text, verdict(max(apart) <= 1e-12), len(apart))


class OneGroup(Lasso):
    """All filters of a layer in one group: plain input-channel pruning."""

    def __init__(self, rows: int, n: int, density: float = 0.5):
        super().__init__(rows, n, density, groups=1)


def dsp_groups() -> Found:
    """Better with every seed, or on the mean."""
    density = 0.15

    def run(seed: int, name: str) -> float:
        return landed(trained(started(name, seed, STEPS, density=density, **EIGHT), seed, STEPS), seed, TUNE)

    ours, theirs = ([run(s, name) for s in SEEDS] for name in ("dsp", variant("dsp", OneGroup)))
    text = f"accuracy at density {density}: {listed(ours)} with 4 groups, {listed(theirs)} with 1"
    return Found(text, better(ours, theirs), len(SEEDS))


@cache
def bayesian_bits(seed: int) -> tuple[list[int], float, float]:
    """(every landed width but the image's, per cent of draws during the search that were exactly 0, exactly 1)."""
    net = started("bayesian-bits", seed, STEPS, bops="1%")
    widths = [w for w in net.net.widths() if isinstance(w, Gated)]
    draws: list[Tensor] = []
    trained(net, seed, STEPS, lambda: draws.append(torch.cat([w.draw() for w in widths]).detach()))
    z = torch.stack(draws)
    plan, image = net.discretize(), {layer.name for layer in net.net.network.layers if layer.reads_input}
    bits = [x.w_bits for x in plan.layers.values()] + [x.a_bits for n, x in plan.layers.items() if n not in image]
    return bits, 100 * float((z == 0).float().mean()), 100 * float((z == 1).float().mean())


def bayesian_powers() -> Found:
    """Yes if every landed width is 2, 4 or 8 and at least two of them occur, partly if only the first."""
    bits = [b for s in SEEDS for b in bayesian_bits(s)[0]]
    counts = ", ".join(f"{bits.count(b)} x {b}" for b in sorted(set(bits)))
    powers = set(bits) <= {2, 4, 8}
    return Found(f"widths at 1 % of the BOPs: {counts}", verdict(powers and len(set(bits)) > 1, powers), len(bits))


def bayesian_gates() -> Found:
    """Yes if gates were drawn exactly shut and exactly open, each in at least 5 % of the draws, partly 0.5 %."""
    shut, open_ = ([bayesian_bits(s)[i] for s in SEEDS] for i in (1, 2))
    least = min(*shut, *open_)
    text = f"draws exactly shut {listed(shut, '.1f')} %, exactly open {listed(open_, '.1f')} %"
    return Found(text, verdict(least >= 5, least >= 0.5), len(SEEDS))
