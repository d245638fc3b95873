"""Names of the forms that a small model is exported in, and of the types that an ONNX file may hold weights in."""

from __future__ import annotations

from jpq.types import unknown

FORMS = ("onnx", "qonnx", "pt2")
ONNX_WEIGHTS = ("int8", "int4", "int2")


def forms_in(text: str) -> tuple[str, ...]:
    """The forms in a list such as "onnx,pt2"; model.onnx is always among them. Raises JpqError for unknown ones."""
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in FORMS:
            raise unknown("form", name, FORMS)
    return ("onnx", *(name for name in FORMS[1:] if name in named))


def require(formats: str, weights: str) -> None:
    """Raise JpqError for names that are not known, with the closest ones."""
    forms_in(formats)
    if weights not in ONNX_WEIGHTS:
        raise unknown("type of weights", weights, ONNX_WEIGHTS)
