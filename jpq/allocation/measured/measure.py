"""Measuring a sensitivity table: one tensor rounded, or one site pruned, at a time, in an attached network.

The quantizer, its grid and the fit of its range are those of training (`fit_threshold`); BatchNorm's statistics are
measured anew where units are dropped. Calibration samples are mixed in pairs, x = (x_i + x_j) / 2: the float network
has been trained on them, and is so sure of them that rounding activations looks a third cheaper than on images it has
not seen; on mixed images the ratio of activations to weights is that of unseen ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq.allocation.measured.table import Key, SensitivityTable, tensors_checksum
from jpq.compression.calibration import reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.methods.quantizers import IntegerQuantizer, fit_threshold
from jpq.methods.quantizers.uniform_integer import quantize_tensor
from jpq.types import JpqError

Divergence = Callable[[Tensor, Tensor], Tensor]  # (output, the float model's output) -> scalar, 0 where they are equal

Bounds = tuple[int, int]  # smallest and largest width, in bits

Widths = Mapping[Key, "int | None"]  # None: floating point

ESTIMATORS = {
    "single": "each change alone, in the float model",
    "around": "each change alone, in the model at the bits and units of the present plan",
}

SAMPLES = 512  # of the calibration
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # of a site's units, beside all of them
NORM_BATCHES = 8  # that BatchNorm's statistics are measured on


def mix_pairs(x: Tensor) -> Tensor:
    """Each sample averaged with its neighbour, [B, ...]; whole numbers (token numbers) stay as they are."""
    return 0.5 * (x + x.roll(1, 0)) if x.is_floating_point() and len(x) > 1 else x


def class_divergence(output: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(output)) in nats, the mean over samples, for outputs [B, classes, ...]."""
    log_q, log_p = F.log_softmax(output, 1), F.log_softmax(reference, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def squared_divergence(output: Tensor, reference: Tensor) -> Tensor:
    """Squared error over the variance of the reference, for outputs without classes."""
    return (output - reference).square().mean() / reference.var().clamp_min(1e-30)


@dataclass(eq=False)
class Probe:
    """A copy of an attached network whose tensors take any width, or none, and whose sites keep their best units.

    Args:
        net: attached; it is not changed.
        batches: inputs of the calibration, mixed already where they should be.
        norm_batches: inputs on which BatchNorm's statistics are measured anew where units are dropped, not mixed.
        divergence: the task's distance of two outputs.
        orders: site -> its units, the most important first.
    """

    net: CompressedModel
    batches: Sequence[Tensor]
    norm_batches: Sequence[Tensor]
    divergence: Divergence
    orders: Mapping[str, Sequence[int]]
    widths: dict[Key, int | None] = field(default_factory=dict)  # of tensors that are not in floating point
    kept: dict[str, int] = field(default_factory=dict)  # of sites that do not keep all units
    norms_anew: bool = False  # BatchNorm's statistics are measured anew even where all units stay
    passes: int = 0  # batches that went through the network so far

    def __post_init__(self) -> None:
        self.net = copy.deepcopy(self.net).eval()
        self._quantizers = quantizer_keys(self.net)
        self._ranges: dict[tuple[Key, int], Tensor] = {}
        self._places = {site.name: i for i, site in enumerate(self.net.sites)}
        for key, quantizer in self._quantizers.items():
            quantizer.register_forward_hook(partial(self._round, key))
        self._norms = {
            name: buffer.clone()
            for name, buffer in self.net.model.named_buffers()
            if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        }
        self._set_units()
        self.references = [self._output(x) for x in self.batches]
        self.passes = 0

    @property
    def keys(self) -> list[Key]:
        """The tensors whose width can be chosen, in order; that of the image is not among them."""
        image = {layer.name for layer in self.net.network.layers if layer.reads_input}
        return [key for key in self._quantizers if key[1] == "w" or key[0] not in image]

    @torch.no_grad()
    def measure(self) -> float:
        """The divergence of the network as it stands from the float one, with nothing rounded and nothing dropped."""
        self._set_units()
        total = sum(
            float(self.divergence(self._output(x), reference)) * len(x)
            for x, reference in zip(self.batches, self.references, strict=True)
        )
        return total / sum(len(x) for x in self.batches)

    @contextmanager
    def changed(self, widths: Widths | None = None, kept: Mapping[str, int] | None = None) -> Iterator[None]:
        """A context in which some tensors have other widths, and some sites keep other numbers of units."""
        before = dict(self.widths), dict(self.kept)
        self.widths |= widths or {}
        self.kept |= kept or {}
        try:
            yield
        finally:
            self.widths, self.kept = before

    def _round(self, key: Key, quantizer: nn.Module, args: tuple[Tensor], out: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The quantizer's answer at the width of its tensor: the input itself in floating point."""
        width, x = self.widths.get(key), args[0]
        if width is None:
            return (x, *out[1:])
        return (quantize_tensor(x, self._range(key, width, x), width, bool(quantizer.signed)), *out[1:])

    def _range(self, key: Key, width: int, x: Tensor) -> Tensor:
        """The range that training would start from at this width."""
        if (key, width) not in self._ranges:
            layer, side = key
            quantizer = self._quantizers[key]
            if side == "w":
                self._ranges[key, width] = fit_threshold(x, width, True, quantizer.log_threshold.dim() > 0)
            else:
                samples = self.net.calibration_samples.get(layer, x)
                self._ranges[key, width] = fit_threshold(samples, width, quantizer.signed, False)
        return self._ranges[key, width]

    @torch.no_grad()
    def _set_units(self) -> None:
        """Let every site keep its number of best units; BatchNorm's statistics follow."""
        for name, i in self._places.items():
            keep = torch.zeros(self.net.gates[i].n)
            keep[list(self.orders[name][: self.kept.get(name, len(keep))])] = 1.0
            self.net.draws[i].z = keep[None].to(next(self.net.model.parameters()).device)
        state = dict(self.net.model.named_buffers())
        for name, value in self._norms.items():
            state[name].copy_(value)
        dropped = any(self.kept.get(name, len(order)) < len(order) for name, order in self.orders.items())
        if dropped or self.norms_anew:
            reestimate_batchnorm(self.net.model, ((x, x) for x in self.norm_batches[:NORM_BATCHES]))

    def _output(self, x: Tensor) -> Tensor:
        self.passes += 1
        output = self.net.model(x)
        if not isinstance(output, Tensor):
            raise JpqError("Sensitivities need a model with one output tensor; compress a part of it that has one.")
        return output


def quantizer_keys(net: CompressedModel) -> dict[Key, IntegerQuantizer]:
    """The quantizers of every quantized layer, its weight's and its input's."""
    found: dict[Key, IntegerQuantizer] = {}
    for layer in net.network.layers:
        pair = net.quantizers(layer.name)
        if pair:
            found[layer.name, "w"], found[layer.name, "a"] = pair
    return found


def unit_counts(n: int) -> list[int]:
    """The numbers of units that a site is measured at, ascending, without all of them."""
    return sorted({max(1, round(share * n)) for share in SHARES} - {n})


def measure_table(
    probe: Probe,
    w_bits: Bounds,
    a_bits: Bounds,
    model: str,
    around: Mapping[Key, int] | None = None,
    counts: Mapping[str, int] | None = None,
    step: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SensitivityTable:
    """Measure the table of an attached network.

    Args:
        probe: the network and its calibration.
        w_bits, a_bits: smallest and largest widths.
        model: checksum of the float weights.
        around: the widths of the plan around which single tensors change; None: the float model.
        counts: with `around`, the units that the plan keeps of each site; default: all of them.
        step: with `around`, the widths tried are those at most so far from the plan's; None: all.
        progress: is told how many of the changes are measured.

    The time is that of one pass over the calibration per change, 2 L B + sum of the sites' counts of them.
    """
    base_widths: dict[Key, int | None] = dict.fromkeys(probe.keys) | dict(around or {})
    bits: dict[Key, dict[int, float]] = {key: {} for key in probe.keys}
    base_counts = {name: len(order) for name, order in probe.orders.items()} | dict(counts or {})
    units: dict[str, dict[int, float]] = {name: {count: 0.0} for name, count in base_counts.items()}
    changes: list[tuple[Widths, dict[str, int], Callable[[float], None]]] = []
    for key in probe.keys:
        low, high = w_bits if key[1] == "w" else a_bits
        centre = base_widths[key]
        for width in range(low, high + 1):
            if centre is None or step is None or abs(width - centre) <= step:
                changes.append(({key: width}, {}, partial(bits[key].__setitem__, width)))
    for name, order in probe.orders.items():
        for count in sorted({*unit_counts(len(order)), len(order)} - {base_counts[name]}):
            changes.append(({}, {name: count}, partial(units[name].__setitem__, count)))
    with probe.changed(base_widths, base_counts):
        base = probe.measure() if around else 0.0
        probe.norms_anew = True  # what new statistics alone change is no price of a unit
        base_of_units = probe.measure()
        probe.norms_anew = False
        for done, (widths, kept, record) in enumerate(changes, 1):
            with probe.changed(widths, kept):
                record(probe.measure() - (base_of_units if kept else base))
            progress(done, len(changes))
    return SensitivityTable(
        bits,
        units,
        {name: tuple(order) for name, order in probe.orders.items()},
        "around" if around else "single",
        model,
        tensors_checksum(probe.batches),
        sum(len(x) for x in probe.batches),
        {"divergence": base, "bits": {f"{layer}/{side}": b for (layer, side), b in (around or {}).items()}},
    )
