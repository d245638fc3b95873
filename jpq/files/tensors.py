"""Tensors that others wrote (.safetensors, .pth, .pt, .th), read as data: first measured, then loaded.

A file that torch.save wrote is a pickle, which is a program. Before torch.load(weights_only=True) sees it, its pickle
is run here with stand-ins for everything that it names: nothing is imported or called, and what is learned is which
storages and tensors it declares (`pickles`). These must lie within the bytes that the file really has: torch believes
them.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor, nn

from jpq.files.atomic import replace_file
from jpq.files.pickle_check import DEEP, BoundedFile, PickleChecker
from jpq.files.untrusted import as_dict, as_int, as_list, check_file, parse_json
from jpq.types import JpqError

AWAY = "Remove it, or run without --resume."

HEADER = 10**8  # bytes of a safetensors header, as its own reader has it
SIZES = {
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
MAGIC = b"PK\3\4"  # of a zip archive
# what a reader of a damaged file may raise: of pickles, of zips, and of torch
DAMAGE = (
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


def restore(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load a state dict strictly. Raises JpqError where it does not fit, or holds NaN or infinity."""

    def put() -> None:
        for name, tensor in require_tensors(state).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"NaN or infinity in '{name}'")
        module.load_state_dict(dict(state))

    fitted(put, source)


def fitted(put: Callable[[], object], source: Path) -> None:
    """Put something from a checkpoint in its place. Raises JpqError where it does not fit."""
    try:
        put()
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise JpqError(f"{source} does not fit this model ({short(error)}). {AWAY}") from error


def save_tensors(module: nn.Module, path: Path) -> None:
    """The module's state as safetensors."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    replace_file(path, lambda part: part.write_bytes(serialized(state)))  # whose errors are the system's own


def load_tensors(module: nn.Module, path: Path) -> None:
    """Load what `save_tensors` wrote. Raises JpqError for a missing, foreign or ill-fitting file, NaN or infinity."""
    state = safetensors_of(path)
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise JpqError(f"{path} holds NaN or infinity in '{bad[0]}': it is damaged.")
    restore(module, state, path)


def safetensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises JpqError where its header declares anything but the bytes it has."""
    size = check_file(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            _require_header(parse_json(file.read(length).decode(), "its header"), size - 8 - length)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, JpqError) as error:
        raise JpqError(f"Cannot read {path} ({short(error)}).") from error


def _require_header(header: Any, room: int) -> None:
    for name, entry in as_dict(header).items():
        if name == "__metadata__":
            continue
        if as_dict(entry).get("dtype") not in SIZES:
            raise ValueError(f"tensor {name[:40]!r} is of type {str(entry.get('dtype'))[:20]!r}")
        shape = [as_int(n, 0, room) for n in as_list(entry.get("shape"))[: DEEP + 1]]
        begin, end = (as_int(n, 0, room) for n in as_list(entry.get("data_offsets")))
        if len(shape) > DEEP or prod(shape) * SIZES[entry["dtype"]] != end - begin:
            raise ValueError(f"tensor {name[:40]!r} is not of the size that its bytes have")


def torch_of(path: Path) -> Any:
    """What torch.save wrote to a file: tensors, numbers and text in dicts and lists. Raises JpqError for all else."""
    size = check_file(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(len(MAGIC)) == MAGIC  # as torch tells them apart; a zip's directory is at its end
            file.seek(0)
            if zipped:
                _require_zip(file, size)
            else:
                _require_legacy(BoundedFile(file, size))
        return _loaded(path)
    except RecursionError as error:
        raise JpqError(f"{path} nests deeper than any weights do.") from error
    except DAMAGE as error:
        raise JpqError(f"{path} is damaged, or no file of tensors ({short(error)}).") from error


def _loaded(path: Path) -> Any:
    """What torch makes of the file; it refuses with advice for those who trust it, of which only the reason is kept."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0].partition(" Please ")[0]
        raise ValueError(reason or "torch refuses it") from error


def _require_zip(file: IO[bytes], size: int) -> None:
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
        found = _declared(BoundedFile(io.BytesIO(program), len(program)))
        room = {e.filename.removeprefix(f"{top}data/"): e.file_size for e in entries}
        for key, declared in found.items():
            if declared > room.get(key, 0):
                raise ValueError(f"it declares {declared:,} bytes where it has {room.get(key, 0):,}")


def _require_legacy(file: BoundedFile) -> None:
    """The same for files from before torch 1.6: four pickles, a fifth with the storages' keys, then their bytes."""
    for _ in range(3):
        PickleChecker(file).load()
    found = _declared(file)
    if not all(type(key) is str for key in as_list(PickleChecker(file).load())):
        raise ValueError("a storage's key is no text")
    if sum(found.values()) > file.left:
        raise ValueError(f"it declares {sum(found.values()):,} bytes of tensors where {file.left:,} are left")


def _declared(file: BoundedFile) -> dict[str, int]:
    """Key of each storage that a pickle refers to -> its bytes, as declared."""
    reader = PickleChecker(file)
    reader.load()
    return reader.declared


def short(error: BaseException) -> str:
    """An error's text in one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def require_tensors(found: Any) -> Mapping[str, Tensor]:
    """A dict of tensors by name. Raises ValueError for anything else."""
    if not isinstance(found, Mapping) or not all(isinstance(k, str) for k in found):
        raise ValueError("no dict of tensors")
    if not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError("not all of it are tensors")
    return found
