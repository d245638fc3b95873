"""Errors of torch.onnx as one sentence, which names the operator where ONNX does not know one."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch.onnx.errors import UnsupportedOperatorError

from jpq.types import JpqError


@contextmanager
def name_unsupported_op() -> Iterator[None]:
    """Raise JpqError, which names the operator where it can, for whatever torch.onnx cannot export."""
    try:
        yield
    except JpqError:
        raise
    except UnsupportedOperatorError as error:
        name = _operator_name(error)
        remedy = (
            "ONNX has no complex numbers; compute the same with real ones, such as cos and sin."
            if "complex" in name
            else "translate it to ONNX's operators with torch.onnx.register_custom_op_symbolic, or compute the same "
            "with torch's own operators."
        )
        raise JpqError(f"torch.onnx cannot export the operator {name}: {remedy}") from error
    except Exception as error:  # torch.onnx and its symbolic functions raise classes of every kind
        reason = " ".join(str(error).partition("[Caused by")[0].split())[:200] or type(error).__name__
        raise JpqError(
            f"torch.onnx cannot export this model ({reason}). Replace that part by other operators of torch."
        ) from error


def _operator_name(error: UnsupportedOperatorError) -> str:
    """The operator that an error is about: from its message, or (torch 2.9 leaves it out) from where it was raised."""
    match = re.search(r"\w+::\w+", str(error))
    if match:
        return match[0]
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((str(names["ns_op_name"]) for names in reversed(frames) if "ns_op_name" in names), str(error))
