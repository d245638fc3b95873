"""Which units a detector's scores depend on: feature maps times their gradients, from layers to sites to a ranking.

A member of a site is one tensor that its taps read, after normalisation and activation; layers that read the same
tensor are one member, with the whole gradient of that tensor. The source is silent about layers that are called several
times (a head on all scales): their maps count as one, with the places of all.

    I^m_c <- I^m_c / (rms(I^m) + 1e-12)      root mean square over all channels c of the tensor m
    I_u    = mean of I^m_c over the members m of the site of u, and over the channels that u stands for

The root mean square takes the place of a norm: that falls on channels the harder, the more a layer has of them, so one
ranking of the network empties its wide layers (`studies/detection.py` measures both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from jpq.allocation.ranking.rank import quantiles, require_channels
from jpq.compression.model import CompressedModel
from jpq.methods.scores.base import Evidence, Score, SiteView
from jpq.tracing.forward import eval_mode, hook_modules
from jpq.tracing.network import Network
from jpq.tracing.sites import Site
from jpq.types import JpqError, Units

FLOOR = 8  # channels of each site that go last

SHARE = 0.1  # of a site's channels, that go last

TINY = 1e-12

BOXES = 100  # of each image, whose scores are summed
GROWN = 1.1  # objects' boxes, in the variant that looks inside them only


@dataclass(frozen=True, eq=False)
class SaliencyBatch:
    """One batch, and what is to be kept about it."""

    images: Tensor  # [batch, channels, height, width]
    utility: Callable[[Any], Tensor]  # the model's output -> Y, a sum over the images
    boxes: list[Tensor] | None = None  # [k, 4] of each image: only what lies inside them counts


@dataclass
class _Pass:
    """What layers read in one forward pass."""

    names: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # layer -> the tensor of each call
    maps: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)  # so that no other tensor gets their ids

    def note(self, name: str, _: nn.Module, x: Tensor | None, __: Any) -> None:
        """Copy what a layer reads, and wait for its gradient."""
        if x is None or not x.requires_grad:
            return
        key = (id(x), x._version)  # a tensor that is changed in place is another one
        self.names.setdefault(name, []).append(key)
        if key not in self.maps:
            self.held.append(x)
            self.maps[key] = x.detach().clone()
            gradients = self.gradients  # not self: it holds x, and a cycle would keep every batch in memory
            x.register_hook(lambda g: gradients.__setitem__(key, g.detach()))


def saliency(
    model: nn.Module,
    network: Network,
    sites: Sequence[Site],
    scenes: Iterable[SaliencyBatch],
    score: Score | None = None,
) -> dict[str, Tensor | None]:
    """Site -> [n], normalised by layer; None for sites on which the utility does not depend (they feed only boxes).

    Args:
        model: a network, or that network under compression; it runs in evaluation mode, and is not changed.
        network, sites: of that model.
        scenes: the images; results are means over all of them, however they are batched.
        score: of one layer's maps; `Saliency` unless given.

    Raises JpqError without any image, and where a site's reader is no module of its own.
    """
    modules = dict((model.model if isinstance(model, CompressedModel) else model).named_modules())
    readers = {tap.layer for site in sites for tap in site.taps}
    listened = {name: modules[name] for name in sorted(readers & modules.keys())}
    sums: dict[str, Tensor] = {}
    member: dict[str, str] = {}  # layer -> the first layer that reads the same
    images = 0
    for scene in scenes:
        seen = _Pass()
        with eval_mode(model), hook_modules(listened, seen.note, before=True), torch.enable_grad():
            _backward(model, scene)
        lost = readers - seen.names.keys()
        if lost:
            raise JpqError(
                f"Saliency needs what layer '{min(lost)}' reads, which no module of its own computes. "
                "Exclude the layers before it (skip in jpq.channels)."
            )
        first: dict[tuple[tuple[int, int], ...], str] = {}
        for name in listened:
            member[name] = first.setdefault(tuple(seen.names[name]), name)
        for name in first.values():
            values = _of_layer(name, modules[name], seen, scene, score or Saliency())
            if values is not None:
                sums[name] = sums.get(name, 0) + values * len(scene.images)
        images += len(scene.images)
    if not images:
        raise JpqError("Saliency needs at least one batch of images.")
    return {site.name: _of_site(site, sums, member, images) for site in sites}


def _backward(model: nn.Module, scene: SaliencyBatch) -> None:
    """Gradients of the utility to everything between it and the images; weights get none."""
    image = scene.images.detach().clone().requires_grad_()
    wanted = scene.utility(model(image * 1))
    try:
        torch.autograd.grad(wanted, image)
    except RuntimeError as error:
        raise JpqError(
            f"The detector's scores cannot be differentiated ({str(error).partition('.')[0]}). Where a layer changes "
            "what another has read, build it with inplace=False."
        ) from error


def _of_layer(name: str, module: Any, seen: _Pass, scene: SaliencyBatch, score: Score) -> Tensor | None:
    """[channels]: the score of what one layer reads; None where the utility does not depend on it."""
    keys = seen.names[name]
    if not any(key in seen.gradients for key in keys):
        return None
    maps: list[Tensor] = []
    gradients: list[Tensor] = []
    for key in keys:
        a = seen.maps[key]
        g = seen.gradients.get(key, torch.zeros_like(a))
        if scene.boxes is not None and module.weight.dim() == 4:
            height, width = scene.images.shape[-2:]
            a = a * inside(scene.boxes, (height, width), (a.shape[2], a.shape[3])).to(a)
        for parts, x in ((maps, a), (gradients, g)):
            parts.append(x.movedim(-1 if module.weight.dim() == 2 else 1, 1).reshape(len(x), -1, _places(x, module), 1))
    a, g = torch.cat(maps, 2), torch.cat(gradients, 2)
    view = SiteView(name, module.weight.detach().new_empty(a.shape[1], 0))
    return score(view, Evidence(a, activation_gradients=g))[0].detach()


def _places(x: Tensor, module: Any) -> int:
    """Places of a map: all numbers of a sample over its channels."""
    return x[0].numel() // x.shape[-1 if module.weight.dim() == 2 else 1]


def _of_site(site: Site, sums: Mapping[str, Tensor], member: Mapping[str, str], images: int) -> Tensor | None:
    found: dict[str, Tensor] = {}
    for tap in site.taps:
        name = member[tap.layer]
        if name not in sums or name in found:
            continue
        values = sums[name].cpu() / images
        values = values / (values.square().mean().sqrt() + TINY)
        axis: Any = tap.structure
        index = np.tile(axis.index, len(values) // len(axis.index))  # the same channels of each group
        found[name] = torch.stack([values[np.flatnonzero(index == u)].mean() for u in range(site.n)])
    return torch.stack(list(found.values())).mean(0) if found else None


def rank_everywhere(net: CompressedModel, values: Mapping[str, Tensor | None], floor: int = FLOOR) -> None:
    """Set the margin of every unit to the share of all units of the network that are worth no more.

    The best `floor` units of each site, or `SHARE` of them where that is more, go only when all others have gone.

    Args:
        net: attached with `Ranked` gates.
        values: site -> [n], comparable between sites (`saliency`).

    Raises JpqError for sites without a value, and where units are not channels.
    """
    require_channels(net)
    missing = [site.name for site in net.sites if values.get(site.name) is None]
    if missing:
        raise JpqError(
            f"Nothing ranks {len(missing)} sites, such as '{missing[0]}': they feed only box outputs. Leave them out "
            "of what is attached (jpq.detection.detector.rankable)."
        )
    scores = [v for site in net.sites if (v := values[site.name]) is not None]
    if not scores:
        return
    for gate, own, place in zip(
        net.gates, scores, quantiles(torch.cat(scores)).split([len(v) for v in scores]), strict=True
    ):
        last = own.argsort(descending=True, stable=True)[: max(floor, round(SHARE * len(own)))]
        margins = place.clone()
        margins[last] += 1
        gate.margins.copy_(margins[None])


def utility(scores: Tensor, boxes: int = BOXES) -> Tensor:
    """Y, summed over the batch, so that every image has its own gradient: its `boxes` largest scores.

    scores: [batch, boxes of all scales together], 0 for boxes that do not count.
    """
    return scores.topk(min(boxes, scores.shape[1]), 1).values.sum()


class Saliency(Score):
    """I_c = mean over images of sum_ij |g_c,ij A_c,ij| / (height width).

    An upper bound, over the map, of |first-order change of Y| when the channel is set to 0; equal to it where all terms
    have one sign. Values of different layers must be normalised before they are compared (`allocators.salient`).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"activations", "activation_gradients"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`."""
        a, g = _maps(site, evidence)
        return (g * a).abs().mean((2, 3)).mean(0)[None]


class CamSaliency(Score):
    """I_c = mean over images of sum_ij |w_c A_c,ij| / (height width), with w_c = mean_ij max(g_c,ij, 0).

    Grad-CAM's weight of a map, of positive gradients only (as in Grad-CAM++).
    """

    needs: ClassVar[frozenset[str]] = Saliency.needs

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`."""
        a, g = _maps(site, evidence)
        return (g.relu().mean((2, 3)) * a.abs().mean((2, 3))).mean(0)[None]


def _maps(site: SiteView, evidence: Evidence) -> tuple[Tensor, Tensor]:
    a, g = evidence.activations, evidence.activation_gradients
    if a is None or g is None:
        raise JpqError(
            f"Saliency needs feature maps and what a detector's scores gain by them; '{site.name}' has none. "
            "Rank with jpq.detection.detector.rank, or choose another score."
        )
    return a, g


def inside(boxes: list[Tensor], image: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[images, 1, *size], 1 where a place of the map overlaps an object's box, grown by a tenth; else 0.

    The variant that ranks by what happens at the objects: the idea of the authors' follow-up, Saliency and location
    aware pruning of deep visual detectors for autonomous driving, 2025.

    Args:
        boxes: [k, 4] for each image, x1, y1, x2, y2 in pixels; image: its (height, width); size: of the map.
    """
    out = torch.zeros(len(boxes), 1, *size)
    steps = torch.tensor([image[1] / size[1], image[0] / size[0]])  # pixels that a place stands for: x, y
    for here, corners in zip(out, boxes, strict=True):
        for box in corners.cpu():
            middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * GROWN
            first = ((middle - half) / steps).floor().long().clamp_min(0)
            last = ((middle + half) / steps).ceil().long()
            here[0, first[1] : last[1], first[0] : last[0]] = 1
    return out
