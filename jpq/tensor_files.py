"""Tensors that others wrote (.safetensors, .pth, .pt, .th), read as data: first measured, then loaded.

A file that torch.save wrote is a pickle, which is a program. Before torch.load(weights_only=True) sees it, its pickle
is run here with stand-ins for everything that it names: nothing is imported or called, and what is learned is which
storages and tensors it declares. These must lie within the bytes that the file really has: torch believes them.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jpq.foreign import require_file, row, table, tree_of, whole
from jpq.types import JpqError

HEADER = 10**8  # bytes of a safetensors header, as its own reader has it
DEEP = 64  # dims of a tensor
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
    "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
STORAGES = {
    "ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "UntypedStorage": 1, "ShortStorage": 2, "HalfStorage": 2,
    "BFloat16Storage": 2, "IntStorage": 4, "FloatStorage": 4, "LongStorage": 8, "DoubleStorage": 8,
    "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16,
}  # fmt: skip
MAGIC = b"PK\3\4"  # of a zip archive
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
HARMLESS = (
    *TENSORS, "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch.Size",
    "torch.device", "collections.OrderedDict", "collections.Counter", "collections.defaultdict", "_codecs.encode",
)  # fmt: skip
# what a reader of a damaged file may raise: of pickles, of zips, and of torch
DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, KeyError,
    IndexError, TypeError, AttributeError, RuntimeError, NotImplementedError, OverflowError, AssertionError,
)  # fmt: skip


def safetensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises JpqError where its header declares anything but the bytes it has."""
    size = require_file(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            _require_header(tree_of(file.read(length).decode(), "its header"), size - 8 - length)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, JpqError) as error:
        raise JpqError(f"Cannot read {path} ({short(error)}).") from error


def _require_header(header: Any, room: int) -> None:
    for name, entry in table(header).items():
        if name == "__metadata__":
            continue
        if table(entry).get("dtype") not in SIZES:
            raise ValueError(f"tensor {name[:40]!r} is of type {str(entry.get('dtype'))[:20]!r}")
        shape = [whole(n, 0, room) for n in row(entry.get("shape"))[: DEEP + 1]]
        begin, end = (whole(n, 0, room) for n in row(entry.get("data_offsets")))
        if len(shape) > DEEP or prod(shape) * SIZES[entry["dtype"]] != end - begin:
            raise ValueError(f"tensor {name[:40]!r} is not of the size that its bytes have")


def torch_of(path: Path) -> Any:
    """What torch.save wrote to a file: tensors, numbers and text in dicts and lists. Raises JpqError for all else."""
    size = require_file(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(len(MAGIC)) == MAGIC  # as torch tells them apart; a zip's directory is at its end
            file.seek(0)
            if zipped:
                _require_zip(file, size)
            else:
                _require_legacy(_Bounded(file, size))
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
        found = _declared(_Bounded(io.BytesIO(program), len(program)))
        room = {e.filename.removeprefix(f"{top}data/"): e.file_size for e in entries}
        for key, declared in found.items():
            if declared > room.get(key, 0):
                raise ValueError(f"it declares {declared:,} bytes where it has {room.get(key, 0):,}")


def _require_legacy(file: _Bounded) -> None:
    """The same for files from before torch 1.6: four pickles, a fifth with the storages' keys, then their bytes."""
    for _ in range(3):
        _Measuring(file).load()
    found = _declared(file)
    if not all(type(key) is str for key in row(_Measuring(file).load())):
        raise ValueError("a storage's key is no text")
    if sum(found.values()) > file.left:
        raise ValueError(f"it declares {sum(found.values()):,} bytes of tensors where {file.left:,} are left")


def _declared(file: _Bounded) -> dict[str, int]:
    """Key of each storage that a pickle refers to -> its bytes, as declared."""
    reader = _Measuring(file)
    reader.load()
    return reader.declared


class _Bounded:
    """A file that refuses to be asked for more than it holds: room would be made for all of that."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size

    @property
    def left(self) -> int:
        return self.size - self.file.tell()

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise EOFError(f"{count:,} bytes are announced and {self.left:,} are left")
        return self.file.read(count)

    def readline(self) -> bytes:
        return self.file.readline()


class _Closed:
    """What a pickle may not change: it would no longer say what torch will see."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets what is inside a storage, or inside what it names")


class _Named(_Closed):
    """Stands for something that a pickle names; called, it does nothing but check what a tensor is made of."""

    def __init__(self, name: str, reader: _Measuring) -> None:
        self.name, self.reader = name, reader

    def __call__(self, *args: Any) -> Any:
        if self.name not in HARMLESS:
            raise ValueError(f"it wants to run {self.name[:60]}, and jpq runs nothing in a file")
        if self.name in TENSORS:
            _require_tensor(*args[:4])
        elif self.name == "_codecs.encode":
            return self.reader.encoded(*args)
        elif self.name.startswith("collections."):
            _require_items(self.name, args)
        return _Made()


class _Made:
    """Stands for an object that a pickle makes; it forgets what is put into it."""

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:  # a tensor would take a tuple for another storage, of any size
            raise ValueError("an object's state is no dict")


class _Storage(_Closed):
    """Stands for a storage: its bytes, and bytes an element (1 where it is untyped: at least that many)."""

    def __init__(self, size: int, each: int) -> None:
        self.size, self.each = size, each


class _Measuring(pickle._Unpickler):
    """Runs a pickle on stand-ins. Python's own implementation: the one in C makes room for whatever it is told."""

    def __init__(self, file: _Bounded) -> None:
        super().__init__(file)
        self.declared: dict[str, int] = {}
        self.room = file.size  # for bytes that are made from text: each text lies in the file, once

    def encoded(self, text: Any = None, encoding: Any = None, *others: Any) -> bytes:
        """What pickles of protocol 2 write for bytes. Raises ValueError for any other use: "hex" doubles its text."""
        if type(text) is not str or encoding != "latin1" or others:
            raise ValueError("it encodes something else than bytes")
        self.room -= len(text)
        if self.room < 0:
            raise ValueError("it makes more bytes than it has")
        return text.encode("latin1")

    def _refused(self) -> None:
        raise ValueError("it holds objects, not tensors alone, and jpq runs no code of a file")

    def _put(self) -> None:
        _require_key(self.stack[-2])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    def _put_all(self) -> None:
        for key in self.stack[::2]:  # type: ignore[attr-defined]
            _require_key(key)
        super().load_setitems()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        **dict.fromkeys(b"".join((pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ, pickle.INST)), _refused),
        # what torch does not take either, and what hashes whatever it is given
        **dict.fromkeys(b"".join((pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)), _refused),
        pickle.BYTEARRAY8[0]: _refused,  # makes room for whatever length it is told
        pickle.SETITEM[0]: _put,
        pickle.SETITEMS[0]: _put_all,
    }

    def find_class(self, module: str, name: str) -> Any:
        return _Named(f"{module}.{name}", self)

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[1], _Named):
            raise ValueError("it ends too early, or torch.save did not write it")
        _, kind, key, _, count = pid[:5]
        view = pid[5] if len(pid) > 5 else None
        if type(key) is not str or (view is not None and type(row(list(view))[0]) is not str):
            raise ValueError("a storage's key is no text")
        each = STORAGES[kind.name.rpartition(".")[2]]
        size = whole(count, 0, 2**62) * each
        self.declared[key] = max(size, self.declared.get(key, 0))
        return _Storage(size, each)


def _require_key(key: Any) -> None:
    """Raises ValueError for what no dict of weights has for a key: nested tuples of few bytes take ever to hash."""
    if type(key) not in (str, int, float, bool, bytes, type(None)) or (type(key) is int and abs(key) >= 2**61):
        raise ValueError(f"a dict's key is a {type(key).__name__}")


def _require_items(name: str, args: tuple[Any, ...]) -> None:
    """Raises ValueError where a dict is made from anything but another dict, or (as Python 2 wrote) a list of pairs."""
    if len(args) > 1 or (args and name == "collections.OrderedDict" and type(args[0]) not in (dict, list)):
        raise ValueError("a dict is made of something else than pairs")
    if args and name == "collections.Counter" and type(args[0]) is not dict:
        raise ValueError("a count is made of something else than a dict")
    for pair in args[0] if args and type(args[0]) is list else ():
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise ValueError("a dict is made of something else than pairs")
        _require_key(pair[0])


def _require_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> None:
    """Raises ValueError where a tensor is larger than its storage, or lies outside it."""
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or len(shape) > DEEP:
        raise ValueError("a tensor without a storage")
    sides, steps = ([whole(n, 0, 2**62) for n in part] for part in (shape, stride))
    last = whole(offset, 0, 2**62) + sum((n - 1) * step for n, step in zip(sides, steps, strict=True))
    if prod(sides) and max(prod(sides), last + 1) * storage.each > storage.size:
        raise ValueError(f"a tensor of {sides} does not lie within its {storage.size:,} bytes")


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
