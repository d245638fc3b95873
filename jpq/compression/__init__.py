"""The model under compression: gates and quantizers on its layers, costs, discretization."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.compression.calibration import recalibrate, reestimate_batchnorm
    from jpq.compression.external_mask import ExternalMask
    from jpq.compression.external_mask import read as read_mask
    from jpq.compression.external_mask import write as write_mask
    from jpq.compression.hypernetwork import Generated, generate_weight
    from jpq.compression.model import CompressedModel
    from jpq.compression.power_of_two_steps import round_activation_steps
    from jpq.compression.usage import exact_usage

__all__ = [
    "CompressedModel",
    "ExternalMask",
    "Generated",
    "exact_usage",
    "generate_weight",
    "read_mask",
    "recalibrate",
    "reestimate_batchnorm",
    "round_activation_steps",
    "write_mask",
]

_HOMES = {
    "CompressedModel": "model",
    "ExternalMask": "external_mask",
    "Generated": "hypernetwork",
    "exact_usage": "usage",
    "generate_weight": "hypernetwork",
    "read_mask": "external_mask:read",
    "recalibrate": "calibration",
    "reestimate_batchnorm": "calibration",
    "round_activation_steps": "power_of_two_steps",
    "write_mask": "external_mask:write",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
