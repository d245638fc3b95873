"""`--weights imagenet`: the weights that torchvision or timm publishes for a model, downloaded where they are not yet.

A download is kept in the library's own cache (TORCH_HOME, HF_HOME).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from jpq.tasks import zoo
from jpq.tasks.third_party import import_extra
from jpq.tasks.weights import load_content, load_weights
from jpq.types import JpqError

IMAGENET = "imagenet"

OTHER_SCALE = ("googlenet", "inception_v3")  # whose published weights expect images of another scale


def load_named_weights(model: nn.Module, name: str, weights: Path) -> tuple[str, ...]:
    """Copy weights into the model of this name: those of a file, or with `imagenet` those that its library publishes.

    Returns sentences on what was cast, left out or chosen. Raises JpqError as `load_weights` does, for models without
    published weights, and where they cannot be downloaded.
    """
    if str(weights) != IMAGENET or weights.exists():
        return load_weights(model, weights)
    kind, _, architecture = name.partition(":")
    if kind == "torchvision":
        content = _torchvision_state(architecture)
    elif kind == "timm":
        content = _timm_state(architecture)
    else:
        raise JpqError(
            f"--weights imagenet is for torchvision:NAME and timm:NAME, and the model is {name}: give a file with "
            "--weights."
        )
    return load_content(model, content, weights)


def _torchvision_state(name: str) -> Any:
    """The state dict of a classifier that torchvision publishes weights for."""
    if zoo.kind_of(name) != "classification" or name in OTHER_SCALE:
        raise JpqError(
            f"torchvision publishes no ImageNet weights that jpq can use for {name}: give a file with --weights."
        )
    published = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return published.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise _download_error(f"torchvision:{name}", error) from error


def _timm_state(name: str) -> Any:
    """The state dict of a model that timm publishes weights for."""
    timm = import_extra("timm", "timm", f"timm:{name}")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not config.has_weights:
        raise JpqError(f"timm publishes no weights for {name}: give a file with --weights.")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # each of the hub's libraries has errors of its own
        raise _download_error(f"timm:{name}", error) from error


def _download_error(name: str, error: Exception) -> JpqError:
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
    return JpqError(
        f"The ImageNet weights of {name} are not here and could not be downloaded ({reason[:200]}): give a file with "
        "--weights."
    )
