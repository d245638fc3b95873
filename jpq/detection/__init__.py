"""Pruning torchvision's one-stage detectors by saliency."""

from jpq.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {})
