"""Put gates and quantizers on a copy of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from jpq.gates import Gate, ZeroBin
from jpq.network.accept import require_wide, unwrapped
from jpq.network.compressed import Compressed
from jpq.network.hyper import Hypernetworks
from jpq.network.read import arguments, call, does_not_run, evaluating, heard
from jpq.network.record import Layer, Network
from jpq.network.sites import Site
from jpq.network.taps import Draw, Jitter, Masked
from jpq.quantizers import (
    DeadZone,
    Fixed,
    Integer,
    Width,
    can_quantize,
    fit_threshold,
    quantize_layer,
    quantize_results,
    replace_everywhere,
)  # fmt: skip
from jpq.structures import Axis, Structure
from jpq.types import JpqError

__all__ = ["attach", "call", "observe", "observe_again", "quantize", "refuse_tied"]

SAMPLES = 2**14  # activations per layer and batch that calibration looks at
Batches = Iterable[Any]
MakeWidth = Callable[[Layer], tuple[Width, Width]]


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
) -> Compressed:
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
    model = unwrapped(model)
    require_wide(model)
    if any(parametrize.is_parametrized(m) for m in model.modules()):
        raise JpqError(
            "The model already carries parametrizations; remove them before compressing it. "
            "jpq.unpacked folds weight_norm and spectral_norm."
        )
    for layer in network.layers:
        refuse_tied(model, layer)
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    batches = list(calibration)
    seen = observe(model, network, batches)
    results = observe_results(model, network, batches) if output_bits else {}
    compressed = Compressed(
        model, network, sites, [gate(s.rows, s.n).to(device) for s in sites], method, channel_multiple
    )
    compressed.seen = seen
    for one, site in zip(compressed.gates, sites, strict=True):
        shapes = [torch.Size(network.layer(t.layer).weight_shape) for t in site.taps]
        sizes = torch.stack([t.structure.sizes(s) for t, s in zip(site.taps, shapes, strict=True)]).sum(0)
        one.bind(sizes.to(device), site.taps[0].structure.quota())
    compressed.draws = [Draw(g) for g in compressed.gates]
    taps: dict[str, list[tuple[Draw, Structure]]] = {}
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
                model.get_submodule(owner), name, Masked(taps[layer.name]), unsafe=True
            )
            pair = compressed.quantizers(layer.name)
            if pair:
                noisy = [(d, s) for d, s in taps[layer.name] if isinstance(s, Axis)]  # masks have no noise per sample
                pair[1].jitter = Jitter(noisy, -1 if layer.kind == "linear" else 1, layer.groups) if noisy else None
    for layer in network.layers:
        if layer.end is not None and layer.end.module in results and compressed.quantizers(layer.name):
            ranges = fit_threshold(results[layer.end.module], output_bits, layer.end.signed, False)
            grid = Integer(ranges, Fixed(output_bits), layer.end.signed)
            quantize_results(model.get_submodule(layer.end.module), grid.to(device))
    for draw, site in zip(compressed.draws, sites, strict=True):
        draw.reach = _reach(model, network, site)
        draw.look()
        pair = compressed.quantizers(site.taps[0].layer)
        if isinstance(draw.gate, ZeroBin) and pair:
            put_zero_bin(draw.gate, pair[0])
    for draw in compressed.draws:
        draw.gate.join(list(compressed.gates))
    for draw in compressed.draws:
        draw.again()
    return compressed


def put_zero_bin(gate: ZeroBin, quantizer: Integer) -> None:
    """Let training round a weight on a grid with the gate's dead zone.

    Raises JpqError where the width brings a grid of its own.
    """
    if quantizer.grid is not None:
        raise JpqError(
            f"Widths of kind {type(quantizer.width).__name__} and a dead zone each bring a grid to train on; choose "
            "widths that have none (learned, squashed or power_of_two)."
        )
    quantizer.grid, gate.in_grid = DeadZone(gate.ends), True


def _reach(model: nn.Module, network: Network, site: Site) -> list[tuple[nn.Module, str, Structure]]:
    """What a site's taps multiply: (module, name of its weight, structure)."""
    reach = []
    for tap in site.taps:
        owner, _, name = network.layer(tap.layer).weight.rpartition(".")
        reach.append((model.get_submodule(owner), name, tap.structure))
    return reach


def quantize(model: nn.Module, layer: Layer, widths: tuple[Width, Width], seen: Tensor | None) -> None:
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
    w = Integer(fit_threshold(weight, widths[0].soft(), True, layer.kind != "conv_transpose"), widths[0], True)
    a = Integer(fit_threshold(x, widths[1].soft(), signed, False), widths[1], signed)
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


def observe(model: nn.Module, network: Network, batches: Batches) -> dict[str, Tensor]:
    """Values that each layer reads, with the extremes: a random SAMPLES of each batch; the model runs in eval mode.

    Drawn at random because any regular stride shares a factor with some image's width and sees one column only.
    Raises JpqError for a batch that the model cannot take.
    """
    return _observe(model, [layer.name for layer in network.layers], batches, before=True)


def observe_again(net: Compressed, batches: Batches) -> None:
    """Let the ranges that landing fits anew be fitted to what layers read now, not to what the float model's did."""
    with evaluating(net):
        for draw in net.draws:
            draw.again()
        net.seen = observe(net.model, net.network, batches)


def observe_results(model: nn.Module, network: Network, batches: Batches) -> dict[str, Tensor]:
    """The same of what modules hand on, where that could be rounded (`network.ends`)."""
    return _observe(model, [layer.end.module for layer in network.layers if layer.end], batches, before=False)


@torch.no_grad()
def _observe(model: nn.Module, names: Sequence[str], batches: Batches, before: bool) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def sample(name: str, _: nn.Module, x: Tensor | None, out: Any) -> None:
        value = x if before else out
        if isinstance(value, Tensor):
            flat = value.detach().flatten().float()
            pick = torch.randint(flat.numel(), (min(SAMPLES, flat.numel()),), generator=draw).to(flat.device)
            seen[name].append(torch.cat([flat[pick], flat.min()[None], flat.max()[None]]))

    modules = {n: m for n, m in model.named_modules() if n in seen}
    with evaluating(model), heard(modules, sample, before=before):
        for batch in batches:
            try:
                call(model, batch)
            except Exception as error:
                raise does_not_run(model, *arguments(batch), error) from error
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}
