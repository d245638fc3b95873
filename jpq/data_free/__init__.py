"""Pruning without data: a trained model is pruned on random images, and the owner of the data trains under the mask."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.data_free.layerwise_admm import AdmmSettings, LayerReport
    from jpq.data_free.prune import (
        DataFreeResult,
        build_layer_gate,
        mask_sites,
        project_weights_once,
        prune_model,
        prune_private,
        random_images,
    )
    from jpq.data_free.settings import DataFreeSettings

__all__ = [
    "AdmmSettings",
    "DataFreeResult",
    "DataFreeSettings",
    "LayerReport",
    "build_layer_gate",
    "mask_sites",
    "project_weights_once",
    "prune_model",
    "prune_private",
    "random_images",
]

_HOMES = {
    "AdmmSettings": "layerwise_admm",
    "DataFreeResult": "prune",
    "DataFreeSettings": "settings",
    "LayerReport": "layerwise_admm",
    "build_layer_gate": "prune",
    "mask_sites": "prune",
    "project_weights_once": "prune",
    "prune_model": "prune",
    "prune_private": "prune",
    "random_images": "prune",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
