"""Object detection: focal and box loss, average precision, and agreement box by box.

After T.-Y. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002 (loss of scores, assignment
of anchors by overlap), and H. Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, arXiv:1902.09630.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from jpq.tasks.base import Pair, Task, check_classes, check_targets
from jpq.types import JpqError

COLUMNS = 8  # of an output beside the scores: corners of the box, and corners of its anchor

OBJECT, BACKGROUND = (
    0.5,
    0.4,
)  # overlap with an object from which an anchor stands for it, below which it stands for none

CANDIDATES = 400  # of each image: boxes with the highest scores, before suppression

DETECTIONS = 100  # of each image after suppression, as COCO counts them

LEAST_SCORE, SUPPRESSED = (
    0.01,
    0.5,
)  # smallest score of a detection; overlap with a better one of its class that drops it

SURE = 0.5  # score from which a box counts as a decision


class Detection(Task):
    """Boxes with classes: outputs are `[B, A, classes + 8]` for A anchors, targets a dict of boxes and labels an image.

    The columns of an output are a score for each class as the logit of its probability (class 0 is none, and not read),
    the corners of the box (x1, y1, x2, y2) in pixels, and those of its anchor, the box that it is a change of.
    Targets have "boxes" [k, 4] (corners in pixels) and "labels" [k] (int64, from 1 on). Suppression of overlapping
    boxes is no part of the network. The metric is COCO's average precision over overlaps of 0.5 to 0.95 (torchmetrics
    and pycocotools).
    """

    name = "detection"
    metric_name = "AP"
    metric_unit = "%"
    metric_bounds = (0.0, 1.0)
    output_name = "boxes with class scores"
    decision_name = "box"
    divergence_unit = "nats and squared sides of anchors"
    packages = ("torchmetrics", "pycocotools")

    def loss(self, output: Tensor, target: Any) -> Tensor:
        """Focal loss of the scores plus generalized IoU loss of the boxes, over the number of boxes with objects."""
        scores, boxes, anchors = split_columns(output)
        total, count = output.sum() * 0, 0
        for i, objects in enumerate(target):
            matched = assign(anchors[i], objects["boxes"].to(output))
            found, read = matched >= 0, matched != AMBIGUOUS
            wanted = torch.zeros_like(scores[i])
            labels = objects["labels"].to(output.device).long()[matched[found]]
            wanted[found, labels] = 1.0
            total = total + sigmoid_focal_loss(scores[i][read][:, 1:], wanted[read][:, 1:], reduction="sum")
            true_boxes = objects["boxes"].to(output)[matched[found]]
            total = total + generalized_box_iou_loss(boxes[i][found], true_boxes, reduction="sum")
            count += int(found.sum())
        return total / max(1, count)

    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The divergence with scores softened by the temperature, whose part is multiplied by its square."""
        return self._distance(student, teacher.detach(), temperature)

    def divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        """KL divergence of the scores' probabilities in nats, plus the boxes' squared distance in sides of anchors.

        Both are summed over anchors, boxes with the reference's highest score as weight, and averaged over images.
        """
        return self._distance(output, reference.detach(), 1.0)

    def _distance(self, output: Tensor, reference: Tensor, temperature: float) -> Tensor:
        (scores, boxes, _), (true_scores, true_boxes, anchors) = split_columns(output), split_columns(reference)
        q, p = scores[..., 1:] / temperature, true_scores[..., 1:] / temperature
        present = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
        absent = (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
        sides = _sides(anchors)
        moved = ((boxes - true_boxes) / torch.cat([sides, sides], -1)).square().mean(-1)
        weight = true_scores[..., 1:].sigmoid().amax(-1)
        return temperature**2 * (present + absent).sum((1, 2)).mean() + (weight * moved).sum(1).mean()

    def summarize(self, pairs: Iterable[Pair]) -> float:
        """Average precision over the split."""
        return max(0.0, self._precision(pairs)["map"])

    def other_metrics(self, pairs: Sequence[Pair]) -> dict[str, tuple[float, str]]:
        """Average precision at an overlap of 0.5."""
        return {"AP50": (max(0.0, self._precision(pairs)["map_50"]), "%")}

    def _precision(self, pairs: Iterable[Pair]) -> dict[str, float]:
        """Figures of torchmetrics' MeanAveragePrecision; -1 where there are no objects at all."""
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision()
        for output, target in pairs:
            objects = [{key: value.cpu() for key, value in o.items() if key in ("boxes", "labels")} for o in target]
            metric.update(detect(output.float().cpu()), objects)
        return {key: float(value) for key, value in metric.compute().items() if key in ("map", "map_50")}

    def same_decision(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether a box has the same class, or none, above a probability of one half, boolean [B, A].

        Boxes with a class must lie within `tolerance` of the anchor's sides of each other, too.
        """
        (_, boxes, anchors), (_, others, _) = split_columns(a), split_columns(b)
        classes, other_classes = sure_classes(a), sure_classes(b)
        sides = _sides(anchors)
        near = ((boxes - others).abs() <= self.tolerance * torch.cat([sides, sides], -1)).all(-1)
        return (classes == other_classes) & ((classes == 0) | near)

    def decision_gap(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each box's highest probability from one half, [B, A]."""
        return (split_columns(a)[0][..., 1:].sigmoid().amax(-1) - SURE).abs()

    def count_outputs(self, output: Tensor) -> int:
        """Number of classes, none (0) among them."""
        return output.shape[-1] - COLUMNS

    def fits(self, output: object, samples: int, classes: int | None) -> bool:
        """Whether the output is one tensor [samples, anchors, classes + 8]."""
        if not isinstance(output, Tensor) or output.dim() != 3 or len(output) != samples:
            return False
        return classes is None or output.shape[2] == classes + COLUMNS

    def check_target(self, target: Any, classes: int) -> None:
        """Raise JpqError for targets that are no dicts of "boxes" and "labels", one per image."""
        fine = isinstance(target, Sequence) and all(_holds_objects(entry) for entry in target)
        check_targets(fine, self, 'a dict of "boxes" [k, 4] and "labels" [k] per image', target)
        for entry in target:
            boxes = entry["boxes"]
            ordered = bool((boxes[:, 2:] > boxes[:, :2]).all())
            check_targets(ordered, self, "boxes x1, y1, x2, y2 with x1 < x2 and y1 < y2", boxes)
            check_classes(self, entry["labels"], classes)

    def example_batch(self, samples: int, classes: int) -> tuple[Tensor, Any]:
        """Four anchors per image, two of which are objects."""
        corners = torch.tensor([[0.0, 0.0], [32.0, 0.0], [0.0, 32.0], [32.0, 32.0]])
        anchors = torch.cat([corners, corners + 24], 1).expand(samples, -1, -1)
        scores = torch.full((samples, 4, max(2, classes)), -6.0)
        target = []
        for i in range(samples):
            labels = torch.tensor([1 + i % (scores.shape[2] - 1), 1])
            scores[i, torch.tensor([0, 3]), labels] = 6.0
            target.append({"boxes": anchors[i, [0, 3]] + 1.0, "labels": labels})
        return torch.cat([scores, anchors + 1.0, anchors], 2), target

    def row_text(self, classes: int) -> str:
        """Form of one sample's output, in words."""
        return f"[boxes, {classes} + {COLUMNS}] (class scores, corners of box and anchor)"


AMBIGUOUS = -2  # of an anchor that overlaps an object too little to stand for it, and too much to stand for none


def split_columns(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [B, A, classes], boxes [B, A, 4], anchors [B, A, 4]) of an output."""
    return output[..., :-COLUMNS], output[..., -COLUMNS:-4], output[..., -4:]


def assign(anchors: Tensor, boxes: Tensor) -> Tensor:
    """The number of the object that each anchor stands for, [A]; -1 for none, `AMBIGUOUS` where it is not trained.

    Every object has the anchor that overlaps it most, besides those above `OBJECT`.

    Args:
        anchors: [A, 4]; boxes: of the objects, [k, 4].
    """
    matched = torch.full((len(anchors),), -1, device=anchors.device)
    if not len(boxes):
        return matched
    overlap = box_iou(boxes, anchors)
    best, number = overlap.max(0)
    matched[best >= BACKGROUND] = AMBIGUOUS
    matched = torch.where(best >= OBJECT, number, matched)
    matched[overlap.argmax(1)] = torch.arange(len(boxes), device=anchors.device)
    return matched


def check_inside(target: Any, height: int, width: int, what: str) -> None:
    """Raise JpqError for boxes that lie outside of their images, or are shares of them in place of pixels."""
    boxes = torch.cat([entry["boxes"].reshape(-1, 4) for entry in target])
    outside = (boxes[:, 2:] <= 0).any(1) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
    if bool(outside.any()):
        corners = ", ".join(f"{value:g}" for value in boxes[outside][0].tolist())
        raise JpqError(
            f"{what} has a box ({corners}) outside of its image of {height} x {width} pixels. Give x1, y1, x2, y2 in "
            "pixels of the image as the model sees it."
        )
    if len(boxes) and float(boxes.max()) <= 1:
        raise JpqError(
            f"{what} has boxes that end at {float(boxes.max()):g} at most, which look like shares of the image of "
            f"{height} x {width} pixels. Give x1, y1, x2, y2 in pixels."
        )


def detect(output: Tensor) -> list[dict[str, Tensor]]:
    """The detections of each image: "boxes" [n, 4], "scores" [n] and "labels" [n], after suppression, best first."""
    scores, boxes, _ = split_columns(output)
    probabilities = scores[..., 1:].sigmoid()
    found = []
    for p, corners in zip(probabilities, boxes, strict=True):
        best = p.flatten().topk(min(CANDIDATES, p.numel()))
        kept = best.values >= LEAST_SCORE
        values, places = best.values[kept], best.indices[kept]
        labels = 1 + places % p.shape[1]
        candidates = corners[places // p.shape[1]]
        candidates = torch.cat(
            [torch.minimum(candidates[:, :2], candidates[:, 2:]), torch.maximum(candidates[:, :2], candidates[:, 2:])],
            1,
        )
        order = batched_nms(candidates, values, labels, SUPPRESSED)[:DETECTIONS]
        found.append({"boxes": candidates[order], "scores": values[order], "labels": labels[order]})
    return found


def sure_classes(output: Tensor) -> Tensor:
    """The class of each box with a probability of one half or more, [B, A]; 0 for none."""
    best, number = split_columns(output)[0][..., 1:].max(-1)
    return torch.where(best >= 0, number + 1, torch.zeros_like(number))


def _sides(anchors: Tensor) -> Tensor:
    """Width and height of anchors [..., 4] in pixels, [..., 2], 1 at least."""
    return (anchors[..., 2:] - anchors[..., :2]).abs().clamp_min(1.0)


def _holds_objects(entry: Any) -> bool:
    """Whether an image's target is a dict of boxes [k, 4] and labels [k]."""
    if not isinstance(entry, Mapping) or not {"boxes", "labels"} <= set(entry):
        return False
    boxes, labels = entry["boxes"], entry["labels"]
    return (
        boxes.dim() == 2 and boxes.shape[1] == 4 and labels.shape == boxes.shape[:1] and not labels.is_floating_point()
    )
