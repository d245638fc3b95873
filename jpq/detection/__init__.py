"""Pruning and quantizing torchvision's one-stage detectors: channels are ranked by the saliency of detection scores."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.detection.detector import (
        DetectorCore,
        extract_core,
        prepare_images,
        prepare_saliency_batches,
        rank_channels,
        rankable_sites,
        reassemble_detector,
    )
    from jpq.detection.saliency import CamSaliency, Saliency, SaliencyBatch, channel_saliency, rank_network

__all__ = [
    "CamSaliency",
    "DetectorCore",
    "Saliency",
    "SaliencyBatch",
    "channel_saliency",
    "extract_core",
    "prepare_images",
    "prepare_saliency_batches",
    "rank_channels",
    "rank_network",
    "rankable_sites",
    "reassemble_detector",
]

_HOMES = {
    "CamSaliency": "saliency",
    "DetectorCore": "detector",
    "Saliency": "saliency",
    "SaliencyBatch": "saliency",
    "channel_saliency": "saliency",
    "extract_core": "detector",
    "prepare_images": "detector",
    "prepare_saliency_batches": "detector",
    "rank_channels": "detector",
    "rank_network": "saliency",
    "rankable_sites": "detector",
    "reassemble_detector": "detector",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
