"""The bit-packed file `model.packed`: its format, and a rebuilt model written to it and read back."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.export.packed.batchnorm_folding import fold_batchnorms
    from jpq.export.packed.file import PackedLayer, header_bytes, load_packed, packed_bits, packed_bytes, save_packed
    from jpq.export.packed.model import PackedSize, pack_model, unpack_model

__all__ = [
    "PackedLayer",
    "PackedSize",
    "fold_batchnorms",
    "header_bytes",
    "load_packed",
    "pack_model",
    "packed_bits",
    "packed_bytes",
    "save_packed",
    "unpack_model",
]

_HOMES = {
    "PackedLayer": "file",
    "PackedSize": "model",
    "fold_batchnorms": "batchnorm_folding",
    "header_bytes": "file",
    "load_packed": "file",
    "pack_model": "model",
    "packed_bits": "file",
    "packed_bytes": "file",
    "save_packed": "file",
    "unpack_model": "model",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
