"""The plans that a measured one is compared with: uniform bits, uniform bits with wider ends, and two stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jpq.allocation.measured.table import Key
from jpq.allocation.two_stage import decide_two_stage
from jpq.allocation.uniform_bits import widest_plans_with_wider_ends, widest_uniform_plans
from jpq.compression.model import CompressedModel
from jpq.costs.target import Target, all_met
from jpq.plan import Plan
from jpq.types import JpqError

MEASURED, BITS_ONLY = "measured", "measured, bits only"
UNIFORM, WIDER_ENDS, TWO_STAGE = "uniform", "uniform, wider ends", "two-stage"


@dataclass(frozen=True)
class AllowedWidths:
    """The widths that a device takes: any of these, in bits, ascending, and some tensors' own ones."""

    w: tuple[int, ...]
    a: tuple[int, ...]
    pinned: Mapping[Key, int]  # tensor -> the only width that it takes

    def of(self, key: Key) -> tuple[int, ...]:
        """The widths that one tensor may take."""
        return (self.pinned[key],) if key in self.pinned else self.w if key[1] == "w" else self.a

    def allow(self, plan: Plan, image: set[str]) -> bool:
        """Whether every width of a plan is allowed; `image`: layers that read the model's input."""
        return all(
            layer.w_bits in self.of((name, "w")) and (name in image or layer.a_bits in self.of((name, "a")))
            for name, layer in plan.layers.items()
        )


@dataclass(frozen=True)
class Candidate:
    """A plan that meets every target, and how far the network under it is from the float one."""

    name: str
    plan: Plan
    divergence: float  # measured with all decisions at once, on the calibration


def comparison_plans(
    net: CompressedModel,
    targets: Sequence[Target],
    widths: AllowedWidths,
    density: float,
    divergence: Callable[[Plan], float] | None = None,
) -> dict[str, Plan]:
    """The plans of the usual methods that meet every target, by name; those that cannot are left out.

    Args:
        net: attached with `Ranked` gates, whose margins hold a ranking.
        targets: all of them are met.
        widths: the allowed ones.
        density: share of the MACs that stays in the first of two stages.
        divergence: of several pairs of uniform widths (5 and 4 bits, 4 and 5) that with the least is taken; without it,
            the costliest.
    """
    image = image_layers(net)
    makers: dict[str, Callable[[], list[Plan]]] = {
        UNIFORM: lambda: widest_uniform_plans(net, targets, widths.w, widths.a, pinned=widths.pinned),
        WIDER_ENDS: lambda: widest_plans_with_wider_ends(net, targets, widths.w, widths.a, widths.pinned),
        TWO_STAGE: lambda: [_two_stage(net, targets, widths, density)],
    }
    plans: dict[str, Plan] = {}
    for name, make in makers.items():
        try:
            found = make()
        except JpqError:  # this method has no plan within the targets
            continue
        fit = [plan for plan in found if widths.allow(plan, image) and all_met(targets, net.exact_usage(plan))]
        if fit:
            plans[name] = min(fit, key=divergence) if divergence is not None and len(fit) > 1 else fit[0]
    return plans


def image_layers(net: CompressedModel) -> set[str]:
    """The layers that read the model's input, whose width is not chosen."""
    return {layer.name for layer in net.network.layers if layer.reads_input}


def _two_stage(net: CompressedModel, targets: Sequence[Target], widths: AllowedWidths, density: float) -> Plan:
    """The plan of two stages; where only some widths are allowed, at one of them for weights and for inputs."""
    plan = decide_two_stage(net, targets, (widths.w[0], widths.w[-1]), (widths.a[0], widths.a[-1]), density)
    image = image_layers(net)
    if widths.allow(plan, image):
        return with_pinned_widths(plan, widths.pinned)
    inner = {name: layer for name, layer in plan.layers.items() if (name, "w") not in widths.pinned}
    w_most = max((layer.w_bits for layer in inner.values()), default=widths.w[0])
    a_most = max((layer.a_bits for name, layer in inner.items() if name not in image), default=widths.a[0])
    w, a = (max(b for b in allowed if b <= most) for allowed, most in ((widths.w, w_most), (widths.a, a_most)))
    return with_pinned_widths(decide_two_stage(net, targets, (w, w), (a, a), density), widths.pinned)


def with_pinned_widths(plan: Plan, pinned: Mapping[Key, int]) -> Plan:
    """The plan with the tensors that take one width only at that width."""
    layers = dict(plan.layers)
    for (name, side), bits in pinned.items():
        layers[name] = replace(layers[name], w_bits=bits) if side == "w" else replace(layers[name], a_bits=bits)
    return replace(plan, layers=layers)
