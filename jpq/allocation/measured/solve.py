"""The plan of least predicted divergence that meets every target: bits exactly, units in turns with them.

    min  sum_l S_w[l, w_l] + S_a[l, a_l] + sum_s S_c[s, k_s]      such that every cost is within its target

Given the units, costs are sums over layers of a table of (w, a), a multiple-choice knapsack that is solved exactly
(`choose`). Units enter bit-operations as a product with the bits, so they are decided in turns: for the prices of the
targets in the last solution (multipliers of its linear relaxation), each site takes the number of units at which the
divergence plus the priced cost of the layers that it touches, each at its best bits, is least. Several starts at
smaller shares of the units, then single steps of units with the bits solved again; the best plan is kept. Where there
are few combinations of units it is the best of all. Equal inputs give equal plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations, product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from jpq.allocation.measured.choose import Group, choose, prices
from jpq.allocation.measured.table import Key, SensitivityTable
from jpq.compression.model import CompressedModel
from jpq.costs import COSTS, LayerUse
from jpq.costs.target import Target, all_met, used_share
from jpq.plan import LayerPlan, Plan
from jpq.types import JpqError

Floats = npt.NDArray[np.float64]

Counts = dict[str, int]  # site -> units kept

STARTS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)  # shares of the units of every site from which the turns begin
ROUNDS = 8  # of units and bits in turns, from one start
ENUMERATED = 2000  # up to so many combinations of units the best of all is found
PAIRED_SITES = 12  # up to so many sites steps of two at a time are tried
NO_GAIN = 1e-4  # share of a site's largest divergence below which more units gain nothing
TIE = 1e-15  # divergences closer than this count as equal
ROUNDING = 1e-9  # share of a limit that sums of floats may be wrong by
TOGETHER = 128  # numbers of units whose costs are computed at a time
LOCAL_STEPS = 40  # exact solutions that the final search by single steps may take


@dataclass(frozen=True, eq=False)
class Choices:
    """The widths that one layer may take, all pairs of them."""

    layer: str
    w: npt.NDArray[np.int64]  # [pairs]
    a: npt.NDArray[np.int64]
    values: Floats  # [pairs]: S_w + S_a


@dataclass(frozen=True)
class Solution:
    """A plan and its predicted divergence."""

    plan: Plan
    divergence: float
    counts: Mapping[str, int]


class Solver:
    """The decisions of one network, its table and its targets.

    Args:
        net: attached; its present plan gives what the table does not choose (widths of images, signs of grids).
        table: divergences; sites that it lacks keep all units, tensors that it lacks their present width.
        targets: all of them are met.
        pinned: tensor -> width that it has whatever it costs.
        free_units: whether units may go; False: bits alone.
    """

    def __init__(
        self,
        net: CompressedModel,
        table: SensitivityTable,
        targets: Sequence[Target],
        pinned: Mapping[Key, int] | None = None,
        free_units: bool = True,
    ):
        self.net, self.table, self.targets = net, table, tuple(targets)
        self.limits = [float(target.limit) for target in targets]
        self.present = net.plan()
        self.choices = [_choices(name, layer, table, pinned or {}) for name, layer in self.present.layers.items()]
        self._choice_index = {choices.layer: i for i, choices in enumerate(self.choices)}
        sites = [site.name for site in net.sites if not site.is_mask and site.name in table.units]
        self.grids = {name: _thinned(table.units[name], net, name) for name in sites} if free_units else {}
        self._kept_cache: dict[tuple[str, int], tuple[bool, ...]] = {}
        self._cost_cache: dict[tuple[Any, ...], Floats] = {}  # (layer, its shares) -> [pairs, targets]
        self._linear = LinearShares.of(self) if self.grids else None
        self._batches: dict[str | None, list[Batch]] = {}  # site -> the layers that it touches; None: all layers

    def solve(self) -> Solution:
        """The best plan found. Raises JpqError where no plan meets the targets."""
        best: tuple[float, Counts, list[int]] | None = None
        seen: dict[tuple[int, ...], tuple[float, list[int]] | None] = {}
        for share in STARTS if self.grids else STARTS[:1]:
            counts = self._turns({name: _nearest(grid, share) for name, grid in self.grids.items()})
            found = self._exact(counts, seen)
            if found is not None and (best is None or found[0] < best[0] - TIE):
                best = found[0], counts, found[1]
        if best is None:
            smallest = {name: min(grid) for name, grid in self.grids.items()}
            found = self._exact(smallest, seen)
            if found is None:
                raise JpqError("The targets cannot be met by any bits and units that the sensitivity table knows.")
            best = found[0], smallest, found[1]
        value, counts, picks = self._single_steps(best, seen)
        return Solution(self._plan(counts, picks), value, counts)

    def fill(self, plan: Plan) -> Plan:
        """The plan with more units where the targets leave room, the largest gain per cost first.

        Counts between two measured ones are interpolated; units whose absence costs nothing stay away.
        """
        counts = {name: sum(plan.kept[name]) for name in self.grids}
        allowed = {site.name: self.net.counts(site) for site in self.net.sites if site.name in counts}
        open_sites = set(counts)
        while open_sites:
            used = self._used(plan)
            best: tuple[float, str, Plan] | None = None
            for name in sorted(open_sites):
                step = self._next_step(plan, name, counts[name], allowed[name])
                if step is None:
                    open_sites.discard(name)  # costs only grow: what is too dear now never fits later
                    continue
                gain, trial = step
                rate = gain / max(self._used(trial) - used, TIE)
                if best is None or rate > best[0]:
                    best = rate, name, trial
            if best is not None:
                _, name, plan = best
                counts[name] = sum(plan.kept[name])
        return plan

    def _next_step(self, plan: Plan, name: str, count: int, allowed: Sequence[int]) -> tuple[float, Plan] | None:
        """(gain of the next larger number of units, the plan with it); None where it gains nothing or is too dear."""
        more = min((k for k in allowed if k > count), default=None)
        if more is None:
            return None
        row = self.table.units[name]
        measured = sorted(row)
        fewer_costs, more_costs = np.interp([count, more], measured, [row[k] for k in measured])
        gain = float(fewer_costs - more_costs)
        trial = replace(plan, kept={**plan.kept, name: self._kept_units(name, more)})
        if gain <= NO_GAIN * max(map(abs, row.values())) or not all_met(self.targets, self.net.exact_usage(trial)):
            return None
        return gain, trial

    def _used(self, plan: Plan) -> float:
        """Share of the tightest target that a plan uses."""
        uses = self.net.exact_usage(plan)
        return max((float(used_share(target, uses)) for target in self.targets), default=0.0)

    def _turns(self, counts: Counts) -> Counts:
        """Units and prices in turns from one start, until the units stay as they are."""
        for _ in range(ROUNDS if counts else 0):
            price = self._prices(counts)
            moved = self._best_counts(counts, price) if price is not None else self._smaller(counts)
            if moved == counts:
                break
            counts = moved
        return counts

    def _smaller(self, counts: Counts) -> Counts:
        """Every site one step down its grid."""
        return {name: max([k for k in self.grids[name] if k < n], default=n) for name, n in counts.items()}

    def _best_counts(self, counts: Counts, price: Floats) -> Counts:
        """The units of each site in turn that are best at these prices, all else as it is."""
        counts = dict(counts)
        for name, grid in self.grids.items():
            values = self._priced_sums([counts | {name: k} for k in grid], price, name)
            best, best_value = counts[name], np.inf
            for k, priced in zip(grid, values.tolist(), strict=True):
                value = self.table.units[name][k] + priced
                if value < best_value - TIE:
                    best, best_value = k, value
            counts[name] = best
        return counts

    def _priced_sums(self, several: Sequence[Counts], price: Floats, site: str | None = None) -> Floats:
        """For each of several numbers of units: divergence plus priced cost of all layers, each at its best bits.

        With `site` only the layers whose cost depends on the units of this site count.
        """
        if self._linear is None:
            return np.array([sum(self._priced(use, price) for use in self._exact_uses(c)) for c in several])
        if site not in self._batches:
            self._batches[site] = self._linear.batches(self.choices, site)
        parts = [several[i : i + TOGETHER] for i in range(0, len(several), TOGETHER)]
        return np.concatenate([self._sums_of(self._linear, part, price, self._batches[site]) for part in parts])

    def _sums_of(
        self, linear: LinearShares, several: Sequence[Counts], price: Floats, batches: Sequence[Batch]
    ) -> Floats:
        """[several]: the sums of `_priced_sums` over the layers of some batches."""
        sums = np.zeros(len(several))
        for batch in batches:
            shares = linear.at_all(several, batch.places)
            if batch.values is None:
                (place,) = batch.places.tolist()
                sums += [self._priced(linear.use(place, tuple(row)), price) for row in shares[0].tolist()]
            else:
                priced = batch.values
                for target, worth in zip(self.targets, price.tolist(), strict=True):
                    priced = priced + worth * np.asarray(COSTS[target.cost]([batch.use_at(shares)]))
                best = np.broadcast_to(priced.min(-1), shares.shape[:2])
                sums += best.sum(0)
        return sums

    def _priced(self, use: LayerUse, price: Floats) -> float:
        """Divergence plus priced cost of one layer at its best bits."""
        index = self._choice_index.get(use.name)
        if index is None:
            return float(np.dot([float(COSTS[t.cost]([use])) for t in self.targets], price))
        choices = self.choices[index]
        return float((choices.values + self._costs(use, choices) @ price).min())

    def _costs(self, use: LayerUse, choices: Choices) -> Floats:
        """[pairs, targets]: the cost of one layer at each pair of widths."""
        key = (use.name, *_shares(use))
        if key not in self._cost_cache:
            self._cost_cache[key] = self._new_costs(use, choices)
        return self._cost_cache[key]

    def _new_costs(self, use: LayerUse, choices: Choices) -> Floats:
        columns = []
        for target in self.targets:
            if use.clock is None:
                cost = COSTS[target.cost](
                    [replace(use, w_bits=choices.w.astype(float), a_bits=choices.a.astype(float))]
                )
                columns.append(np.broadcast_to(np.asarray(cost, float), choices.values.shape))
            else:
                pairs = zip(choices.w.tolist(), choices.a.tolist(), strict=True)
                uses = [[replace(use, w_bits=w, a_bits=a)] for w, a in pairs]
                columns.append(np.array([float(COSTS[target.cost](one)) for one in uses]))
        return np.stack(columns, 1) if columns else np.zeros((len(choices.values), 0))

    def _uses(self, counts: Counts) -> list[LayerUse]:
        """The use of every layer at these units, shares as floats; bits are those of the present plan."""
        return self._exact_uses(counts) if self._linear is None else self._linear.uses(counts)

    def _exact_uses(self, counts: Counts) -> list[LayerUse]:
        return [_as_floats(use) for use in self.net.exact_usage(replace(self.present, kept=self._kept(counts)))]

    def _kept(self, counts: Counts) -> dict[str, tuple[bool, ...]]:
        return {**self.present.kept, **{name: self._kept_units(name, count) for name, count in counts.items()}}

    def _kept_units(self, site: str, count: int) -> tuple[bool, ...]:
        """Which units stay where so many of a site do: the first of its order."""
        if (site, count) not in self._kept_cache:
            order = self.table.orders[site]
            best = set(order[:count])
            self._kept_cache[site, count] = tuple(unit in best for unit in range(len(order)))
        return self._kept_cache[site, count]

    def _groups(self, counts: Counts) -> tuple[list[Group], list[float]]:
        """The options of every layer at these units, and the costs that no choice changes."""
        index = self._choice_index
        groups: list[Group] = []
        fixed = [0.0] * len(self.targets)
        for use in self._uses(counts):
            if use.name in index:
                choices = self.choices[index[use.name]]
                groups.append(Group(choices.values, self._costs(use, choices)))
            else:
                fixed = [f + float(COSTS[t.cost]([use])) for f, t in zip(fixed, self.targets, strict=True)]
        return groups, fixed

    def _exact(
        self, counts: Counts, seen: dict[tuple[int, ...], tuple[float, list[int]] | None], below: float = math.inf
    ) -> tuple[float, list[int]] | None:
        """The least divergence at these units, with the option of each layer.

        None where no bits meet the targets, or none with a divergence less than `below`, which only falls from call to
        call.
        """
        key = tuple(counts[name] for name in self.grids)
        if key not in seen:
            seen[key] = self._solve_bits(counts, below)
        return seen[key]

    def _solve_bits(self, counts: Counts, below: float) -> tuple[float, list[int]] | None:
        groups, fixed = self._groups(counts)
        limits = [limit - cost for limit, cost in zip(self.limits, fixed, strict=True)]
        if any(limit <= 0 for limit in limits):
            return None
        units = sum(self.table.units[name][k] for name, k in counts.items())
        picks = choose(groups, limits, below - units)
        if picks is None:
            return None
        if not all_met(self.targets, self.net.exact_usage(self._plan(counts, picks))):  # floats have rounded a sum down
            picks = choose(groups, [limit * (1 - ROUNDING) for limit in limits], below - units)
            if picks is None or not all_met(self.targets, self.net.exact_usage(self._plan(counts, picks))):
                return None
        bits = sum(float(group.values[i]) for group, i in zip(groups, picks, strict=True))
        return bits + units, picks

    def _single_steps(
        self, best: tuple[float, Counts, list[int]], seen: dict[tuple[int, ...], tuple[float, list[int]] | None]
    ) -> tuple[float, Counts, list[int]]:
        """Better plans one step of one or two sites away, with the bits solved again, until there are none.

        A neighbour is solved exactly only where its lower bound, the Lagrangian at the prices of the best plan, is
        below the best divergence.
        """
        left, improved = LOCAL_STEPS, bool(self.grids)
        if self.grids and prod(map(len, self.grids.values())) <= ENUMERATED:
            return self._enumerate(best, seen)
        while improved and left > 0:
            improved = False
            price = self._prices(best[1])
            for bound, counts in self._by_bound(list(self._neighbours(best[1])), price):
                if bound >= best[0] - TIE or left == 0:
                    break
                left -= 1
                found = self._exact(counts, seen, best[0] - TIE)
                if found is not None and found[0] < best[0] - TIE:
                    best, improved = (found[0], counts, found[1]), True
                    break
        return best

    def _enumerate(
        self, best: tuple[float, Counts, list[int]], seen: dict[tuple[int, ...], tuple[float, list[int]] | None]
    ) -> tuple[float, Counts, list[int]]:
        """The best of all combinations of units, those of the lowest bound first, until no bound is below the best."""
        price = self._prices(best[1])
        combinations_of_units = [dict(zip(self.grids, ks, strict=True)) for ks in product(*self.grids.values())]
        for bound, counts in self._by_bound(combinations_of_units, price):
            if bound >= best[0] - TIE:
                break
            found = self._exact(counts, seen, best[0] - TIE)
            if found is not None and found[0] < best[0] - TIE:
                best = found[0], counts, found[1]
        return best

    def _prices(self, counts: Counts) -> Floats | None:
        """What one unit of each target is worth at these units; None where no bits meet the targets."""
        groups, fixed = self._groups(counts)
        limits = [limit - cost for limit, cost in zip(self.limits, fixed, strict=True)]
        try:
            return prices(groups, limits) if min(limits, default=1.0) > 0 else None
        except JpqError:
            return None

    def _by_bound(self, several: Sequence[Counts], price: Floats | None) -> list[tuple[float, Counts]]:
        """Several numbers of units, each after a lower bound of the divergence at them; the lowest bound first."""
        if price is None or not several:
            return [(0.0, counts) for counts in several]
        units = np.array([sum(self.table.units[name][k] for name, k in counts.items()) for counts in several])
        bounds = units + self._priced_sums(several, price) - float(np.dot(self.limits, price))
        return [(float(bounds[i]), several[i]) for i in np.argsort(bounds, kind="stable").tolist()]

    def _neighbours(self, counts: Counts) -> Iterator[Counts]:
        """One step of one site away; of two sites, where there are few."""
        steps = [
            (name, grid[j])
            for name, grid in self.grids.items()
            for j in (grid.index(counts[name]) - 1, grid.index(counts[name]) + 1)
            if 0 <= j < len(grid)
        ]
        for name, k in steps:
            yield counts | {name: k}
        if len(self.grids) <= PAIRED_SITES:
            for (one, k), (other, n) in combinations(steps, 2):
                if one != other:
                    yield counts | {one: k, other: n}

    def _plan(self, counts: Counts, picks: Sequence[int]) -> Plan:
        """The plan of these units and options."""
        layers = dict(self.present.layers)
        for choices, i in zip(self.choices, picks, strict=True):
            old = layers[choices.layer]
            layers[choices.layer] = LayerPlan(int(choices.w[i]), int(choices.a[i]), old.signed)
        return replace(self.present, layers=layers, kept=self._kept(counts))


@dataclass(frozen=True, eq=False)
class Batch:
    """Layers whose costs are computed together."""

    places: npt.NDArray[np.int64]  # [layers], among the uses of a network
    use: LayerUse  # its numbers are of these layers, [layers, 1, 1], and its widths those of all pairs, [pairs]
    values: Floats | None  # [layers, 1, pairs]: S_w + S_a; None: one layer whose cost is computed as it is

    def use_at(self, shares: Floats) -> LayerUse:
        """The use of these layers at shares [layers, several, 3]; its costs are [layers, several, pairs]."""
        inputs, outputs, positions = (shares[..., i, None] for i in range(3))
        return replace(self.use, inputs=inputs, outputs=outputs, positions=positions)


class LinearShares:
    """The shares of every layer's inputs, outputs and positions as linear functions of the numbers of units.

    Args:
        sites: names, in the order of the columns.
        full: the uses with all units.
        most: [sites], all units of each.
        shares: [layers, 3], with all units.
        slopes: [layers, 3, sites], per unit.
    """

    def __init__(self, sites: Sequence[str], full: Sequence[LayerUse], most: Floats, shares: Floats, slopes: Floats):
        self.sites, self.full, self.most, self.shares, self.slopes = list(sites), list(full), most, shares, slopes
        self.touched = {name: np.flatnonzero(slopes[:, :, i].any(1)) for i, name in enumerate(sites)}
        self._cache: dict[tuple[Any, ...], LayerUse] = {}

    @classmethod
    def of(cls, solver: Solver) -> LinearShares | None:
        """Those of a solver's network; None where they are not linear (units of unequal size)."""
        grids = solver.grids
        most = {name: max(grid) for name, grid in grids.items()}
        full = solver._exact_uses(most)
        shares = np.array([_shares(use) for use in full])
        slopes = np.zeros((*shares.shape, len(grids)))
        for i, (name, grid) in enumerate(grids.items()):
            fewer = np.array([_shares(use) for use in solver._exact_uses(most | {name: min(grid)})])
            slopes[:, :, i] = (shares - fewer) / max(1, max(grid) - min(grid))
        found = cls(list(grids), full, np.array(list(most.values()), float), shares, slopes)
        halves = {name: grid[len(grid) // 2] for name, grid in grids.items()}
        mixed = {name: grid[i % len(grid)] for i, (name, grid) in enumerate(grids.items())}
        for counts in (halves, mixed):
            exact = np.array([_shares(use) for use in solver._exact_uses(counts)])
            if not np.allclose(found.at(counts), exact, rtol=0, atol=1e-12):
                return None
        return found

    def at(self, counts: Counts) -> Floats:
        """[layers, 3]: shares at these units, rounded where floats differ from a fraction by their last digits."""
        fewer = self.most - np.array([counts[name] for name in self.sites], float)
        return np.round(self.shares - self.slopes @ fewer, 13)

    def at_all(self, several: Sequence[Counts], layers: npt.NDArray[np.int64]) -> Floats:
        """[layers, several, 3]: the shares of some layers at each of several numbers of units, rounded as by `at`."""
        units = np.array([[counts[name] for name in self.sites] for counts in several], float)
        moved = self.slopes[layers] @ (self.most - units).T
        return np.round(self.shares[layers][:, :, None] - moved, 13).transpose(0, 2, 1)

    def batches(self, choices: Sequence[Choices], site: str | None) -> list[Batch]:
        """The layers that depend on a site (None: all), those together that have the same pairs of widths."""
        by_name = {c.layer: c for c in choices}
        together: dict[tuple[bool, bytes, bytes], list[int]] = {}
        found = []
        for place in range(len(self.full)) if site is None else self.touched[site].tolist():
            use = self.full[place]
            own = by_name.get(use.name)
            if own is None or use.clock is not None:
                found.append(Batch(np.array([place]), use, None))
            else:
                together.setdefault((use.regular, own.w.tobytes(), own.a.tobytes()), []).append(place)
        for places in together.values():
            uses = [self.full[place] for place in places]
            own = by_name[uses[0].name]
            numbers: dict[str, Any] = {
                name: np.array([getattr(use, name) for use in uses], float)[:, None, None]
                for name in ("macs", "weights", "outputs_all", "density", "mask_bits")
            }
            use = replace(uses[0], **numbers, w_bits=own.w.astype(float), a_bits=own.a.astype(float))
            values = np.stack([by_name[use.name].values for use in uses])[:, None]
            found.append(Batch(np.array(places), use, values))
        return found

    def uses(self, counts: Counts) -> list[LayerUse]:
        """The uses of all layers."""
        return [self.use(i, tuple(row)) for i, row in enumerate(self.at(counts).tolist())]

    def use(self, layer: int, shares: tuple[float, ...]) -> LayerUse:
        """The use of one layer at these shares."""
        key = (layer, shares)
        if key not in self._cache:
            inputs, outputs, positions = shares
            self._cache[key] = replace(self.full[layer], inputs=inputs, outputs=outputs, positions=positions)
        return self._cache[key]


def predicted_divergence(table: SensitivityTable, plan: Plan) -> float:
    """The sum of a plan's single divergences; numbers of units between two measured ones are interpolated."""
    total = 0.0
    for name, layer in plan.layers.items():
        total += table.bits.get((name, "w"), {}).get(layer.w_bits, 0.0)
        total += table.bits.get((name, "a"), {}).get(layer.a_bits, 0.0)
    for name, kept in plan.kept.items():
        if name in table.units:
            counts = sorted(table.units[name])
            total += float(np.interp(sum(kept), counts, [table.units[name][k] for k in counts]))
    return total


def _choices(name: str, layer: LayerPlan, table: SensitivityTable, pinned: Mapping[Key, int]) -> Choices:
    """The widths of one layer: those that the table knows, or the present one."""
    weight: Key = (name, "w")
    inputs: Key = (name, "a")
    rows = []
    for key, present in ((weight, layer.w_bits), (inputs, layer.a_bits)):
        row = table.bits.get(key, {}) or {present: 0.0}
        if key in pinned:
            row = {pinned[key]: row.get(pinned[key], 0.0)}
        rows.append(sorted(row.items()))
    pairs = [(w, a, s + t) for w, s in rows[0] for a, t in rows[1]]
    w, a, values = zip(*pairs, strict=True)
    return Choices(name, np.array(w, np.int64), np.array(a, np.int64), np.array(values, float))


def _thinned(row: Mapping[int, float], net: CompressedModel, name: str) -> list[int]:
    """The numbers of units that were measured and may be kept, ascending."""
    site = next(site for site in net.sites if site.name == name)
    allowed = set(net.counts(site))
    return [k for k in sorted(row) if k in allowed] or [max(row)]


def _nearest(grid: Sequence[int], share: float) -> int:
    """The entry of a grid nearest to a share of its largest."""
    return min(grid, key=lambda k: (abs(k - share * grid[-1]), -k))


def _shares(use: LayerUse) -> tuple[float, ...]:
    return float(use.inputs), float(use.outputs), float(use.positions)


def _as_floats(use: LayerUse) -> LayerUse:
    """A use whose shares are floats, so that arrays of bits can be multiplied."""
    return replace(
        use,
        inputs=float(use.inputs),
        outputs=float(use.outputs),
        positions=float(use.positions),
        density=float(use.density) if isinstance(use.density, (int, Fraction)) else use.density,
    )
