"""Layer-by-layer ADMM: each layer's weight is drawn to a structure while its output stays close to the dense model's.

    min  mean (A_n - Ahat_n)^2 + rho/2 ||W_n - Z_n + U_n||^2     Z_n = Pi(W_n + U_n)     U_n <- U_n + W_n - Z_n

Y. Gong et al., "A Privacy-Preserving-Oriented DNN Pruning and Mobile Acceleration Framework", GLSVLSI 2020,
arXiv:2003.06513: the images may be random, so no data are needed.

| paper | here | shape |
|---|---|---|
| A_{n-1} | input of the layer in the student, whose earlier layers are pruned already | [images, ...] |
| Ahat_n | output of layer, norm and activation in the frozen dense teacher | [images, ...] |
| f | `FollowingLayers`: the BatchNorm and the activation that read the layer's output, where they are modules | |
| Z_n, U_n, rho, Pi | `jpq.methods.gates.Admm` | like W_n |

We differ: images are drawn anew for each rho, not for each step, so that the layers before run once for many steps; and
weights are measured in their root mean square, the output's error in that of Ahat, so that rho and the learning rate
mean the same in every layer. A rho has 100 steps by default, 20 between two updates of Z and U. With `matched` images
each BatchNorm is re-estimated on them in the copies that ADMM compares (random pixels hardly reach deep layers with the
statistics of real images). Only weights change; biases and norms do not.
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
from jpq.methods.gates.admm import RHOS, UPDATES_PER_RHO, Admm
from jpq.tracing.forward import hook_modules
from jpq.tracing.sites import Site

DrawImages = Callable[[int], Tensor]  # number of new images -> [images, ...], normalised

Pool = tuple[Tensor, Tensor]  # inputs of a layer, and the outputs that it should give

LayerForward = Callable[[Tensor, Tensor], Tensor]  # (input, weight) -> output of the layer and those that follow

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)


@dataclass(frozen=True)
class AdmmSettings:
    """Steps, penalties, images and learning rate of the ADMM of each layer."""

    steps: int = 400  # optimiser steps of a layer, over all rhos
    rhos: Sequence[float] = RHOS
    images: int = 256  # images that a layer learns from at each rho
    batch_size: int = 64
    lr: float = 0.05  # of Adam, times the root mean square of the layer's weights
    matched: bool = True  # whether each BatchNorm is re-estimated on the images, in a copy
    seed: int = 0  # of the order of images


@dataclass(frozen=True)
class LayerReport:
    """Density and errors of one pruned layer; errors are ||A - Ahat|| / ||Ahat|| on images not learned from."""

    name: str
    weights: int
    density: float  # share of the weights that stay
    residual_first: float  # ||W - Z|| / ||W|| at the end of the first rho
    residual: float  # ||W - Z|| / ||W|| at the end of the last rho
    error_one_shot: float  # error of the dense weights, projected without ADMM
    error: float  # error after ADMM
    dead: float  # share of output channels that are constant over all these images


def prune_layerwise(
    model: nn.Module,
    sites: Sequence[Site],
    gates: Sequence[Admm],
    draw_images: DrawImages,
    settings: AdmmSettings,
    report_layer: Callable[[LayerReport], None] = lambda row: None,
) -> nn.Module:
    """Prune a copy of `model` layer by layer: its weights lie on the sites' structures, and `gates` hold the masks.

    Args:
        model: dense and trained, in floating point; it is not changed.
        sites: masks inside its layers, in the order in which the layers run.
        gates: one for each site, set up with the units to keep.
        draw_images: source of images; nothing else is known of any data.
        report_layer: called with each layer's report as soon as it is done.
    """
    teacher = dense_teacher(model, draw_images, settings)
    student, pruned = copy.deepcopy(teacher), copy.deepcopy(model).eval()
    followers = following_layers(teacher, draw_images(2))
    for site, gate in zip(sites, gates, strict=True):
        name = site.taps[0].layer
        follow = followers.get(name, FollowingLayers())
        weight, report = _prune_layer(teacher, student, site, gate, follow, draw_images, settings)
        for target in (student, pruned):
            layer: Any = target.get_submodule(name)
            layer.weight.data.copy_(weight)
        report_layer(report)
    return pruned


def dense_teacher(model: nn.Module, draw_images: DrawImages, settings: AdmmSettings) -> nn.Module:
    """Copy the dense model without gradients; its BatchNorms are re-estimated on the images if inputs are matched."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    if settings.matched:
        batches = -(-settings.images // settings.batch_size)
        images = ((draw_images(settings.batch_size), torch.empty(0)) for _ in range(batches))
        reestimate_batchnorm(teacher, images)
    return teacher


class FollowingLayers(nn.Module):
    """f: the BatchNorm and the activation behind a layer, where they are modules; else the identity."""

    def __init__(self, parts: Sequence[nn.Module] = ()):
        super().__init__()
        self.parts: Any = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """f(x); x is not changed, even by modules that work in place."""
        for part in self.parts:
            x = part(x.clone() if getattr(part, "inplace", False) else x)
        return x


@torch.no_grad()
def following_layers(model: nn.Module, x: Tensor) -> dict[str, FollowingLayers]:
    """Layer -> the BatchNorm and then the activation that alone read its output, where they are modules.

    Only calls of modules are seen; reads by the model's own code go unnoticed.
    """
    calls: list[tuple[str, nn.Module, Tensor | None, Any]] = []  # holds the tensors, so that `is` tells them apart
    leaves = {n: m for n, m in model.named_modules() if not list(m.children())}
    with hook_modules(leaves, lambda *call: calls.append(call)):
        model(x)

    def followers_of(call: int) -> Iterator[nn.Module]:
        output = calls[call][3]
        consumers = [i for i in range(call + 1, len(calls)) if calls[i][2] is output]
        if consumers and isinstance(calls[consumers[0]][1], (_BatchNorm, *ACTIVATIONS)):
            module = calls[consumers[0]][1]
            if len(consumers) == 1 or calls[consumers[0]][3] is output:  # in place: the others read its output
                yield module
                if isinstance(module, _BatchNorm):
                    yield from (m for m in followers_of(consumers[0]) if isinstance(m, ACTIVATIONS))

    followers: dict[str, FollowingLayers] = {}
    for i, (name, *_) in enumerate(calls):
        if name not in followers:
            followers[name] = FollowingLayers([*followers_of(i)][:2])
    return followers


def _prune_layer(
    teacher: nn.Module,
    student: nn.Module,
    site: Site,
    gate: Admm,
    follow: FollowingLayers,
    draw_images: DrawImages,
    settings: AdmmSettings,
) -> tuple[Tensor, LayerReport]:
    """(pruned weight of one layer of the student, its report)."""
    name, structure = site.taps[0].layer, site.taps[0].structure
    layer: Any = student.get_submodule(name)
    dense = layer.weight.detach().clone()
    unit = dense.square().mean().sqrt().clamp_min(1e-12)
    weight = (dense / unit).requires_grad_(True)
    gate.observe_weights([(weight, structure)])  # Z = Pi(W), U = 0
    one_shot = gate.near(0) * unit

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return follow(functional_call(layer, {"weight": w}, (x,)))

    def draw_pool() -> Pool | None:
        """The student layer's inputs on new images and its targets; None where the layer is never called."""
        inputs, targets = [], []
        for start in range(0, settings.images, settings.batch_size):
            x = draw_images(min(settings.batch_size, settings.images - start))
            student_input, teacher_input = layer_input(student, name, x), layer_input(teacher, name, x)
            if student_input is None or teacher_input is None:
                return None
            inputs.append(student_input)
            with torch.no_grad():
                targets.append(forward(teacher_input, dense))
        return torch.cat(inputs), torch.cat(targets)

    residuals = _run_admm(gate, weight, lambda x, w: forward(x, w * unit), draw_pool, settings)
    gate.dual(0).zero_()
    gate.project()  # once more, of the weights alone
    pruned = gate.near(0) * unit
    test, channel_dim = draw_pool(), -1 if dense.dim() == 2 else 1
    error_one_shot, error = (_output_error(forward, test, w) if test else 0.0 for w in (one_shot, pruned))
    dead = _dead_share(test[1].movedim(channel_dim, 0).flatten(1)) if test else 0.0
    density = _mask_density(gate, site)
    return pruned, LayerReport(name, dense.numel(), density, residuals[0], residuals[-1], error_one_shot, error, dead)


class _LayerReached(Exception):
    """Exception that ends a forward pass at a layer, so that the rest of the network does not run."""


@torch.no_grad()
def layer_input(model: nn.Module, name: str, x: Tensor) -> Tensor | None:
    """The input of one layer at its first call; layers behind it do not run. None: the layer is never called."""
    inputs: list[Tensor] = []

    def record(_: str, __: nn.Module, read: Tensor | None, ___: Any) -> None:
        if read is not None:
            inputs.append(read.clone())  # later layers may write into it
            raise _LayerReached

    with hook_modules({name: model.get_submodule(name)}, record, before=True):
        try:
            model(x)
        except _LayerReached:
            return inputs[0]
    return None


def _run_admm(
    gate: Admm,
    weight: Tensor,
    forward: LayerForward,
    draw_pool: Callable[[], Pool | None],
    settings: AdmmSettings,
) -> list[float]:
    """Draw `weight`, in place, to the gate's structure by ADMM; the residual at the end of each rho."""
    steps_per_rho = settings.steps // len(settings.rhos) // UPDATES_PER_RHO * UPDATES_PER_RHO
    order = torch.Generator().manual_seed(settings.seed)
    residuals = []
    for rho in range(len(settings.rhos)):
        pool = draw_pool()
        if pool is None:
            return [gate.metrics()["residual"]]
        batch = max(1, len(pool[0]) * settings.batch_size // settings.images)
        optim = torch.optim.Adam([weight], settings.lr)
        scale = pool[1].square().mean().clamp_min(1e-30)
        for step in range(steps_per_rho):
            optim.param_groups[0]["lr"] = settings.lr * 0.1 ** (3 * step // steps_per_rho)
            rows = torch.randint(len(pool[0]), (batch,), generator=order).to(weight.device)
            x, target = (part[rows] for part in pool)
            loss = F.mse_loss(forward(x, weight), target) / scale + gate.own_loss()
            optim.zero_grad()
            loss.backward()
            optim.step()
            gate.after_step((rho * steps_per_rho + step + 1) / (steps_per_rho * len(settings.rhos)))
        residuals.append(gate.metrics()["residual"])
    return residuals


@torch.no_grad()
def _output_error(forward: LayerForward, pool: Pool, weight: Tensor) -> float:
    """||A - Ahat|| / ||Ahat|| with this weight."""
    x, target = pool
    return float((forward(x, weight) - target).norm() / target.norm().clamp_min(1e-30))


def _dead_share(outputs: Tensor) -> float:
    """Share of channels whose output is constant; outputs: `[channels, values]`."""
    spread = outputs.amax(1) - outputs.amin(1)
    return float((spread <= 1e-6 * outputs.abs().amax().clamp_min(1e-30)).float().mean())


def _mask_density(gate: Admm, site: Site) -> float:
    """Share of the weights that the mask keeps."""
    structure = site.taps[0].structure
    size = torch.Size(gate.near(0).shape)
    return float(structure.expand(gate.keep(), size).expand(size).mean())
