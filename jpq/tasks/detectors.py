"""torchvision's one-stage detectors as networks with one output, for the task `detection`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from jpq.tracing.forward import eval_mode
from jpq.types import JpqError

LARGEST_CHANGE = math.log(1000.0 / 16)  # of the logarithm of a side, as torchvision clips it

LEAST = 1e-6  # smallest probability that a logit is computed of


class DetectorCore(nn.Module):
    """A detector's backbone and head: [batch, 3, height, width], resized and normalised, to raw outputs per box."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The head's outputs; the boxes of all scales stand one after the other."""
        return self.head(feature_maps(self.backbone, images))


def feature_maps(backbone: Callable[[Tensor], Any], images: Tensor) -> list[Tensor]:
    """The backbone's maps, fine scales first; a backbone may give one map or several by name."""
    maps = backbone(images)
    return [maps] if isinstance(maps, Tensor) else list(maps.values())


class DetectorNetwork(DetectorCore):
    """An SSD, SSDlite or RetinaNet for images of one size, whose output is that of the task `detection`.

    [batch, 3, height, width], normalised, to [batch, anchors, classes + 8]: scores as logits, corners of boxes and of
    anchors in pixels. The probabilities of SSD are those of its softmax.

    Args:
        detector: of torchvision; weights are shared.
        size: height and width of the images. Raises JpqError for other detectors.
    """

    anchors: Tensor
    scale: Tensor

    def __init__(self, detector: Any, size: tuple[int, int]):
        if isinstance(detector, GeneralizedRCNN):
            raise JpqError(
                f"{type(detector).__name__} chooses proposals by their values before its loss, and how many differs, "
                "which no traced graph holds: --task detection does not train it. Prune and quantize its backbone in "
                "your own loop, with its own losses: jpq.compress(detector.backbone, images), see docs/detectors.md."
            )
        if not isinstance(detector, (SSD, RetinaNet)):
            raise JpqError(
                f"{type(detector).__name__} is not an SSD, SSDlite or RetinaNet of torchvision, which --task detection "
                "trains; give such a one, or a network of your own whose output jpq.tasks.Detection describes."
            )
        super().__init__(detector.backbone, detector.head)
        self.softmax = isinstance(detector, SSD)
        coder = detector.box_coder
        images = torch.zeros(1, 3, *size)
        with torch.no_grad(), eval_mode(detector):
            maps = feature_maps(detector.backbone, images)
            (anchors,) = detector.anchor_generator(ImageList(images, [size]), maps)
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("scale", 1 / torch.tensor(coder.weights), persistent=False)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """[batch, 3, height, width] -> [batch, anchors, classes + 8]."""
        outputs = super().forward(images)
        scores, changes = outputs["cls_logits"], outputs["bbox_regression"]
        if self.softmax:
            p = scores.softmax(-1).clamp(LEAST, 1 - LEAST)
            scores = torch.log(p / (1 - p))
        anchors = self.anchors + torch.zeros_like(changes)
        return torch.cat([scores, self._boxes(changes), anchors], -1)

    def _boxes(self, changes: Tensor) -> Tensor:
        """Corners of the boxes that are these changes of the anchors, [batch, anchors, 4]."""
        sides = self.anchors[:, 2:] - self.anchors[:, :2]
        middles = self.anchors[:, :2] + sides / 2
        changes = changes * self.scale
        centre = middles + changes[..., :2] * sides
        half = sides * changes[..., 2:].clamp(max=LARGEST_CHANGE).exp() / 2
        return torch.cat([centre - half, centre + half], -1)


def build_detector(name: str, classes: int, size: tuple[int, int]) -> DetectorNetwork:
    """torchvision's detector with random weights, for normalised images of `size` (height, width).

    `classes` counts none as class 0, as torchvision does. Raises JpqError for a detector that is none of one stage.
    """
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    return DetectorNetwork(model, size)
