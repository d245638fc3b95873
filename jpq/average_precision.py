"""How good detections are: average precision, the area under precision over recall.

    AP_k(t)  = integral over recall of max{precision at any recall that is at least as large}
    mAP(t)   = mean of AP_k(t) over the classes k that occur

Detections of a class are taken over all images by falling score. One is right if its IoU with a still unmatched object
of its class in its image is at least t (the best such object is matched). Everingham et al., The PASCAL Visual Object
Classes Challenge, IJCV 2010, with the whole area instead of 11 points (as since 2010); COCO's AP is the mean over
t = .5, .55, ..., .95 (COCO itself samples recall at 101 points, which differs in the third digit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from jpq.types import JpqError

Boxes = Mapping[str, Tensor]  # {"boxes": [k, 4], "labels": [k]}, of detections also {"scores": [k]}
COCO = tuple(t / 100 for t in range(50, 100, 5))


def average_precision(found: Sequence[Boxes], wanted: Sequence[Boxes], iou: float = 0.5) -> float:
    """mAP at one IoU, in [0, 1]: `found` and `wanted` hold one entry per image.

    Raises JpqError for different numbers of images, and where no object is wanted at all.
    """
    if len(found) != len(wanted):
        raise JpqError(f"There are detections of {len(found)} images, and objects of {len(wanted)}: give one each.")
    labels = sorted({int(label) for target in wanted for label in target["labels"]})
    if not labels:
        raise JpqError("No image shows an object, so there is nothing to find. Give targets with boxes.")
    return sum(_of_class(found, wanted, label, iou) for label in labels) / len(labels)


def coco(found: Sequence[Boxes], wanted: Sequence[Boxes]) -> float:
    """mAP averaged over IoU .5 to .95."""
    return sum(average_precision(found, wanted, iou) for iou in COCO) / len(COCO)


def _of_class(found: Sequence[Boxes], wanted: Sequence[Boxes], label: int, iou: float) -> float:
    scores, right, objects = [], [], 0
    for detected, target in zip(found, wanted, strict=True):
        mine, there = detected["labels"] == label, target["labels"] == label
        objects += int(there.sum())
        score, order = detected["scores"][mine].sort(descending=True, stable=True)
        scores.append(score)
        right.append(_matched(box_iou(detected["boxes"][mine][order], target["boxes"][there]), iou))
    order = torch.cat(scores).argsort(descending=True, stable=True)
    return area(torch.cat(right)[order], objects)


def _matched(overlaps: Tensor, iou: float) -> Tensor:
    """[detections], bool: whether each, in turn, finds an object that none before it took. overlaps: [d, objects]."""
    left = overlaps.clone()
    out = torch.zeros(len(left), dtype=torch.bool)
    for i, row in enumerate(left):
        if len(row) and bool(row.max() >= iou):
            out[i] = True
            left[:, int(row.argmax())] = -1.0
    return out


def area(right: Tensor, objects: int) -> float:
    """Area under the precision envelope; `right`: [d] by falling score, of `objects` that could be found."""
    hits = right.double().cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1, dtype=torch.double)
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(right) else precision
    return float(envelope[right].sum()) / objects  # recall grows by 1 / objects at each right one
