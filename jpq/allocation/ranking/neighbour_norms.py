"""What lies before and behind each unit: the squared norms of the layers that are really connected to it.

Along the execution order every channel class has stretches: layers make it, then layers read it, until others make it
again. Makers with no reader between them add up in one place (parallel branches); where a later maker adds to what is
there already (a residual stage), the identity that leads past it counts 1. A depthwise layer reads its class and makes
it anew, with no way past it. What no layer makes or reads (the image, an embedding) counts 1.
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

BN_EPS = 1e-10  # in gamma / sqrt(var + eps), as in the authors' code of LAP

ByClass = dict[int, float]

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Stretch:
    """Layers that make a class, then layers that read it, by position in the execution order."""

    makers: list[int] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)
    past: bool = False  # whether what came before goes on beside it


class Chains:
    """Norms of filters, of what makes their inputs, and of what reads them, on the weights as they are used.

    Args:
        net: in the state whose weights are looked at.
        scales: layer -> `[outputs]`, the scale of the normalisation that reads its output (`batch_scales`).
        dead: channel classes that are as good as gone: the weights that make them count 0.
    """

    def __init__(self, net: CompressedModel, scales: dict[str, Tensor], dead: Collection[int] = ()):
        self.layers = net.network.layers
        self.at = {layer.name: i for i, layer in enumerate(self.layers)}
        self.squares = [_squares(layer, net.used_weight(layer), dead) for layer in self.layers]
        self.scales = [scales.get(x.name, torch.ones(len(x.outputs))).cpu().numpy() ** 2 for x in self.layers]
        rows = [s.sum(2).reshape(-1) * a for s, a in zip(self.squares, self.scales, strict=True)]
        self.made = [_by_class(x.outputs, r) for x, r in zip(self.layers, rows, strict=True)]
        self.read = [_by_class(x.inputs, s.sum(1).reshape(-1)) for x, s in zip(self.layers, self.squares, strict=True)]
        self.stretches = _stretches(self.layers)

    def of(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """(own, reached, after), each `[links, n]` in double precision: a link is a layer that makes the units."""
        taps = {self.at[tap.layer] for tap in site.taps}
        own: list[list[float]] = []
        reached: list[list[float]] = []
        after: list[list[float]] = []
        for maker in site.makers:
            if maker not in self.at:  # an embedding
                continue
            i = self.at[maker]
            layer, squares = self.layers[i], self.squares[i]
            groups, _, inputs = squares.shape
            before = np.array([self._before(int(c), i) for c in layer.inputs]).reshape(groups, 1, inputs)
            rows, far = squares.sum(2).reshape(-1), (squares * before).sum(2).reshape(-1)
            behind = np.array([self._behind(int(c), i, taps) for c in layer.outputs]) * self.scales[i]
            own_of, far_of = _by_class(layer.outputs, rows), _by_class(layer.outputs, far)
            # positions of one unit in one layer have the same readers, and nearly always there is one
            behind_of = {int(c): float(b) for c, b in zip(layer.outputs, behind, strict=True)}
            for out, found in ((own, own_of), (reached, far_of), (after, behind_of)):
                out.append([found.get(int(c), 0.0) for c in site.labels])
        shape = (len(own), site.n)
        return tuple(torch.tensor(x, dtype=torch.float64).reshape(shape) for x in (own, reached, after))  # type: ignore[return-value]

    def _before(self, c: int, reader: int) -> float:
        """A: what makes the class that a layer reads."""
        for k, stretch in enumerate(self.stretches.get(c, ())):
            if reader in stretch.readers:
                if not stretch.makers:
                    return 1.0
                return sum(self.made[m].get(c, 0.0) for m in stretch.makers) + float(stretch.past and k > 0)
        return 1.0

    def _behind(self, c: int, maker: int, taps: set[int]) -> float:
        """B without the scale: what reads the class that a layer makes, of the layers in `taps`."""
        stretches = self.stretches.get(c, [])
        for k, stretch in enumerate(stretches):
            if maker in stretch.makers:
                through = [r for r in stretch.readers if r in taps or self.layers[r].depthwise]
                on = k + 1 < len(stretches) and stretches[k + 1].past and len(through) == len(stretch.readers)
                return sum(self.read[r].get(c, 0.0) for r in through) + float(on)
        return 1.0


def _stretches(layers: Collection[Layer]) -> dict[int, list[Stretch]]:
    found: dict[int, list[Stretch]] = defaultdict(lambda: [Stretch()])
    for i, layer in enumerate(layers):
        for c in np.unique(layer.inputs[layer.inputs != NONE]).tolist():
            found[c][-1].readers.append(i)
        for c in np.unique(layer.outputs[layer.outputs != NONE]).tolist():
            last = found[c][-1]
            if last.readers:
                found[c].append(Stretch([i], past=bool(last.makers) and not layer.depthwise))
            else:
                last.makers.append(i)
    return dict(found)


def _squares(layer: Layer, weight: Tensor, dead: Collection[int]) -> Any:
    """[groups, outputs, inputs] of a group: squared weights, summed over the kernel; 0 where the output is dead."""
    w = weight.detach().double().square()
    w = w.flatten(2).sum(2) if w.dim() > 2 else w
    g = layer.groups
    if layer.kind is LayerKind.CONV_TRANSPOSE:
        cut = w.reshape(g, w.shape[0] // g, w.shape[1]).transpose(1, 2)
    else:
        cut = w.reshape(g, w.shape[0] // g, w.shape[1])
    squares = cut.cpu().numpy().copy()
    if dead:
        squares[np.isin(layer.outputs, list(dead)).reshape(squares.shape[:2])] = 0
    return squares


def _by_class(labels: Any, values: Any) -> ByClass:
    """Class -> the sum of its positions' values."""
    classes, at = np.unique(labels, return_inverse=True)
    sums = np.zeros(len(classes))
    np.add.at(sums, at.reshape(-1), values)
    return {int(c): float(s) for c, s in zip(classes, sums, strict=True) if c != NONE}


@torch.no_grad()
def batch_scales(net: CompressedModel, batch: Any) -> dict[str, Tensor]:
    """Layer -> gamma / sqrt(var) `[outputs]` of the BatchNorm that reads what the layer gives, and nothing else."""
    gave: list[tuple[Tensor, str]] = []
    scales: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, x: Tensor | None, out: Any) -> None:
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            if isinstance(out, Tensor):
                gave.append((out, name))
        elif module.running_var is not None:
            gamma = torch.ones_like(module.running_var) if module.weight is None else module.weight
            for made, layer in gave:
                if made is x:
                    scales[layer] = gamma.detach().double() / (module.running_var.double() + BN_EPS).sqrt()

    modules = {layer.name: m for layer in net.network.layers if (m := net.layer(layer.name)) is not None}
    norms = {n: m for n, m in net.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    with eval_mode(net), hook_modules({**modules, **norms}, note):
        call_model(net.model, batch)
    return scales


def norm_scales(net: CompressedModel, site: Site) -> Tensor | None:
    """`[n]`: |gamma| summed over the normalisations that each unit passes; None where there is none."""
    total = torch.zeros(site.n, dtype=torch.float64)
    found = False
    for name, module in net.model.named_modules():
        labels = net.network.axes.get(f"{name}.weight", {}).get(0)
        if labels is None or not isinstance(module, _NORMS):
            continue
        sums = _by_class(labels, module.weight.detach().abs().double().cpu().numpy())
        own = [sums.get(int(c)) for c in site.labels]
        found = found or any(s is not None for s in own)
        total += torch.tensor([s or 0.0 for s in own], dtype=torch.float64)
    return total if found else None
