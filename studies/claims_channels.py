"""Measurements of claims on methods that drop channels, columns or kernels; each function states its rule.

claims.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import mean

import torch
from support.trial import (
    EIGHT_BITS,
    SEARCH_STEPS,
    SEEDS,
    TUNE_STEPS,
    Measurement,
    accuracy_after_tuning,
    accuracy_percent,
    compare_by_seed,
    join_numbers,
    register_variant,
    start_compression,
    train,
    verdict,
)
from torch import Tensor

import jpq
from jpq.compression import Generated, generate_weight
from jpq.methods.gates import Annealed, Gate, Lasso
from jpq.methods.quantizers import Gated

NOTHING_DROPPED = "not tested: nothing was dropped"
GDP_SMALL = 1e-3  # a gate below it is dropped at the end


@cache
def spp(seed: int) -> tuple[float, float]:
    """Per cent of the units whose probability ever rose; of those, per cent that came back to 0 and stayed."""
    session = start_compression("spp", seed, SEARCH_STEPS, density=0.5, **EIGHT_BITS)
    gates = list(session.net.gates)
    rose: list[Tensor] = []
    train(session, seed, SEARCH_STEPS, lambda: rose.append(torch.cat([g.p.flatten() > 0 for g in gates])))
    ever = torch.stack(rose).any(0)
    kept = torch.cat([g.keep().flatten() > 0 for g in gates])
    return _percent(ever), _percent(kept[ever])


def spp_recovers() -> Measurement:
    """Yes if at least 1 % of the units that had a probability to be pruned lost it again, partly if any did."""
    rose, back = ([spp(s)[i] for s in SEEDS] for i in (0, 1))
    text = f"probabilities of {join_numbers(rose, '.1f')} % of the columns ever rose; "
    text += f"{join_numbers(back, '.1f')} % of these stayed"
    return Measurement(text, verdict(min(back) >= 1, min(back) > 0), len(SEEDS))


@dataclass(frozen=True)
class GdpRun:
    """Gates and accuracies (per cent) at the end of a search with GDP, before anything is discretized."""

    dropped: int  # gates below GDP_SMALL
    gates: int
    polarized: float  # per cent of the gates < 0.01 or > 0.5
    extreme: float  # per cent of the gates exactly 0 or > 0.95
    accuracy_soft: float  # with all gates as they are
    accuracy_dropped: float  # with those below GDP_SMALL at 0


@cache
def gdp(seed: int) -> GdpRun:
    """A search with GDP at 1 % of the BOPs."""
    net = train(start_compression("gdp", seed, SEARCH_STEPS, bops="1%"), seed, SEARCH_STEPS).net.eval()
    g = torch.cat([gate.relaxed().detach().flatten() for gate in net.gates])
    return GdpRun(
        dropped=int((g < GDP_SMALL).sum()),
        gates=len(g),
        polarized=_percent((g < 1e-2) | (g > 0.5)),
        extreme=_percent((g == 0) | (g > 0.95)),
        accuracy_soft=accuracy_with_gates(net, _soft),
        accuracy_dropped=accuracy_percent(net),
    )


def accuracy_with_gates(net: jpq.CompressedModel, value: Callable[[Gate], Tensor]) -> float:
    """Accuracy (per cent) of the attached model while `value(gate)` multiplies its channels."""
    for sample in net.draws:
        sample.z = value(sample.gate)
    return accuracy_percent(net.model)


def gdp_polarises() -> Measurement:
    """Yes if gates were dropped and all are < 0.01 or > 0.5 with every seed, partly if 90 % are."""
    shares = [gdp(s).polarized for s in SEEDS]
    text = f"gates < 0.01 or > 0.5 at the end: {join_numbers(shares, '.1f')} %"
    return _gdp_measurement(text, min(shares) == 100, min(shares) >= 90)


def gdp_exact_zeros() -> Measurement:
    """Yes if gates were dropped and 95 % are exactly 0 or above 0.95 with every seed, partly if 80 %."""
    shares = [gdp(s).extreme for s in SEEDS]
    text = f"gates exactly 0 or > 0.95: {join_numbers(shares, '.1f')} %"
    return _gdp_measurement(text, min(shares) >= 95, min(shares) >= 80)


def gdp_drops_for_nothing() -> Measurement:
    """Yes if gates were dropped and that moves accuracy by at most 0.25 points with every seed, partly at most 1."""
    before, after = [gdp(s).accuracy_soft for s in SEEDS], [gdp(s).accuracy_dropped for s in SEEDS]
    worst = max(abs(a - b) for a, b in zip(before, after, strict=True))
    text = f"accuracy with all gates as they are {join_numbers(before)}, "
    text += f"with those below 1e-3 dropped {join_numbers(after)}"
    return _gdp_measurement(text, worst <= 0.25, worst <= 1)


def _gdp_measurement(text: str, holds: bool, partly: bool) -> Measurement:
    """A claim on GDP: not tested where a seed dropped no gate."""
    runs = [gdp(s) for s in SEEDS]
    counts = ", ".join(f"{run.dropped} of {run.gates}" for run in runs)
    word = verdict(holds, partly) if all(run.dropped for run in runs) else NOTHING_DROPPED
    return Measurement(f"{text}; gates dropped: {counts}", word, len(runs))


class Warm(Annealed):
    """DAIS's indicators at temperature 1 throughout."""

    def after_step(self, progress: float) -> None:
        """No cooling."""


@cache
def dais(seed: int, annealed: bool) -> tuple[float, float, float]:
    """(mean |I - 1[alpha > 0]| at the start, at the end, points of accuracy between soft and hard at the end)."""
    name = "dais" if annealed else register_variant("dais", Warm)
    session = start_compression(name, seed, SEARCH_STEPS, bops="1%")
    start = _mean_gap(session.net)
    train(session, seed, SEARCH_STEPS)
    net = session.net.eval()
    soft, hard = accuracy_with_gates(net, _soft), accuracy_with_gates(net, _hard)
    return start, _mean_gap(net), abs(soft - hard)


def _mean_gap(net: jpq.CompressedModel) -> float:
    """Mean distance of the soft indicators from the hard ones."""
    return mean(float((g.relaxed() - g.keep()).detach().abs().mean()) for g in net.gates)


def dais_gap() -> Measurement:
    """Yes if the mean gap ends below 0.01 and a tenth of what it is without annealing, partly if it falls."""
    annealed, warm = ([dais(s, a) for s in SEEDS] for a in (True, False))
    end = max(d[1] for d in annealed)
    text = (
        f"mean |I - hard I|: {join_numbers([d[0] for d in annealed])} -> "
        f"{join_numbers([d[1] for d in annealed], '.4f')} (without "
        f"annealing {join_numbers([d[1] for d in warm], '.4f')})"
    )
    closes = end < 0.01 and end < 0.1 * min(d[1] for d in warm)
    return Measurement(text, verdict(closes, end < min(d[0] for d in annealed)), len(SEEDS))


def dais_accuracy() -> Measurement:
    """Yes if hard indicators move accuracy by at most 0.25 points with every seed, partly if less than without it."""
    annealed, warm = ([dais(s, a)[2] for s in SEEDS] for a in (True, False))
    text = f"|accuracy soft - hard|, points: {join_numbers(annealed)} (without annealing {join_numbers(warm)})"
    return Measurement(text, verdict(max(annealed) <= 0.25, mean(annealed) < mean(warm)), len(SEEDS))


def dhp_slices() -> Measurement:
    """Yes up to 1e-12 (relative, float64), for random latents and biases and every second draw of the channels."""
    net = start_compression("dhp", 0, 1, **EIGHT_BITS).net.double()
    layers = [m for m in net.modules() if isinstance(m, Generated)]
    random = torch.Generator().manual_seed(0)
    differences = [_slicing_difference(hyper, random) for hyper in layers * 5]
    text = f"largest relative difference {max(differences):.1e} over {len(differences)} draws in {len(layers)} layers"
    return Measurement(text, verdict(max(differences) <= 1e-12), len(differences))


def _slicing_difference(hyper: Generated, random: torch.Generator) -> float:
    """Relative difference of the kernels generated and then sliced, and generated from sliced latents."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.double)

    c, n = hyper.b0.shape
    z_in, z_out, b0, b1 = normal(c), normal(n), normal(c, n), normal(*hyper.b1.shape)
    ins, outs = (torch.randperm(k, generator=random)[: max(1, k // 2)] for k in (c, n))

    def cut(t: Tensor) -> Tensor:
        return t[ins][:, outs]

    whole: Tensor = generate_weight(z_in, z_out, b0, hyper.w1, b1, hyper.w2)[outs][:, ins]
    sliced = generate_weight(z_in[ins], z_out[outs], cut(b0), cut(hyper.w1), cut(b1), cut(hyper.w2))
    return float(((whole - sliced).abs().max() / whole.abs().max()).detach())


class OneGroup(Lasso):
    """All filters of a layer in one group: plain input-channel pruning."""

    def __init__(self, rows: int, n: int, density: float = 0.5):
        super().__init__(rows, n, density, groups=1)


def dsp_groups() -> Measurement:
    """Better with every seed, or on the mean."""
    density = 0.15

    def run(seed: int, name: str) -> float:
        session = start_compression(name, seed, SEARCH_STEPS, density=density, **EIGHT_BITS)
        return accuracy_after_tuning(train(session, seed, SEARCH_STEPS), seed, TUNE_STEPS)

    four, one = ([run(s, name) for s in SEEDS] for name in ("dsp", register_variant("dsp", OneGroup)))
    text = f"accuracy at density {density}: {join_numbers(four)} with 4 groups, {join_numbers(one)} with 1"
    return Measurement(text, compare_by_seed(four, one), len(SEEDS))


@cache
def bayesian_bits(seed: int) -> tuple[list[int], float, float]:
    """(every landed width but the image's, per cent of draws during the search that were exactly 0, exactly 1)."""
    session = start_compression("bayesian-bits", seed, SEARCH_STEPS, bops="1%")
    net = session.net
    widths = [w for w in net.widths() if isinstance(w, Gated)]
    draws: list[Tensor] = []
    train(session, seed, SEARCH_STEPS, lambda: draws.append(torch.cat([w.draw() for w in widths]).detach()))
    z = torch.stack(draws)
    plan, image = session.discretize(), {layer.name for layer in net.network.layers if layer.reads_input}
    bits = [x.w_bits for x in plan.layers.values()] + [x.a_bits for n, x in plan.layers.items() if n not in image]
    return bits, _percent(z == 0), _percent(z == 1)


def bayesian_powers() -> Measurement:
    """Yes if every landed width is 2, 4 or 8 and at least two of them occur, partly if only the first."""
    bits = [b for s in SEEDS for b in bayesian_bits(s)[0]]
    counts = ", ".join(f"{bits.count(b)} x {b}" for b in sorted(set(bits)))
    powers = set(bits) <= {2, 4, 8}
    return Measurement(
        f"widths at 1 % of the BOPs: {counts}", verdict(powers and len(set(bits)) > 1, powers), len(bits)
    )


def bayesian_gates() -> Measurement:
    """Yes if gates were drawn exactly shut and exactly open, each in at least 5 % of the draws, partly 0.5 %."""
    shut, open_ = ([bayesian_bits(s)[i] for s in SEEDS] for i in (1, 2))
    least = min(*shut, *open_)
    text = f"draws exactly shut {join_numbers(shut, '.1f')} %, exactly open {join_numbers(open_, '.1f')} %"
    return Measurement(text, verdict(least >= 5, least >= 0.5), len(SEEDS))


def _soft(gate: Gate) -> Tensor:
    """The gate's relaxed values."""
    return gate.relaxed().detach()


def _hard(gate: Gate) -> Tensor:
    """The gate's decisions."""
    return gate.keep()


def _percent(mask: Tensor) -> float:
    """Per cent of the entries that are true."""
    return 100 * float(mask.float().mean())
