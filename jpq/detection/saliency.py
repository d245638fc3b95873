"""Saliency of channels for detection scores (feature maps times their gradients), and the ranking that it gives.

After J. I. Choi, Q. Tian, "Visual Saliency-Guided Channel Pruning for Deep Visual Detectors in Autonomous Driving",
IEEE Intelligent Vehicles 2023, arXiv:2303.02512. The paper ties a gradient-based saliency to the detections; its
formula is not public, so everything here is a reconstruction in the line of Grad-CAM (Selvaraju et al., ICCV 2017).

| symbol | where | shape |
|---|---|---|
| A, feature map as a layer reads it | `Evidence.activations` | [batch, n, height, width] |
| g = dY/dA | `Evidence.activation_gradients` | [batch, n, height, width] |
| S_d, score of box d before non-maximum suppression | `jpq.detection.detector.confidence` | [batch, boxes] |
| Y, utility of an image's detections | `utility` | scalar |
| I_c, importance of channel c | `Saliency`, `CamSaliency` | [1, n] |

Y uses scores alone: no loss, no suppression, no threshold, and no box coordinates, whose outputs have neither a best
value nor a sign. So a layer that feeds only box outputs has no saliency, which is not the same as a saliency of 0.

A member of a site is one tensor that its taps read, after normalisation and activation; layers that read the same
tensor are one member, with the whole gradient of that tensor. The source is silent about layers that are called several
times (a head on all scales): their maps count as one, with the places of all.

    I^m_c <- I^m_c / (rms(I^m) + 1e-12)      root mean square over all channels c of the tensor m
    I_u    = mean of I^m_c over the members m of the site of u, and over the channels that u stands for

We differ: the root mean square takes the place of a norm, which lowers the values of a layer the more, the more
channels it has, so that one ranking of the network empties its wide layers (`studies/detection.py` measures both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from jpq.allocation.ranking.rank import check_channels, quantiles
from jpq.compression.model import CompressedModel
from jpq.methods.scores.base import Evidence, Score, SiteView
from jpq.tracing.forward import eval_mode, hook_modules
from jpq.tracing.network import Network
from jpq.tracing.sites import Site
from jpq.types import JpqError, Units

LAST_CHANNELS = 8  # channels of each site that are removed last, at least

LAST_SHARE = 0.1  # share of a site's channels that are removed last, at least

EPSILON = 1e-12  # added to a root mean square before it divides

BOXES = 100  # boxes of each image whose scores are summed

BOX_SCALE = 1.1  # factor on the sides of objects' boxes, in the variant that counts only places inside them

TensorKey = tuple[int, int]  # identity and version of a tensor: one that is changed in place is another one


@dataclass(frozen=True, eq=False)
class SaliencyBatch:
    """Prepared images and the scalar utility Y of the model's outputs that pruning should preserve."""

    images: Tensor  # [batch, channels, height, width]
    utility: Callable[[Any], Tensor]  # the model's output -> Y, a sum over the images
    boxes: list[Tensor] | None = None  # [k, 4] of each image: only places of the maps inside them count; None: all


def channel_saliency(
    model: nn.Module,
    network: Network,
    sites: Sequence[Site],
    batches: Iterable[SaliencyBatch],
    score: Score | None = None,
) -> dict[str, Tensor | None]:
    """Saliency of every unit: site -> [n], normalised by layer; None for sites that feed only box outputs.

    Args:
        model: a float model, or the same under compression; it runs in evaluation mode, and is not changed.
        network, sites: the model's trace and pruning groups.
        batches: images and utilities; results are means over all images, however they are batched.
        score: scores the channels of one layer's maps; `Saliency` unless given.

    Raises JpqError without any image, and where a site's reader is no module of its own.
    """
    modules = dict((model.model if isinstance(model, CompressedModel) else model).named_modules())
    consumers = {tap.layer for site in sites for tap in site.taps}
    hooked = {name: modules[name] for name in sorted(consumers & modules.keys())}
    sums: dict[str, Tensor] = {}  # first layer that reads a tensor -> [channels], scores summed over images
    first_reader: dict[str, str] = {}  # layer -> the first layer that reads the same tensors
    images = 0
    for batch in batches:
        reads = _differentiate(model, hooked, batch)
        _check_consumers(consumers, reads)
        first_consumers: dict[tuple[TensorKey, ...], str] = {}  # tensors -> the first layer that reads them
        for name in hooked:
            first_reader[name] = first_consumers.setdefault(tuple(reads.keys[name]), name)
        for name in first_consumers.values():
            values = _layer_scores(name, modules[name], reads, batch, score or Saliency())
            if values is not None:
                sums[name] = sums.get(name, 0) + values * len(batch.images)
        images += len(batch.images)
    if not images:
        raise JpqError("Saliency needs at least one batch of images.")
    return {site.name: _site_scores(site, sums, first_reader, images) for site in sites}


@dataclass
class _LayerReads:
    """Copies of the tensors that layers read in one forward pass, and the gradients of the utility to them."""

    keys: dict[str, list[TensorKey]] = field(default_factory=dict)  # layer -> the tensor of each of its calls
    maps: dict[TensorKey, Tensor] = field(default_factory=dict)
    gradients: dict[TensorKey, Tensor] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)  # keeps the tensors alive, so that their ids stay theirs

    def record(self, name: str, _: nn.Module, x: Tensor | None, __: Any) -> None:
        """Copy the tensor that a layer reads, and store its gradient when the backward pass reaches it."""
        if x is None or not x.requires_grad:
            return
        key = (id(x), x._version)
        self.keys.setdefault(name, []).append(key)
        if key not in self.maps:
            self.tensors.append(x)
            self.maps[key] = x.detach().clone()
            gradients = self.gradients  # not self: it holds x, and a cycle would keep every batch in memory
            x.register_hook(lambda g: gradients.__setitem__(key, g.detach()))


def _differentiate(model: nn.Module, hooked: Mapping[str, nn.Module], batch: SaliencyBatch) -> _LayerReads:
    """Run the model and differentiate the utility by all tensors that layers read; weights get no gradient."""
    reads = _LayerReads()
    with eval_mode(model), hook_modules(hooked, reads.record, before=True), torch.enable_grad():
        image = batch.images.detach().clone().requires_grad_()
        utility_sum = batch.utility(model(image * 1))
        try:
            torch.autograd.grad(utility_sum, image)
        except RuntimeError as error:
            raise JpqError(
                f"The detector's scores cannot be differentiated ({str(error).partition('.')[0]}). Where a layer "
                "changes what another has read, build it with inplace=False."
            ) from error
    return reads


def _check_consumers(consumers: set[str], reads: _LayerReads) -> None:
    """Raise JpqError for a layer that no module computes."""
    missing = consumers - reads.keys.keys()
    if missing:
        raise JpqError(
            f"Saliency needs what layer '{min(missing)}' reads, which no module of its own computes. "
            "Exclude the layers before it (skip in jpq.channels)."
        )


def _layer_scores(name: str, module: Any, reads: _LayerReads, batch: SaliencyBatch, score: Score) -> Tensor | None:
    """[channels]: the score of the tensors that one layer reads; None where the utility does not depend on them."""
    keys = reads.keys[name]
    if not any(key in reads.gradients for key in keys):
        return None
    maps: list[Tensor] = []
    gradients: list[Tensor] = []
    for key in keys:
        a = reads.maps[key]
        g = reads.gradients.get(key, torch.zeros_like(a))
        if batch.boxes is not None and module.weight.dim() == 4:
            height, width = batch.images.shape[-2:]
            a = a * object_mask(batch.boxes, (height, width), (a.shape[2], a.shape[3])).to(a)
        maps.append(_flatten_places(a, module))
        gradients.append(_flatten_places(g, module))
    a, g = torch.cat(maps, 2), torch.cat(gradients, 2)
    view = SiteView(name, module.weight.detach().new_empty(a.shape[1], 0))
    return score(view, Evidence(a, activation_gradients=g))[0].detach()


def _flatten_places(x: Tensor, module: Any) -> Tensor:
    """[batch, channels, places, 1]: a map with all its places on one dim; linear layers have channels last."""
    x = x.movedim(-1 if module.weight.dim() == 2 else 1, 1)
    places = x[0].numel() // x.shape[1]
    return x.reshape(len(x), -1, places, 1)


def _site_scores(site: Site, sums: Mapping[str, Tensor], first_reader: Mapping[str, str], images: int) -> Tensor | None:
    """[n]: I_u of one site's units; None where the utility depends on none of its members."""
    members: dict[str, Tensor] = {}
    for tap in site.taps:
        name = first_reader[tap.layer]
        if name not in sums or name in members:
            continue
        values = sums[name].cpu() / images
        values = values / (values.square().mean().sqrt() + EPSILON)
        axis: Any = tap.structure
        index = np.tile(axis.index, len(values) // len(axis.index))  # the same channels of each group
        members[name] = torch.stack([values[np.flatnonzero(index == u)].mean() for u in range(site.n)])
    return torch.stack(list(members.values())).mean(0) if members else None


def rank_network(net: CompressedModel, values: Mapping[str, Tensor | None], floor: int = LAST_CHANNELS) -> None:
    """Write one ranking of all units of the network into the margins of its gates.

    A unit's margin is the share of all units whose value is no larger. The best `floor` units of each site, or a tenth
    of them where that is more, are removed only after all others.

    Args:
        net: attached with `Ranked` gates.
        values: site -> [n], comparable between sites (`channel_saliency`).

    Raises JpqError for sites without a value, and where units are not channels.
    """
    check_channels(net)
    missing = [site.name for site in net.sites if values.get(site.name) is None]
    if missing:
        raise JpqError(
            f"Nothing ranks {len(missing)} sites, such as '{missing[0]}': they feed only box outputs. Leave them out "
            "of what is attached (jpq.detection.rankable_sites)."
        )
    scores = [v for site in net.sites if (v := values[site.name]) is not None]
    if not scores:
        return
    places = quantiles(torch.cat(scores)).split([len(v) for v in scores])
    for gate, site_scores, place in zip(net.gates, scores, places, strict=True):
        protected = max(floor, round(LAST_SHARE * len(site_scores)))
        best = site_scores.argsort(descending=True, stable=True)[:protected]
        margins = place.clone()
        margins[best] += 1
        gate.margins.copy_(margins[None])


def utility(scores: Tensor, boxes: int = BOXES) -> Tensor:
    """Y: the sum of the `boxes` largest scores of each image, over the batch; images do not mix in its gradient.

    scores: [batch, boxes of all scales together], 0 for boxes that do not count.
    """
    return scores.topk(min(boxes, scores.shape[1]), 1).values.sum()


class Saliency(Score):
    """Saliency of a channel: I_c = mean over images of sum_ij |g_c,ij A_c,ij| / (height width).

    An upper bound, over the map, of |first-order change of Y| when the channel is set to 0; equal to it where all terms
    have one sign. Values of different layers must be normalised before they are compared (`channel_saliency`).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"activations", "activation_gradients"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`: the saliency of each channel."""
        a, g = _maps_and_gradients(site, evidence)
        return (g * a).abs().mean((2, 3)).mean(0)[None]


class CamSaliency(Score):
    """Grad-CAM variant: I_c = mean over images of sum_ij |w_c A_c,ij| / (height width), w_c = mean_ij max(g_c,ij, 0).

    Grad-CAM's weight of a map, of positive gradients only (as in Grad-CAM++).
    """

    needs: ClassVar[frozenset[str]] = Saliency.needs

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`: the saliency of each channel."""
        a, g = _maps_and_gradients(site, evidence)
        return (g.relu().mean((2, 3)) * a.abs().mean((2, 3))).mean(0)[None]


def _maps_and_gradients(site: SiteView, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """(A, g), each [images, channels, height, width]. Raises JpqError where the evidence has none."""
    a, g = evidence.activations, evidence.activation_gradients
    if a is None or g is None:
        raise JpqError(
            f"Saliency needs feature maps and what a detector's scores gain by them; '{site.name}' has none. "
            "Rank with jpq.detection.rank_channels, or choose another score."
        )
    return a, g


def object_mask(boxes: list[Tensor], image: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Mask of a map's places at objects: [images, 1, *size], 1 where a place overlaps a box grown by a tenth, else 0.

    For the variant that counts only places at objects, the idea of the authors' follow-up, Saliency and location
    aware pruning of deep visual detectors for autonomous driving, 2025.

    Args:
        boxes: [k, 4] for each image: x1, y1, x2, y2 in pixels.
        image, size: (height, width) of the images and of the map.
    """
    mask = torch.zeros(len(boxes), 1, *size)
    steps = torch.tensor([image[1] / size[1], image[0] / size[0]])  # pixels per place of the map: x, y
    for image_mask, corners in zip(mask, boxes, strict=True):
        for box in corners.cpu():
            middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * BOX_SCALE
            low = ((middle - half) / steps).floor().long().clamp_min(0)
            high = ((middle + half) / steps).ceil().long()
            image_mask[0, low[1] : high[1], low[0] : high[0]] = 1
    return mask
