"""What pruning costs at a budget: closing the cheapest channels, against taking the same saving from the bits.

Under a plan, the divergence of the outputs from the float model's is measured three times: as the plan is; with the
cheapest `SHARE` of the open channels closed; and with all of these open but bits lowered until the cost is no higher
than with them closed. Channels are ordered by the margins of the search's own gates, bits chosen exactly from the
measured price of each tensor's next smaller widths. Every figure is of the network before fine-tuning, on training
samples mixed in pairs, with BatchNorm's statistics measured anew.
"""

from __future__ import annotations

import copy
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from jpq.allocation.measured.calibration import calibration_samples
from jpq.allocation.measured.probe import Divergence, Probe
from jpq.allocation.measured.solve import Solver
from jpq.allocation.measured.table import Key, SensitivityTable
from jpq.compression.model import CompressedModel
from jpq.costs import COSTS, macs
from jpq.costs.target import Target, used_share
from jpq.plan import Plan
from jpq.tracing.forward import eval_mode
from jpq.types import JpqError

SHARE = 0.1  # of the open channels, which are closed
SAMPLES = 256  # of the calibration
MOST_WORK = 1e12  # MACs of all passes together, above which nothing is measured
STEPS = (1, 2)  # how many smaller widths each tensor may take; the second where the first do not save enough
LEAST = 5e-4  # added divergence in nats that is told from nothing; errors of images are smaller and are shown
FEWEST_UNITS = 10  # open channels, below which there is no tenth of them

PRICED = {"bops": "bit-operations", "bops-structured": "bit-operations", "size": "bytes"}  # costs that bits lower


@dataclass(frozen=True)
class PruningPrice:
    """The divergence that a saving adds when channels give it, and when bits do."""

    closed: int  # channels that would be closed
    open: int  # channels that the plan keeps
    all: int  # channels that the sites have
    cost: str  # a name in PRICED
    saving: float  # share of the plan's cost
    channels: float  # added divergence, in the unit of the task's distance
    bits: float | None  # added divergence; None where no lower bits save as much
    unit: str  # of the divergence: "nats", or "" where it is a share of the variance
    samples: int
    seconds: float

    @property
    def pays(self) -> bool:
        """Whether channels are the cheaper way to save."""
        return self.bits is None or self.channels < self.bits

    def record(self) -> dict[str, Any]:
        """The figures as plain data, for result.json."""
        return {**asdict(self), "pays": self.pays}

    def sentence(self) -> str:
        """The figures in one or two sentences, for the notes of a run."""
        start = (
            f"Closing the cheapest {100 * SHARE:.0f} % of the open channels ({self.closed} of {self.open}) would cost "
            f"{self._amount(self.channels)} before training"
        )
        same = f"the same {PRICED[self.cost]} ({100 * self.saving:.1f} %)"
        if self.bits is None:
            return f"{start}; the widths that bits may take cannot give {same}: only pruning makes this model cheaper."
        gone = self.all - self.open
        kept = f"the search closed {gone} of {self.all} channels" if gone else "all channels stay"
        if self._is_nothing(self.channels) and self._is_nothing(self.bits):
            return f"{start}, and so would taking {same} from the bits: neither is dearer here, and {kept}."
        start = f"{start}; taking {same} from the bits would cost {self._amount(self.bits)}"
        if self.pays:
            return (
                f"{start}: pruning pays here, and {kept}. A longer --search or a larger --gate-weight would close more."
            )
        return f"{start}: more pruning does not pay here, and {kept}."

    def _amount(self, divergence: float) -> str:
        """A divergence in words."""
        return "nothing" if self._is_nothing(divergence) else f"{divergence:.2g} {self.unit}".strip()

    def _is_nothing(self, divergence: float) -> bool:
        """Whether a divergence is noise about 0."""
        return divergence <= (LEAST if self.unit else 0.0)


def price_pruning(
    net: CompressedModel,
    plan: Plan,
    model: nn.Module,
    targets: Sequence[Target],
    inputs: Callable[[], Iterable[Any]],
    divergence: Divergence,
    unit: str = "",
    main_output: Callable[[Any], Any] = lambda output: output,
) -> PruningPrice | None:
    """Measure what closing more channels costs beside taking as much from the bits; `net` stays as it is.

    Args:
        net: after its search, before it is frozen: its gates' margins order the channels.
        plan: what the search came to.
        model: float, from whose outputs all are measured.
        targets: of the budget; the cost of the tightest one that bits lower is what is saved.
        inputs: gives training batches.
        divergence: the task's distance of two outputs.
        unit: of the divergence.
        main_output: the tensor that divergences are of, out of what the model returns.

    None where there are too few channels to close, the targets do not depend on bits, or the measuring would take more
    than MOST_WORK.
    """
    began = time.perf_counter()
    target = _priced_target(net, plan, targets)
    kept = {site.name: sum(plan.kept[site.name]) for site in net.sites if not site.is_mask}
    if target is None or sum(kept.values()) < FEWEST_UNITS or _work(net) > MOST_WORK:
        return None
    orders, closed = _orders(net, plan), _close_cheapest(net, plan, kept)
    if closed == kept:
        return None
    choices = {(name, s): q.width.choices for name, s, q in _quantizers(net)}
    try:
        mixed, plain = calibration_samples(inputs(), SAMPLES)
        probe = _probe(net, plan, model, mixed, plain, divergence, orders, main_output)
    except JpqError:  # no main output that is one tensor
        return None
    pruned = replace(plan, kept={**plan.kept, **_masks(orders, closed)})
    before, after = (float(COSTS[target.cost](probe.net.exact_usage(p))) for p in (plan, pruned))
    with probe.statistics_anew(), probe.changed(_widths(plan), kept):
        base = probe.measure()
        with probe.changed(kept=closed):
            channels = probe.measure() - base
        fewer_bits = _lower_bits(probe, plan, choices, replace(target, limit=math.floor(after)), base)
        bits = None
        if fewer_bits is not None:
            with probe.changed(_widths(fewer_bits)):
                bits = probe.measure() - base
    return PruningPrice(
        closed=sum(kept.values()) - sum(closed.values()),
        open=sum(kept.values()),
        all=sum(site.n for site in net.sites if not site.is_mask),
        cost=target.cost,
        saving=1 - after / before,
        channels=channels,
        bits=bits,
        unit=unit,
        samples=probe.samples,
        seconds=round(time.perf_counter() - began, 2),
    )


def _priced_target(net: CompressedModel, plan: Plan, targets: Sequence[Target]) -> Target | None:
    """The tightest target whose cost bits lower; None where there is none."""
    uses = net.exact_usage(plan)
    priced = [target for target in targets if target.cost in PRICED]
    return max(priced, key=lambda target: used_share(target, uses), default=None)


def _work(net: CompressedModel) -> float:
    """MACs of all passes together: a step down of every tensor, and a few passes of whole plans."""
    passes = 2 * len(net.network.layers) + 4
    return float(macs(net.exact_usage())) * SAMPLES * passes


def _quantizers(net: CompressedModel) -> Iterable[tuple[str, Any, Any]]:
    """(layer, "w" or "a", quantizer) of every quantized tensor whose width can be chosen: the image's cannot."""
    for layer in net.network.layers:
        pair = net.quantizers(layer.name)
        if pair:
            yield layer.name, "w", pair[0]
            if not layer.reads_input:
                yield layer.name, "a", pair[1]


def _margins(net: CompressedModel) -> dict[str, Tensor]:
    """Channel site -> margins of its units, `[n]`."""
    pairs = zip(net.sites, net.gates, strict=True)
    return {site.name: gate.margin().detach()[0].cpu() for site, gate in pairs if not site.is_mask}


def _orders(net: CompressedModel, plan: Plan) -> dict[str, list[int]]:
    """Channel site -> its units, those that the plan keeps first, each part by falling margin."""
    orders = {}
    for name, margins in _margins(net).items():
        kept = torch.tensor(plan.kept[name])
        by_margin = margins.argsort(descending=True, stable=True)
        orders[name] = [*by_margin[kept[by_margin]].tolist(), *by_margin[~kept[by_margin]].tolist()]
    return orders


def _close_cheapest(net: CompressedModel, plan: Plan, kept: Mapping[str, int]) -> dict[str, int]:
    """The number of units of each site after the SHARE of smallest margins is closed, in numbers that may stay."""
    left = max(1, round(SHARE * sum(kept.values())))
    allowed = {site.name: net.counts(site) for site in net.sites if site.name in kept}
    margins = {
        name: sorted(m for m, stays in zip(row.tolist(), plan.kept[name], strict=True) if stays)
        for name, row in _margins(net).items()
    }
    counts = dict(kept)
    while left > 0:
        steps = []
        for name, count in counts.items():
            place = bisect_left(allowed[name], count)
            fewer = allowed[name][place - 1] if place else 0
            if fewer > 0 and count - fewer <= max(left, net.multiple):
                steps.append((margins[name][kept[name] - fewer - 1], name, fewer))
        if not steps:
            break
        _, name, fewer = min(steps)
        left -= counts[name] - fewer
        counts[name] = fewer
    return counts


def _masks(orders: Mapping[str, Sequence[int]], counts: Mapping[str, int]) -> dict[str, tuple[bool, ...]]:
    """Site -> unit -> whether it is among the first so many of its site."""
    best = {name: set(orders[name][:count]) for name, count in counts.items()}
    return {name: tuple(unit in best[name] for unit in range(len(orders[name]))) for name in counts}


@torch.no_grad()
def _probe(
    net: CompressedModel,
    plan: Plan,
    model: nn.Module,
    mixed: Sequence[Any],
    plain: Sequence[Any],
    divergence: Divergence,
    orders: Mapping[str, Sequence[int]],
    main_output: Callable[[Any], Any],
) -> Probe:
    """A probe of the network under the plan, whose divergence is that from the float model."""
    frozen = copy.deepcopy(net)
    frozen.freeze(plan)
    probe = Probe(frozen, mixed, plain, divergence, orders, main_output)
    with eval_mode(model):
        probe.references = [probe.output_of(model, x) for x in mixed]
    return probe


def _widths(plan: Plan) -> dict[Key, int | None]:
    """The widths of a plan by tensor."""
    found: dict[Key, int | None] = {}
    for name, layer in plan.layers.items():
        found[name, "w"], found[name, "a"] = layer.w_bits, layer.a_bits
    return found


def _lower_bits(
    probe: Probe, plan: Plan, choices: Mapping[tuple[str, Any], Sequence[int]], target: Target, base: float
) -> Plan | None:
    """The plan of the same channels whose bits meet the target at the least predicted divergence; None: there is none.

    Args:
        probe: at the plan.
        plan: from whose widths each tensor may go down.
        choices: tensor -> its allowed widths.
        target: to be met.
        base: divergence of the plan.
    """
    bits: dict[Key, dict[int, float]] = {key: {w: 0.0} for key, w in _widths(plan).items() if w is not None}
    for steps in STEPS:
        for key, allowed in choices.items():
            smaller = sorted((b for b in allowed if b < max(bits[key])), reverse=True)[:steps]
            for width in smaller:
                if width not in bits[key]:
                    with probe.changed({key: width}):
                        bits[key][width] = max(0.0, probe.measure() - base)
        table = SensitivityTable(bits, {}, {}, "around", "", "", probe.samples)
        try:
            return Solver(probe.net, table, [target], free_units=False).solve().plan
        except JpqError:
            continue
    return None
