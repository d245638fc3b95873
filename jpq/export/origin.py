"""`Origin`: the plan of a small model and the form of its inputs, noted on the model, so that it can be saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from jpq.export.program import assemble, check_structure, describe, encode_argument
from jpq.files import untrusted
from jpq.plan import Plan
from jpq.tracing.forward import split_arguments

ATTRIBUTE = "jpq_origin"  # of a small model; it goes along into copies and pickles

LARGEST_INPUT = 2**28  # numbers of one input that is made from its form


class TensorForm:
    """The type and shape of a tensor. No dataclass: torch would look for tensors inside it."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape

    def make(self, device: torch.device, seed: int = 0) -> Tensor:
        """A tensor of this form: random where it is of floating point, else 0."""
        if not self.dtype.is_floating_point:
            return torch.zeros(self.shape, dtype=self.dtype, device=device)
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=draw).to(device, self.dtype)


@dataclass(frozen=True)
class Origin:
    """Where a small model comes from."""

    plan: Plan
    example: Any = None  # a batch in which tensors are replaced by their forms; None: not known
    about: Mapping[str, Any] = field(default_factory=dict)  # what a file of it says: see jpq/export/onnx/metadata.py


def form_of(example: Any) -> Any:
    """An example (a tensor, a tuple of arguments, a dict of keywords) with its tensors replaced by their forms."""
    return tree_map(lambda v: TensorForm(v.dtype, tuple(v.shape)) if isinstance(v, Tensor) else v, example)


def example_of(form: Any, device: torch.device) -> Any:
    """A batch of that form, of random numbers and zeros."""
    return tree_map(lambda v: v.make(device) if isinstance(v, TensorForm) else v, form)


def note_origin(
    model: nn.Module, plan: Plan | None = None, example: Any = None, about: Mapping[str, Any] | None = None
) -> None:
    """Note the plan of a small model, the form of its inputs, or facts about it; what is not given stays as it is."""
    known = origin_of(model)
    if plan is not None:
        known = replace(known, plan=plan) if known else Origin(plan)
    if known is None:
        return
    if example is not None:
        known = replace(known, example=form_of(example))
    vars(model)[ATTRIBUTE] = replace(known, about={**known.about, **(about or {})})


def origin_of(model: nn.Module) -> Origin | None:
    """The origin that is noted on a model."""
    return vars(model).get(ATTRIBUTE)


def encode_form(form: Any) -> dict[str, Any]:
    """The form of an example in JSON's types. Raises ValueError for classes that have none."""
    args, kwargs = split_arguments(form)
    leaves, spec = tree_flatten((args, kwargs))
    structure = describe(tree_unflatten(range(len(leaves)), spec))
    return {"structure": structure, "leaves": [_encode_leaf(leaf) for leaf in leaves]}


def _encode_leaf(leaf: Any) -> Any:
    if isinstance(leaf, TensorForm):
        return {"dtype": str(leaf.dtype).removeprefix("torch."), "shape": list(leaf.shape)}
    return {"value": encode_argument(leaf)}


def decode_form(record: Any) -> Any:
    """The form of an example, (args) or {kwargs}, from `encode_form`. Raises ValueError or KeyError for others."""
    leaves = [_decode_leaf(leaf) for leaf in untrusted.as_list(record["leaves"])]
    check_structure(record["structure"], len(leaves))
    args, kwargs = assemble(record["structure"], leaves)
    return kwargs or args


def _decode_leaf(leaf: Mapping[str, Any]) -> Any:
    if "value" in leaf:
        return leaf["value"]
    shape = tuple(untrusted.as_int(n, 0, LARGEST_INPUT) for n in untrusted.as_list(leaf["shape"]))
    untrusted.as_int(prod(shape), 0, LARGEST_INPUT)
    dtype = getattr(torch, untrusted.as_str(leaf["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of type {leaf['dtype'][:20]!r}")
    return TensorForm(dtype, shape)
