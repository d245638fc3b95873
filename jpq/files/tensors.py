"""Files of tensors (.safetensors, .pth, .pt, .th), written atomically, and checked as data before they are loaded.

A file of torch.save is a pickle, which is a program. Before torch.load(weights_only=True) reads it, `PickleChecker`
runs its pickle on stand-ins: nothing is imported or called, and the storages and tensors that it declares are known.
They must lie within the bytes of the file, because torch allocates whatever is declared.
"""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor, nn

from jpq.files.atomic import replace_file
from jpq.files.pickle_check import DEEP, NUMPY_BYTES, NUMPY_SCALARS, BoundedFile, PickleChecker
from jpq.files.untrusted import as_dict, as_int, as_list, check_file, parse_json
from jpq.types import JpqError

START_OVER = "Remove it, or run without --resume."  # advice at the end of errors about checkpoints

HEADER_BYTES = 10**8  # largest safetensors header, the limit of its own reader

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}

ZIP_MAGIC = b"PK\3\4"

DAMAGE = (  # errors that reading a damaged pickle or zip raises
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    AssertionError,
)


def save_tensors(module: nn.Module, path: str | Path, about: dict[str, str] | None = None) -> None:
    """Write the module's state dict as a .safetensors file, with facts about it, for `read_about`."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    content = serialized(state, about)
    replace_file(path, lambda part: part.write_bytes(content))  # its errors are those of the system


def read_about(path: str | Path) -> dict[str, str]:
    """The facts in a .safetensors file, {} where it has none. Raises JpqError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise JpqError(f"Cannot read {path} ({one_line(error)}).") from error


def load_tensors(module: nn.Module, path: str | Path) -> None:
    """Load a file of `save_tensors`. Raises JpqError for a missing, foreign or ill-fitting file, NaN and infinity."""
    restore(module, read_finite(path), Path(path))


def read_finite(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises JpqError where it is damaged, or holds NaN or infinity."""
    state = read_safetensors(path)
    name = _nonfinite(state)
    if name is not None:
        raise JpqError(f"{path} holds NaN or infinity in '{name}': it is damaged.")
    return state


def restore(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load a state dict strictly. Raises JpqError where it does not fit, or holds NaN or infinity."""

    def load() -> None:
        name = _nonfinite(check_tensors(state))
        if name is not None:
            raise ValueError(f"NaN or infinity in '{name}'")
        module.load_state_dict(dict(state))

    apply_saved(load, source)


def apply_saved(load: Callable[[], object], source: Path) -> None:
    """Call `load`, which puts a part of a checkpoint in place. Raises JpqError where that part does not fit."""
    try:
        load()
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise JpqError(f"{source} does not fit this model ({one_line(error)}). {START_OVER}") from error


def check_tensors(state: Any) -> Mapping[str, Tensor]:
    """The state, if it is a dict of tensors by name. Raises ValueError for anything else."""
    if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
        raise ValueError("no dict of tensors")
    if not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("not all of it are tensors")
    return state


def _nonfinite(state: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity."""
    return next((n for n, t in state.items() if t.is_floating_point() and not t.isfinite().all()), None)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises JpqError where its header does not describe the bytes that follow."""
    path = Path(path)
    size = check_file(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            _check_header(parse_json(file.read(length).decode(), "its header"), size - 8 - length)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, JpqError) as error:
        raise JpqError(f"Cannot read {path} ({one_line(error)}).") from error


def _check_header(header: Any, room: int) -> None:
    """Raises ValueError where a tensor's type, shape or place does not fit `room` bytes."""
    for name, entry in as_dict(header).items():
        if name == "__metadata__":
            continue
        if as_dict(entry).get("dtype") not in DTYPE_BYTES:
            raise ValueError(f"tensor {name[:40]!r} is of type {str(entry.get('dtype'))[:20]!r}")
        shape = [as_int(n, 0, room) for n in as_list(entry.get("shape"))[: DEEP + 1]]
        begin, end = (as_int(n, 0, room) for n in as_list(entry.get("data_offsets")))
        if len(shape) > DEEP or prod(shape) * DTYPE_BYTES[entry["dtype"]] != end - begin:
            raise ValueError(f"tensor {name[:40]!r} is not of the size that its bytes have")


def read_torch(path: str | Path, plain_objects: bool = False) -> Any:
    """The content of a torch.save file: tensors, numbers and text in dicts and lists. Raises JpqError for all else.

    With `plain_objects` also argparse.Namespace and numpy's numbers, which training scripts put beside weights.
    """
    path = Path(path)
    size = check_file(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC  # the test that torch itself makes
            file.seek(0)
            if zipped:
                _check_zip(file, size, plain_objects)
            else:
                _check_legacy(BoundedFile(file, size), plain_objects)
        with torch.serialization.safe_globals(_plain_globals() if plain_objects else []):
            return _loaded(path)
    except RecursionError as error:
        raise JpqError(f"{path} nests deeper than any weights do.") from error
    except DAMAGE as error:
        raise JpqError(f"{path} is damaged, or no file of tensors ({one_line(error)}).") from error


def _loaded(path: Path) -> Any:
    """The content of a file by torch.load; its error keeps only the reason, not torch's advice to trust the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0].partition(" Please ")[0]
        raise ValueError(reason or "torch refuses it") from error


def _plain_globals() -> list[Any]:
    """Classes and functions that torch may call for `plain_objects`, the last under names of both numpy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    types = [type(np.dtype(code)) for code in NUMPY_BYTES]
    return [argparse.Namespace, np.dtype, *types, *((scalar, name) for name in NUMPY_SCALARS)]


def _check_zip(file: IO[bytes], size: int, plain_objects: bool) -> None:
    """Raises ValueError where the archive is compressed, or declares more than it has, and for damage."""
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is None or end[9] - end[5] - end[6] != (76 if end[0] == b"PK\6\6" else 0):
        raise ValueError("it is not one archive that torch wrote")  # bytes in front: Python skips them, torch does not
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        top = entries[0].filename.partition("/")[0] + "/" if entries else ""
        alike = len({e.filename.lower() for e in entries}) < len(entries)  # torch looks them up without their case
        if alike or not all(e.filename.startswith(top) for e in entries):
            raise ValueError("it is not one archive that torch wrote")
        if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
            raise ValueError("its records are compressed, and torch compresses none: it may unpack to any size")
        if sum(e.file_size for e in entries) > size:
            raise ValueError("its records are together larger than the file")
        broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"record {broken[:40]!r} does not match its checksum")
        program = archive.read(f"{top}data.pkl")
        stored = {e.filename.removeprefix(f"{top}data/"): e.file_size for e in entries}
        for key, declared in _declared_bytes(BoundedFile(io.BytesIO(program), len(program)), plain_objects).items():
            if declared > stored.get(key, 0):
                raise ValueError(f"it declares {declared:,} bytes where it has {stored.get(key, 0):,}")


def _check_legacy(file: BoundedFile, plain_objects: bool) -> None:
    """Raises ValueError where a file of torch before 1.6 declares more than it has.

    Such a file is four pickles, a fifth with the keys of its storages, then their bytes.
    """
    for _ in range(3):
        PickleChecker(file).load()
    declared = sum(_declared_bytes(file, plain_objects).values())
    if not all(type(key) is str for key in as_list(PickleChecker(file).load())):
        raise ValueError("a storage's key is no text")
    if declared > file.left:
        raise ValueError(f"it declares {declared:,} bytes of tensors where {file.left:,} are left")


def _declared_bytes(file: BoundedFile, plain_objects: bool) -> dict[str, int]:
    """Key of each storage that a pickle refers to -> the size that it declares."""
    checker = PickleChecker(file, plain_objects)
    checker.load()
    return checker.declared


def one_line(error: BaseException) -> str:
    """The text of an error in one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__
