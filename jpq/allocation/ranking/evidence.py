"""What scores ask for, collected from the network as it stands, one record for each site.

Gradients are of gates that multiply the units where each layer has read and quantized them: the network's own gates at
1, one for each sample. What a gate closes is exactly what its readers lose, whatever their widths.
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

from jpq.allocation.ranking.neighbour_norms import Chains, batch_scales, norm_scales
from jpq.compression.model import CompressedModel
from jpq.methods.scores import Chain, Evidence
from jpq.tracing.forward import call_model, eval_mode, hook_modules
from jpq.tracing.sites import Site, Tap, dropped
from jpq.types import NONE, JpqError

Batches = Iterable[tuple[Any, Tensor | None]]  # (inputs, labels)

Loss = Callable[[Any, Tensor], Tensor]  # (output, labels) -> the batch's mean loss

LABELLED = frozenset({"labels", "gradients", "curvature"})


def collect(net: CompressedModel, needs: Collection[str], batches: Batches, count: int, loss: Loss) -> list[Evidence]:
    """The evidence of each site of `net`, from the first `count` batches.

    Raises JpqError where there are no batches, no labels and some are needed, and for layers that cannot be heard.
    """
    pairs = list(islice(batches, count)) if set(needs) & {*LABELLED, "activations", "means", "chain"} else []
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise JpqError("Evidence is batches of (inputs, classes): give jpq.compress evidence=[(inputs, classes), ...].")
    labelled = set(needs) & LABELLED
    if labelled and any(y is None for _, y in pairs):
        raise JpqError(
            "This score needs labels: give jpq.compress evidence=[(inputs, classes), ...], training batches."
        )
    if not pairs and set(needs) - {"scales", "generator"}:
        raise JpqError("This score needs batches of training data, and there are none.")
    maps, means = _heard(net, [x for x, _ in pairs], needs)
    gradients, curvature = [], []
    for x, y in pairs if "gradients" in needs else []:
        first, second = gate_gradients(net, x, y, loss, "curvature" in needs)
        gradients.append(first)
        curvature.append(second)
    labels = torch.cat([y for _, y in pairs if y is not None]) if labelled and pairs else None
    chains = Chains(net, batch_scales(net, pairs[0][0]), dead(net)) if "chain" in needs else None
    draw = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    return [
        Evidence(
            activations=maps.get(site.name),
            means=means.get(site.name),
            labels=labels,
            gradients=tuple(g[i] for g in gradients),
            curvature=tuple(h[i] for h in curvature if h),
            scales=norm_scales(net, site) if "scales" in needs else None,
            chain=Chain(*chains.of(site)) if chains else None,
            generator=draw,
        )
        for i, site in enumerate(net.sites)
    ]


def dead(net: CompressedModel) -> set[int]:
    """Channel classes that every gate on them has closed in the last draw."""
    pairs = zip(net.sites, net.draws, strict=True)
    kept = {s.name: [True] * s.n if d.z is None else (d.z[0] != 0).tolist() for s, d in pairs}
    return dropped(net.sites, kept)


def gate_gradients(
    net: CompressedModel, x: Any, labels: Tensor | None, loss: Loss, curvature: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """(dL_n/dz of each sample's own loss, `[samples, n]` a site; d2L/dz2 of the mean loss, `[n]` a site, or nothing).

    In evaluation mode. Where a layer reads its samples in another layout (windows, sequence first), only the sum over
    the samples is right, which is all that most scores use.
    """
    if labels is None:
        raise JpqError("Gradients of gates need labels.")
    like = next(net.parameters())
    samples = len(labels)
    gates = [like.new_ones(samples, site.n).requires_grad_() for site in net.sites]
    kernels = sdpa_kernel(SDPBackend.MATH) if curvature else nullcontext()  # others have no second derivative
    with torch.enable_grad(), eval_mode(net), frozen(net), multiplied(net, gates), kernels:
        scores = call_model(net.model, x)
        try:
            out = loss(scores, labels)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise JpqError(
                f"This score cannot have its loss from what the model gives and these labels ({reason}). It needs one "
                "tensor of class scores, and classes as whole numbers from 0."
            ) from error
        first = torch.autograd.grad(out, gates, create_graph=curvature)
        second = [_diagonal(g, z) for g, z in zip(first, gates, strict=True)] if curvature else []
    return [g.detach() * samples for g in first], second


def _diagonal(gradient: Tensor, gate: Tensor) -> Tensor:
    """`[n]`: second derivatives for the gate that all samples share, one backward pass for each unit."""
    if not gradient.requires_grad:  # the loss is linear in these gates
        return torch.zeros_like(gate[0])
    return torch.stack(
        [
            torch.autograd.grad(gradient[:, u].sum(), gate, retain_graph=True)[0][:, u].sum()
            for u in range(gate.shape[1])
        ]
    )


@contextmanager
def frozen(net: CompressedModel) -> Iterator[None]:
    """No parameter gets a gradient meanwhile."""
    held = [p for p in net.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


@contextmanager
def multiplied(net: CompressedModel, gates: Sequence[Tensor]) -> Iterator[None]:
    """Every layer reads each site's units times its gate, `[samples, n]`, behind the layer's quantizer."""
    taps: dict[str, list[tuple[Tensor, Tap]]] = {}
    for site, gate in zip(net.sites, gates, strict=True):
        for tap in site.taps:
            taps.setdefault(tap.layer, []).append((gate, tap))
    met: set[str] = set()
    handles = []
    for name, cuts in taps.items():
        layer = net.layer(name)
        if layer is None:
            continue
        dim = net.network.layer(name).kind.channel_dim

        def scaled(x: Tensor, name: str = name, cuts: Any = cuts, dim: int = dim) -> Tensor:
            met.add(name)
            for gate, tap in cuts:
                x = x * _broadcast(gate, tap.structure.index, x, dim)
            return x

        if hasattr(layer, "input_quant"):
            handles.append(layer.input_quant.register_forward_hook(lambda _, __, out, f=scaled: f(out)))
        else:
            handles.append(layer.register_forward_pre_hook(lambda _, args, f=scaled: (f(args[0]), *args[1:])))
    try:
        yield
        _require_heard(set(taps) - met)
    finally:
        for handle in handles:
            handle.remove()


def _broadcast(gate: Tensor, index: np.ndarray, x: Tensor, dim: int) -> Tensor:
    """The gates of x's channels, with x's number of dims."""
    samples, n = gate.shape
    rows = x.shape[0]
    z = gate.repeat_interleave(rows // samples, 0) if rows % samples == 0 else gate.mean(0, keepdim=True)
    at = _channels(index, x.shape[dim], x.device)
    z = torch.cat([z, z.new_ones(len(z), 1)], 1)[:, torch.where(at == NONE, n, at)]
    shape = [1] * x.dim()
    shape[0], shape[dim] = len(z), -1
    return z.reshape(shape).to(x.dtype)


def _require_heard(lost: Collection[str]) -> None:
    if lost:
        raise JpqError(
            f"This score needs what layer '{min(lost)}' reads, which no module of its own computes. "
            "Choose another --score, or exclude the layers before it with --skip."
        )


@torch.no_grad()
def _heard(
    net: CompressedModel, batches: Sequence[Any], needs: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(site -> maps of the first batch, site -> means of all batches), as the layers read the units."""
    if not set(needs) & {"activations", "means"} or not net.sites:
        return {}, {}
    every = "means" in needs
    names = {tap.layer for site in net.sites for tap in (site.taps if every else site.taps[:1])}
    names |= {tap.layer for site in net.sites for tap in site.taps}
    layers = {name: layer for name in names if (layer := net.layer(name)) is not None}
    maps: dict[str, Any] = {}
    means: dict[str, list[Tensor]] = {site.name: [] for site in net.sites}
    for batch in batches if every else batches[:1]:
        seen: dict[str, Tensor] = {}

        def keep(name: str, layer: nn.Module, x: Any, _: Any, seen: dict[str, Tensor] = seen) -> None:
            x = x.detach().movedim(-1 if layer.weight.dim() == 2 else 1, 1)  # type: ignore[operator]
            seen[name] = x.reshape(*x.shape, *[1] * (4 - x.dim())).flatten(3)

        with eval_mode(net), hook_modules(layers, keep):
            call_model(net.model, batch)
        _require_heard(names - seen.keys())
        for site in net.sites:
            if not maps.get(site.name, ()) and "activations" in needs:
                maps[site.name] = _maps(site, seen)
            if every:
                means[site.name].append(torch.stack([_means(tap, seen[tap.layer], site.n) for tap in site.taps]))
    return maps, {name: torch.cat(parts, 1) for name, parts in means.items()} if every else {}


def _channels(index: np.ndarray, channels: int, device: torch.device) -> Tensor:
    """The unit of each channel that a layer reads: every group of a grouped layer reads the same."""
    return torch.as_tensor(index, device=device).repeat(channels // len(index))


def _means(tap: Tap, x: Tensor, n: int) -> Tensor:
    """[samples, n]: mean of each unit over all places where one layer reads it."""
    index = _channels(tap.structure.index, x.shape[1], x.device)  # type: ignore[attr-defined]
    held = index != NONE
    flat = x.flatten(2).mean(2)[:, held]
    sums = flat.new_zeros(len(flat), n).index_add(1, index[held], flat)
    return sums / index[held].bincount(minlength=n).clamp_min(1)


def _maps(site: Site, seen: dict[str, Tensor]) -> Tensor:
    """[batch, n, height, width]: the units as the first tap reads them; a flattened unit is one row."""
    tap = site.taps[0]
    x = seen[tap.layer]  # [batch, positions, height, width]
    index: np.ndarray = tap.structure.index  # type: ignore[attr-defined]
    return of_units(x.transpose(0, 1), index, site.n).permute(2, 0, 1, 3, 4).flatten(2, 3)


def of_units(x: Tensor, index: np.ndarray, n: int) -> Tensor:
    """[positions, ...] -> [n, most positions of a unit, ...], zeros where a unit has fewer."""
    held = [np.flatnonzero(index == u) for u in range(n)]
    at = np.full((n, max(map(len, held))), len(x))
    for u, places in enumerate(held):
        at[u, : len(places)] = places
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[torch.as_tensor(at, device=x.device)]
