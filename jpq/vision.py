"""torchvision's architectures by name: how each is built, and what it usually takes."""

from __future__ import annotations

from functools import cache

import torchvision
from torch import nn

from jpq.types import JpqError, unknown

BACKBONE = ".backbone"  # after the name of a detector
CLASSES = {"classification": 1000, "segmentation": 21, "detection": 91, "video": 400}  # as torchvision's weights have
CLIPS = {"mvit": (3, 16, 224, 224), "s3d": (3, 16, 224, 224), "swin3d": (3, 16, 224, 224)}  # else 112 x 112
SIDES = {"inception_v3": 299, "ssd300": 300, "ssdlite320": 320}  # else 224, detectors 320


@cache
def kinds() -> dict[str, str]:
    """Name -> "classification", "segmentation", "detection" or "video"."""
    models = torchvision.models
    families = {"segmentation": models.segmentation, "detection": models.detection, "video": models.video}
    found = dict.fromkeys(models.list_models(module=models), "classification")
    for kind, module in families.items():
        found |= dict.fromkeys(models.list_models(module=module), kind)
    return found


def kind_of(name: str) -> str:
    """What sort of network `name`, or `name.backbone` of a detector, is. Raises JpqError for an unknown name."""
    known = kinds()
    plain = name.removesuffix(BACKBONE)
    if plain not in known or (plain != name and known[plain] != "detection"):
        raise unknown("torchvision model", name, known)
    return known[plain]


def build(name: str, classes: int) -> nn.Module:
    """A new model with random weights; of a detector its backbone, since its forward cannot be read.

    Raises JpqError for an unknown name, and for a detector without `.backbone`.
    """
    kind = kind_of(name)
    extra: dict[str, object] = {}
    if kind in ("segmentation", "detection"):
        extra["weights_backbone"] = None  # else it would be downloaded
    if name in ("googlenet", "inception_v3"):
        # their training-only heads return tuples, and their own initialisation takes minutes or warns
        extra |= {"aux_logits": False, "init_weights": False}
    if kind == "detection" and not name.endswith(BACKBONE):
        raise JpqError(
            f"torchvision:{name} is a detector, whose code chooses boxes by their values, which no exported graph can "
            f"hold. Its backbone can be read: give torchvision:{name}{BACKBONE}."
        )
    model = torchvision.models.get_model(name.removesuffix(BACKBONE), weights=None, num_classes=classes, **extra)
    return model.backbone if kind == "detection" else model


def usual_shape(name: str) -> tuple[int, ...]:
    """What one sample usually looks like: channels, (frames,) height, width."""
    kind = kind_of(name)
    if kind == "video":
        return next((shape for start, shape in CLIPS.items() if name.startswith(start)), (3, 16, 112, 112))
    side = next((side for start, side in SIDES.items() if name.startswith(start)), None)
    return (3, *(2 * [side or (320 if kind == "detection" else 224)]))
