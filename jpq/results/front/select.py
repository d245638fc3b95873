"""Choosing one point of a front by limits or by its knee, with reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jpq.costs.latency import NS
from jpq.costs.target import parse_amount
from jpq.results.formatting import format_change, format_metric, format_number, format_percent
from jpq.results.front.front import Front, build_front, check_one_table
from jpq.results.front.points import RunPoint
from jpq.tasks import CLASSIFICATION
from jpq.tasks.base import Task
from jpq.tasks.metric_text import metric_flag, parse_score
from jpq.types import JpqError

ACCURACY = "accuracy"

LIMITS = {
    "min_accuracy": ACCURACY,
    "min_metric": ACCURACY,
    "max_bops": "bops",
    "max_macs": "macs",
    "max_size": "size",
    "max_latency": "latency",
}

COST_NAMES = {
    "bops": "BOPs",
    "bops-structured": "structured BOPs",
    "macs": "MACs",
    "size": "size",
    "latency": "predicted latency",
}


@dataclass(frozen=True)
class Limit:
    """The smallest held-out metric or the largest cost of a point."""

    cost: str  # a name in COSTS, or ACCURACY
    text: str  # the limit with its flag, such as "--max-bops 1%"
    value: float  # the smallest score, or in the cost's unit

    def met(self, point: RunPoint) -> bool:
        """Whether a point keeps the limit; one that does not know the cost does not."""
        if self.cost == ACCURACY:
            return point.accuracy >= self.value
        return self.cost in point.costs and point.costs[self.cost] <= self.value


@dataclass(frozen=True)
class Choice:
    """The chosen point, and the reasons, a sentence each."""

    index: int  # in the front's points
    point: RunPoint
    why: tuple[str, ...]


def parse_limits(
    texts: Mapping[str, str | None], full_costs: Mapping[str, float], task: Task = CLASSIFICATION
) -> tuple[Limit, ...]:
    """Limits from the texts of flags.

    Args:
        texts: name of the flag -> its text, such as {"min_accuracy": "91%", "max_size": "60KB"}.
        full_costs: of the fp32 model, for percentages.
        task: whose metric a smallest one is.

    Raises JpqError for amounts of another form.
    """
    bounds = []
    for name, text in texts.items():
        if text is None:
            continue
        flag, cost = f"--{name.replace('_', '-')}", LIMITS[name]
        if cost == ACCURACY:
            value = parse_score(task, text, flag)
        elif "%" in text and cost not in full_costs:
            raise JpqError(f"{flag} {text}: no run says what the fp32 model costs there. Give an amount, such as 3ms.")
        else:
            value = float(parse_amount(cost, text, full_costs.get(cost, 0.0), flag))
        bounds.append(Limit(cost, f"{flag} {text}", value))
    return tuple(bounds)


def pick_point(front: Front, limits: Sequence[Limit], knee: bool = False) -> Choice:
    """The best of the points that keep every limit.

    Where a metric is asked for, the cheapest in the front's first cost; else the one with the best metric. With `knee`,
    the knee of the front of these points. Raises JpqError where there is none, naming the nearest that there are.
    """
    cost = front.costs[0]
    if any(limit.cost == "latency" for limit in limits):
        check_one_table(front.points)
    fit = [p for p in front.points if all(limit.met(p) for limit in limits)]
    if not fit:
        raise JpqError(_nearest_text(front, limits))
    counts = [f"{limit.text}: {sum(map(limit.met, front.points))} of {len(front.points)} runs" for limit in limits]
    if len(limits) > 1:
        counts.append(f"all together: {len(fit)}")
    why = [f"{'; '.join(counts)}."] if counts else []
    if knee:
        inside = build_front(fit, front.costs)
        if inside.knee is None:
            raise JpqError(
                f"There is no knee: of {_runs_text(len(fit))}, {len(inside.front_indices)} are on the front, and none "
                "of them stands out above the line from the cheapest to the best. "
                f"Choose by {metric_flag(front.task)} or --max-bops."
            )
        best = inside.points[inside.knee]
        why.append(f"It is the knee of {_runs_text(len(fit))}: farthest above the line from the cheapest to the best.")
    elif any(limit.cost == ACCURACY for limit in limits):
        best = min(fit, key=lambda p: (p.costs[cost], -p.accuracy))
        why.append(_extreme_text(f"the least {COST_NAMES[cost]}", len(fit)))
    else:
        best = max(fit, key=lambda p: (p.accuracy, -p.costs[cost]))
        why.append(_extreme_text(f"the {_best_word(front.task)} held-out {front.task.metric_name}", len(fit)))
    index = next(i for i, p in enumerate(front.points) if p is best)
    return Choice(index, best, (*why, *_neighbour_texts(front, best, limits)))


def _best_word(task: Task) -> str:
    return "highest" if task.higher_is_better else "lowest"


def _extreme_text(what: str, n: int) -> str:
    return f"It has {what} of these {n}." if n > 1 else "It is the only one."


def _runs_text(n: int) -> str:
    return f"{n} runs" if n != 1 else "one run"


def format_point_cost(point: RunPoint, cost: str) -> str:
    """A cost of a point as text: "9.18 M BOPs (0.99 % of fp32)", "20.6 KB", "0.412 ms"."""
    value = point.costs[cost]
    if cost == "latency":
        return f"{value / NS:#.3g} ms"
    if cost == "size":
        return format_number(value, "B")
    share = f" ({format_percent(point.share(cost))} of fp32)" if cost in point.full_costs else ""
    return f"{format_number(value)} {COST_NAMES[cost]}{share}"


def _neighbour_texts(front: Front, best: RunPoint, limits: Sequence[Limit]) -> list[str]:
    """Sentences on the next cheaper and the next dearer point of the front."""
    cost = front.costs[0]
    lines = []
    cheaper = [p for p in front.front_points if p.costs[cost] < best.costs[cost]]
    dearer = [p for p in front.front_points if p.costs[cost] > best.costs[cost] and p.accuracy > best.accuracy]
    for words, near in (("cheaper", cheaper[-1:]), ("dearer", dearer[:1])):
        for p in near:
            misses = [limit.text for limit in limits if not limit.met(p)]
            but = f"; it misses {' and '.join(misses)}" if misses else ""
            change = format_change(front.task, p.accuracy - best.accuracy)
            lines.append(
                f"The next {words} one of the front, {p.name}, has {change} at "
                f"{p.costs[cost] / best.costs[cost]:.2f} times the {COST_NAMES[cost]}{but}."
            )
    return lines


def _nearest_text(front: Front, limits: Sequence[Limit]) -> str:
    """Error message where no point keeps all limits: for each limit, the best of those that keep the others."""
    near: list[str] = []
    for limit in limits:
        known = [p for p in front.points if limit.cost in (ACCURACY, *p.costs)]
        rest = [bound for bound in limits if bound is not limit]
        fit = [p for p in known if all(bound.met(p) for bound in rest)]
        if not known:
            near.append(f"no run knows its {COST_NAMES[limit.cost]}")
        if fit and rest:
            near.append(f"with {' and '.join(bound.text for bound in rest)} {_best_text(fit, limit)}")
        if known and not any(map(limit.met, known)):
            near.append(_best_text(known, limit, " of all" if rest else ""))
    return f"No run meets {' and '.join(limit.text for limit in limits)}: {'; '.join(near)}."


def _best_text(points: Sequence[RunPoint], limit: Limit, scope: str = "") -> str:
    if limit.cost == ACCURACY:
        best = max(points, key=lambda p: p.accuracy)
        words = f"the {_best_word(best.metric)} {best.metric.metric_name}"
        words = "the most accurate" if best.metric is CLASSIFICATION else words
        return f"{words}{scope} is {best.name} with {format_metric(best.metric, best.accuracy)}"
    best = min(points, key=lambda p: p.costs[limit.cost])
    return f"the least{scope} is {best.name} with {format_point_cost(best, limit.cost)}"
