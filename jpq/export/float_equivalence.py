"""Equivalence of masked and shrunk float models: random units dropped, outputs compared in float64.

`check_equivalence` is the whole check; tests and `studies/coverage.py` share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from jpq.tracing.double_casts import in_double
from jpq.tracing.forward import call_model, collect_tensors, hook_modules
from jpq.tracing.network import Network
from jpq.tracing.shrink import remove_channels
from jpq.tracing.sites import Site
from jpq.types import JpqError

WEIGHT_GAIN = 1.4  # gain of a randomized weight matrix, which makes up for the loss at a ReLU

Keep = Mapping[str, Tensor]  # site -> [1, n], 1 where the unit is kept


@dataclass(frozen=True)
class EquivalenceResult:
    """Difference of a masked and a shrunk model for one random decision."""

    difference: float  # relative, the largest over the outputs
    sensitivity: float  # relative change of the output for a mirrored example: the effect of a wrong channel
    dropped: int  # number of label classes
    seconds: float  # processor time for building the small model


def check_equivalence(
    model: nn.Module, network: Network, sites: Sequence[Site], example: Any, seed: int, share: float = 0.5
) -> EquivalenceResult:
    """Drop all but a random `share` of every site's units, and compare the masked and the shrunk model.

    Args:
        model: in float64 and eval mode (see `randomize`); it is restored afterwards.
        network: traced from that model in any precision.
        sites: of that network.
        example: arguments of its forward; floating-point tensors are made float64.
        seed: of the random decisions.
        share: of units that are kept.
    """
    keep = draw_decisions(sites, seed, share)
    classes = dropped_labels(sites, keep)
    start = process_time()
    small = remove_channels(model, network, classes)
    seconds = process_time() - start
    shrunk_outputs = float64_outputs(small, example)
    mirrored = tree_map(lambda v: v.flip(-1) if isinstance(v, Tensor) and v.dim() else v, example)
    sensitivity = relative_difference(shrunk_outputs, float64_outputs(small, mirrored))
    del small
    with masked_weights(model, network, sites, keep) as masked:
        difference = relative_difference(float64_outputs(masked, example), shrunk_outputs)
    return EquivalenceResult(difference, sensitivity, len(classes), seconds)


@torch.no_grad()
def randomize(model: nn.Module, example: Any, seed: int = 0) -> nn.Module:
    """Make a model float64 in eval mode, in place, with random weights behind which no channel can hide.

    Fresh networks drown their input in shifts: an EfficientNet's output changes by 1e-11 when its image changes, so a
    wrong channel in its stem would pass for rounding. Here every convolution and Linear keeps its input's scale,
    batch norms get the statistics of `example`, off by a random part, vectors (also those spread over dims of size 1)
    and parameters that are zero throughout become uniform in [0.5, 1.5), and shifts uniform in [-0.5, 0.5).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.double().named_parameters():
        if p.numel() == max(p.shape, default=1) or not p.any():
            is_shift = name.endswith("bias")
            p.copy_(torch.rand(p.shape, generator=generator, dtype=torch.double) + (-0.5 if is_shift else 0.5))
        elif p.dim() > 1 and p.std() > 0 and not name.endswith(("table", "embedding", "token")):
            p.mul_(WEIGHT_GAIN / (p.std() * p[0].numel() ** 0.5))

    def set_statistics(_: str, norm: Any, x: Any, __: Any) -> None:
        if norm.running_mean is None or norm.running_var is None:
            return
        values = x.transpose(0, 1).flatten(1)
        spread = values.std(1, unbiased=False)
        offset = torch.rand(2, len(spread), generator=generator, dtype=torch.double) - 0.5
        norm.running_mean.copy_(values.mean(1) + offset[0] * spread)
        norm.running_var.copy_(torch.where(spread > 0, spread, 1.0).square() * (1 + offset[1]))

    norms = {n: m for n, m in model.eval().named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    if norms:
        with hook_modules(norms, set_statistics, before=True):
            float64_outputs(model, example)
    return model


def draw_decisions(sites: Sequence[Site], seed: int, share: float = 0.5) -> dict[str, Tensor]:
    """Random masks, [1, n] each, that keep `share` of each site's units, at least one."""
    generator = torch.Generator().manual_seed(seed)
    decisions = {}
    for site in sites:
        keep = torch.zeros(1, site.n, dtype=torch.double)
        keep[0, torch.randperm(site.n, generator=generator)[: max(1, round(share * site.n))]] = 1
        decisions[site.name] = keep
    return decisions


def dropped_labels(sites: Sequence[Site], keep: Keep) -> set[int]:
    """The label classes of dropped units."""
    return {int(c) for s in sites for c, k in zip(s.labels, keep[s.name][0], strict=True) if not k}


@contextmanager
def masked_weights(model: nn.Module, network: Network, sites: Sequence[Site], keep: Keep) -> Iterator[nn.Module]:
    """A context in which every weight of `model` that reads a dropped channel is zero; it restores the weights."""
    originals: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for site in sites:
                for tap in site.taps:
                    name = network.layer(tap.layer).weight
                    weight = model.get_parameter(name)
                    originals.setdefault(name, weight.clone())
                    weight.mul_(tap.structure.expand(keep[site.name].to(weight), weight.shape))
        yield model
    finally:
        with torch.no_grad():
            for name, original in originals.items():
                model.get_parameter(name).copy_(original)


@torch.no_grad()
def float64_outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """All output tensors of a model for an example (a tensor, a tuple, or a dict of keywords) made float64."""
    double_example = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, example)
    return in_double(lambda: collect_tensors(call_model(model, double_example)))


def relative_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """|a - b| / |a|, the largest over the outputs. Raises JpqError where shapes differ or a number is not finite."""
    if [x.shape for x in a] != [x.shape for x in b]:
        raise JpqError(f"The outputs have the shapes {[list(x.shape) for x in a]} and {[list(x.shape) for x in b]}.")
    if not all(bool(x.isfinite().all()) for x in (*a, *b)):
        raise JpqError("An output is not finite, so nothing can be compared; choose other weights.")
    return max(float((x - y).norm() / x.norm().clamp_min(1e-300)) for x, y in zip(a, b, strict=True))
