"""Whether an ONNX file takes batches of other sizes than the one that it was exported with.

torch.onnx writes what ran: of code that loops over samples, or makes a number of their count, it writes the example's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from jpq.export.runtimes import Session
from jpq.tracing.forward import batch_size, collect_tensors


def first_samples(example: Any, count: int) -> Any:
    """An example's first `count` samples, in any nest of tensors; they are repeated where it has fewer."""
    size = batch_size(example)

    def take(v: Any) -> Any:
        if not isinstance(v, Tensor) or not v.dim() or len(v) != size:
            return v
        return torch.cat([v] * -(-count // size))[:count]

    return tree_map(take, example)


@torch.no_grad()
def batch_is_free(path: Path, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a file gives outputs of the model's shapes for another number of samples than the example has.

    True, too, where the model itself takes no other number, and where onnxruntime cannot run the file at all.
    """
    example = (args, dict(kwargs))
    other = first_samples(example, 2 if batch_size(example) != 2 else 3)  # not one, which code may squeeze away
    try:
        expected = collect_tensors(model(*other[0], **other[1]))
    except Exception:  # whatever the model's code raises
        return True
    found = _output_shapes(path, other)
    if found is None:
        return _output_shapes(path, example) is None  # the file does not run at all, which is no matter of the batch
    return found == [t.shape for t in expected]


def _output_shapes(path: Path, example: Any) -> list[torch.Size] | None:
    """Shapes of a file's outputs as it is written; None where onnxruntime cannot run it."""
    try:
        return [t.shape for t in collect_tensors(Session(path, optimised=False)(*collect_tensors(example)))]
    except Exception:  # onnxruntime has a class of its own for every kind of failure
        return None
