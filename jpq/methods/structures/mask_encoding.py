"""Encoding of a mask's kept units in the cheapest of five forms.

R rows of n units, v_r of them real and k_r kept. Rows are "even" where k_r = min(q, v_r) with one q for all of them, as
in N:M and k-of-n masks and wherever there is a single row; q then stands in the header.

| encoding | bits | what is written |
|---|---|---|
| `all` | 0 | nothing: everything is kept |
| `bitmap` | sum v_r | one bit for each real unit |
| `rank` | R * ceil(log2 C(n, q)) | which choice of q units: sum of C(p_i, i), p_i the i-th kept place; even, n <= 62 |
| `kept` | sum k_r * ceil(log2 n) | the place of each kept unit in its row, rising; not even: the k_r before, in bytes |
| `dropped` | sum (v_r - k_r) * ceil(log2 n) | the same of those that are dropped |

The smallest is taken, the earliest in this table where several are: 2:4 takes 3 bits for 4 weights (`rank`), 1:4 takes
2, the single weights of a layer of a million a bit each (`bitmap`), or 20 a kept one below 5 % density (`kept`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from jpq.types import JpqError

Flags = npt.NDArray[np.bool_]  # [rows, n]

ENCODINGS = ("all", "bitmap", "rank", "kept", "dropped")

LONGEST = 62  # largest number of units in a row whose combinatorial rank fits 63 bits

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
CHUNK = 2**17  # numbers at a time, a multiple of 8 so that every chunk begins at a byte


@dataclass(frozen=True)
class Form:
    """Form of an encoded mask: its encoding, the numbers that a reader needs beside the bytes, and its size."""

    encoding: str
    even: int | None  # q, the count of every row; None where rows differ
    most: int  # largest count of kept (or dropped) units in a row, where rows differ
    bits: int  # size of the encoded mask


def choose(n: int, valid: Ints, kept: Ints) -> Form:
    """Cheapest form for rows of n units, `valid[r]` of them real and `kept[r]` of them kept."""
    rows, q = len(kept), int(kept.max(initial=0))
    even = q if bool((kept == np.minimum(q, valid)).all()) else None
    forms = [Form("bitmap", even, 0, int(valid.sum()))]
    if bool((kept == valid).all()):
        forms.insert(0, Form("all", even, 0, 0))
    if even is not None and n <= LONGEST:
        forms.append(Form("rank", even, 0, rows * _width(comb(n, q))))
    for name, counts in (("kept", kept), ("dropped", valid - kept)):
        most = int(counts.max(initial=0))
        listing = 0 if even is not None else 8 * length(rows, most.bit_length())
        forms.append(Form(name, even, most, int(counts.sum()) * _width(n) + listing))
    return min(forms, key=lambda f: f.bits)


def encode(kept: Flags, valid: Flags, form: Form) -> Bytes:
    """Bytes of a mask, as many as `form.bits` need."""
    if form.encoding == "all":
        return np.zeros(0, np.uint8)
    if form.encoding == "bitmap":
        return pack(kept[valid], 1)
    if form.encoding == "rank":
        assert form.even is not None
        n = kept.shape[1]
        order = kept.cumsum(1)
        ranks = np.where(kept, _binomials(n)[np.arange(n), order], 0).sum(1)
        return pack(ranks, _width(comb(n, form.even)))
    listed = kept if form.encoding == "kept" else valid & ~kept
    places = pack(listed.nonzero()[1], _width(kept.shape[1]))
    if form.even is not None:
        return places
    return np.concatenate([pack(listed.sum(1), form.most.bit_length()), places])


def decode(data: Bytes, valid: Flags, form: Form) -> Flags:
    """Kept units, bool `[rows, n]`. Raises JpqError where the bytes are not what `encode` writes for such rows."""
    real = valid.sum(1)
    if form.encoding == "all":
        _count(data, 0)
        return valid.copy()
    kept = np.zeros_like(valid)
    if form.encoding == "bitmap":
        kept[valid] = unpack(data, 1, int(real.sum())).astype(bool)
        return kept
    kept = _unrank(data, valid, form) if form.encoding == "rank" else _unlist(data, valid, form)
    if bool((kept & ~valid).any()):
        raise JpqError("The mask keeps units that do not exist.")
    return kept


def _unrank(data: Bytes, valid: Flags, form: Form) -> Flags:
    rows, n = valid.shape
    if form.even is None or not 0 <= form.even <= n or n > LONGEST:
        raise JpqError(f"A mask of ranks needs even rows of at most {LONGEST} units.")
    choices = comb(n, form.even)
    ranks = unpack(data, _width(choices), rows)
    if bool((ranks >= choices).any()):
        raise JpqError(f"A mask holds a rank beyond the {choices} choices of {form.even} of {n} units.")
    left = np.minimum(form.even, valid.sum(1))
    table, kept = _binomials(n), np.zeros_like(valid)
    for column in range(n - 1, -1, -1):
        below = table[column, left]
        take = (left > 0) & (below <= ranks)
        kept[:, column] = take
        ranks -= np.where(take, below, 0)
        left = left - take
    if bool(ranks.any()) or bool(left.any()):
        raise JpqError("A mask holds a rank that its row has no choice for.")
    return kept


def _unlist(data: Bytes, valid: Flags, form: Form) -> Flags:
    rows, n = valid.shape
    real, width = valid.sum(1), _width(n)
    if form.even is not None:
        counts = np.minimum(form.even, real)
        counts = counts if form.encoding == "kept" else real - counts
        columns = unpack(data, width, int(counts.sum()))
    else:
        head = length(rows, form.most.bit_length())
        counts = unpack(data[:head], form.most.bit_length(), rows)
        if bool((counts > real).any()):
            raise JpqError("A mask lists more units than a row has.")
        columns = unpack(data[head:], width, int(counts.sum()))
    owner = np.repeat(np.arange(rows), counts)
    if bool((columns >= n).any()) or bool(((np.diff(columns) <= 0) & (np.diff(owner) == 0)).any()):
        raise JpqError("A mask lists units that do not exist, or not in rising order.")
    listed = np.zeros_like(valid)
    listed[owner, columns] = True
    if form.encoding == "kept":
        return listed
    if bool((listed & ~valid).any()):
        raise JpqError("The mask drops units that do not exist.")
    return valid & ~listed


def _count(data: Bytes, expected: int) -> None:
    if len(data) != expected:
        raise JpqError(f"The mask takes {expected} bytes, not {len(data)}.")


def _width(choices: int) -> int:
    return max(0, choices - 1).bit_length()


def _binomials(n: int) -> Ints:
    """Binomial coefficients C(i, j) for i below n and j up to n."""
    return np.array([[comb(i, j) for j in range(n + 1)] for i in range(n)], np.int64).reshape(n, n + 1)


def length(count: int, width: int) -> int:
    """Number of bytes that `count` numbers of `width` bits take."""
    return -(-count * width // 8)


def pack(numbers: npt.NDArray[Any], width: int) -> Bytes:
    """Bytes of the `[n]` numbers in [0, 2^width); width 0 to 62."""
    out = np.zeros(length(len(numbers), width), np.uint8)
    if not width:
        return out
    for start in range(0, len(numbers), CHUNK):
        part = numbers[start : start + CHUNK].astype(np.int64)
        bits = np.empty((len(part), width), np.uint8)
        for j in range(width):
            bits[:, j] = (part >> j) & 1
        byte = start * width // 8
        packed = np.packbits(bits, bitorder="little")
        out[byte : byte + len(packed)] = packed
    return out


def unpack(data: Bytes, width: int, count: int) -> Ints:
    """Numbers, `[count]`, that `pack` wrote. Raises JpqError where the bytes are not exactly those of so many."""
    if len(data) != length(count, width):
        raise JpqError(f"{count} numbers of {width} bits take {length(count, width)} bytes, not {len(data)}.")
    spare = 8 * len(data) - count * width
    if spare and data[-1] >> (8 - spare):
        raise JpqError("The bits behind the last number are not zero.")
    out = np.zeros(count, np.int64)
    for start in range(0, count if width else 0, CHUNK):
        n = min(CHUNK, count - start)
        byte = start * width // 8
        bits = np.unpackbits(data[byte : byte + length(n, width)], count=n * width, bitorder="little").reshape(n, width)
        for j in range(width):
            out[start : start + n] |= bits[:, j].astype(np.int64) << j
    return out
