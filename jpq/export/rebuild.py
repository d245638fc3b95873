"""Rebuilding: the physically smaller model with fixed brevitas quantizers, built from a plan and filled with weights.

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
from jpq.export.origin import note_origin
from jpq.export.unconstrained.reorder import choose_layout
from jpq.export.unconstrained.select import insert_selects
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
from jpq.plan import LayerPlan, Plan
from jpq.tracing.model_checks import unwrap_model
from jpq.tracing.routes import applied_routes, apply_routes
from jpq.tracing.shrink import apply_slices
from jpq.tracing.tied_weights import layers_sharing
from jpq.types import JpqError

_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original$")  # the name of a parametrized parameter


@torch.no_grad()
def rebuild(net: CompressedModel, model: nn.Module) -> tuple[nn.Module, Plan]:
    """Build the small model from a network with its final plan, and the float model that it was made from.

    Returns the small model in evaluation mode and its complete plan. In evaluation the small model computes what `net`
    computes, to rounding; unless channels inside opened averages were removed (`net.opened`), which fine-tuning of the
    small model must repair.
    """
    plan = complete_plan(net)
    dense = copy.deepcopy(unwrap_model(model)).to(next(net.model.parameters()).device)
    _take_types(net.model, dense)
    trained_state = {_PARAMETRIZED.sub(r"\1", name): t for name, t in net.model.state_dict().items()}
    dense.load_state_dict({name: trained_state[name] for name in dense.state_dict()})
    small = build_from_plan(plan, dense)
    _copy_ranges(net, small, plan)
    _apply_masks(net, small, plan)
    note_origin(small, plan)
    return small.eval(), plan


def _take_types(trained: nn.Module, dense: nn.Module) -> None:
    """Give each tensor of the float model the type that it has in the trained one: a complex buffer stays complex."""
    tensors = (*trained.named_parameters(remove_duplicate=False), *trained.named_buffers(remove_duplicate=False))
    types = {_PARAMETRIZED.sub(r"\1", name): tensor.dtype for name, tensor in tensors}
    for name, tensor in (*dense.named_parameters(), *dense.named_buffers()):
        tensor.data = tensor.data.to(types.get(name, tensor.dtype))


def complete_plan(net: CompressedModel) -> Plan:
    """The plan of a network with final decisions, with the slices and selections that make it physical."""
    plan = net.plan()
    layout = choose_layout(net.network, [site for site in net.sites if not site.is_mask], plan.kept)
    return replace(plan, slices=layout.slices, selects=layout.selects, routes=applied_routes(net.model))


def build_from_plan(plan: Plan, model: nn.Module) -> nn.Module:
    """Build the small model that `plan` describes from its dense float `model`, which is not changed.

    Weights are those of `model`, sliced; the quantizers' ranges are still 1. Raises JpqError where the plan names a
    layer that the model does not have.
    """
    small = apply_slices(apply_routes(copy.deepcopy(unwrap_model(model)), plan.routes), plan.slices)
    modules = dict(small.named_modules())
    for name, layer in plan.layers.items():
        module = modules.get(name)
        if module is None or not can_quantize(module):
            raise JpqError(f"The plan quantizes layer '{name}', which the model does not have: is it the same model?")
        _quantize(small, module, layer)
    modules = dict(small.named_modules())
    for name in plan.masks:
        if name not in modules:
            raise JpqError(f"The plan masks layer '{name}', which the model does not have: is it the same model?")
        # which weights are kept: counts and storage need it, the forward pass does not
        modules[name].register_buffer("mask", torch.ones_like(modules[name].weight, dtype=torch.bool))
    for name, end in plan.ends.items():
        if name not in modules:
            raise JpqError(f"The plan rounds what '{name}' gives, which the model does not have: is it the same model?")
        reference = next(small.parameters())
        quantize_results(
            modules[name], IntegerQuantizer(torch.ones(()).to(reference), Fixed(end.bits), end.signed).to(reference)
        )
    return insert_selects(small, plan.selects)


def _quantize(small: nn.Module, module: Any, layer: LayerPlan) -> None:
    """Put a brevitas layer in the place of a float layer, and of those that share its weight and then its quantizers.

    They have the plan's bits, and ranges of 1.
    """
    weight: Tensor = module.weight
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    ranges = torch.ones(()) if transposed else torch.ones(len(weight), *[1] * (weight.dim() - 1))
    weight_grid = IntegerQuantizer(ranges.to(weight), Fixed(layer.w_bits), True).to(weight)
    act_grid = IntegerQuantizer(torch.ones(()).to(weight), Fixed(layer.a_bits), layer.signed).to(weight)
    for other in layers_sharing(small, module).values():
        replace_everywhere(small, other, quantize_layer(other, weight_grid, act_grid))


def _copy_ranges(net: CompressedModel, small: nn.Module, plan: Plan) -> None:
    """Give the small model's quantizers the trained ranges, sliced like the weights."""
    for name in plan.layers:
        trained_grids = net.quantizers(name)
        assert trained_grids is not None
        layer = small.get_submodule(name)
        rows = plan.slices.get(f"{name}.weight", {}).get(0)
        _copy_range(trained_grids[0], weight_quantizer(layer), rows)
        _copy_range(trained_grids[1], act_quantizer(layer))
    for name in plan.ends:
        small_grid, trained_grid = (result_quantizer(m.get_submodule(name)) for m in (small, net.model))
        assert small_grid is not None
        assert trained_grid is not None
        _copy_range(trained_grid, small_grid)


def _copy_range(trained: IntegerQuantizer, small: IntegerQuantizer, rows: Any = None) -> None:
    """Copy a quantizer's range, side and step, of a weight those of the kept `rows`."""
    for old, new in ((trained.log_threshold, small.log_threshold), (trained.step, small.step)):
        new.copy_(old[rows] if rows is not None and old.dim() else old)
    small.side.copy_(trained.side[rows] if rows is not None and trained.side.dim() else trained.side)
    small.power_of_two.copy_(trained.power_of_two)


def _apply_masks(net: CompressedModel, small: nn.Module, plan: Plan) -> None:
    """Zero the weights that masks inside layers drop, and store which ones are kept."""
    for site in net.sites:
        if site.is_mask:
            tap = site.taps[0]
            layer: Any = small.get_submodule(tap.layer)
            kept = plan.masks[tap.layer].units().to(layer.weight)
            mask = tap.structure.expand(kept, layer.weight.shape)
            layer.mask.copy_(mask.expand_as(layer.weight) > 0)
            layer.weight.mul_(layer.mask)
