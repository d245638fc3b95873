"""`attach`: gates and quantizers on the layers of a copy of a float model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from jpq.compression.calibration import Batches, observe_activations, observe_outputs
from jpq.compression.hypernetwork import Hypernetworks
from jpq.compression.masking import GateSample, InputNoise, MaskParametrization, original, parametrize_weight
from jpq.compression.model import CompressedModel
from jpq.methods.gates import Gate
from jpq.methods.quantizers import (
    BitWidth,
    Fixed,
    IntegerQuantizer,
    can_quantize,
    fit_threshold,
    fit_weight_grid,
    quantize_layer,
    quantize_results,
    replace_everywhere,
)
from jpq.methods.structures import Axis, Structure
from jpq.tracing.copy_model import copy_model
from jpq.tracing.model_checks import check_full_precision, unwrap_model
from jpq.tracing.network import Layer, Network
from jpq.tracing.pruning_masks import has_pruning_masks
from jpq.tracing.sites import Site
from jpq.tracing.tied_weights import layers_sharing
from jpq.types import JpqError

MakeWidths = Callable[[Layer], tuple[BitWidth, BitWidth]]


def attach(
    model: nn.Module,
    network: Network,
    sites: Sequence[Site],
    gate: Callable[[int, int], Gate],
    widths: MakeWidths,
    calibration: Batches,
    method: str,
    output_bits: int = 0,
    channel_multiple: int = 1,
    all_levels: bool = False,
) -> CompressedModel:
    """A copy of `model` with a gate for each site and quantizers on each layer, ranges fitted to `calibration`.

    Args:
        model: the float model.
        network, sites: layers and pruning groups of that model (`trace`, `channels`).
        gate: (rows, n) -> gate.
        widths: layer -> (width of its weight, width of its input).
        calibration: a few batches of inputs (a tensor, a tuple of positional arguments, or a dict of keywords each).
        method: name of the method, for the plan.
        output_bits: width to which outputs of convolutions are rounded before sums, poolings and several consumers,
            so that integer kernels compute those (`jpq.tracing.integer_io`); 0: they stay in floating point.
        channel_multiple: discretization keeps multiples of so many channels at each site (`channel_counts`).
        all_levels: whether weights use all 2^b levels of their widths (`jpq.methods.quantizers.fit_weight_grid`).

    Raises JpqError for weights in half precision and parametrized ones. DataParallel and torch.compile come off.
    """
    model = _checked_copy(model)
    batches = list(calibration)
    inputs = observe_activations(model, network, batches)
    outputs = observe_outputs(model, network, batches) if output_bits else {}
    device = next(model.parameters()).device
    gates = [gate(s.rows, s.n).to(device) for s in sites]
    net = CompressedModel(model, network, sites, gates, method, channel_multiple)
    net.calibration_samples = inputs
    for site, site_gate in zip(sites, net.gates, strict=True):
        shapes = [torch.Size(network.layer(t.layer).weight_shape) for t in site.taps]
        sizes = torch.stack([t.structure.sizes(s) for t, s in zip(site.taps, shapes, strict=True)]).sum(0)
        site_gate.set_site(sizes.to(device), site.taps[0].structure.quota())
    net.draws = [GateSample(g, number=i) for i, g in enumerate(net.gates)]
    taps = _taps_by_layer(net)
    hypernetworks = Hypernetworks(sites, list(net.gates))
    for layer in network.layers:
        if not layer.kept_float:
            quantize(model, layer, widths(layer), inputs.get(layer.name), all_levels)
        hypernetworks.register(model, layer)
        if layer.name in taps:
            _mask_layer(net, layer, taps[layer.name])
    _quantize_outputs(net, outputs, output_bits)
    _connect_gates(net)
    return net


def _checked_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the model. Raises JpqError where gates or quantizers could not act on its weights."""
    model = unwrap_model(model)
    check_full_precision(model)
    if any(parametrize.is_parametrized(m) for m in model.modules()):
        raise JpqError(
            "The model already carries parametrizations; remove them before compressing it. "
            "jpq.decompose folds those of torch.nn.utils.parametrize."
        )
    if has_pruning_masks(model):
        raise JpqError(
            "The model carries masks of torch.nn.utils.prune. jpq.decompose folds them; or do it yourself: "
            "prune.remove(module, 'weight')."
        )
    return copy_model(model)


def quantize(
    model: nn.Module,
    layer: Layer,
    widths: tuple[BitWidth, BitWidth],
    inputs: Tensor | None,
    all_levels: bool = False,
) -> None:
    """Replace one layer of `model` by its quantized form, ranges fitted to its weight and to samples of its inputs.

    Layers that share the weight share its quantizers. Layers of other classes stay as they are, and so do layers whose
    module is never called (`inputs` is None): code that passes a module's weight to a function, as Swin's attention
    does, would bypass the quantizers.
    """
    module = dict(model.named_modules()).get(layer.name)
    if module is None or inputs is None or not can_quantize(module) or layer.weight != f"{layer.name}.weight":
        return
    tied = list(layers_sharing(model, module).values())
    if any(type(other) is not type(module) for other in tied):
        return
    weight: Tensor = module.weight.detach()
    x = inputs if inputs.numel() else torch.ones(1, device=weight.device)
    signed = bool(x.min() < -1e-6 * x.abs().max())
    all_levels = all_levels and not widths[0].own_grid
    bits = float(widths[0]().detach()) if all_levels else widths[0].soft()
    threshold, side = fit_weight_grid(weight, bits, layer.kind.output_dim == 0, all_levels)
    w = IntegerQuantizer(threshold, widths[0], True, side)
    a = IntegerQuantizer(fit_threshold(x, widths[1].soft(), signed, False), widths[1], signed)
    for other in tied:
        replace_everywhere(model, other, quantize_layer(other, w.to(weight), a.to(weight)))


def _taps_by_layer(net: CompressedModel) -> dict[str, list[tuple[GateSample, Structure]]]:
    """Layer -> the gates that act on it, each with the structure of its units there."""
    taps: dict[str, list[tuple[GateSample, Structure]]] = {}
    for draw, site in zip(net.draws, net.sites, strict=True):
        for tap in site.taps:
            taps.setdefault(tap.layer, []).append((draw, tap.structure))
    return taps


def _mask_layer(net: CompressedModel, layer: Layer, taps: Sequence[tuple[GateSample, Structure]]) -> None:
    """Multiply a layer's weight by the masks of its taps, and its input by the noise of its channel gates."""
    owner, _, name = layer.weight.rpartition(".")
    parametrize_weight(net.model.get_submodule(owner), name, MaskParametrization(taps))
    quantizers = net.quantizers(layer.name)
    if quantizers:
        noisy = [(draw, structure) for draw, structure in taps if isinstance(structure, Axis)]  # masks have no noise
        quantizers[1].noise = InputNoise(noisy, len(layer.weight_shape)) if noisy else None


def _quantize_outputs(net: CompressedModel, outputs: Mapping[str, Tensor], bits: int) -> None:
    """Round the outputs of modules that were observed, with ranges fitted to these samples."""
    for layer in net.network.layers:
        point = layer.output_quant_point
        if point is not None and point.module in outputs and net.quantizers(layer.name):
            samples = outputs[point.module]
            grid = IntegerQuantizer(fit_threshold(samples, bits, point.signed, False), Fixed(bits), point.signed)
            quantize_results(net.model.get_submodule(point.module), grid.to(samples.device))


def _connect_gates(net: CompressedModel) -> None:
    """Give each gate the weights that it masks, the quantizer of the first of them, and the other gates."""
    for draw, site in zip(net.draws, net.sites, strict=True):
        draw.reach = _masked_weights(net, site)
        draw.show_weights()
        quantizers = net.quantizers(site.taps[0].layer)
        if quantizers:
            draw.gate.attach_quantizer(quantizers[0])
    for draw in net.draws:
        draw.gate.link(list(net.gates))
    for draw in net.draws:
        draw.resample()


def _masked_weights(net: CompressedModel, site: Site) -> list[tuple[Tensor, Structure]]:
    """The float weights that a site's taps mask, each with its structure."""
    weights = []
    for tap in site.taps:
        owner, _, name = net.network.layer(tap.layer).weight.rpartition(".")
        weights.append((original(net.model.get_submodule(owner), name), tap.structure))
    return weights
