"""Safe reading and writing of files: atomic writes, and bounded reads of files from elsewhere."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.files.atomic import replace_file
    from jpq.files.tensors import load_tensors, save_tensors

__all__ = [
    "load_tensors",
    "replace_file",
    "save_tensors",
]

_HOMES = {
    "load_tensors": "tensors",
    "replace_file": "atomic",
    "save_tensors": "tensors",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
