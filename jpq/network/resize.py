"""Removing channels from a float model by slicing its parameters, as plain data that a saved plan can hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from jpq.types import JpqError, Labels

if TYPE_CHECKING:
    from jpq.network.record import Network

# parameter, buffer or counting attribute -> dim -> kept indices, in their new order
Slices = Mapping[str, Mapping[int, list[int]]]


def slices(
    network: Network, dropped: Collection[int], places: Callable[[Labels], Labels] | None = None
) -> dict[str, dict[int, list[int]]]:
    """What is kept of every parameter, buffer and counting attribute that loses something or changes its order.

    A name that ends in a counting attribute ("shortcut.pad.before", "attention.heads", "norm.normalized_shape") has
    the one dim 0; the attribute becomes the number of kept entries. `places` gives the positions of an axis in their
    new order.
    """
    above = max(dropped, default=0) + 1
    gone = np.zeros(above + 2, bool)  # the last two entries stand for larger classes and for NONE
    gone[list(dropped)] = True
    out: dict[str, dict[int, list[int]]] = {}
    counted = {name: {0: labels} for name, labels in network.attributes.items()}
    for name, axes in [*network.axes.items(), *counted.items()]:
        for dim, labels in axes.items():
            lost = gone[np.minimum(labels, above)]
            if lost.all() and name in network.axes:
                raise JpqError(f"Nothing would be left of dim {dim} of '{name}'. Keep at least one of its channels.")
            natural = np.arange(len(labels))
            at = places(labels) if places else natural
            if lost.any() or (at != natural).any():
                out.setdefault(name, {})[int(dim)] = at[~lost[at]].tolist()
    return out


@torch.no_grad()
def apply_slices(model: nn.Module, slices: Slices) -> nn.Module:
    """Slice `model` in place and set its modules' sizes to match. Keys of dims may be strings, as json makes them."""
    owners: dict[str, nn.Module] = {}
    for name, axes in slices.items():
        path, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(path)
            value = getattr(module, attribute)
            if isinstance(value, bool) or not isinstance(value, int | tuple | Tensor):
                raise AttributeError(f"{name} is a {type(value).__name__}")
        except AttributeError as e:
            raise JpqError(f"The plan slices '{name}', which this {type(model).__name__} has not. Load the plan "
                           "into the model that it was made from.") from e  # fmt: skip
        if isinstance(value, int | tuple):  # a count, or the shape of a normalisation over one dim
            count = len(axes[next(iter(axes))])
            setattr(module, attribute, count if isinstance(value, int) else (count,))
            continue
        owners[path] = module
        _slice(name, value, {int(dim): kept for dim, kept in axes.items()})
    for module in set(owners.values()):
        _resize(module)
    return model


def _slice(name: str, value: Tensor, axes: dict[int, list[int]]) -> None:
    data = value.data
    for dim, kept in axes.items():
        if not kept or dim >= data.dim():
            raise JpqError(
                f"The plan keeps {len(kept)} entries of dim {dim} of '{name}', a tensor of {data.dim()} dims."
            )
        if max(kept) >= data.shape[dim]:
            raise JpqError(f"The plan keeps index {max(kept)} of dim {dim} of '{name}', which has only "
                           f"{data.shape[dim]}. Load the plan into the model that it was made from, once.")  # fmt: skip
        data = data.index_select(dim, torch.tensor(kept, dtype=torch.long, device=data.device))
    value.data = data  # in place, so parameters and modules that are shared stay shared
    value.grad = None


def _resize(module: nn.Module) -> None:
    """Bring the size attributes of a torch module in line with its sliced tensors."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        n_in, n_out = weight.shape[1], weight.shape[0]
        if module.transposed:
            if module.groups == module.in_channels and module.groups > 1:
                module.groups = weight.shape[0]
            module.in_channels, module.out_channels = weight.shape[0], n_in * module.groups
        else:
            if module.groups == module.in_channels and module.groups > 1:
                module.groups = module.groups * n_out // module.out_channels
            module.in_channels, module.out_channels = n_in * module.groups, n_out
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = weight if weight is not None else module.running_mean
        module.num_features = held.shape[0] if held is not None else module.num_features
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
