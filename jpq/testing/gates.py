"""Laws of a gate: the keep-or-drop decision over the units of one site, soft in training and exact afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jpq.methods.gates import Frozen, Gate
from jpq.methods.structures import (
    Block,
    Elementwise,
    Inputs,
    KernelPattern,
    PerOutput,
    Structure,
    Window,
)
from jpq.testing.expectation import expect
from jpq.types import JpqError, Units

DENSITY = 0.4  # density of gates that take one

DRAWS = 4000  # number of draws of a stochastic gate

SIGMAS = 5.0  # largest deviation of a mean over draws, in standard deviations

STEPS = 100  # number of steps of a search

H = 1e-6  # step of finite differences, in float64

# ways to move parameters, tried in turn until some units are kept and others dropped
MOVES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda p: p + torch.linspace(-6, 6, p.numel()).to(p).reshape(p.shape),
    lambda p: p * (torch.arange(p.numel()) % 3 > 0).to(p).reshape(p.shape),
    lambda p: 0.1 * p,
    lambda p: p - 6,
    lambda p: p + 6,
)


@dataclass(frozen=True)
class Placed:
    """A gate on one weight, set up as `jpq.attach` does it."""

    gate: Gate
    weight: nn.Parameter
    structure: Structure

    @classmethod
    def on(cls, gate_class: type[Gate], structure: Structure, size: tuple[int, ...], dtype: torch.dtype) -> Placed:
        """A gate of this class over the units of a random weight, whose entries all differ clearly from 0."""
        weight = nn.Parameter((torch.rand(size, dtype=dtype) + 0.5) * (torch.rand(size).round() * 2 - 1).to(dtype))
        rows, n = structure.shape(weight.shape)
        options = {"density": DENSITY} if gate_class.takes_density else {}
        gate = gate_class(rows, n, **options)
        gate.set_site(structure.sizes(weight.shape), structure.quota())
        placed = cls(gate.to(dtype), weight, structure)
        placed.observe()
        gate.link([gate])
        return placed

    def observe(self) -> None:
        """Show the gate the weight, as every forward pass does."""
        if self.gate.needs_weights:
            self.gate.observe_weights([(self.weight, self.structure)])

    def search(self) -> None:
        """A whole search in which nothing else moves the weight."""
        for step in range(STEPS + 1):
            self.observe()
            self.gate.multiplier()
            self.gate.after_step(step / STEPS)
        self.observe()
        self.gate.finish()

    def mask(self) -> Tensor:
        """0 or 1 for each weight, by the decision."""
        return self.structure.expand(self.gate.keep(), self.weight.shape).expand(self.weight.shape)


def check_gate(cls: type[Gate]) -> None:
    """Check the laws of gates on a class that is built as `cls(rows, n)`, with `density=` where it takes one.

    All members have the shape `[rows, n]`; a free gate starts with everything kept; `keep` is 0 or 1 and follows
    `margin`; evaluation is zero exactly where a unit is dropped; `keep_probability` lies in [0, 1], rises with the
    margin, has a gradient, and is P(z != 0) where z is drawn; gradients are those of finite differences; noise has mean
    1; steps keep everything finite; `state_dict` restores the decision; a gate that takes a density or has a quota
    keeps exactly so many units when the search ends; one that is decided outside holds what it is given.

    Raises AssertionError with the law that is broken.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for law in LAWS:
            law(cls)


def _structures(cls: type[Gate]) -> Iterator[tuple[Structure, tuple[int, ...]]]:
    """Structures that suit a class of gates, with the size of a weight."""
    if cls.channels_only:
        yield Inputs(), (12, 64)
        return
    yield Elementwise(), (6, 10)
    yield PerOutput(), (6, 10)
    if cls.elementwise_only:
        return
    yield Inputs(), (12, 64)
    yield Block(4, 4), (6, 10)
    if cls.enforces_quota != "never":
        yield Window(2, 4), (5, 10)
    if cls.enforces_quota == "always":
        yield KernelPattern(), (4, 3, 3, 3)


def _places(cls: type[Gate], dtype: torch.dtype = torch.float32) -> Iterator[tuple[Placed, str]]:
    """New gates on all structures that suit the class, each with its name for a sentence."""
    for structure, size in _structures(cls):
        yield Placed.on(cls, structure, size, dtype), f"{cls.__name__} on {structure}"


def _decisive(cls: type[Gate], dtype: torch.dtype = torch.float32) -> tuple[Placed, str]:
    """A gate over one row of units that keeps some and drops others, in the middle of its search or at its end."""
    structure, size = next(_structures(cls))
    name = f"{cls.__name__} on {structure}"
    if cls.takes_density:
        placed = Placed.on(cls, structure, size, dtype)
        placed.search()
        return placed, name
    for move in MOVES:
        placed = Placed.on(cls, structure, size, dtype)
        with torch.no_grad():
            for parameter in placed.gate.parameters():
                parameter.copy_(move(parameter))
            if cls.ranks_units:
                margins = placed.gate.get_buffer("margins")
                margins.copy_(torch.linspace(-1, 1, margins.numel()).reshape(margins.shape))
            if cls.decided_outside:
                placed.gate.take((torch.arange(placed.gate.n) % 2)[None].to(dtype))
        placed.gate.after_step(0.5)
        if 0 < int(placed.gate.keep().sum()) < placed.gate.n:
            return placed, name
    raise AssertionError(f"{name}: no values of its parameters were found that keep some units and drop others.")


def _members_have_the_shape_of_the_units(cls: type[Gate]) -> None:
    for placed, name in _places(cls):
        gate, shape = placed.gate, (placed.gate.rows, placed.gate.n)
        members = {
            "relaxed": gate.relaxed(),
            "margin": gate.margin(),
            "keep": gate.keep(),
            "keep_probability": gate.keep_probability(),
            "scale": gate.scale(),
            "latent": gate.latent(),
            "penalty": gate.penalty(),
        }
        for member, values in members.items():
            expect(values is None or values.shape == shape, f"{name}: {member}() is not of the shape {shape}.")
        loss = gate.own_loss()
        expect(loss is None or loss.dim() == 0, f"{name}: own_loss() is not a scalar.")
        noise = gate.input_noise(3) if gate.rows == 1 else None  # units of several rows are no inputs of a layer
        expect(
            noise is None or noise.shape == (3, gate.n), f"{name}: input_noise(3) is not of the shape {(3, gate.n)}."
        )
        expect(all(isinstance(v, float) for v in gate.metrics().values()), f"{name}: metrics() are not plain numbers.")


def _starts_with_everything_kept(cls: type[Gate]) -> None:
    for placed, name in _places(cls):
        kept = int(placed.gate.keep().sum())
        least = 1 if cls.takes_density else placed.gate.rows * placed.gate.n
        expect(kept >= least, f"{name}: starts with {kept} of {placed.gate.rows * placed.gate.n} units.")


def _keep_is_binary_and_follows_the_margin(cls: type[Gate]) -> None:
    placed, name = _decisive(cls)
    keep, margin = placed.gate.keep(), placed.gate.margin()
    expect((keep == 0) | (keep == 1), f"{name}: keep() has other values than 0 and 1.")
    expect(torch.equal(keep > 0, margin > 0), f"{name}: keep() is not where margin() is above 0.")
    expect(not keep.requires_grad, f"{name}: keep() carries a gradient; keep_probability() is for that.")


def _evaluation_is_zero_exactly_where_a_unit_is_dropped(cls: type[Gate]) -> None:
    placed, name = _decisive(cls)
    gate = placed.gate.eval()
    multiplier = gate.multiplier()
    expect(multiplier is not None, f"{name}: multiplier() is None in evaluation: weights would stay dense.")
    assert multiplier is not None
    expect(torch.equal(multiplier == 0, gate.keep() == 0), f"{name}: evaluation is not zero exactly where dropped.")
    frozen = Frozen(gate.keep())
    for training in (True, False):
        frozen_multiplier = frozen.train(training).multiplier()
        expect(
            frozen_multiplier is not None and torch.equal(frozen_multiplier, gate.keep()),
            f"{name}: freezing the decision changes it.",
        )


def _keep_probability_rises_with_the_margin(cls: type[Gate]) -> None:
    placed, name = _decisive(cls)
    probability, margin = placed.gate.keep_probability(), placed.gate.margin()
    expect((probability >= 0) & (probability <= 1), f"{name}: keep_probability() leaves [0, 1].")
    for row, order in zip(probability, margin.argsort(1), strict=True):
        expect(row[order].diff() >= 0, f"{name}: keep_probability() falls where margin() rises.")


def _keep_probability_has_a_gradient(cls: type[Gate]) -> None:
    if cls.fixed_count:  # a count that is set needs no pressure
        return
    placed, name = _decisive(cls)
    parameters = list(placed.gate.parameters())
    if not parameters:
        return
    total = placed.gate.keep_probability().sum()
    expect(total.requires_grad, f"{name}: keep_probability() has no gradient, so no budget can press on the gate.")
    if cls.self_updating:
        total.backward()
        return
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    for (parameter, _), grad in zip(placed.gate.named_parameters(), grads, strict=True):
        reached = grad is not None and bool((grad != 0).any())
        expect(reached, f"{name}: the gradient of keep_probability() does not reach {parameter}.")


def _keep_probability_is_that_of_the_draws(cls: type[Gate]) -> None:
    if cls.fixed_count:
        return
    placed, name = _decisive(cls)
    gate = placed.gate
    if torch.equal(gate.relaxed(), gate.relaxed()):  # nothing is drawn
        return
    with torch.no_grad():
        often = torch.stack([gate.relaxed() != 0 for _ in range(DRAWS)]).double().mean(0)
        p = gate.keep_probability().double()
    bound = SIGMAS * (p * (1 - p) / DRAWS).sqrt() + 10 / DRAWS
    expect((often - p).abs() <= bound, f"{name}: keep_probability() is not P(z != 0) of what relaxed() draws.")


def _gradients_are_those_of_finite_differences(cls: type[Gate]) -> None:
    placed, name = _decisive(cls, torch.float64)
    gate = placed.gate
    parameters = [p for p in gate.parameters() if p.requires_grad]
    if not parameters or cls.self_updating:
        return
    members: dict[str, Callable[[], Tensor | None]] = {"penalty": gate.penalty}
    if not cls.fixed_count:
        members["keep_probability"] = gate.keep_probability
        relaxed = gate.relaxed()
        if not bool(((relaxed == 0) | (relaxed == 1)).all()):  # a hard forward pass has a gradient of its own making
            members["relaxed"] = gate.relaxed
    for member, values in members.items():
        slope = _slopes(values, parameters)
        if slope is not None:
            by_autograd, measured = slope
            message = (
                f"{name}: the gradient of {member}() is {by_autograd:.6g} where finite differences give {measured:.6g}."
            )
            expect(abs(by_autograd - measured) <= 1e-5 * (abs(by_autograd) + abs(measured)) + 1e-7, message)


def _slopes(values: Callable[[], Tensor | None], parameters: list[nn.Parameter]) -> tuple[float, float] | None:
    """(by autograd, by central differences) along a random direction, of a random sum of values; None without gradient.

    The same random numbers are drawn in every evaluation.
    """
    directions = [torch.randn_like(p) for p in parameters]

    def total() -> Tensor | None:
        torch.manual_seed(1)
        out = values()
        if out is None:
            return None
        return (out * torch.linspace(0.5, 1.5, out.numel()).to(out).reshape(out.shape)).sum()

    def moved(length: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(length * d)
        out = total()
        assert out is not None
        return float(out.detach())

    out = total()
    if out is None or not out.requires_grad:
        return None
    grads = torch.autograd.grad(out, parameters, allow_unused=True)
    by_autograd = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True) if g is not None)
    above, below = moved(H), moved(-2 * H)
    moved(H)
    return by_autograd, (above - below) / (2 * H)


def _noise_has_mean_one(cls: type[Gate]) -> None:
    structure, size = next(_structures(cls))
    placed = Placed.on(cls, structure, size, torch.float32)
    noise = placed.gate.input_noise(DRAWS)
    if noise is None:
        return
    off = (noise.mean(0) - 1).abs() <= SIGMAS * noise.std(0) / DRAWS**0.5 + 1e-6
    expect(off, f"{cls.__name__}: input_noise() does not have mean 1.")


def _a_step_keeps_everything_finite(cls: type[Gate]) -> None:
    for placed, name in _places(cls):
        gate = placed.gate
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.mul_(1e6)
        gate.multiplier()
        gate.after_step(1.0)
        placed.observe()
        expect(gate.margin().isfinite(), f"{name}: margin() is not finite after a step from large parameters.")
        expect(gate.relaxed().isfinite(), f"{name}: relaxed() is not finite after a step from large parameters.")
        expect(gate.keep_probability().isfinite(), f"{name}: keep_probability() is not finite after a step.")


def _state_dict_restores_the_decision(cls: type[Gate]) -> None:
    placed, name = _decisive(cls)
    gate = placed.gate
    state = copy.deepcopy(gate.state_dict())
    fresh = Placed.on(cls, placed.structure, tuple(placed.weight.shape), placed.weight.dtype)
    with torch.no_grad():
        fresh.weight.copy_(placed.weight)
    fresh.gate.load_state_dict(state)
    fresh.observe()
    expect(torch.equal(fresh.gate.keep(), gate.keep()), f"{name}: state_dict() does not restore keep().")
    expect(torch.equal(fresh.gate.scale(), gate.scale()), f"{name}: state_dict() does not restore scale().")
    expect(torch.allclose(fresh.gate.margin(), gate.margin()), f"{name}: state_dict() does not restore margin().")


def _a_density_is_kept_when_the_search_ends(cls: type[Gate]) -> None:
    if not cls.takes_density:
        return
    for placed, name in _places(cls):
        placed.search()
        mask, gate = placed.mask(), placed.gate
        expect((mask == 0) | (mask == 1), f"{name}: the mask is not of 0 and 1 when the search ends.")
        expect(torch.equal(gate.margin() > 0, gate.keep() > 0), f"{name}: keep() is not where margin() is above 0.")
        sizes = placed.structure.sizes(placed.weight.shape)
        most = float(sizes.max())
        if placed.structure.quota() is not None or (gate.rows > 1 and cls.enforces_quota != "never"):
            kept, due = (gate.keep() * (sizes > 0)).sum(1), _units_due(placed, sizes)
            expect(
                torch.equal(kept, due),
                f"{name}: rows keep {kept.tolist()} units when the search ends, not {due.tolist()}.",
            )
        elif cls.enforces_quota != "never":
            off = abs(float(mask.sum()) - DENSITY * mask.numel())
            expect(off < most + 1e-6, f"{name}: {float(mask.mean()):.3f} of the weights stay at density {DENSITY}.")
        else:
            over = float(mask.sum()) - DENSITY * mask.numel()
            expect(float(mask.sum()) > 0, f"{name}: no weight stays at density {DENSITY}.")
            expect(over <= gate.rows * most, f"{name}: {float(mask.mean()):.3f} of the weights stay at {DENSITY}.")


def _units_due(placed: Placed, sizes: Units) -> Units:
    """Number of units that each row keeps: the quota, or the density rounded half up."""
    quota, real = placed.structure.quota(), (sizes > 0).sum(1).float()
    return real.clamp_max(quota) if quota is not None else (DENSITY * real + 0.5).floor().clamp_min(1)


def _overlapping_units_are_never_piled_up(cls: type[Gate]) -> None:
    if cls.enforces_quota != "always" or not cls.takes_density:
        return
    placed = Placed.on(cls, KernelPattern(), (4, 3, 3, 3), torch.float32)
    for progress in (0.0, 0.3, 1.0):
        placed.observe()
        z = placed.gate.multiplier()
        if z is not None:
            share = placed.structure.expand(z, placed.weight.shape)
            inside = (share > -1e-6) & (share < 1 + 1e-6)
            expect(inside, f"{cls.__name__}: patterns of one kernel add up to weights times more than 1 in training.")
        placed.gate.after_step(progress)
    expect(placed.gate.keep().sum(1) == 1, f"{cls.__name__}: a kernel keeps another number of patterns than one.")


def _a_density_outside_is_refused(cls: type[Gate]) -> None:
    for density in (0.0, -0.1, 1.5) if cls.takes_density else ():
        try:
            cls(1, 4, **{"density": density})
        except JpqError as error:
            expect("density" in str(error), f"{cls.__name__}: refuses density {density} without naming it: {error}")
            continue
        raise AssertionError(f"{cls.__name__}: takes density {density} instead of raising JpqError.")


def _a_decision_made_outside_is_held(cls: type[Gate]) -> None:
    gate = Placed.on(cls, *next(_structures(cls)), torch.float32).gate
    decision = (torch.arange(gate.rows * gate.n) % 3 > 0).float().reshape(gate.rows, gate.n)
    if cls.decided_outside:
        gate.take(decision)
        gate.after_step(1.0)
        expect(torch.equal(gate.keep(), decision), f"{cls.__name__}: does not hold the decision that it took.")
        return
    try:
        gate.take(decision)
    except JpqError:
        return
    raise AssertionError(f"{cls.__name__}: takes a decision, and does not say so (decided_outside).")


LAWS = (
    _a_decision_made_outside_is_held,
    _members_have_the_shape_of_the_units,
    _starts_with_everything_kept,
    _keep_is_binary_and_follows_the_margin,
    _evaluation_is_zero_exactly_where_a_unit_is_dropped,
    _keep_probability_rises_with_the_margin,
    _keep_probability_has_a_gradient,
    _keep_probability_is_that_of_the_draws,
    _gradients_are_those_of_finite_differences,
    _noise_has_mean_one,
    _a_step_keeps_everything_finite,
    _state_dict_restores_the_decision,
    _a_density_is_kept_when_the_search_ends,
    _overlapping_units_are_never_piled_up,
    _a_density_outside_is_refused,
)
