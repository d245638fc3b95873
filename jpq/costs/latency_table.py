"""The table of measured layer latencies: its columns, and reading and writing it as CSV.

| column | meaning |
|---|---|
| kind | conv, depthwise, conv_transpose or linear |
| groups | of a grouped conv; 1 for all others, depthwise too |
| kernel, stride | such as 3x3 and 1x1; empty for linear |
| size | places where the kernel is applied, such as 32x32: a conv's output, a conv_transpose's input; tokens |
| form | types of input and output of a quantized layer: int8>int8, int8>float, float>int8, float>float; empty: any |
| inputs, outputs | channels of the layer as it was measured |
| bits | width of weights and input in the measurement: 32 float, 8 int8 |
| scheme, density | dense and 1, or the structure of a mask (block:8x4 ...) and the share of weights that it keeps |
| ms | milliseconds of one call, one sample |

groups, form, scheme and density may be left out; other columns are notes (hardware, threads, n ...).

Cells are read here and not by the getters of `jpq.files.untrusted`: those take values of a parsed tree, a cell is text.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from jpq.types import DENSE, JpqError, unknown

KINDS = ("conv", "depthwise", "conv_transpose", "linear")

NEEDED = ("kind", "kernel", "stride", "size", "inputs", "outputs", "bits", "ms")

FORMS = ("", "int8>int8", "int8>float", "float>int8", "float>float")

OPTIONAL = {"groups": "1", "form": "", "scheme": DENSE, "density": "1"}

MOST_ROWS = 100_000

MODELLED = "modelled"  # value of the column source in lines that were computed, not measured

LONGEST = 1e7  # longest time in ms (nearly three hours)

WIDEST = 2**24  # most channels, and most positions along one side


@dataclass(frozen=True)
class Shape:
    """Kind and sizes of a layer, without its numbers of channels."""

    kind: str
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    size: tuple[int, ...]

    def __str__(self) -> str:
        parts = [self.kind, *([f"of {self.groups} groups"] if self.groups > 1 else [])]
        if self.kernel:
            parts += [sides(self.kernel), f"stride {sides(self.stride)}"]
        return " ".join(parts) + (f" at {sides(self.size)}" if self.size else "")


@dataclass(frozen=True)
class Entry:
    """A line of the table: a layer and its measured time."""

    shape: Shape
    inputs: int
    outputs: int
    bits: int
    ms: float
    scheme: str = DENSE
    density: float = 1.0
    form: str = ""
    notes: Mapping[str, str] = field(default_factory=dict, compare=False)  # the other columns


@dataclass(frozen=True)
class LatencyTable:
    """All lines of one file."""

    source: str  # the file's name, for messages
    entries: tuple[Entry, ...]

    def note(self, name: str, default: str = "") -> str:
        """The first line's value in a column of notes."""
        return self.entries[0].notes.get(name, default)


def sides(lengths: Iterable[int]) -> str:
    """Sizes as text in a cell, such as `3x3`."""
    return "x".join(map(str, lengths))


def parse_table(text: str, source: str) -> LatencyTable:
    """The table in the text of a CSV file. Raises JpqError, naming the line, for missing and for senseless cells."""
    lines = csv.DictReader(io.StringIO(text))
    columns: list[str] = []
    with suppress(csv.Error):  # Python 3.10 refuses the byte 0, newer ones take it for text
        columns = [c.strip() for c in lines.fieldnames or []]
    lines.fieldnames = columns
    missing = [c for c in NEEDED if c not in columns]
    if missing:
        raise JpqError(
            f"{source} is no table of latencies: column{'s' * (len(missing) > 1)} {', '.join(missing)} missing. "
            f"It needs {', '.join(NEEDED)}; `jpq bench --table FILE.csv` writes one."
        )
    entries: list[Entry] = []
    try:
        for line in lines:
            if len(entries) == MOST_ROWS:
                raise JpqError(f"{source} has more than {MOST_ROWS:,} lines. Keep those of the layers you need.")
            cells = {k: (v or "").strip() for k, v in line.items() if k is not None and not isinstance(v, list)}
            filled = {k: v for k, v in cells.items() if v}
            entries.append(_entry({**OPTIONAL, **filled}, f"{source}, line {lines.line_num}"))
    except csv.Error as error:
        raise JpqError(f"{source}, line {lines.line_num}, is not CSV: {error}.") from error
    if not entries:
        raise JpqError(f"{source} holds no measurements: there is no line below its header.")
    return LatencyTable(source, tuple(entries))


def format_table(entries: Iterable[Entry]) -> str:
    """The CSV text that `parse_table` reads as these entries."""
    entries = list(entries)
    notes = list(dict.fromkeys(k for e in entries for k in e.notes))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["kind", "groups", *NEEDED[1:-1], "form", "scheme", "density", "ms", *notes])
    for e in entries:
        s = e.shape
        key = [s.kind, s.groups, sides(s.kernel), sides(s.stride), sides(s.size), e.inputs, e.outputs, e.bits]
        values = [e.form, e.scheme, _exact_text(e.density), _exact_text(e.ms)]
        writer.writerow([*key, *values, *(e.notes.get(k, "") for k in notes)])
    return out.getvalue()


def _exact_text(value: float) -> str:
    """The fewest decimals that are read as the same number."""
    return np.format_float_positional(value, trim="-")


def _entry(cells: Mapping[str, str], where: str) -> Entry:
    kind = cells.get("kind", "")
    if kind not in KINDS:
        raise JpqError(f"{where}: {unknown('kind', kind, KINDS)}")
    ms, density = _ms(cells, where), _density(cells, where)
    inputs, outputs, groups = (_count(cells, name, where, WIDEST) for name in ("inputs", "outputs", "groups"))
    shape = _shape(kind, groups, cells, where)
    bits = _count(cells, "bits", where, 64)
    if cells["scheme"] == DENSE and density != 1:
        raise JpqError(f"{where}: density {cells['density']} needs a scheme, such as block:8x4; dense layers keep all.")
    if cells["form"] not in FORMS:
        raise JpqError(f"{where}: {unknown('form', cells['form'], FORMS[1:])}")
    known = {*NEEDED, *OPTIONAL}
    notes = {k: v for k, v in cells.items() if k not in known}
    return Entry(shape, inputs, outputs, bits, ms, cells["scheme"], density, cells["form"], notes)


def _ms(cells: Mapping[str, str], where: str) -> float:
    ms = _number(cells, "ms", where)
    if not 0 < ms <= LONGEST:
        raise JpqError(f"{where}: ms is {cells.get('ms')}; a measured time lies above 0 and below {LONGEST:g} ms.")
    return ms


def _density(cells: Mapping[str, str], where: str) -> float:
    density = _number(cells, "density", where)
    if not 0 <= density <= 1:
        raise JpqError(f"{where}: density is {cells['density']}; it is the share that stays, 0 to 1.")
    return density


def _shape(kind: str, groups: int, cells: Mapping[str, str], where: str) -> Shape:
    kernel, stride, size = (_sides(cells, name, where) for name in ("kernel", "stride", "size"))
    if kind != "linear" and not 1 <= len(kernel) == len(stride) == len(size) <= 3:
        raise JpqError(f"{where}: a {kind} needs kernel, stride and size of as many sides, such as 3x3, 1x1 and 32x32.")
    if kind == "linear" and (kernel or stride):
        raise JpqError(f"{where}: a linear layer has no kernel and no stride; leave those cells empty.")
    return Shape(kind, 1 if kind in ("depthwise", "linear") else groups, kernel, stride, size)


def _number(cells: Mapping[str, str], name: str, where: str) -> float:
    """A cell as a finite number."""
    try:
        value = float(cells.get(name, ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise JpqError(f"{where}: {name} is '{cells.get(name, '')}'; a finite number is needed.")
    return value


def _count(cells: Mapping[str, str], name: str, where: str, most: int) -> int:
    """A cell as a whole number from 1 to `most`."""
    text = cells.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 12 and 1 <= int(text) <= most):
        raise JpqError(f"{where}: {name} is '{text}'; a whole number from 1 to {most:,} is needed.")
    return int(text)


def _sides(cells: Mapping[str, str], name: str, where: str) -> tuple[int, ...]:
    """A cell such as `3x3` as sizes; an empty one has none."""
    text = cells.get(name, "")
    return tuple(_count({name: part}, name, where, WIDEST) for part in text.split("x")) if text else ()
