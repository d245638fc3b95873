"""Copies of models, whose parts may keep tensors that an earlier forward pass computed (attention maps, features)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from jpq.types import JpqError

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model, memo: Mapping[int, Any] | None = None) -> Model:
    """A deep copy, in which such tensors are detached: copy.deepcopy alone refuses them.

    `memo`: id of an object -> what stands for it in the copy. Raises JpqError for models that cannot be copied.
    """
    detached = {id(t): t.detach().clone() for t in computed_tensors(model)}
    try:
        return copy.deepcopy(model, {**detached, **(memo or {})})
    except Exception as error:  # whatever the attributes' classes raise
        raise JpqError(
            f"{type(model).__name__} cannot be copied, and jpq works on copies: {error}. Make its "
            "attributes such that copy.deepcopy(model) works."
        ) from error


def computed_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors with a gradient's history in attributes of a model's parts, in lists, tuples, sets and dicts too."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting: list[Any] = [vars(module) for module in model.modules()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if not value.is_leaf:
                found[id(value)] = value
        elif id(value) not in seen and isinstance(value, (Mapping, list, tuple, set)):
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
    return list(found.values())
