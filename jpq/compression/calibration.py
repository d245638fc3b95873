"""Calibration on data: samples of activations to which ranges are fitted, and BatchNorm's running averages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from jpq.compression.batchnorm import moving_norms
from jpq.compression.model import CompressedModel
from jpq.tracing.export_graph import forward_error
from jpq.tracing.forward import call_model, copy_tensors, eval_mode, hook_modules, split_arguments
from jpq.tracing.network import Network
from jpq.tracing.tied_weights import layers_sharing
from jpq.types import JpqError

SAMPLES = 2**14  # activations per layer and batch

Batches = Iterable[Any]  # of inputs as `call_model` takes them


def observe_activations(model: nn.Module, network: Network, batches: Batches) -> dict[str, Tensor]:
    """Layer -> samples of its input: SAMPLES random values of each batch, and its extremes, in evaluation mode.

    Random, because a regular stride that shares a factor with the width of an image would see few of its columns.
    Raises JpqError for a batch that the model cannot take.
    """
    names = {layer.name: layer.name for layer in network.layers}
    modules = dict(model.named_modules())
    for name in list(names):
        if isinstance(modules.get(name), (nn.Linear, nn.modules.conv._ConvNd)):
            names |= dict.fromkeys(layers_sharing(model, modules[name]), name)  # they share a grid
    return observe_modules(model, names, batches, before=True)


def recalibrate(net: CompressedModel, batches: Batches) -> None:
    """Replace the samples of the float model's activations by samples under the present decisions.

    Discretization refits the ranges of widths that it changes to these samples.
    """
    with eval_mode(net):
        for draw in net.draws:
            draw.resample()
        net.calibration_samples = observe_activations(net.model, net.network, batches)


def observe_outputs(model: nn.Module, network: Network, batches: Batches) -> dict[str, Tensor]:
    """Module -> samples of its output, where that could be rounded (`Layer.output_quant_point`)."""
    points = [layer.output_quant_point for layer in network.layers if layer.output_quant_point]
    return observe_modules(model, {point.module: point.module for point in points}, batches, before=False)


@torch.no_grad()
def observe_modules(model: nn.Module, names: Mapping[str, str], batches: Batches, before: bool) -> dict[str, Tensor]:
    """Samples under the names on the right of what the modules on the left read, or give."""
    draw = torch.Generator().manual_seed(0)
    samples: dict[str, list[Tensor]] = {name: [] for name in names.values()}

    def sample(name: str, _: nn.Module, x: Tensor | None, out: Any) -> None:
        value = x if before else out
        if isinstance(value, Tensor):
            flat = value.detach().flatten().float()
            pick = torch.randint(flat.numel(), (min(SAMPLES, flat.numel()),), generator=draw).to(flat.device)
            samples[names[name]].append(torch.cat([flat[pick], flat.min()[None], flat.max()[None]]))

    modules = {n: m for n, m in model.named_modules() if n in names}
    with eval_mode(model), hook_modules(modules, sample, before=before):
        for batch in batches:
            args, kwargs = copy_tensors(split_arguments(batch))
            try:
                model(*args, **kwargs)
            except Exception as error:
                raise forward_error(model, args, kwargs, error) from error
    return {name: torch.cat(parts) for name, parts in samples.items() if parts}


@torch.no_grad()
def reestimate_batchnorm(net: nn.Module, batches: Iterable[tuple[Any, Any]], count: int = 100) -> None:
    """Set BatchNorm's running statistics to plain averages over the first `count` batches, where they do not stay.

    The network is in evaluation mode then. `batches` are (inputs, anything) pairs; JpqError where there are none, which
    would leave norms without statistics.
    """
    norms = moving_norms(net)
    if not norms:
        return
    pairs = islice(batches, count)
    first = next(pairs, None)
    if first is None:
        raise JpqError("BatchNorm's statistics are measured on batches, and there are none: give at least one.")
    momenta = [m.momentum for m in norms]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    try:
        for x, _ in chain([first], pairs):
            call_model(net, x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        net.eval()
