"""Put gates and quantizers on a copy of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from jpq.compression.calibration import Batches, observe_activations, observe_outputs
from jpq.compression.hypernetwork import Hypernetworks
from jpq.compression.masking import GateSample, InputNoise, MaskParametrization
from jpq.compression.model import CompressedModel
from jpq.methods.gates import Gate
from jpq.methods.quantizers import (
    BitWidth,
    Fixed,
    IntegerQuantizer,
    can_quantize,
    fit_threshold,
    quantize_layer,
    quantize_results,
    replace_everywhere,
)
from jpq.methods.structures import Axis, Structure
from jpq.tracing.model_checks import check_full_precision, unwrap_model
from jpq.tracing.network import Layer, Network
from jpq.tracing.sites import Site
from jpq.types import JpqError

MakeWidth = Callable[[Layer], tuple[BitWidth, BitWidth]]


def attach(
    model: nn.Module,
    network: Network,
    sites: Sequence[Site],
    gate: Callable[[int, int], Gate],
    widths: MakeWidth,
    calibration: Batches,
    method: str,
    output_bits: int = 0,
    channel_multiple: int = 1,
) -> CompressedModel:
    """A copy of `model` with a gate for each site and quantizers on each layer, ranges fitted to `calibration`.

    Args:
        model: the float model.
        network, sites: of that model (`trace`, `channels`).
        gate: (rows, n) -> gate.
        widths: layer -> (width of its weight, width of its input).
        calibration: a few batches of inputs (a tensor, a tuple of positional arguments, or a dict of keywords each).
        method: recorded in the plan.
        output_bits: also round, to so many bits, convolutions' results that meet a sum, a pooling or several readers,
            so that integer kernels compute them (`network.ends`); 0: leave them in floating point.
        channel_multiple: of how many channels each site keeps multiples when it lands (`network.multiples`).

    Raises JpqError for weights in half precision, parametrized or tied ones. DataParallel and torch.compile come off.
    """
    model = unwrap_model(model)
    check_full_precision(model)
    if any(parametrize.is_parametrized(m) for m in model.modules()):
        raise JpqError(
            "The model already carries parametrizations; remove them before compressing it. "
            "jpq.decompose folds weight_norm and spectral_norm."
        )
    for layer in network.layers:
        refuse_tied(model, layer)
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    batches = list(calibration)
    seen = observe_activations(model, network, batches)
    results = observe_outputs(model, network, batches) if output_bits else {}
    compressed = CompressedModel(
        model, network, sites, [gate(s.rows, s.n).to(device) for s in sites], method, channel_multiple
    )
    compressed.calibration_samples = seen
    for one, site in zip(compressed.gates, sites, strict=True):
        shapes = [torch.Size(network.layer(t.layer).weight_shape) for t in site.taps]
        sizes = torch.stack([t.structure.sizes(s) for t, s in zip(site.taps, shapes, strict=True)]).sum(0)
        one.set_site(sizes.to(device), site.taps[0].structure.quota())
    compressed.draws = [GateSample(g) for g in compressed.gates]
    taps: dict[str, list[tuple[GateSample, Structure]]] = {}
    for draw, site in zip(compressed.draws, sites, strict=True):
        for tap in site.taps:
            taps.setdefault(tap.layer, []).append((draw, tap.structure))
    hyper = Hypernetworks(sites, list(compressed.gates))
    for layer in network.layers:
        quantize(model, layer, widths(layer), seen.get(layer.name))
        hyper.register(model, layer)
        if layer.name in taps:
            owner, _, name = layer.weight.rpartition(".")
            parametrize.register_parametrization(
                model.get_submodule(owner), name, MaskParametrization(taps[layer.name]), unsafe=True
            )
            pair = compressed.quantizers(layer.name)
            if pair:
                noisy = [(d, s) for d, s in taps[layer.name] if isinstance(s, Axis)]  # masks have no noise per sample
                pair[1].jitter = InputNoise(noisy, layer.kind.channel_dim, layer.groups) if noisy else None
    for layer in network.layers:
        if layer.output_quant_point is not None and layer.output_quant_point.module in results and compressed.quantizers(layer.name):
            ranges = fit_threshold(results[layer.output_quant_point.module], output_bits, layer.output_quant_point.signed, False)
            grid = IntegerQuantizer(ranges, Fixed(output_bits), layer.output_quant_point.signed)
            quantize_results(model.get_submodule(layer.output_quant_point.module), grid.to(device))
    for draw, site in zip(compressed.draws, sites, strict=True):
        draw.reach = _reach(model, network, site)
        draw.show_weights()
        pair = compressed.quantizers(site.taps[0].layer)
        if pair:
            draw.gate.attach_quantizer(pair[0])
    for draw in compressed.draws:
        draw.gate.link(list(compressed.gates))
    for draw in compressed.draws:
        draw.resample()
    return compressed


def _reach(model: nn.Module, network: Network, site: Site) -> list[tuple[nn.Module, str, Structure]]:
    """What a site's taps multiply: (module, name of its weight, structure)."""
    reach = []
    for tap in site.taps:
        owner, _, name = network.layer(tap.layer).weight.rpartition(".")
        reach.append((model.get_submodule(owner), name, tap.structure))
    return reach


def quantize(model: nn.Module, layer: Layer, widths: tuple[BitWidth, BitWidth], seen: Tensor | None) -> None:
    """Replace one layer of `model` by its quantized twin, ranges fitted to its weight and to `seen` inputs.

    Left as it is: a layer of another class, and one whose module is never called (`seen` is None): code that hands a
    module's weight to a function, as Swin's attention does, would not notice the quantizers.
    """
    module = dict(model.named_modules()).get(layer.name)
    if module is None or seen is None or not can_quantize(module) or layer.weight != f"{layer.name}.weight":
        return
    weight: Tensor = module.weight.detach()
    x = seen if seen.numel() else torch.ones(1, device=weight.device)
    signed = bool(x.min() < -1e-6 * x.abs().max())
    w = IntegerQuantizer(fit_threshold(weight, widths[0].soft(), True, layer.kind.output_dim == 0), widths[0], True)
    a = IntegerQuantizer(fit_threshold(x, widths[1].soft(), signed, False), widths[1], signed)
    new = quantize_layer(module, w.to(weight), a.to(weight))
    replace_everywhere(model, module, new)


def refuse_tied(model: nn.Module, layer: Layer) -> None:
    """Raise JpqError where several modules share one weight: a mask or grid on one would not reach the other."""
    weight = model.get_parameter(layer.weight)
    owners = [n for n, m in model.named_modules() if any(p is weight for p in m.parameters(recurse=False))]
    if len(owners) > 1:
        raise JpqError(
            f"Layers {' and '.join(owners)} share one weight, which jpq cannot compress yet. "
            "Give each its own (copy the weight), or use one module twice."
        )
