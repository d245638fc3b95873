"""Pruning and quantizing torchvision's one-stage detectors: channels are ranked by the saliency of detection scores."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.detection.detector import (
        DetectorCore,
        detector_core,
        prepare_images,
        rank_channels,
        rankable_sites,
        reassemble,
        saliency_batches,
    )
    from jpq.detection.saliency import CamSaliency, Saliency, SaliencyBatch, channel_saliency, rank_network

__all__ = [
    "CamSaliency",
    "DetectorCore",
    "Saliency",
    "SaliencyBatch",
    "channel_saliency",
    "detector_core",
    "prepare_images",
    "rank_channels",
    "rank_network",
    "rankable_sites",
    "reassemble",
    "saliency_batches",
]

_HOMES = {
    "CamSaliency": "saliency",
    "DetectorCore": "detector",
    "Saliency": "saliency",
    "SaliencyBatch": "saliency",
    "channel_saliency": "saliency",
    "detector_core": "detector",
    "prepare_images": "detector",
    "rank_channels": "detector",
    "rank_network": "saliency",
    "rankable_sites": "detector",
    "reassemble": "detector",
    "saliency_batches": "detector",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
