"""Interpreter of pickles on stand-ins, which imports and calls nothing and records the tensors that a pickle declares.

It refuses what would take long or much memory: torch's own reader hashes, and makes bytes of, whatever a file names.
"""

from __future__ import annotations

import pickle
from math import prod
from typing import IO, Any, ClassVar

from jpq.files.untrusted import as_int, as_list

DEEP = 64  # largest number of dims of a tensor

STORAGES = {
    "ByteStorage": 1,
    "CharStorage": 1,
    "BoolStorage": 1,
    "UntypedStorage": 1,
    "ShortStorage": 2,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "IntStorage": 4,
    "FloatStorage": 4,
    "LongStorage": 8,
    "DoubleStorage": 8,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}

TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")

HARMLESS = (
    *TENSORS,
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.Size",
    "torch.device",
    "collections.OrderedDict",
    "collections.Counter",
    "collections.defaultdict",
    "_codecs.encode",
)


NAMESPACE = "argparse.Namespace"  # holds the settings of a training script

NUMPY_TYPE = "numpy.dtype"

NUMPY_SCALARS = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")  # since and before version 2

NUMPY_BYTES = {
    **{"b1": 1, "i1": 1, "u1": 1, "i2": 2, "u2": 2, "f2": 2},
    **{"i4": 4, "u4": 4, "f4": 4, "i8": 8, "u8": 8, "f8": 8},
}


class BoundedFile:
    """A file that refuses reads beyond its end: memory would be allocated for the whole read."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size

    @property
    def left(self) -> int:
        """Bytes from the present position to the end."""
        return self.size - self.file.tell()

    def read(self, count: int) -> bytes:
        """Read `count` bytes. Raises EOFError where fewer are left."""
        if count > self.left:
            raise EOFError(f"{count:,} bytes are announced and {self.left:,} are left")
        return self.file.read(count)

    def readline(self) -> bytes:
        """Bytes to the end of a line."""
        return self.file.readline()


class _Closed:
    """Stand-in whose state a pickle may not set, since torch would then see other content than was checked."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets what is inside a storage, or inside what it names")


class _Named(_Closed):
    """Stand-in for a class or function; a call only checks the arguments of tensors and of dicts."""

    def __init__(self, name: str, reader: PickleChecker) -> None:
        self.name, self.reader = name, reader

    def __call__(self, *args: Any) -> Any:
        if self.reader.plain_objects and self.name == NUMPY_TYPE:
            return _NumpyType(*args)
        if self.reader.plain_objects and self.name in NUMPY_SCALARS:
            return _checked_scalar(*args)
        if self.name not in HARMLESS:
            raise ValueError(f"it wants to run {self.name[:60]}, and jpq runs nothing in a file")
        if self.name in TENSORS:
            _check_tensor(*args[:4])
        elif self.name == "_codecs.encode":
            return self.reader.encoded(*args)
        elif self.name.startswith("collections."):
            _check_items(self.name, args)
        return _Made()


class _Made:
    """Stand-in for an object that a pickle makes; it drops everything that is put into it."""

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:  # a tensor would take a tuple for another storage, of any size
            raise ValueError("an object's state is no dict")


class _NumpyType(_Closed):
    """Stand-in for the type of a number of numpy. Raises ValueError for types that are no plain numbers."""

    def __init__(self, code: Any = None, align: Any = False, copy: Any = False) -> None:
        if type(code) is not str or code not in NUMPY_BYTES or {type(align), type(copy)} - {bool, int}:
            raise ValueError("a type of numpy that is no number's")
        self.size = NUMPY_BYTES[code]

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 8 or state[0] != 3 or state[1] not in ("<", "|"):
            raise ValueError("a type of numpy that is no number's")
        if any(type(part) not in (int, str, type(None)) for part in state) or state[2:] != (
            None,
            None,
            None,
            -1,
            -1,
            0,
        ):
            raise ValueError("a type of numpy that is no number's")


class _Storage(_Closed):
    """Stand-in for a storage: its bytes, and its bytes per element (1 where it is untyped)."""

    def __init__(self, size: int, each: int) -> None:
        self.size, self.each = size, each


class PickleChecker(pickle._Unpickler):
    """Interpreter of a pickle on stand-ins; Python's implementation, as the one in C allocates any declared length.

    With `plain_objects` it lets through what training scripts put beside weights: argparse.Namespace, numpy's numbers.
    """

    def __init__(self, file: BoundedFile, plain_objects: bool = False) -> None:
        super().__init__(file)
        self.plain_objects = plain_objects
        self.declared: dict[str, int] = {}  # key of a storage -> its bytes
        self.room = file.size  # bytes left that text may be encoded to: each text stands in the file once

    def encoded(self, text: Any = None, encoding: Any = None, *others: Any) -> bytes:
        """Bytes as protocol 2 encodes them. Raises ValueError for any other encoding: "hex" doubles its text."""
        if type(text) is not str or encoding != "latin1" or others:
            raise ValueError("it encodes something else than bytes")
        self.room -= len(text)
        if self.room < 0:
            raise ValueError("it makes more bytes than it has")
        return text.encode("latin1")

    def _refused(self) -> None:
        raise ValueError("it holds objects, not tensors alone, and jpq runs no code of a file")

    def _new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        is_plain = isinstance(kind, _Named) and kind.name == NAMESPACE and type(arguments) is tuple and not arguments
        if not (self.plain_objects and is_plain):
            self._refused()
        self.append(_Made())  # type: ignore[attr-defined]

    def _put(self) -> None:
        _check_key(self.stack[-2])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    def _put_all(self) -> None:
        for key in self.stack[::2]:  # type: ignore[attr-defined]
            _check_key(key)
        super().load_setitems()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.NEWOBJ[0]: _new_object,
        **dict.fromkeys(b"".join((pickle.NEWOBJ_EX, pickle.OBJ, pickle.INST)), _refused),
        # opcodes that torch refuses too, and that hash any object
        **dict.fromkeys(b"".join((pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)), _refused),
        pickle.BYTEARRAY8[0]: _refused,  # allocates any declared length
        pickle.SETITEM[0]: _put,
        pickle.SETITEMS[0]: _put_all,
    }

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for the class or function."""
        return _Named(f"{module}.{name}", self)

    def persistent_load(self, pid: Any) -> _Storage:
        """A stand-in for a storage; `declared` notes its size. Raises ValueError for anything else."""
        if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[1], _Named):
            raise ValueError("it ends too early, or torch.save did not write it")
        _, kind, key, _, count = pid[:5]
        view = pid[5] if len(pid) > 5 else None
        if type(key) is not str or (view is not None and type(as_list(list(view))[0]) is not str):
            raise ValueError("a storage's key is no text")
        each = STORAGES[kind.name.rpartition(".")[2]]
        size = as_int(count, 0, 2**62) * each
        self.declared[key] = max(size, self.declared.get(key, 0))
        return _Storage(size, each)


def _check_key(key: Any) -> None:
    """Raises ValueError for a key that no dict of weights has: nested tuples of few bytes take very long to hash."""
    if type(key) not in (str, int, float, bool, bytes, type(None)) or (type(key) is int and abs(key) >= 2**61):
        raise ValueError(f"a dict's key is a {type(key).__name__}")


def _check_items(name: str, args: tuple[Any, ...]) -> None:
    """Raises ValueError unless a dict is made from a dict or, as Python 2 wrote it, from a list of pairs."""
    if len(args) > 1 or (args and name == "collections.OrderedDict" and type(args[0]) not in (dict, list)):
        raise ValueError("a dict is made of something else than pairs")
    if args and name == "collections.Counter" and type(args[0]) is not dict:
        raise ValueError("a count is made of something else than a dict")
    for pair in args[0] if args and type(args[0]) is list else ():
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise ValueError("a dict is made of something else than pairs")
        _check_key(pair[0])


def _checked_scalar(kind: Any = None, content: Any = None, *others: Any) -> _Made:
    """Stand-in for a number of numpy. Raises ValueError where its bytes are not those of one of its type."""
    if not isinstance(kind, _NumpyType) or type(content) is not bytes or len(content) != kind.size or others:
        raise ValueError("a number of numpy whose bytes are not its own")
    return _Made()


def _check_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> None:
    """Raises ValueError where a tensor is larger than its storage, or lies outside it."""
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or len(shape) > DEEP:
        raise ValueError("a tensor without a storage")
    sides, steps = ([as_int(n, 0, 2**62) for n in part] for part in (shape, stride))
    last = as_int(offset, 0, 2**62) + sum((n - 1) * step for n, step in zip(sides, steps, strict=True))
    if prod(sides) and max(prod(sides), last + 1) * storage.each > storage.size:
        raise ValueError(f"a tensor of {sides} does not lie within its {storage.size:,} bytes")
