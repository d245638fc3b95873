"""The sensitivity table of a large network from one backward pass over the calibration.

    S_w[l, b] = S_a[l, b] = 1/2 sum_i F_i (Q_b(x)_i - x_i)^2        S_c[s, k] = 1/2 sum over the dropped units of F_u

with the rounding error measured at every width, and F the diagonal of the Fisher information: the second derivative of
the divergence, as the mean over samples of squared gradients (FIT: B. Zandonati et al., ICLR 2023, arXiv:2210.08502,
eq. 6). The gradients are those of v . f(x), where v is drawn so that its covariance is the second derivative of the
divergence by the outputs: for classes a one-hot class drawn from the model's own probabilities minus these, for squared
errors a normal variable. As v has mean 0, the square of a gradient summed over a batch has the sum of the samples'
Fisher information as its mean; a unit u counts through the gradient by the factor that its weights are multiplied by.

We differ: FIT squares gradients of the loss with true labels. BatchNorm's statistics stay, also where units go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jpq.allocation.measured.measure import Bounds, Change, changes_of
from jpq.allocation.measured.probe import Divergence, Probe
from jpq.allocation.measured.table import Key, SensitivityTable, tensors_checksum
from jpq.methods.gates import Frozen
from jpq.tracing.forward import collect_tensors, split_samples
from jpq.types import JpqError

CHUNK = 16  # samples of one backward pass
AGREEMENT = 0.02  # largest relative difference of a divergence from its second-order form, at small changes

Noise = Callable[[Tensor, torch.Generator], Tensor]  # output -> v, whose covariance is the divergence's Hessian


def class_noise(output: Tensor, generator: torch.Generator) -> Tensor:
    """A one-hot class drawn from softmax(output) minus softmax(output), for outputs [B, classes, ...]."""
    p = output.softmax(1)
    rows = p.movedim(1, -1).reshape(-1, p.shape[1])
    drawn = torch.multinomial(rows.cpu(), 1, generator=generator)[:, 0].to(p.device)
    hot = F.one_hot(drawn, p.shape[1]).to(p).view(*p.movedim(1, -1).shape).movedim(-1, 1)
    return (hot - p) / (output[0, 0].numel() ** 0.5)


def squared_noise(output: Tensor, generator: torch.Generator) -> Tensor:
    """A normal variable of the variance 2 / (outputs per sample x variance of the outputs)."""
    normal = torch.randn(output.shape, generator=generator).to(output)
    return normal * (2 / (output[0].numel() * output.var(unbiased=False).clamp_min(1e-30))).sqrt()


def noise_of(divergence: Divergence, output: Tensor) -> Noise:
    """The noise of a divergence: which form it has is measured by small changes of these outputs.

    Raises JpqError for a divergence that is neither that of classes nor a squared error.
    """
    f = output.detach().double()
    change = torch.randn(f.shape, generator=torch.Generator().manual_seed(0)).to(f) * 1e-3 * f.std().clamp_min(1e-12)
    measured = float(divergence(f + change, f))
    squared = float(change.square().mean() / f.var(unbiased=False).clamp_min(1e-30))
    forms: dict[Noise, float] = {squared_noise: squared}
    if f.dim() >= 2 and f.shape[1] >= 2:
        p = f.softmax(1)
        forms[class_noise] = float(((p * change.square()).sum(1) - (p * change).sum(1).square()).mean() / 2)
    for noise, expected in forms.items():
        if abs(measured - expected) <= AGREEMENT * expected:
            return noise
    raise JpqError(
        "The Fisher estimator knows the divergence of classes and squared errors, and this task has another one. "
        "Measure its table with --estimator single."
    )


@dataclass
class _Sums:
    """Sums over samples: squared gradients of weights and of units, and products with rounding errors of inputs."""

    weights: dict[Key, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[tuple[Key, int], float] = field(default_factory=dict)


def fisher_table(
    probe: Probe,
    w_bits: Bounds,
    a_bits: Bounds,
    model: str,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SensitivityTable:
    """The table of an attached network by the Fisher information, in the unit of its divergence.

    Args:
        probe: the network and its calibration.
        w_bits, a_bits: smallest and largest widths.
        model: checksum of the float weights.
        seed: of the draws of v.
        progress: is told how many parts of the calibration are done.

    Raises JpqError for a divergence that is neither that of classes nor a squared error.
    """
    noise = noise_of(probe.divergence, torch.cat(list(probe.references)))
    changes = changes_of(probe, w_bits, a_bits)
    generator = torch.Generator().manual_seed(seed)
    sums = _Sums()
    parts = [part for x in probe.batches for part in split_samples(x, CHUNK)]
    with _float_with_gradients(probe):
        for done, x in enumerate(parts, 1):
            _add_part(probe, x, noise, generator, changes, sums)
            progress(done, len(parts))
        bits: dict[Key, dict[int, float]] = {key: {} for key in probe.keys}
        units: dict[str, dict[int, float]] = {name: {len(order): 0.0} for name, order in probe.orders.items()}
        for change in changes:
            row = units[change.name] if change.kept else bits[change.key]
            row[change.value] = _entry(probe, change, sums) / (2 * probe.samples)
    orders = {name: tuple(order) for name, order in probe.orders.items()}
    return SensitivityTable(
        bits,
        units,
        orders,
        "fisher",
        model,
        tensors_checksum(collect_tensors(probe.batches)),
        probe.samples,
        {"divergence": 0.0, "weight_levels": probe.net.plan().weight_levels},
    )


@contextmanager
def _float_with_gradients(probe: Probe) -> Iterator[None]:
    """A context in which nothing is rounded or dropped, and gradients reach every weight and unit."""
    gates = [draw.gate for draw in probe.net.draws]
    learning = {p: p.requires_grad for p in probe.net.model.parameters()}
    for draw in probe.net.draws:
        draw.gate = Frozen.all(1, 1)  # gates that are straight-through would hide the gradient of a unit
    for p in learning:
        p.requires_grad_(True)
    try:
        with probe.changed(dict.fromkeys(probe.keys), {name: len(order) for name, order in probe.orders.items()}):
            probe.measure()  # sets what the context says
            yield
    finally:
        for draw, gate in zip(probe.net.draws, gates, strict=True):
            draw.gate = gate
        for p, learns in learning.items():
            p.requires_grad_(learns)
            p.grad = None


def _add_part(
    probe: Probe, x: Any, noise: Noise, generator: torch.Generator, changes: list[Change], sums: _Sums
) -> None:
    """Add one backward pass over some samples to the sums."""
    factors = probe.unit_factors()
    for factor in factors.values():
        factor.requires_grad_(True)
    with torch.enable_grad(), probe.tensors_seen() as seen:
        output = probe.output_of(probe.net.model, x)
        v = noise(output.detach(), generator)
        wanted = [tensor for tensors in seen.values() for tensor in tensors]
        sources = [*factors.values(), *wanted]
        gradients = torch.autograd.grad((v * output).sum(), sources, allow_unused=True)
    by_tensor = dict(zip(map(id, sources), gradients, strict=True))
    with torch.no_grad():
        for name, factor in factors.items():
            _add(sums.units, name, by_tensor[id(factor)])
        widths: dict[Key, list[int]] = {}
        for change in changes:
            if change.what == "input":
                widths.setdefault(change.key, []).append(change.value)
        for key, tensors in seen.items():
            used = [(tensor, g) for tensor in tensors if (g := by_tensor[id(tensor)]) is not None]
            if key[1] == "w" and used:
                _add(sums.weights, key, torch.stack([gradient for _, gradient in used]).sum(0))  # over all calls
            for width in widths.get(key, ()):
                for tensor, gradient in used:
                    error = probe.rounded(key, width, tensor) - tensor
                    value = float((gradient * error).square().sum(dtype=torch.float64))
                    sums.inputs[key, width] = sums.inputs.get((key, width), 0.0) + value


def _add(sums: dict[Key, Tensor] | dict[str, Tensor], key: Key | str, gradient: Tensor | None) -> None:
    """Add the square of a gradient to the sum under a key."""
    if gradient is not None:
        square = gradient.double().square()
        into: dict[Key | str, Tensor] = sums  # type: ignore[assignment]
        into[key] = into[key] + square if key in into else square


def _entry(probe: Probe, change: Change, sums: _Sums) -> float:
    """The sum over samples and elements behind one entry of the table."""
    if change.kept:
        if change.name not in sums.units:
            return 0.0
        dropped = list(probe.orders[change.name][change.value :])
        return float(sums.units[change.name].flatten()[dropped].sum())
    if change.what == "input":
        return sums.inputs.get((change.key, change.value), 0.0)
    if change.key not in sums.weights:
        return 0.0
    weight = probe.weight(change.key)
    error = (probe.rounded(change.key, change.value, weight) - weight).double()
    return float((sums.weights[change.key] * error.square()).sum())
