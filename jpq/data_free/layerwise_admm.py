"""One layer after the other is pulled to a structure by ADMM, so that it still gives what the dense model gives.

    min  mean (A_n - Ahat_n)^2 + rho/2 ||W_n - Z_n + U_n||^2     Z_n = Pi(W_n + U_n)     U_n <- U_n + W_n - Z_n

Y. Gong et al., "A Privacy-Preserving-Oriented DNN Pruning and Mobile Acceleration Framework", GLSVLSI 2020,
arXiv:2003.06513: the images may be random, so no data are needed.

| paper | here | shape |
|---|---|---|
| A_{n-1} | what the layer reads in the student, whose earlier layers are pruned already | [images, ...] |
| Ahat_n | what layer, norm and activation give in the frozen dense teacher | [images, ...] |
| f | `Follow`: the BatchNorm and the activation that read the layer's output, where they are modules | |
| Z_n, U_n, rho, Pi | `jpq.methods.gates.Admm` | like W_n |

We differ: images are drawn anew for each rho, not for each step, so that the layers before run once for many steps; and
weights are measured in their root mean square, the output's error in that of Ahat, so that rho and the learning rate
mean the same in every layer. Only weights change; biases and norms do not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from jpq.compression.calibration import reestimate_batchnorm
from jpq.methods.gates.admm import EACH, RHOS, Admm
from jpq.tracing.forward import hook_modules
from jpq.tracing.sites import Site

Draw = Callable[[int], Tensor]  # so many new images, normalised

Pool = tuple[Tensor, Tensor]  # what a layer reads, and what it should give

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)


@dataclass(frozen=True)
class AdmmSettings:
    """How long and how hard each layer is pulled."""

    steps: int = 400  # of the optimiser, over all rhos
    rhos: Sequence[float] = RHOS
    images: int = 256  # that a layer learns from at each rho
    batch_size: int = 64
    lr: float = 0.05  # of Adam, times the root mean square of the layer's weights
    matched: bool = True  # whether each BatchNorm is measured anew on the images, in a copy
    seed: int = 0  # of the order of images


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. Errors are ||A - Ahat|| / ||Ahat|| on images that were not learned from."""

    name: str
    weights: int
    density: float  # share of the weights that stay
    residual_first: float  # ||W - Z|| / ||W|| at the end of the first rho
    residual: float  # and at the end of the last one
    error_one_shot: float  # of the dense weights, projected
    error: float  # after ADMM
    dead: float  # share of output channels that give one and the same number on all these images


class FollowingLayers(nn.Module):
    """f: the BatchNorm and the activation behind a layer, where they are modules; else the identity."""

    def __init__(self, parts: Sequence[nn.Module] = ()):
        super().__init__()
        self.parts: Any = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """f(x); x stays as it is, whatever the modules do in place."""
        for part in self.parts:
            x = part(x.clone() if getattr(part, "inplace", False) else x)
        return x


class _Reached(Exception):
    """The layer was reached, and the rest of the network need not run."""


def prune(
    model: nn.Module,
    sites: Sequence[Site],
    gates: Sequence[Admm],
    draw: Draw,
    how: AdmmSettings,
    note: Callable[[LayerReport], None] = lambda row: None,
) -> nn.Module:
    """A copy of `model` whose weights lie on the sites' structures; `gates` then hold the masks.

    Args:
        model: dense and trained, in floating point; it is not changed.
        sites: masks inside its layers, in the order in which those run.
        gates: one for each site, told how much stays.
        draw: images; nothing else is known of any data.
        how: how long and how hard.
        note: told about each layer when it is done.
    """
    teacher = frozen(model, draw, how)
    student, done = copy.deepcopy(teacher), copy.deepcopy(model).eval()
    follows = followers(teacher, draw(2))
    for site, gate in zip(sites, gates, strict=True):
        name = site.taps[0].layer
        weight, row = _one(teacher, student, site, gate, follows.get(name, FollowingLayers()), draw, how)
        for m in (student, done):
            kept: Any = m.get_submodule(name)
            kept.weight.data.copy_(weight)
        note(row)
    return done


def frozen(model: nn.Module, draw: Draw, how: AdmmSettings) -> nn.Module:
    """The dense teacher: a copy of `model`, its BatchNorms measured on the images where inputs are matched."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    if how.matched:
        batches = -(-how.images // how.batch_size)
        reestimate_batchnorm(teacher, ((draw(how.batch_size), torch.empty(0)) for _ in range(batches)))
    return teacher


def _one(
    teacher: nn.Module,
    student: nn.Module,
    site: Site,
    gate: Admm,
    follow: FollowingLayers,
    draw: Draw,
    how: AdmmSettings,
) -> tuple[Tensor, LayerReport]:
    """The pruned weight of one layer of the student, and how it went."""
    name, structure = site.taps[0].layer, site.taps[0].structure
    layer: Any = student.get_submodule(name)
    dense = layer.weight.detach().clone()
    unit = dense.square().mean().sqrt().clamp_min(1e-12)
    weight = (dense / unit).requires_grad_(True)
    gate.observe_weights([(weight, structure)])  # Z = Pi(W), U = 0
    one_shot = gate.near(0) * unit

    def given(x: Tensor, w: Tensor) -> Tensor:
        return follow(functional_call(layer, {"weight": w}, (x,)))

    def pool() -> Pool | None:
        """What the student's layer reads of new images and what it should give; None where it is never called."""
        parts = []
        for first in range(0, how.images, how.batch_size):
            x = draw(min(how.batch_size, how.images - first))
            ours, theirs = reads(student, name, x), reads(teacher, name, x)
            if ours is None or theirs is None:
                return None
            with torch.no_grad():
                parts.append((ours, given(theirs, dense)))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    residuals = _admm(gate, weight, lambda x, w: given(x, w * unit), pool, how)
    gate.dual(0).zero_()
    gate.project()  # once more, of the weights alone
    pruned = gate.near(0) * unit
    test, channel = pool(), -1 if dense.dim() == 2 else 1
    crude, after = (_error(given, test, w) if test else 0.0 for w in (one_shot, pruned))
    dead = _dead(test[1].movedim(channel, 0).flatten(1)) if test else 0.0
    density = _density(gate, site)
    row = LayerReport(name, dense.numel(), density, residuals[0], residuals[-1], crude, after, dead)
    return pruned, row


def _admm(
    gate: Admm,
    weight: Tensor,
    given: Callable[[Tensor, Tensor], Tensor],
    pool: Callable[[], Pool | None],
    how: AdmmSettings,
) -> list[float]:
    """Pull `weight`, in place; the residual at the end of each rho."""
    each = how.steps // len(how.rhos) // EACH * EACH
    order = torch.Generator().manual_seed(how.seed)
    residuals = []
    for turn in range(len(how.rhos)):
        known = pool()
        if known is None:
            return [gate.metrics()["residual"]]
        rows = max(1, len(known[0]) * how.batch_size // how.images)
        optim = torch.optim.Adam([weight], how.lr)
        size = known[1].square().mean().clamp_min(1e-30)
        for i in range(each):
            optim.param_groups[0]["lr"] = how.lr * 0.1 ** (3 * i // each)
            which = torch.randint(len(known[0]), (rows,), generator=order).to(weight.device)
            x, wanted = (part[which] for part in known)
            loss = F.mse_loss(given(x, weight), wanted) / size + gate.own_loss()
            optim.zero_grad()
            loss.backward()
            optim.step()
            gate.after_step((turn * each + i + 1) / (each * len(how.rhos)))
        residuals.append(gate.metrics()["residual"])
    return residuals


@torch.no_grad()
def _error(given: Callable[[Tensor, Tensor], Tensor], pool: Pool, weight: Tensor) -> float:
    """||A - Ahat|| / ||Ahat||."""
    x, wanted = pool
    return float((given(x, weight) - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _dead(outputs: Tensor) -> float:
    """Share of channels, `[channels, values]`, that never change."""
    spread = outputs.amax(1) - outputs.amin(1)
    return float((spread <= 1e-6 * outputs.abs().amax().clamp_min(1e-30)).float().mean())


def _density(gate: Admm, site: Site) -> float:
    """Share of the weights that the mask keeps."""
    structure = site.taps[0].structure
    size = torch.Size(gate.near(0).shape)
    return float(structure.expand(gate.keep(), size).expand(size).mean())


@torch.no_grad()
def reads(model: nn.Module, name: str, x: Tensor) -> Tensor | None:
    """What the layer of that name reads, at its first call; the layers behind it do not run. None: it is not called."""
    found: list[Tensor] = []

    def note(_: str, __: nn.Module, read: Tensor | None, ___: Any) -> None:
        if read is not None:
            found.append(read.clone())  # what comes later may write into it
            raise _Reached

    with hook_modules({name: model.get_submodule(name)}, note, before=True):
        try:
            model(x)
        except _Reached:
            return found[0]
    return None


@torch.no_grad()
def followers(model: nn.Module, x: Tensor) -> dict[str, FollowingLayers]:
    """Layer -> the BatchNorm and then the activation that alone read its output, where they are modules.

    Only calls of modules are seen: what a model's code reads as well is not noticed.
    """
    calls: list[tuple[str, nn.Module, Tensor | None, Any]] = []  # holds the tensors, so that `is` tells them apart
    leaves = {n: m for n, m in model.named_modules() if not list(m.children())}
    with hook_modules(leaves, lambda *call: calls.append(call)):
        model(x)

    def behind(at: int) -> Iterator[nn.Module]:
        out = calls[at][3]
        readers = [i for i in range(at + 1, len(calls)) if calls[i][2] is out]
        if readers and isinstance(calls[readers[0]][1], (_BatchNorm, *ACTIVATIONS)):
            module = calls[readers[0]][1]
            if len(readers) == 1 or calls[readers[0]][3] is out:  # in place: the others read what it made
                yield module
                if isinstance(module, _BatchNorm):
                    yield from (m for m in behind(readers[0]) if isinstance(m, ACTIVATIONS))

    found: dict[str, FollowingLayers] = {}
    for i, (name, *_) in enumerate(calls):
        if name not in found:
            found[name] = FollowingLayers([*behind(i)][:2])
    return found
