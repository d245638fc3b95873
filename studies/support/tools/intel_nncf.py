"""Intel's NNCF: quantizers placed and calibrated by nncf.quantize, then trained with learned scales.

Widths are those of the device it quantizes for, and one pair for the whole network: 8 bits everywhere, or 4 bits in
weights and inputs on its NPU; it refuses others. So the cheapest network is one of 1.56 % of the bit-operations of 32
bits. Its pruning (nncf.prune) zeroes single weights, which takes no multiplication away from dense layers. With 4 bits,
the average pooling is left out, for which no device offers so few.

Works with nncf 3.4.0, which compiles an extension when first used; where that takes longer than a minute, set
NNCF_EXTENSION_LOAD_TIMEOUT=0.
"""

from __future__ import annotations

import nncf
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
from torch import nn

from jpq.types import JpqError
from support.tools.job import FLOAT_BITS, Job, Small, layer_names

DEVICES = {8: nncf.TargetDevice.ANY, 4: nncf.TargetDevice.NPU}
POOLING = nncf.IgnoredScope(types=["adaptive_avg_pool2d"])


def quantized(job: Job, bits: int) -> nn.Module:
    """The network with so many bits in all weights and inputs, calibrated."""
    batches = list(job.calibration())
    params = QuantizationParameters(num_bits=bits)
    net: nn.Module = nncf.quantize(
        job.fresh(),
        nncf.Dataset(batches),
        target_device=DEVICES[bits],
        subset_size=len(batches),
        ignored_scope=POOLING if bits < 8 else None,
        advanced_parameters=AdvancedQuantizationParameters(
            activations_quantization_params=params, weights_quantization_params=params
        ),
    )
    return net


def run(job: Job) -> Small:
    """Train at the most bits within the target."""
    bits = max((b for b in DEVICES if b * b <= job.target * FLOAT_BITS**2), default=None)
    if bits is None:
        raise JpqError(f"NNCF has no network of {job.target:%}: give a target of {4 * 4 / FLOAT_BITS**2:.2%} or more.")
    net = job.fit(quantized(job, bits))
    return Small(net, dict.fromkeys(layer_names(job.float_net), (bits, bits)), f"{bits} bits everywhere")
