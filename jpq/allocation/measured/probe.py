"""A network whose tensors are rounded, and whose sites are pruned, one at a time: what divergences are measured with.

The quantizer, its grid and the fit of its range are those of training (`fit_weight_grid`, `fit_threshold`);
BatchNorm's statistics are measured anew where units are dropped, in the network and in the float one that it is
compared with. Where the model is a chain of blocks, only the part behind a change runs again (`prefix_cache`): the same
figures, to the bit, in about half the time. Layers keep their rounded weight from pass to pass (`direct_layers`).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jpq.allocation.measured.direct_layers import DirectLayers
from jpq.allocation.measured.prefix_cache import MOST_BYTES, Calls, Cut, answering, find_cuts, output_at
from jpq.allocation.measured.table import Key
from jpq.compression.batchnorm import moving_norms
from jpq.compression.calibration import reestimate_batchnorm
from jpq.compression.masking import MaskParametrization, original
from jpq.compression.model import CompressedModel
from jpq.methods.quantizers import IntegerQuantizer, fit_threshold, fit_weight_grid
from jpq.methods.quantizers.uniform_integer import quantize_tensor
from jpq.tracing.forward import batch_size, call_model, collect_tensors, split_samples, take_samples
from jpq.types import JpqError

Divergence = Callable[[Tensor, Tensor], Tensor]  # (output, the float model's output) -> scalar, 0 where they are equal

Widths = Mapping[Key, "int | None"]  # None: floating point

NORM_BATCHES = 2  # that BatchNorm's statistics are measured on; with 4 the prices of units are 2 % others
PART = 16  # samples that each thread of a CPU computes at a time: their activations stay in its caches


@dataclass(eq=False)
class Probe:
    """A copy of an attached network whose tensors take any width, or none, and whose sites keep their best units.

    Args:
        net: attached; it is not changed.
        batches: inputs of the calibration (`call_model` says of which form), mixed already where they should be.
        norm_batches: inputs on which BatchNorm's statistics are measured anew where units are dropped, not mixed.
        divergence: the task's distance of two outputs.
        orders: site -> its units, the most important first.
        main_output: the tensor that divergences are of, out of what the model returns (`Task.main_output`).

    Raises JpqError where the float model gives NaN for the calibration.
    """

    net: CompressedModel
    batches: Sequence[Any]
    norm_batches: Sequence[Any]
    divergence: Divergence
    orders: Mapping[str, Sequence[int]]
    main_output: Callable[[Any], Any] = lambda output: output
    widths: dict[Key, int | None] = field(default_factory=dict)  # of tensors that are not in floating point
    kept: dict[str, int] = field(default_factory=dict)  # of sites that do not keep all units
    norms_anew: bool = False  # BatchNorm's statistics are measured anew even where all units stay
    passes: int = 0  # batches that went through the network so far

    def __post_init__(self) -> None:
        self.net = copy.deepcopy(self.net).eval()
        self._quantizers = quantizer_keys(self.net)
        self._ranges: dict[tuple[Key, int], tuple[Tensor, Tensor | None]] = {}
        self._places = {site.name: i for i, site in enumerate(self.net.sites)}
        self._start = _Start()
        self._seen: dict[Key, list[Tensor]] | None = None
        for key, quantizer in self._quantizers.items():
            quantizer.__dict__["forward"] = partial(self._round, key, quantizer)
        keys = {id(quantizer): key for key, quantizer in self._quantizers.items()}
        self.direct = DirectLayers(self.net.model, keys, lambda key: self.widths.get(key), self.rounded)
        self._masks: dict[tuple[str, int], Tensor] = {}
        self._norms = {
            name: buffer.clone()
            for name, buffer in self.net.model.named_buffers()
            if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        }
        self._set_units()
        few = take_samples(self.batches[0], 0, 2)
        self.direct.try_channels_last(lambda: self.output_of(self.net.model, few))
        with torch.no_grad():
            self.references = [self._output(x) for x in self.batches]
        if any(bool(reference.isnan().any()) for reference in self.references):
            raise JpqError(
                "The float model gives NaN for samples of the calibration, so that no sensitivity can be measured: "
                "check its weights, and the samples."
            )
        self.passes = 0

    @property
    def keys(self) -> list[Key]:
        """The tensors whose width can be chosen, in order; that of the image is not among them."""
        image = {layer.name for layer in self.net.network.layers if layer.reads_input}
        return [key for key in self._quantizers if key[1] == "w" or key[0] not in image]

    @torch.no_grad()
    def measure(self) -> float:
        """The divergence of the network as it stands from the float one, with nothing rounded and nothing dropped."""
        total = 0.0
        with answering(self.net.model, self._start.cut) as feed:
            self._set_units(feed)
            for i, (x, reference) in enumerate(zip(self.batches, self.references, strict=True)):
                known = self._start.outputs[i] if self._start.cut is not None else None
                total += float(self.divergence(self._output(x, feed, known), reference)) * batch_size(x)
        return total / self.samples

    @property
    def samples(self) -> int:
        """Number of samples of the calibration."""
        return sum(batch_size(x) for x in self.batches)

    def cut_before(self, keys: Sequence[Key], sites: Sequence[str]) -> int:
        """The number of the last cut before the first of these tensors, and the layers of these sites; -1 for none."""
        cuts, calls = self._cuts
        layers = [key[0] for key in keys]
        for name in sites:
            layers += [tap.layer for tap in self.net.sites[self._places[name]].taps]
        first = min((self._first_calls[layer] for layer in layers), default=0)
        usable = [i for i, cut in enumerate(cuts) if cut.end < first and self._fits(cut, calls)]
        return max(usable, default=-1)

    def share_behind(self, number: int) -> float:
        """The share of the MACs that a pass from this cut computes; 1 from the input (-1)."""
        end = self._cuts[0][number].end if number >= 0 else -1
        macs = {layer.name: layer.macs for layer in self.net.network.layers}
        behind = sum(count for name, count in macs.items() if self._first_calls[name] > end)
        return behind / max(1, sum(macs.values()))

    def kept_bytes(self) -> int:
        """The most memory that samples, outputs and what is kept at a cut take, in bytes."""
        cuts, calls = self._cuts
        samples = self._kept_samples
        at_cuts = [4 * prod(calls.shapes[cut.name] or ()) * samples for cut in cuts if self._fits(cut, calls)]
        tensors = collect_tensors((self.batches, self.norm_batches, self.references))
        return max(at_cuts, default=0) + sum(x.numel() * x.element_size() for x in tensors)

    @cached_property
    def _first_calls(self) -> dict[str, int]:
        """The place of the first call of each layer, and of those that share its weight; 0 where it is never called."""
        starts = self._cuts[1].starts
        names_of: dict[int, set[str]] = defaultdict(set)  # of a module or its weight's quantizer -> modules with it
        for name, module in self.net.model.named_modules():
            for part in (module, getattr(module, "weight_quant", None)):
                names_of[id(part)].add(name)
        places = {}
        for layer in self.net.network.layers:
            module = self.net.layer(layer.name)
            names = {layer.name, layer.weight.rpartition(".")[0]}
            for part in (module, getattr(module, "weight_quant", None)):
                names |= names_of[id(part)] if part is not None else set()
            places[layer.name] = min((starts[name] for name in names if name in starts), default=0)
        return places

    def _fits(self, cut: Cut, calls: Calls) -> bool:
        """Whether the outputs of a cut's module may be kept."""
        shape = calls.shapes[cut.name]
        return shape is not None and 4 * prod(shape) * self._kept_samples <= MOST_BYTES

    @property
    def _kept_samples(self) -> int:
        """Number of samples whose outputs are kept at a cut, at most."""
        return 2 * self.samples + sum(batch_size(x) for x in self.norm_batches[:NORM_BATCHES])

    @cached_property
    def _cuts(self) -> tuple[list[Cut], Calls]:
        """The places where a pass can begin, and the order of calls, of the network as it stands."""
        self._set_units()
        layers = [layer.name for layer in self.net.network.layers]
        return find_cuts(self.net.model, layers, take_samples(self.batches[0], 0, 2))

    @contextmanager
    def starting_at(self, number: int) -> Iterator[None]:
        """A context in which passes begin behind a cut, with its outputs as the network stands when it is entered."""
        if number >= 0:
            self._start = self._outputs_at(self._cuts[0][number])
        try:
            yield
        finally:
            self._start = _Start()

    @torch.no_grad()
    def _outputs_at(self, cut: Cut) -> _Start:
        self._set_units()
        start = _Start(cut, [self._parts_at(cut, x) for x in self.batches])
        if self._statistics_move:
            norms = moving_norms(self.net.model)
            for norm in norms:
                norm.train()
            start.norm_outputs = [output_at(self.net.model, cut, x) for x in self.norm_batches[:NORM_BATCHES]]
            for norm in norms:
                norm.eval()
        return start

    def _parts_at(self, cut: Cut, x: Any) -> list[Tensor]:
        """The outputs of a cut's module for the parts of a batch."""
        return [output_at(self.net.model, cut, part) for part in _parts(x)]

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

    @contextmanager
    def compared_with_norms_anew(self) -> Iterator[None]:
        """A context in which divergences are from the float network with BatchNorm's statistics measured anew as well.

        What new statistics alone change is then no price of a unit. The difference of two divergences from the network
        with its own statistics has that price as well, but is noise where statistics differ much: in a mobilenet_v2
        that was trained for 1,000 steps 38 of 200 such differences are below zero.
        """
        before = self.references
        full = {name: len(order) for name, order in self.orders.items()}
        with torch.no_grad(), self.changed(dict.fromkeys(self.keys), full), self.statistics_anew():
            self._set_units()
            self.references = [self._output(x) for x in self.batches]
        try:
            yield
        finally:
            self.references = before

    @contextmanager
    def statistics_anew(self) -> Iterator[None]:
        """A context in which BatchNorm's statistics are measured anew even where all units stay."""
        before, self.norms_anew = self.norms_anew, True
        try:
            yield
        finally:
            self.norms_anew = before

    def _round(self, key: Key, quantizer: IntegerQuantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The quantizer's answer at the width of its tensor: the input itself in floating point."""
        width = self.widths.get(key)
        if self._seen is not None and x.requires_grad:
            x = x.view_as(x)  # a tensor of its own, since others may read the same one
            self._seen.setdefault(key, []).append(x)
        rounded = x if width is None else self.rounded(key, width, x)
        one = quantizer.zero_point + 1
        return rounded, one, quantizer.zero_point, one * float(width or 32)

    @torch.no_grad()
    def rounded(self, key: Key, width: int, x: Tensor) -> Tensor:
        """A value of one tensor, rounded to a width as training would start with it."""
        threshold, side = self._range(key, width, x)
        return quantize_tensor(x, threshold, width, bool(self._quantizers[key].signed), side)

    def weight(self, key: Key) -> Tensor:
        """The float weight of a layer, with the units that stay."""
        weight: Tensor = self.net.layer(key[0]).weight
        return weight.detach()

    @contextmanager
    def tensors_seen(self) -> Iterator[dict[Key, list[Tensor]]]:
        """A context that collects what quantizers give, where it carries a gradient: one tensor for each call."""
        self._seen = {}
        try:
            yield self._seen
        finally:
            self._seen = None

    def unit_factors(self) -> dict[str, Tensor]:
        """Site -> new factors of its units, 1 each, [1, units], that the next pass multiplies weights by."""
        factors = {}
        for name in self.orders:
            i = self._places[name]
            device = next(self.net.model.parameters()).device
            self.net.draws[i].z = factors[name] = torch.ones(1, self.net.gates[i].n, device=device)
        return factors

    def _range(self, key: Key, width: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(range, side of the additional level) that training would start from at this width."""
        if (key, width) not in self._ranges:
            layer, side = key
            quantizer = self._quantizers[key]
            if side == "w":
                per_channel = quantizer.log_threshold.dim() > 0
                weight = _without_masks(self.net.layer(layer), x)  # whatever is dropped when it is first asked for
                self._ranges[key, width] = fit_weight_grid(weight, width, per_channel, quantizer.all_levels)
            else:
                samples = self.net.calibration_samples.get(layer, x)
                self._ranges[key, width] = fit_threshold(samples, width, quantizer.signed, False), None
        return self._ranges[key, width]

    @property
    def _statistics_move(self) -> bool:
        """Whether BatchNorm's statistics are measured anew."""
        dropped = any(self.kept.get(name, len(order)) < len(order) for name, order in self.orders.items())
        return dropped or self.norms_anew

    @torch.no_grad()
    def _set_units(self, feed: Callable[[Tensor], None] | None = None) -> None:
        """Let every site keep its number of best units; BatchNorm's statistics follow."""
        for name in self.orders:
            self.net.draws[self._places[name]].z = self._mask(name, self.kept.get(name, len(self.orders[name])))
        state = dict(self.net.model.named_buffers())
        for name, value in self._norms.items():
            state[name].copy_(value)
        if self._statistics_move:
            reestimate_batchnorm(self.net.model, self._norm_pairs(feed))

    def _mask(self, name: str, count: int) -> Tensor:
        """The mask of a site that keeps its best units, [1, units]; the same tensor at every call."""
        if (name, count) not in self._masks:
            keep = torch.zeros(1, self.net.gates[self._places[name]].n)
            keep[0, list(self.orders[name][:count])] = 1.0
            self._masks[name, count] = keep.to(next(self.net.model.parameters()).device)
        return self._masks[name, count]

    def _norm_pairs(self, feed: Callable[[Tensor], None] | None) -> Iterator[tuple[Any, Any]]:
        """The inputs on which statistics are measured, each after what it gives at the cut."""
        for i, x in enumerate(self.norm_batches[:NORM_BATCHES]):
            if feed is not None and self._start.cut is not None:
                feed(self._start.norm_outputs[i])
            yield x, x

    def _output(
        self, x: Any, feed: Callable[[Tensor], None] | None = None, known: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The network's output for a batch; `known`: what `feed` is given at the cut for each part of it."""
        self.passes += 1
        outputs = []
        for i, part in enumerate(_parts(x)):
            if feed is not None and known is not None:
                feed(known[i])
            outputs.append(self.output_of(self.net.model, part))
        return torch.cat(outputs)

    def output_of(self, model: nn.Module, x: Any) -> Tensor:
        """The main output of a model for some inputs. Raises JpqError where it is not one tensor."""
        output = self.main_output(call_model(model, x))
        if not isinstance(output, Tensor):
            raise JpqError(
                "Sensitivities need a model whose main output is one tensor; compress a part of it that has one, or "
                "give a task whose main_output picks it."
            )
        return output


def _parts(x: Any) -> tuple[Any, ...]:
    """The parts of a batch that are computed at a time."""
    first = next(iter(collect_tensors(x)), None)
    on_cpu = first is not None and first.is_cpu
    return split_samples(x, PART * torch.get_num_threads()) if on_cpu else (x,)


@dataclass
class _Start:
    """Where passes begin: a cut (None: the input), and the output of its module for every batch."""

    cut: Cut | None = None
    outputs: list[list[Tensor]] = field(default_factory=list)  # of the parts of each batch of the calibration
    norm_outputs: list[Tensor] = field(default_factory=list)  # of the inputs that statistics are measured on


def quantizer_keys(net: CompressedModel) -> dict[Key, IntegerQuantizer]:
    """The quantizers of every quantized layer, its weight's and its input's."""
    found: dict[Key, IntegerQuantizer] = {}
    for layer in net.network.layers:
        pair = net.quantizers(layer.name)
        if pair:
            found[layer.name, "w"], found[layer.name, "a"] = pair
    return found


def _without_masks(module: nn.Module, weight: Tensor) -> Tensor:
    """The float weight of a layer whose `weight` is masked at most; that weight itself, where more is done to it."""
    if parametrize.is_parametrized(module, "weight"):
        steps: Any = module.parametrizations["weight"]  # type: ignore[index]
        return original(module, "weight").detach() if all(isinstance(p, MaskParametrization) for p in steps) else weight
    return weight
