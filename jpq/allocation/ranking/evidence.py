"""Collection of the evidence that scores need (activations, gradients, curvature), one record for each site.

Gradients are those of gates, one for each sample, at 1, that multiply the units where each layer has read and quantized
them. Closing a gate then removes exactly what its consumers read of the unit, at any bit-width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from jpq.allocation.ranking.neighbour_norms import NeighbourNorms, batchnorm_scales, norm_scales
from jpq.compression.model import CompressedModel
from jpq.methods.quantizers import is_quantized
from jpq.methods.scores import Chain, Evidence
from jpq.tracing.forward import call_model, eval_mode, hook_modules
from jpq.tracing.missing_gradients import name_missing_gradient
from jpq.tracing.sites import Site, Tap, dropped_classes
from jpq.types import NONE, JpqError

Batches = Iterable[tuple[Any, Tensor | None]]  # (inputs, labels)

Loss = Callable[[Any, Tensor], Tensor]  # (output, labels) -> the batch's mean loss

NEEDS_LABELS = frozenset({"labels", "gradients", "curvature"})

NEEDS_BATCHES = NEEDS_LABELS | {"activations", "means", "chain"}


def collect_evidence(
    net: CompressedModel, needs: Collection[str], batches: Batches, count: int, loss: Loss
) -> list[Evidence]:
    """Collect the evidence of each site of `net`, from the first `count` batches.

    Args:
        net: as it stands; it is not changed.
        needs: the fields of `Evidence` that a score uses.
        batches: (inputs, labels or None) pairs of training data.
        loss: for gradients.

    Raises JpqError for batches or labels that are needed and missing, and for layers that no module computes.
    """
    pairs, labels = _batches_for(needs, batches, count)
    maps, means = _unit_activations(net, [x for x, _ in pairs], needs)
    gradients, curvature = [], []
    for x, y in pairs if "gradients" in needs else []:
        gradient, second_derivative = gate_gradients(net, x, y, loss, "curvature" in needs)
        gradients.append(gradient)
        curvature.append(second_derivative)
    norms = NeighbourNorms(net, batchnorm_scales(net, pairs[0][0]), closed_classes(net)) if "chain" in needs else None
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    return [
        Evidence(
            activations=maps.get(site.name),
            means=means.get(site.name),
            labels=labels,
            gradients=tuple(g[i] for g in gradients),
            curvature=tuple(h[i] for h in curvature if h),
            scales=norm_scales(net, site) if "scales" in needs else None,
            chain=Chain(*norms.of(site)) if norms else None,
            generator=generator,
        )
        for i, site in enumerate(net.sites)
    ]


def _batches_for(
    needs: Collection[str], batches: Batches, count: int
) -> tuple[list[tuple[Any, Tensor | None]], Tensor | None]:
    """(the first `count` batches, their labels), as far as they are needed. Raises JpqError where they are missing."""
    pairs = list(check_pairs(islice(batches, count))) if set(needs) & NEEDS_BATCHES else []
    needs_labels = set(needs) & NEEDS_LABELS
    if needs_labels and any(y is None for _, y in pairs):
        raise JpqError(
            "This score needs labels: give jpq.compress evidence=[(inputs, classes), ...], training batches."
        )
    if not pairs and set(needs) - {"scales", "generator"}:
        raise JpqError("This score needs batches of training data, and there are none.")
    labels = torch.cat([y for _, y in pairs if y is not None]) if needs_labels and pairs else None
    return pairs, labels


def check_pairs(batches: Batches) -> Iterator[tuple[Any, Any]]:
    """The batches one by one. Raises JpqError at the first that is no pair."""
    for pair in batches:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise JpqError(
                "Evidence is batches of (inputs, classes): give jpq.compress evidence=[(inputs, classes), ...]."
            )
        yield pair[0], pair[1]


def closed_classes(net: CompressedModel) -> set[int]:
    """Channel classes that every gate on them has closed in the last sample of the gates."""
    samples = zip(net.sites, net.draws, strict=True)
    kept = {s.name: [True] * s.n if d.z is None else (d.z[0] != 0).tolist() for s, d in samples}
    return dropped_classes(net.sites, kept)


def gate_gradients(
    net: CompressedModel, x: Any, labels: Tensor | None, loss: Loss, curvature: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """First and second derivatives of the loss for the gates of every site, in evaluation mode.

    Gives dL_n/dz of each sample's own loss, `[samples, n]` a site, and d2L/dz2 of the mean loss, `[n]` a site (an empty
    list without `curvature`). Where a layer reads its samples in another layout (windows, sequence first), only the sum
    over the samples is right, which is all that most scores use.
    """
    if labels is None:
        raise JpqError("Gradients of gates need labels.")
    reference = next(net.parameters())
    samples = len(labels)
    gates = [reference.new_ones(samples, site.n).requires_grad_() for site in net.sites]
    kernels = sdpa_kernel(SDPBackend.MATH) if curvature else nullcontext()  # other kernels have no second derivative
    with torch.enable_grad(), eval_mode(net), frozen_parameters(net), multiply_units(net, gates), kernels:
        output = call_model(net.model, x)
        try:
            mean_loss = loss(output, labels)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise JpqError(
                f"This score cannot have its loss from what the model gives and these labels ({reason}). It needs one "
                "tensor of class scores, and classes as whole numbers from 0."
            ) from error
        with name_missing_gradient():
            gradients = torch.autograd.grad(mean_loss, gates, create_graph=curvature)
        second = [_diagonal(g, z) for g, z in zip(gradients, gates, strict=True)] if curvature else []
    return [g.detach() * samples for g in gradients], second


def _diagonal(gradient: Tensor, gate: Tensor) -> Tensor:
    """`[n]`: second derivatives for a gate shared by all samples, by one backward pass for each unit."""
    if not gradient.requires_grad:  # the loss is linear in these gates
        return torch.zeros_like(gate[0])
    return torch.stack(
        [
            torch.autograd.grad(gradient[:, u].sum(), gate, retain_graph=True)[0][:, u].sum()
            for u in range(gate.shape[1])
        ]
    )


@contextmanager
def frozen_parameters(net: CompressedModel) -> Iterator[None]:
    """Context in which no parameter of the model gets a gradient."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def multiply_units(net: CompressedModel, gates: Sequence[Tensor]) -> Iterator[None]:
    """Context in which every layer reads each site's units times a gate, `[samples, n]`, behind its quantizer."""
    taps: dict[str, list[tuple[Tensor, Tap]]] = {}
    for site, gate in zip(net.sites, gates, strict=True):
        for tap in site.taps:
            taps.setdefault(tap.layer, []).append((gate, tap))
    called: set[str] = set()
    handles = []
    for name, layer_taps in taps.items():
        layer = net.layer(name)
        if layer is None:
            continue
        dim = net.network.layer(name).kind.channel_dim

        def scale(x: Tensor, name: str = name, layer_taps: Any = layer_taps, dim: int = dim) -> Tensor:
            called.add(name)
            for gate, tap in layer_taps:
                x = x * _broadcast(gate, tap.structure.index, x, dim)
            return x

        if is_quantized(layer):
            handles.append(layer.input_quant.register_forward_hook(lambda _, __, out, f=scale: f(out)))
        else:
            handles.append(layer.register_forward_pre_hook(lambda _, args, f=scale: (f(args[0]), *args[1:])))
    try:
        yield
        _check_called(set(taps) - called)
    finally:
        for handle in handles:
            handle.remove()


def _broadcast(gate: Tensor, index: np.ndarray, x: Tensor, dim: int) -> Tensor:
    """The gate of each channel of x, with as many dims as x. index: the unit of each channel; dim: of the channels."""
    samples, n = gate.shape
    rows = x.shape[0]
    z = gate.repeat_interleave(rows // samples, 0) if rows % samples == 0 else gate.mean(0, keepdim=True)
    units = _unit_of_channels(index, x.shape[dim], x.device)
    z = torch.cat([z, z.new_ones(len(z), 1)], 1)[:, torch.where(units == NONE, n, units)]
    shape = [1] * x.dim()
    shape[0], shape[dim] = len(z), -1
    return z.reshape(shape).to(x.dtype)


def _check_called(missing: Collection[str]) -> None:
    """Raise JpqError where a layer's module was not called."""
    if missing:
        raise JpqError(
            f"This score needs what layer '{min(missing)}' reads, which no module of its own computes. "
            "Choose another --score, or exclude the layers before it with --skip."
        )


@torch.no_grad()
def _unit_activations(
    net: CompressedModel, batches: Sequence[Any], needs: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(site -> maps of the first batch, site -> means of all batches) of the units, as layers read them."""
    if not set(needs) & {"activations", "means"} or not net.sites:
        return {}, {}
    with_means = "means" in needs
    names = {tap.layer for site in net.sites for tap in site.taps}
    layers = {name: layer for name in names if (layer := net.layer(name)) is not None}
    maps: dict[str, Any] = {}
    means: dict[str, list[Tensor]] = {site.name: [] for site in net.sites}
    for batch in batches if with_means else batches[:1]:
        inputs: dict[str, Tensor] = {}

        def record(name: str, layer: nn.Module, x: Any, _: Any, inputs: dict[str, Tensor] = inputs) -> None:
            x = x.detach().movedim(-1 if layer.weight.dim() == 2 else 1, 1)  # type: ignore[operator]
            inputs[name] = x.reshape(*x.shape, *[1] * (4 - x.dim())).flatten(3)

        with eval_mode(net), hook_modules(layers, record):
            call_model(net.model, batch)
        _check_called(names - inputs.keys())
        for site in net.sites:
            if not maps.get(site.name, ()) and "activations" in needs:
                maps[site.name] = _unit_maps(site, inputs)
            if with_means:
                means[site.name].append(torch.stack([_unit_means(tap, inputs[tap.layer], site.n) for tap in site.taps]))
    return maps, {name: torch.cat(parts, 1) for name, parts in means.items()} if with_means else {}


def _unit_of_channels(index: np.ndarray, channels: int, device: torch.device) -> Tensor:
    """`[channels]`: the unit of each channel that a layer reads; groups of a grouped layer read the same units."""
    return torch.as_tensor(index, device=device).repeat(channels // len(index))


def _unit_means(tap: Tap, x: Tensor, n: int) -> Tensor:
    """[samples, n]: mean of each unit over all places where one layer reads it."""
    index = _unit_of_channels(tap.structure.index, x.shape[1], x.device)  # type: ignore[attr-defined]
    prunable = index != NONE
    flat = x.flatten(2).mean(2)[:, prunable]
    sums = flat.new_zeros(len(flat), n).index_add(1, index[prunable], flat)
    return sums / index[prunable].bincount(minlength=n).clamp_min(1)


def _unit_maps(site: Site, inputs: dict[str, Tensor]) -> Tensor:
    """[batch, n, height, width]: the units as the first tap reads them; a unit of a flattened map is one row.

    Several channels of one unit, such as those of the groups of a grouped layer, lie below each other.
    """
    tap = site.taps[0]
    x = inputs[tap.layer]  # [batch, positions, height, width]
    index = _unit_of_channels(tap.structure.index, x.shape[1], torch.device("cpu")).numpy()  # type: ignore[attr-defined]
    return group_by_unit(x.transpose(0, 1), index, site.n).permute(2, 0, 1, 3, 4).flatten(2, 3)


def group_by_unit(x: Tensor, index: np.ndarray, n: int) -> Tensor:
    """Gather positions by unit: [positions, ...] -> [n, most positions of a unit, ...]; missing ones are zero."""
    positions = [np.flatnonzero(index == u) for u in range(n)]
    rows = np.full((n, max(map(len, positions))), len(x))
    for u, places in enumerate(positions):
        rows[u, : len(places)] = places
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[torch.as_tensor(rows, device=x.device)]
