"""The error for an operator without a gradient: one sentence that names the operator, instead of torch's own error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from jpq.types import JpqError

NO_GRADIENT = (  # torch's messages, with the operator's name
    re.compile(r"backward through (?P<op>\w+[.:]+\w+)\S* but no autograd formula"),
    re.compile(r"derivative for '?(?P<op>[\w.:]+)'? is not implemented"),
)


@contextmanager
def name_missing_gradient() -> Iterator[None]:
    """Raise JpqError that names the operator where a backward pass ends at one without a gradient."""
    try:
        yield
    except RuntimeError as error:
        matches = [match for pattern in NO_GRADIENT if (match := pattern.search(str(error)))]
        if not matches:
            raise
        raise JpqError(
            f"The operator {matches[0]['op']} has no gradient, which training needs: give it one with "
            "torch.library.register_autograd, or compute the same with torch's own operators."
        ) from error
