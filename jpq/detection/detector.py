"""Detectors: the part that jpq can read, how its channels are ranked, and the way back.

A torchvision detector resizes images, runs a backbone and a head, and then chooses boxes by their values, which no
exported graph can hold. `core` is the backbone with its head, a network like any other, to be traced, pruned,
quantized, rebuilt and exported; `around` puts what became of it back into the detector, which trains and detects as
before.

    part = jpq.detection.detector.core(detector)
    x = jpq.detection.detector.prepared(detector, images)
    network = jpq.trace(part, x)
    sites, boxes_only = jpq.detection.detector.rankable(detector, part, network, jpq.channels(network), x)
    net = jpq.attach(part, network, sites, Ranked, widths, [x], "saliency")
    jpq.detection.detector.rank(net, detector, batches)
    net.settle(jpq.discretize(net, targets))
    small, plan = jpq.rebuild(net, part)
    detector = jpq.detection.detector.around(detector, small)
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
from jpq.detection.saliency import BOXES, SaliencyBatch, rank_everywhere, saliency, utility
from jpq.methods.scores import Score
from jpq.tracing.forward import eval_mode
from jpq.tracing.network import Network
from jpq.tracing.sites import Site
from jpq.types import JpqError

Outputs = Mapping[str, Tensor]  # "cls_logits" [batch, boxes, classes], "bbox_regression" [batch, boxes, 4], ...

Target = Mapping[str, Tensor]  # "boxes" [k, 4], "labels" [k]

Batch = tuple[Sequence[Tensor], Sequence[Target] | None]  # images [3, height, width] in [0, 1], and what they show

Counts = Literal["topk", "assigned"]


class DetectorCore(nn.Module):
    """A detector's backbone and head: [batch, 3, height, width], resized and normalised, to raw outputs per box."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The head's outputs, boxes of all scales one after the other."""
        maps = self.backbone(images)
        return self.head([maps] if isinstance(maps, Tensor) else list(maps.values()))


def core(detector: nn.Module) -> DetectorCore:
    """The part of a one-stage torchvision detector (SSD, SSDlite, RetinaNet, FCOS) that jpq reads; weights are shared.

    Raises JpqError for others.
    """
    _require(detector)
    part = DetectorCore(detector.backbone, detector.head)  # type: ignore[arg-type]
    part.training = detector.training  # the mode of its parts stays as it is
    return part


def _require(detector: nn.Module) -> None:
    if not isinstance(detector, (SSD, RetinaNet, FCOS)):
        raise JpqError(
            f"{type(detector).__name__} is not a one-stage detector of torchvision (SSD, SSDlite, RetinaNet, FCOS), "
            "whose head reads whole maps. Of a two-stage one (Faster R-CNN) prune .backbone with jpq.trace."
        )


def prepared(detector: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """[batch, 3, height, width]: what the core reads when the detector is given these images."""
    _require(detector)
    return _prepared(detector, images, None)[0].tensors


def _prepared(detector: Any, images: Sequence[Tensor], targets: Sequence[Target] | None) -> tuple[Any, Any]:
    return detector.transform(list(images), None if targets is None else [dict(t) for t in targets])


def around(detector: nn.Module, part: Callable[..., Any]) -> nn.Module:
    """The detector with another core in the place of its own; nothing else changes, and `detector` stays as it is.

    Args:
        detector: what the core came from, with its own backbone and head.
        part: a smaller `Core` (the result then is an ordinary torchvision detector, which also trains), a core under
            compression, or its exported file in onnxruntime.
    """
    _require(detector)
    new: Any = copy.copy(detector)
    dense: Any = detector
    new._modules = dict(detector._modules)  # a copied module shares this with the first
    if isinstance(part, DetectorCore):
        new.backbone, new.head = part.backbone, part.head
    else:
        new.backbone = _Maps(part, detector)
        new.head = _Given(new.backbone, dense.head)
    return new


class _Maps(nn.Module):
    """In the place of a backbone: runs the core, and gives empty maps, since anchors look at their sizes only."""

    def __init__(self, part: Callable[..., Any], detector: Any):
        super().__init__()
        self.part = part
        self._dense = [core(detector)]  # in a list: it is not part of what trains
        self._known: dict[tuple[int, int], tuple[list[tuple[int, int]], list[str]]] = {}
        self.outputs: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps without channels; the head's outputs wait in `outputs`."""
        sizes, names = self._sizes(images)
        out = self.part(images)
        named = isinstance(out, Mapping)
        if set(out) != set(names) if named else len(out) != len(names):
            what = ", ".join(map(str, out)) if named else len(out)
            raise JpqError(
                f"What stands in for the core gives {what}; the detector's head "
                f"gives {len(names)} outputs, {', '.join(names)}. Give this detector's core, rebuilt or exported."
            )
        self.outputs = dict(out) if named else dict(zip(names, out, strict=True))
        return OrderedDict((str(i), images.new_empty(len(images), 0, *size)) for i, size in enumerate(sizes))

    def _sizes(self, images: Tensor) -> tuple[list[tuple[int, int]], list[str]]:
        """Sizes of the maps, and names of the outputs, for images of this size."""
        height, width = images.shape[-2:]
        if (height, width) not in self._known:
            dense = self._dense[0]
            with torch.no_grad(), eval_mode(dense):
                maps = dense.backbone(images[:1].to(next(dense.parameters())))
                maps = [maps] if isinstance(maps, Tensor) else list(maps.values())
                sizes = [(int(m.shape[2]), int(m.shape[3])) for m in maps]
                self._known[height, width] = sizes, list(dense.head(maps))
        return self._known[height, width]


class _Given(nn.Module):
    """In the place of a head: gives what the core has computed."""

    def __init__(self, maps: _Maps, dense: nn.Module):
        super().__init__()
        self._held: tuple[_Maps, Any] = (maps, dense)

    def forward(self, maps: Any) -> dict[str, Tensor]:
        """The outputs of the core's last run."""
        return self._held[0].outputs

    def compute_loss(self, *args: Any) -> Any:
        """The dense head's loss of given outputs, which needs none of its weights."""
        return self._held[1].compute_loss(*args)


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


def assigned(detector: nn.Module, images: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """[batch, boxes]: the class of the object that the detector's training assigns each box to; -1 for none.

    Raises JpqError for FCOS, which assigns points instead of boxes.
    """
    _require(detector)
    if isinstance(detector, FCOS):
        raise JpqError('FCOS assigns points to objects, not boxes; use counts="topk".')
    any_detector: Any = detector
    batch, resized = _prepared(detector, images, targets)
    with torch.no_grad(), eval_mode(detector):
        maps = any_detector.backbone(batch.tensors)
    anchors = any_detector.anchor_generator(batch, [maps] if isinstance(maps, Tensor) else list(maps.values()))
    rows = []
    for own, target in zip(anchors, resized, strict=True):
        row = torch.full((len(own),), -1, device=own.device)
        if len(target["boxes"]):
            found = any_detector.proposal_matcher(box_iou(target["boxes"], own))
            row[found >= 0] = target["labels"][found[found >= 0]]
        rows.append(row)
    return torch.stack(rows)


def rankable(
    detector: nn.Module, part: nn.Module, network: Network, sites: Sequence[Site], x: Tensor
) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """(sites that the detector's scores depend on, names of the others, which feed only box outputs and stay).

    x: one batch of prepared images; what they show does not matter.
    """
    found = saliency(part, network, sites, [SaliencyBatch(x[:1], lambda out: utility(confidence(detector, out)))])
    return (
        tuple(site for site in sites if found[site.name] is not None),
        tuple(site.name for site in sites if found[site.name] is None),
    )


def rank(
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
        net: the core, attached with `Ranked` gates on sites that are `rankable`.
        detector: what the core came from.
        batches: images as the detector takes them, with targets where `counts` or `location` need them.
        counts: "topk": the `boxes` best boxes of each image; "assigned": those that training assigns to objects.
        score: `Saliency` unless given; or `CamSaliency`.
        location: count only what lies inside objects.

    Raises JpqError for batches without targets where they are needed, and for sites that only feed box outputs.
    """
    found = saliency(net, net.network, net.sites, scenes(detector, batches, counts, boxes, location), score)
    rank_everywhere(net, found)


def scenes(
    detector: nn.Module, batches: Iterable[Batch], counts: Counts = "topk", boxes: int = BOXES, location: bool = False
) -> Iterator[SaliencyBatch]:
    """What saliency is measured on, batch by batch; see `rank`."""
    _require(detector)
    if counts not in ("topk", "assigned"):
        raise JpqError(f"There is no way '{counts}' to count boxes. Choose topk or assigned.")
    for images, targets in batches:
        if targets is None and (location or counts == "assigned"):
            raise JpqError('location and counts="assigned" look at objects: give batches of (images, targets).')
        batch, resized = _prepared(detector, images, targets)
        labels = assigned(detector, images, targets) if counts == "assigned" and targets is not None else None
        yield SaliencyBatch(
            batch.tensors,
            lambda out, labels=labels: utility(  # type: ignore[misc]
                confidence(detector, out, labels), boxes if labels is None else labels.shape[1]
            ),
            [t["boxes"] for t in resized] if location else None,
        )
