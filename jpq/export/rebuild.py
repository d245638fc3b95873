"""Make the plan real: a physically smaller model with fixed brevitas quantizers, built anew and filled with weights.

It is built from the float model's code, never cut out of the trained one: a quantizer whose shape belongs to the wide
layer cannot survive in the narrow one.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jpq.compression.model import CompressedModel
from jpq.export.unconstrained.reorder import layout
from jpq.export.unconstrained.select import insert
from jpq.methods.quantizers import (
    Fixed,
    IntegerQuantizer,
    act_quantizer,
    can_quantize,
    quantize_layer,
    quantize_results,
    replace_everywhere,
    result_quantizer,
    weight_quantizer,
)
from jpq.plan import Plan
from jpq.tracing.model_checks import unwrapped
from jpq.tracing.shrink import apply_slices
from jpq.types import JpqError

_MASKED = re.compile(r"parametrizations\.(\w+)\.original$")  # where a parametrized parameter is kept


def build(plan: Plan, model: nn.Module) -> nn.Module:
    """The small model that `plan` describes, from its dense float `model` (not changed); ranges are still 1.

    Raises JpqError where the plan names a layer that the model does not have.
    """
    small = apply_slices(copy.deepcopy(unwrapped(model)), plan.slices)
    modules = dict(small.named_modules())
    for name, layer in plan.layers.items():
        module = modules.get(name)
        if module is None or not can_quantize(module):
            raise JpqError(f"The plan quantizes layer '{name}', which the model does not have: is it the same model?")
        weight: Tensor = module.weight
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        ranges = torch.ones(()) if transposed else torch.ones(len(weight), *[1] * (weight.dim() - 1))
        w = IntegerQuantizer(ranges.to(weight), Fixed(layer.w_bits), True).to(weight)
        a = IntegerQuantizer(torch.ones(()).to(weight), Fixed(layer.a_bits), layer.signed).to(weight)
        replace_everywhere(small, module, quantize_layer(module, w, a))
    modules = dict(small.named_modules())
    for name in plan.masks:
        if name not in modules:
            raise JpqError(f"The plan masks layer '{name}', which the model does not have: is it the same model?")
        # which weights there are: counts and storage need it, the forward pass does not
        modules[name].register_buffer("mask", torch.ones_like(modules[name].weight, dtype=torch.bool))
    for name, end in plan.ends.items():
        if name not in modules:
            raise JpqError(f"The plan rounds what '{name}' gives, which the model does not have: is it the same model?")
        like = next(small.parameters())
        quantize_results(modules[name], IntegerQuantizer(torch.ones(()).to(like), Fixed(end.bits), end.signed).to(like))
    return insert(small, plan.selects)


def complete(net: CompressedModel) -> Plan:
    """The plan of a settled network, with the slices and selections that make it physical."""
    plan = net.plan()
    found = layout(net.network, [site for site in net.sites if not site.is_mask], plan.kept)
    return replace(plan, slices=found.slices, selects=found.selects)


@torch.no_grad()
def rebuild(net: CompressedModel, model: nn.Module) -> tuple[nn.Module, Plan]:
    """(small model in eval mode, its plan) from a settled network and the float model that it was made of.

    The law: in evaluation the small model computes what `net` computes, to rounding; unless channels went from inside
    averages that were opened (`net.opened`), which fine-tuning of the small model must repair.
    """
    plan = complete(net)
    dense = copy.deepcopy(unwrapped(model)).to(next(net.model.parameters()))
    trained = {_MASKED.sub(r"\1", name): t for name, t in net.model.state_dict().items()}
    dense.load_state_dict({name: trained[name] for name in dense.state_dict()})
    small = build(plan, dense)
    for name in plan.layers:
        pair = net.quantizers(name)
        assert pair is not None
        layer = small.get_submodule(name)
        rows = plan.slices.get(f"{name}.weight", {}).get(0)
        ranges = pair[0].log_threshold
        weight_quantizer(layer).log_threshold.copy_(ranges[rows] if rows is not None and ranges.dim() else ranges)
        act_quantizer(layer).log_threshold.copy_(pair[1].log_threshold)
    for name in plan.ends:
        mine, trained_grid = (result_quantizer(m.get_submodule(name)) for m in (small, net.model))
        assert mine is not None
        assert trained_grid is not None
        mine.log_threshold.copy_(trained_grid.log_threshold)
    for site in net.sites:
        if site.is_mask:
            masked: Any = small.get_submodule(site.taps[0].layer)
            keep = plan.masks[site.taps[0].layer].units().to(masked.weight)
            mask = site.taps[0].structure.expand(keep, masked.weight.shape)
            masked.mask.copy_(mask.expand_as(masked.weight) > 0)
            masked.weight.mul_(masked.mask)
    return small.eval(), plan
