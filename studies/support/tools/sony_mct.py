"""Sony's Model Compression Toolkit: mixed precision by integer programming under bit-operations, then its training.

The tool folds BatchNorm, calibrates, scores every pair of widths of every layer on images, solves for the widths and
gives a network with learned step sizes (LSQ), which is trained as any other. The target platform is written here, as
its users do for hardware of their own: 2 to 8 bits for weights and for activations, symmetric, weights per channel.

Where a layer's input is also read by a shortcut, the tool warns that its count of bit-operations may be wrong, and it
overshoots what it was asked for; it is asked for less until what it gives keeps to the target.

Works with model-compression-toolkit 2.6.1, mct-quantizers 1.7.0, edge-mdt-cl 1.1.1 and PuLP 3.3.2; as the tool pins
pydantic, networkx and matplotlib to older versions than it needs, install the first three by `pip install --no-deps`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import model_compression_toolkit as mct
from mct_quantizers import PytorchQuantizationWrapper, QuantizationMethod
from model_compression_toolkit.target_platform_capabilities.constants import BIAS_ATTR, KERNEL_ATTR
from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema
from model_compression_toolkit.trainable_infrastructure import TrainingMethod
from torch import Tensor, nn
from torch.nn import functional as F

from jpq.types import JpqError
from support.tools.job import Job, Small, Widths

BITS = (8, 6, 5, 4, 3, 2)
LEARNING_RATE = 5e-4  # on held-out images of a short trial 5.5 points better than the common rate
HALVINGS = 4
Operators = schema.OperatorSetNames


class FixedPad(nn.Module):
    """Zero channels by numbers that tracing can read."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.sides = (0, 0, 0, 0, before, after)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, before + C + after, H, W]."""
        return F.pad(x, self.sides)


def traceable(net: nn.Module) -> nn.Module:
    """The network with shortcuts that torch.fx can trace, in place."""
    for module in net.modules():
        if isinstance(pad := getattr(module, "pad", None), nn.Module):
            module.pad = FixedPad(pad.before, pad.after)  # type: ignore[arg-type]
    return net


def operation(w_bits: int, a_bits: int, weights: bool) -> Any:
    """How the target platform computes an operation at these widths."""
    left = schema.AttributeQuantizationConfig()
    kernel = schema.AttributeQuantizationConfig(
        weights_quantization_method=QuantizationMethod.SYMMETRIC,
        weights_n_bits=w_bits,
        weights_per_channel_threshold=True,
        enable_weights_quantization=True,
    )
    return schema.OpQuantizationConfig(
        default_weight_attr_config=left,
        attr_weights_configs_mapping={KERNEL_ATTR: kernel, BIAS_ATTR: left} if weights else {},
        activation_quantization_method=QuantizationMethod.SYMMETRIC,
        activation_n_bits=a_bits,
        supported_input_activation_n_bits=BITS,
        enable_activation_quantization=True,
        quantization_preserving=False,
        fixed_scale=None,
        fixed_zero_point=None,
        simd_size=1,
        signedness=schema.Signedness.AUTO,
    )


def platform() -> Any:
    """A target platform with all pairs of BITS, one quantizer behind each ReLU, and 8 bits for images and pooling."""

    def options(*operations: Any) -> Any:
        return schema.QuantizationConfigOptions(quantization_configurations=operations, base_config=operations[0])

    default = options(operation(8, 8, weights=False))
    layers = options(*(operation(w, a, weights=True) for w, a in product(BITS, BITS)))
    outputs = options(*(operation(8, a, weights=False) for a in BITS))
    moves = default.clone_and_edit(enable_activation_quantization=False)  # moving numbers does not round them
    sets = {
        name: schema.OperatorsSet(name=name, qc_options=layers) for name in (Operators.CONV, Operators.FULLY_CONNECTED)
    }
    sets |= {name: schema.OperatorsSet(name=name, qc_options=outputs) for name in (Operators.RELU, Operators.ADD)}
    for name in (Operators.FLATTEN, Operators.GET_ITEM, Operators.PAD):
        sets[name] = schema.OperatorsSet(name=name, qc_options=moves)
    conv, add, relu = sets[Operators.CONV], sets[Operators.ADD], sets[Operators.RELU]
    return schema.TargetPlatformCapabilities(
        default_qco=default,
        operator_set=tuple(sets.values()),
        fusing_patterns=tuple(schema.Fusing(operator_groups=g) for g in ((conv, relu), (conv, add, relu), (add, relu))),
        add_metadata=False,
    )


def quantized(job: Job, bops: float) -> nn.Module:
    """The tool's network, ready to be trained, for bit-operations it is asked for."""

    def images() -> Iterator[list[Tensor]]:
        for x in job.calibration():
            yield [x]

    net, _ = mct.qat.pytorch_quantization_aware_training_init_experimental(
        traceable(job.fresh()),
        images,
        target_resource_utilization=mct.core.ResourceUtilization(bops=bops),
        core_config=mct.core.CoreConfig(mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig()),
        qat_config=mct.qat.QATConfig(TrainingMethod.LSQ, TrainingMethod.LSQ),
        target_platform_capabilities=platform(),
    )
    return net


def read_widths(net: nn.Module) -> Widths:
    """Bits of each layer of the tool's network: of its weights, and of the nearest quantizer before it."""

    def bits_of(node: Any) -> int:
        holder = getattr(net, f"{node.name}_activation_holder_quantizer", None)
        if holder is not None:
            return int(holder.activation_holder_quantizer.num_bits)
        (before,) = graph.get_prev_nodes(node)
        return bits_of(before)

    graph: Any = net.graph
    widths = {}
    for node in graph.get_topo_sorted_nodes():
        wrapper = getattr(net, node.name, None)
        if isinstance(wrapper, PytorchQuantizationWrapper):
            (before,) = graph.get_prev_nodes(node)
            (weights,) = wrapper.weights_quantizers.values()
            widths[f"{node.name}.layer"] = (int(weights.num_bits), bits_of(before))
    return widths


def run(job: Job) -> Small:
    """The costliest network within the target that the tool gives, trained."""
    limit = job.target * job.full_bops
    best: tuple[int, float, nn.Module] | None = None
    low, high = 0.6 * limit, limit
    asked = high
    for _ in range(1 + HALVINGS):
        try:
            net = quantized(job, asked)
        except ValueError:  # less than its narrowest network
            low = asked
        else:
            bops = Small(net, read_widths(net)).bops(job.sample())
            if bops <= limit:
                best = max(best or (0, 0.0, net), (bops, asked, net), key=lambda found: found[0])
                low = asked
            else:
                high = asked
        if low == high:
            break
        asked = (low + high) / 2
    if best is None:
        raise JpqError(f"MCT has no network of {job.target:.3%}: give a larger target.")
    _, asked, net = best
    job.fit(net, lr=LEARNING_RATE)
    net = mct.qat.pytorch_quantization_aware_training_finalize_experimental(net)
    return Small(net, read_widths(net), f"2-8 bits by integer programming, asked for {asked / limit:.2f} of the target")
