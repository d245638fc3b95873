"""Gates, scores, structures and quantizers of the papers, and METHODS, the table that combines them."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.methods.compatibility import compose_method, incompatibility, is_allowed
    from jpq.methods.table import METHODS, Method

__all__ = [
    "METHODS",
    "Method",
    "compose_method",
    "incompatibility",
    "is_allowed",
]

_HOMES = {
    "METHODS": "table",
    "Method": "table",
    "compose_method": "compatibility",
    "incompatibility": "compatibility",
    "is_allowed": "compatibility",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
