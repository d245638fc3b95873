"""Squared norms of the weights that produce and consume each unit, over the layers connected to it.

Along the execution order every channel class has stretches: layers produce it, then layers consume it, until others
produce it again. Producers with no consumer between them add up in one place (parallel branches); where a later
producer adds to a tensor that exists already (a residual stage), the identity around it counts 1. A depthwise layer
consumes its class and produces it anew, with no identity around it. A class that no layer produces or consumes (the
image, an embedding) counts 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jpq.compression.model import CompressedModel
from jpq.tracing.forward import call_model, eval_mode, hook_modules
from jpq.tracing.network import Layer, LayerKind
from jpq.tracing.sites import Site
from jpq.types import NONE

BATCHNORM_EPSILON = 1e-10  # in gamma / sqrt(var + eps), as in the authors' code of LAP

ByClass = dict[int, float]  # channel class -> squared norm

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Stretch:
    """Layers that produce a channel class, then layers that consume it, by position in the execution order."""

    producers: list[int] = field(default_factory=list)
    consumers: list[int] = field(default_factory=list)
    bypassed: bool = False  # whether the tensor before goes on beside it (a residual)


class NeighbourNorms:
    """Squared norms of filters, of the producers of their inputs, and of their consumers, on the weights as used.

    Args:
        net: as it stands; its weights are those in use, masked and quantized.
        scales: layer -> `[outputs]`, the scale of the normalisation that reads its output (`batchnorm_scales`).
        closed: channel classes that count as removed: the weights that produce them count 0.
    """

    def __init__(self, net: CompressedModel, scales: dict[str, Tensor], closed: Collection[int] = ()):
        self.layers = [layer for layer in net.network.layers if not layer.float_reason]
        self.positions = {layer.name: i for i, layer in enumerate(self.layers)}
        self.squares = [_weight_squares(layer, net.used_weight(layer), closed) for layer in self.layers]
        self.scales = [scales.get(x.name, torch.ones(len(x.outputs))).cpu().numpy() ** 2 for x in self.layers]
        rows = [s.sum(2).reshape(-1) * a for s, a in zip(self.squares, self.scales, strict=True)]
        self.produced = [_by_class(x.outputs, r) for x, r in zip(self.layers, rows, strict=True)]
        self.consumed = [
            _by_class(x.inputs, s.sum(1).reshape(-1)) for x, s in zip(self.layers, self.squares, strict=True)
        ]
        self.stretches = _stretches(self.layers)

    def of(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of `Chain` for one site, each `[links, n]` float64; a link is one producer of the units."""
        taps = {self.positions[tap.layer] for tap in site.taps}
        filter_norms: list[list[float]] = []
        producer_norms: list[list[float]] = []
        consumer_norms: list[list[float]] = []
        for producer in site.producers:
            if producer not in self.positions:  # an embedding
                continue
            i = self.positions[producer]
            layer, squares = self.layers[i], self.squares[i]
            groups, _, inputs = squares.shape
            before = np.array([self._before(int(c), i) for c in layer.inputs]).reshape(groups, 1, inputs)
            rows, far = squares.sum(2).reshape(-1), (squares * before).sum(2).reshape(-1)
            behind = np.array([self._behind(int(c), i, taps) for c in layer.outputs]) * self.scales[i]
            own_of, far_of = _by_class(layer.outputs, rows), _by_class(layer.outputs, far)
            # positions of one unit in one layer have the same consumers, and nearly always there is one position
            behind_of = {int(c): float(b) for c, b in zip(layer.outputs, behind, strict=True)}
            for links, by_class in ((filter_norms, own_of), (producer_norms, far_of), (consumer_norms, behind_of)):
                links.append([by_class.get(int(c), 0.0) for c in site.labels])
        shape = (len(filter_norms), site.n)
        return tuple(
            torch.tensor(x, dtype=torch.float64).reshape(shape) for x in (filter_norms, producer_norms, consumer_norms)
        )  # type: ignore[return-value]

    def _before(self, c: int, consumer: int) -> float:
        """A: squared norm of the producers of a class that a layer consumes."""
        for k, stretch in enumerate(self.stretches.get(c, ())):
            if consumer in stretch.consumers:
                if not stretch.producers:
                    return 1.0
                return sum(self.produced[m].get(c, 0.0) for m in stretch.producers) + float(stretch.bypassed and k > 0)
        return 1.0

    def _behind(self, c: int, producer: int, taps: set[int]) -> float:
        """B without the scale: squared norm of the consumers in `taps` of a class that a layer produces."""
        stretches = self.stretches.get(c, [])
        for k, stretch in enumerate(stretches):
            if producer in stretch.producers:
                through = [r for r in stretch.consumers if r in taps or self.layers[r].depthwise]
                bypassed = (
                    k + 1 < len(stretches) and stretches[k + 1].bypassed and len(through) == len(stretch.consumers)
                )
                return sum(self.consumed[r].get(c, 0.0) for r in through) + float(bypassed)
        return 1.0


def _stretches(layers: Collection[Layer]) -> dict[int, list[Stretch]]:
    """Channel class -> its stretches along the execution order."""
    stretches: dict[int, list[Stretch]] = defaultdict(lambda: [Stretch()])
    for i, layer in enumerate(layers):
        for c in np.unique(layer.inputs[layer.inputs != NONE]).tolist():
            stretches[c][-1].consumers.append(i)
        for c in np.unique(layer.outputs[layer.outputs != NONE]).tolist():
            last = stretches[c][-1]
            if last.consumers:
                stretches[c].append(Stretch([i], bypassed=bool(last.producers) and not layer.depthwise))
            else:
                last.producers.append(i)
    return dict(stretches)


def _weight_squares(layer: Layer, weight: Tensor, closed: Collection[int]) -> Any:
    """[groups, outputs, inputs of a group]: squared weights, summed over the kernel; 0 where the output is closed."""
    w = weight.detach().double().square()
    w = w.flatten(2).sum(2) if w.dim() > 2 else w
    g = layer.groups
    if layer.kind is LayerKind.CONV_TRANSPOSE:
        grouped = w.reshape(g, w.shape[0] // g, w.shape[1]).transpose(1, 2)
    else:
        grouped = w.reshape(g, w.shape[0] // g, w.shape[1])
    squares = grouped.cpu().numpy().copy()
    if closed:
        squares[np.isin(layer.outputs, list(closed)).reshape(squares.shape[:2])] = 0
    return squares


def _by_class(labels: Any, values: Any) -> ByClass:
    """Channel class -> sum of the values of its positions."""
    classes, positions = np.unique(labels, return_inverse=True)
    sums = np.zeros(len(classes))
    np.add.at(sums, positions.reshape(-1), values)
    return {int(c): float(s) for c, s in zip(classes, sums, strict=True) if c != NONE}


@torch.no_grad()
def batchnorm_scales(net: CompressedModel, batch: Any) -> dict[str, Tensor]:
    """Layer -> gamma / sqrt(var) `[outputs]` of the BatchNorm that reads the layer's output directly."""
    outputs: list[tuple[Tensor, str]] = []
    scales: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, x: Tensor | None, out: Any) -> None:
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            if isinstance(out, Tensor):
                outputs.append((out, name))
        elif module.running_var is not None:
            gamma = torch.ones_like(module.running_var) if module.weight is None else module.weight
            for output, layer in outputs:
                if output is x:
                    scales[layer] = gamma.detach().double() / (module.running_var.double() + BATCHNORM_EPSILON).sqrt()

    modules = {layer.name: m for layer in net.network.layers if (m := net.layer(layer.name)) is not None}
    norms = {n: m for n, m in net.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    with eval_mode(net), hook_modules({**modules, **norms}, record):
        call_model(net.model, batch)
    return scales


def norm_scales(net: CompressedModel, site: Site) -> Tensor | None:
    """`[n]`: |gamma| summed over the normalisations that each unit passes; None where none is passed."""
    total = torch.zeros(site.n, dtype=torch.float64)
    any_norm = False
    for name, module in net.model.named_modules():
        labels = net.network.axes.get(f"{name}.weight", {}).get(0)
        if labels is None or not isinstance(module, _NORMS):
            continue
        sums = _by_class(labels, module.weight.detach().abs().double().cpu().numpy())
        gammas = [sums.get(int(c)) for c in site.labels]
        any_norm = any_norm or any(g is not None for g in gammas)
        total += torch.tensor([g or 0.0 for g in gammas], dtype=torch.float64)
    return total if any_norm else None
