"""The law on a float model: with random units dropped, the masked and the shrunk one compute the same in float64.

`hold` is the whole check; tests and `studies/coverage.py` share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from jpq.tracing.forward import call_model, hook_modules
from jpq.tracing.network import Network
from jpq.tracing.shrink import shrink
from jpq.tracing.sites import Site
from jpq.types import JpqError

GAIN = 1.4  # of a weight matrix: about what a rectifier takes away

Keep = Mapping[str, Tensor]  # site -> [1, n], 1 where the unit stays


@dataclass(frozen=True)
class EquivalenceResult:
    """What one random decision showed."""

    difference: float  # relative, of masked and shrunk output, the largest over the outputs
    sensitivity: float  # relative change of the output when the example is mirrored: what a wrong channel would show
    dropped: int  # label classes
    seconds: float  # of the processor, for building the small model


@torch.no_grad()
def randomize(model: nn.Module, example: Any, seed: int = 0) -> nn.Module:
    """Make `model` float64 (in place), with weights behind which no channel can hide; gives it in eval mode.

    Fresh networks drown their input in shifts: an EfficientNet's output changes by 1e-11 when its image changes, so a
    wrong channel in its stem would pass for rounding. Here every convolution and Linear keeps its input's scale,
    batch norms get the statistics of `example`, off by a random part, vectors (also those spread over dims of size 1)
    and parameters that are zero throughout become uniform in [0.5, 1.5), and shifts uniform in [-0.5, 0.5).
    """
    g = torch.Generator().manual_seed(seed)
    for name, p in model.double().named_parameters():
        if p.numel() == max(p.shape, default=1) or not p.any():
            shift = name.endswith("bias")
            p.copy_(torch.rand(p.shape, generator=g, dtype=torch.double) + (-0.5 if shift else 0.5))
        elif p.dim() > 1 and p.std() > 0 and not name.endswith(("table", "embedding", "token")):
            p.mul_(GAIN / (p.std() * p[0].numel() ** 0.5))

    def measure(_: str, norm: Any, x: Any, __: Any) -> None:
        if norm.running_mean is None or norm.running_var is None:
            return
        values = x.transpose(0, 1).flatten(1)
        spread = values.std(1, unbiased=False)
        off = torch.rand(2, len(spread), generator=g, dtype=torch.double) - 0.5
        norm.running_mean.copy_(values.mean(1) + off[0] * spread)
        norm.running_var.copy_(torch.where(spread > 0, spread, 1.0).square() * (1 + off[1]))

    norms = {n: m for n, m in model.eval().named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    if norms:
        with hook_modules(norms, measure, before=True):
            outputs(model, example)
    return model


def decide(sites: Sequence[Site], seed: int, share: float = 0.5) -> dict[str, Tensor]:
    """Random masks that keep `share` of each site's units, at least one: [1, n] each."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for site in sites:
        keep = torch.zeros(1, site.n, dtype=torch.double)
        keep[0, torch.randperm(site.n, generator=g)[: max(1, round(share * site.n))]] = 1
        out[site.name] = keep
    return out


def dropped(sites: Sequence[Site], keep: Keep) -> set[int]:
    """The label classes that go."""
    return {int(c) for s in sites for c, k in zip(s.labels, keep[s.name][0], strict=True) if not k}


@contextmanager
def masked(model: nn.Module, network: Network, sites: Sequence[Site], keep: Keep) -> Iterator[nn.Module]:
    """Inside, every weight of `model` that reads a dropped channel is zero; afterwards weights are as before."""
    before: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for site in sites:
                for tap in site.taps:
                    name = network.layer(tap.layer).weight
                    weight = model.get_parameter(name)
                    before.setdefault(name, weight.clone())
                    weight.mul_(tap.structure.expand(keep[site.name].to(weight), weight.shape))
        yield model
    finally:
        with torch.no_grad():
            for name, was in before.items():
                model.get_parameter(name).copy_(was)


@torch.no_grad()
def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Every tensor that the model gives for an example of a tensor, a tuple, or a dict of keywords, in float64."""
    wide = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, example)
    return [v for v in tree_flatten(call_model(model, wide))[0] if isinstance(v, Tensor)]


def relative_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """|a - b| / |a|, the largest over the outputs. Raises JpqError where shapes differ or a number is not finite."""
    if [x.shape for x in a] != [x.shape for x in b]:
        raise JpqError(f"The outputs have the shapes {[list(x.shape) for x in a]} and {[list(x.shape) for x in b]}.")
    if not all(bool(x.isfinite().all()) for x in (*a, *b)):
        raise JpqError("An output is not finite, so nothing can be compared; choose other weights.")
    return max(float((x - y).norm() / x.norm().clamp_min(1e-300)) for x, y in zip(a, b, strict=True))


def check_equivalence(
    model: nn.Module, network: Network, sites: Sequence[Site], example: Any, seed: int, share: float = 0.5
) -> EquivalenceResult:
    """Drop all but a random `share` of every site's units, and compare the masked and the shrunk model.

    Args:
        model: in float64 and eval mode (see `scramble`); it comes back as it was.
        network, sites: of that model, traced in any precision.
        example: what its forward takes; floating-point tensors are made float64.
    """
    keep = decide(sites, seed, share)
    gone = dropped(sites, keep)
    start = process_time()
    small = shrink(model, network, gone)
    seconds = process_time() - start
    found = outputs(small, example)
    mirrored = tree_map(lambda v: v.flip(-1) if isinstance(v, Tensor) and v.dim() else v, example)
    sensitivity = relative_difference(found, outputs(small, mirrored))
    del small
    with masked(model, network, sites, keep) as same:
        return EquivalenceResult(relative_difference(outputs(same, example), found), sensitivity, len(gone), seconds)
