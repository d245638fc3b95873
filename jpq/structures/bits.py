"""Streams of whole numbers at a fixed number of bits each.

Number i occupies bits i * width to (i + 1) * width - 1 of the stream, least significant first; bit j of the stream is
bit j % 8 (1, 2, 4, ...) of byte j // 8. The last byte is filled up with zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from jpq.types import JpqError

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
CHUNK = 2**17  # numbers at a time, a multiple of 8 so that every chunk begins at a byte


def length(count: int, width: int) -> int:
    """Bytes of `count` numbers of `width` bits."""
    return -(-count * width // 8)


def pack(numbers: npt.NDArray[Any], width: int) -> Bytes:
    """`[n]` numbers in [0, 2^width) as bytes; width 0 to 62."""
    out = np.zeros(length(len(numbers), width), np.uint8)
    if not width:
        return out
    for start in range(0, len(numbers), CHUNK):
        part = numbers[start : start + CHUNK].astype(np.int64)
        bits = np.empty((len(part), width), np.uint8)
        for j in range(width):
            bits[:, j] = (part >> j) & 1
        at = start * width // 8
        packed = np.packbits(bits, bitorder="little")
        out[at : at + len(packed)] = packed
    return out


def unpack(data: Bytes, width: int, count: int) -> Ints:
    """The `[count]` numbers that `pack` wrote. Raises JpqError where the bytes are not exactly those of so many."""
    if len(data) != length(count, width):
        raise JpqError(f"{count} numbers of {width} bits take {length(count, width)} bytes, not {len(data)}.")
    spare = 8 * len(data) - count * width
    if spare and data[-1] >> (8 - spare):
        raise JpqError("The bits behind the last number are not zero.")
    out = np.zeros(count, np.int64)
    for start in range(0, count if width else 0, CHUNK):
        n = min(CHUNK, count - start)
        at = start * width // 8
        bits = np.unpackbits(data[at : at + length(n, width)], count=n * width, bitorder="little").reshape(n, width)
        for j in range(width):
            out[start : start + n] |= bits[:, j].astype(np.int64) << j
    return out
