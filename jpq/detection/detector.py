"""Compression of torchvision's one-stage detectors: take out backbone and head, rank their channels, put them back.

A torchvision detector resizes images, runs a backbone and a head, and then chooses boxes by their values, which no
exported graph can hold. The core (backbone and head) is a network like any other: it can be traced, pruned, quantized,
rebuilt and exported. `reassemble_detector` puts the smaller core back into the detector, which trains and detects as
before.

    core = jpq.detection.extract_core(detector)
    x = jpq.detection.prepare_images(detector, images)
    network = jpq.trace(core, x)
    sites, boxes_only = jpq.detection.rankable_sites(detector, core, network, jpq.channels(network), x)
    net = jpq.attach(core, network, sites, Ranked, widths, [x], "saliency")
    jpq.detection.rank_channels(net, detector, batches)
    net.freeze(jpq.discretize(net, targets))
    small, plan = jpq.rebuild(net, core)
    detector = jpq.detection.reassemble_detector(detector, small)
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from jpq.compression.model import CompressedModel
from jpq.detection.saliency import BOXES, SaliencyBatch, channel_saliency, rank_network, utility
from jpq.methods.scores import Score
from jpq.tasks.detectors import DetectorCore as DetectorCore
from jpq.tasks.detectors import feature_maps
from jpq.tracing.forward import eval_mode
from jpq.tracing.network import Network
from jpq.tracing.sites import Site
from jpq.types import JpqError

Outputs = Mapping[str, Tensor]  # "cls_logits" [batch, boxes, classes], "bbox_regression" [batch, boxes, 4], ...

Target = Mapping[str, Tensor]  # "boxes" [k, 4], "labels" [k]

Batch = tuple[Sequence[Tensor], Sequence[Target] | None]  # images [3, height, width] in [0, 1], and their objects

Counts = Literal["topk", "assigned"]  # which boxes of an image count


def extract_core(detector: nn.Module) -> DetectorCore:
    """Take the core out of a one-stage torchvision detector (SSD, SSDlite, RetinaNet, FCOS); weights are shared.

    Raises JpqError for others.
    """
    _check_one_stage(detector)
    core = DetectorCore(detector.backbone, detector.head)  # type: ignore[arg-type]
    core.training = detector.training  # the mode of its parts stays as it is
    return core


def _check_one_stage(detector: nn.Module) -> None:
    """Raise JpqError for a module that is not a one-stage detector."""
    if not isinstance(detector, (SSD, RetinaNet, FCOS)):
        raise JpqError(
            f"{type(detector).__name__} is not a one-stage detector of torchvision (SSD, SSDlite, RetinaNet, FCOS), "
            "whose head reads whole maps. Of a two-stage one (Faster R-CNN) prune .backbone: docs/detectors.md."
        )


def prepare_images(detector: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Resize, normalise and batch images as the detector does: [batch, 3, height, width], the core's input."""
    _check_one_stage(detector)
    return _transform(detector, images, None)[0].tensors


def _transform(detector: Any, images: Sequence[Tensor], targets: Sequence[Target] | None) -> tuple[Any, Any]:
    """(torchvision's ImageList, targets with boxes scaled like the images)."""
    return detector.transform(list(images), None if targets is None else [dict(t) for t in targets])


def rankable_sites(
    detector: nn.Module, core: nn.Module, network: Network, sites: Sequence[Site], x: Tensor
) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """(sites that the detection scores depend on, names of the others, which feed only box outputs and stay).

    x: one batch of prepared images; their content does not matter.
    """
    batch = SaliencyBatch(x[:1], lambda outputs: utility(confidence(detector, outputs)))
    values = channel_saliency(core, network, sites, [batch])
    return (
        tuple(site for site in sites if values[site.name] is not None),
        tuple(site.name for site in sites if values[site.name] is None),
    )


def rank_channels(
    net: CompressedModel,
    detector: nn.Module,
    batches: Iterable[Batch],
    *,
    counts: Counts = "topk",
    boxes: int = BOXES,
    score: Score | None = None,
    location: bool = False,
) -> None:
    """Rank all channels of a detector's core by saliency in one ranking of the whole network, for `jpq.discretize`.

    Args:
        net: the core, attached with `Ranked` gates on its `rankable_sites`.
        detector: the detector that the core was taken from.
        batches: images as the detector takes them, with targets where `counts` or `location` need them.
        counts: "topk": the `boxes` best boxes of each image; "assigned": those that training assigns to objects.
        score: `Saliency` unless given; or `CamSaliency`.
        location: count only places of the maps that lie inside objects.

    Raises JpqError for batches without targets where they are needed, and for sites that only feed box outputs.
    """
    samples = prepare_saliency_batches(detector, batches, counts, boxes, location)
    rank_network(net, channel_saliency(net, net.network, net.sites, samples, score))


def prepare_saliency_batches(
    detector: nn.Module, batches: Iterable[Batch], counts: Counts = "topk", boxes: int = BOXES, location: bool = False
) -> Iterator[SaliencyBatch]:
    """Prepared images with the utility that their saliency is measured by; arguments as `rank_channels` has them."""
    _check_one_stage(detector)
    if counts not in ("topk", "assigned"):
        raise JpqError(f"There is no way '{counts}' to count boxes. Choose topk or assigned.")
    for images, targets in batches:
        if targets is None and (location or counts == "assigned"):
            raise JpqError('location and counts="assigned" look at objects: give batches of (images, targets).')
        batch, resized = _transform(detector, images, targets)
        labels = assigned_labels(detector, images, targets) if counts == "assigned" and targets is not None else None
        yield SaliencyBatch(
            batch.tensors,
            lambda outputs, labels=labels: utility(  # type: ignore[misc]
                confidence(detector, outputs, labels), boxes if labels is None else labels.shape[1]
            ),
            [t["boxes"] for t in resized] if location else None,
        )


def confidence(detector: nn.Module, outputs: Outputs, labels: Tensor | None = None) -> Tensor:
    """S_d, [batch, boxes] in [0, 1]: the score of each box's best class, or of its class in `labels`.

    SSD: probability of a class that is not background. RetinaNet: sigmoid of a class. FCOS: times the sigmoid of its
    centre-ness, as an objectness (torchvision ranks by the root of that).

    Args:
        labels: [batch, boxes], the class of the object that a box is assigned to; boxes without one (-1) have score 0.
    """
    logits = outputs["cls_logits"]
    if isinstance(detector, SSD):
        scores = torch.cat([torch.zeros_like(logits[..., :1]), logits.softmax(-1)[..., 1:]], -1)
    else:
        scores = logits.sigmoid()
    if "bbox_ctrness" in outputs:
        scores = scores * outputs["bbox_ctrness"].sigmoid()
    if labels is None:
        return scores.amax(-1)
    return scores.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels >= 0)


def assigned_labels(detector: nn.Module, images: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """[batch, boxes]: the class of the object that the detector's training assigns each box to; -1 for none.

    Raises JpqError for FCOS, which assigns points instead of boxes.
    """
    _check_one_stage(detector)
    if isinstance(detector, FCOS):
        raise JpqError('FCOS assigns points to objects, not boxes; use counts="topk".')
    any_detector: Any = detector
    batch, resized = _transform(detector, images, targets)
    with torch.no_grad(), eval_mode(detector):
        maps = feature_maps(any_detector.backbone, batch.tensors)
    rows = []
    for anchors, target in zip(any_detector.anchor_generator(batch, maps), resized, strict=True):
        row = torch.full((len(anchors),), -1, device=anchors.device)
        if len(target["boxes"]):
            objects = any_detector.proposal_matcher(box_iou(target["boxes"], anchors))  # index; negative for none
            row[objects >= 0] = target["labels"][objects[objects >= 0]]
        rows.append(row)
    return torch.stack(rows)


def reassemble_detector(detector: nn.Module, core: Callable[..., Any]) -> nn.Module:
    """Build a detector with another core in the place of its own; all else is shared, and `detector` is not changed.

    Args:
        detector: the detector that the core was taken from, with its own backbone and head.
        core: a smaller `DetectorCore` (the result then is an ordinary torchvision detector, which also trains), a core
            under compression, or its exported file in onnxruntime.
    """
    _check_one_stage(detector)
    new: Any = copy.copy(detector)
    dense: Any = detector
    new._modules = dict(detector._modules)  # `copy.copy` shares this dict between both modules
    if isinstance(core, DetectorCore):
        new.backbone, new.head = core.backbone, core.head
    else:
        new.backbone = _CoreAsBackbone(core, detector)
        new.head = _CoreOutputs(new.backbone, dense.head)
    return new


class _CoreAsBackbone(nn.Module):
    """Stand-in for a backbone that runs the whole core and gives empty maps, since anchors need only their sizes."""

    def __init__(self, part: Callable[..., Any], detector: Any):
        super().__init__()
        self.part = part
        self._dense = [extract_core(detector)]  # in a list: no submodule, so it is neither trained nor saved
        self._known: dict[tuple[int, int], tuple[list[tuple[int, int]], list[str]]] = {}
        self.outputs: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps without channels; the head's outputs wait in `outputs`."""
        sizes, names = self._sizes(images)
        out = self.part(images)
        named = isinstance(out, Mapping)
        if set(out) != set(names) if named else len(out) != len(names):
            received = ", ".join(map(str, out)) if named else len(out)
            raise JpqError(
                f"What stands in for the core gives {received}; the detector's head "
                f"gives {len(names)} outputs, {', '.join(names)}. Give this detector's core, rebuilt or exported."
            )
        self.outputs = dict(out) if named else dict(zip(names, out, strict=True))
        return OrderedDict((str(i), images.new_empty(len(images), 0, *size)) for i, size in enumerate(sizes))

    def _sizes(self, images: Tensor) -> tuple[list[tuple[int, int]], list[str]]:
        """(height and width of each map, names of the head's outputs) for images of this size."""
        height, width = images.shape[-2:]
        if (height, width) not in self._known:
            dense = self._dense[0]
            with torch.no_grad(), eval_mode(dense):
                maps = feature_maps(dense.backbone, images[:1].to(next(dense.parameters())))
                sizes = [(int(m.shape[2]), int(m.shape[3])) for m in maps]
                self._known[height, width] = sizes, list(dense.head(maps))
        return self._known[height, width]


class _CoreOutputs(nn.Module):
    """Stand-in for a head that gives the outputs which the core has computed already."""

    def __init__(self, maps: _CoreAsBackbone, dense: nn.Module):
        super().__init__()
        self._held: tuple[_CoreAsBackbone, Any] = (maps, dense)  # in a tuple: no submodules

    def forward(self, maps: Any) -> dict[str, Tensor]:
        """The outputs of the core's last run."""
        return self._held[0].outputs

    def compute_loss(self, *args: Any) -> Any:
        """The dense head's loss of these outputs, which needs none of its weights."""
        return self._held[1].compute_loss(*args)
