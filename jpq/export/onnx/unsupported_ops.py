"""The error for an operator that ONNX does not know: one sentence that names the operator, instead of torch's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch.onnx.errors import UnsupportedOperatorError

from jpq.types import JpqError


@contextmanager
def name_unsupported_op() -> Iterator[None]:
    """Raise JpqError that names the operator where torch.onnx has no translation for one."""
    try:
        yield
    except UnsupportedOperatorError as error:
        match = re.search(r"\w+::\w+", str(error))
        raise JpqError(
            f"torch.onnx cannot export the operator {match[0] if match else error}: translate it to ONNX's operators "
            "with torch.onnx.register_custom_op_symbolic, or compute the same with torch's own operators."
        ) from error
