"""Detection saliency: how much of what a unit carries matters to the scores of the boxes that are found.

After J. I. Choi, Q. Tian, Visual Saliency-Guided Channel Pruning for Deep Visual Detectors in Autonomous Driving, IEEE
Intelligent Vehicles 2023, arXiv:2303.02512. The paper ties a gradient-based saliency to the detections; its formula is
not public, so everything here is a reconstruction in the line of Grad-CAM (Selvaraju et al., ICCV 2017).

| symbol | where | shape |
|---|---|---|
| A, feature map as a layer reads it | `Evidence.activations` | [batch, n, height, width] |
| g = dY/dA | `Evidence.activation_gradients` | the same |
| S_d, score of box d before NMS | `jpq.detection.confidence` | [batch, boxes] |
| Y, utility of an image's detections | `utility` | scalar |
| I_c, importance of channel c | the score | [1, n] |

Y uses scores alone: no loss, no NMS, no threshold, and no box coordinates, whose outputs have neither a best value nor
a sign. So a layer that feeds nothing but box outputs has no saliency, which is not the same as a saliency of 0.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from jpq.scores.base import Evidence, Score, SiteView
from jpq.types import JpqError, Units

BOXES = 100  # of each image, whose scores are summed
GROWN = 1.1  # objects' boxes, in the variant that looks inside them only


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
            "Rank with jpq.detection.rank, or choose another score."
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
