"""The sensitivity table: how much the outputs change when one tensor is rounded, or one site keeps fewer units.

    S_w[l, b]   the weight of layer l at b bits        S_a[l, b]   the input of layer l at b bits
    S_c[s, k]   the k best units of site s alone

each as the divergence of the outputs from the float model's, in the unit of the task's own distance (nats for classes),
minus the divergence of the base from which one change at a time is made. It is kept as a CSV file, whose first line
says for which task, network, weights and calibration it holds, by which version of jpq it was measured, and a checksum
of the rows, so that a file that was cut short is known.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jpq.files import replace_file, untrusted
from jpq.tracing.network import Network
from jpq.types import JpqError

Side = Literal["w", "a"]

Key = tuple[str, Side]  # (layer, its weight or its input)

FORMAT = 3  # version of the file, and of the grids and fits that it was measured with

COLUMNS = ("what", "name", "value", "of", "divergence", "macs")

_MARK = "# jpq sensitivity "


@dataclass(frozen=True)
class SensitivityTable:
    """Divergences of single changes, in the unit of the task's distance."""

    bits: Mapping[Key, Mapping[int, float]]  # tensor -> width in bits -> divergence
    units: Mapping[str, Mapping[int, float]]  # site -> number of units kept -> divergence; all of them: 0
    orders: Mapping[str, tuple[int, ...]]  # site -> its units, the most important first
    estimator: str  # how it was measured, a name in jpq.allocation.measured.measure.ESTIMATORS
    model: str  # checksum of the float weights
    calibration: str  # checksum of the samples
    samples: int
    base: Mapping[str, Any] = field(default_factory=dict)  # divergence of the base, its bits
    measured_by: str = field(default_factory=lambda: version("jpq"))  # version of jpq
    task: str = ""  # name of the task whose distance it is in; "": a distance of the caller's own, or not recorded

    def most_sensitive(self, count: int = 5) -> list[tuple[Key, int, float]]:
        """The tensors whose smallest width changes the outputs most: (tensor, width, divergence)."""
        worst = [(key, min(row), row[min(row)]) for key, row in self.bits.items() if row]
        return sorted(worst, key=lambda entry: -entry[2])[:count]

    def scaled(self, activations: float) -> SensitivityTable:
        """A copy whose divergences of activations are multiplied by a factor: training heals them less than weights."""
        bits = {
            key: {b: s * (activations if key[1] == "a" else 1.0) for b, s in row.items()}
            for key, row in self.bits.items()
        }
        return replace(self, bits=bits)


def write_table(path: str | Path, table: SensitivityTable, network: Network) -> None:
    """Write the table as a CSV file, `COLUMNS` wide, after one comment line of JSON; a file is replaced as a whole."""
    rows = _text_of_rows(table, network)
    head = {
        "format": FORMAT,
        "jpq": table.measured_by,
        "estimator": table.estimator,
        "task": table.task,
        "model": table.model,
        "calibration": table.calibration,
        "samples": table.samples,
        "base": dict(table.base),
        "orders": {site: list(order) for site, order in table.orders.items()},
        "rows": _text_checksum(rows),
    }
    text = _MARK + json.dumps(head) + "\n" + rows
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def _text_of_rows(table: SensitivityTable, network: Network) -> str:
    """The rows of the file, with their header."""
    macs = {layer.name: layer.macs for layer in network.layers}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for (layer, side), row in table.bits.items():
        for width, divergence in sorted(row.items()):
            what = "weight" if side == "w" else "input"
            writer.writerow([what, layer, width, 32, repr(divergence), macs.get(layer, "")])
    for site, row in table.units.items():
        for kept, divergence in sorted(row.items()):
            writer.writerow(["units", site, kept, len(table.orders[site]), repr(divergence), ""])
    return out.getvalue()


def _text_checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_table(path: str | Path) -> SensitivityTable:
    """Read a table that `write_table` wrote. Raises JpqError for any other file, and for one that is cut short."""
    path = Path(path)
    text = untrusted.read_text(path, "sensitivity table")
    first_line, _, rest = text.partition("\n")
    if not first_line.startswith(_MARK):
        raise JpqError(f"{path} is no sensitivity table; write one with `jpq sensitivity --out FILE.csv`.")
    try:
        head = json.loads(first_line.removeprefix(_MARK))
        if head["format"] != FORMAT:
            raise JpqError(
                f"{path} has format {head['format']} and this version of jpq reads {FORMAT}: measure it anew."
            )
        if head["rows"] != _text_checksum(rest):
            raise ValueError("its rows are not those that were written")
        orders = {str(site): tuple(int(u) for u in order) for site, order in head["orders"].items()}
        bits, units = _parse_rows(csv.DictReader(io.StringIO(rest)))
        for site, order in orders.items():
            if sorted(order) != list(range(len(order))) or len(order) not in units[site]:
                raise ValueError(f"site {site} is not complete")
        return SensitivityTable(
            bits,
            units,
            orders,
            str(head["estimator"]),
            str(head["model"]),
            str(head["calibration"]),
            int(head["samples"]),
            dict(head["base"]),
            str(head["jpq"]),
            str(head.get("task", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise JpqError(f"{path} is damaged or was cut short ({error}): measure it anew.") from error


def _parse_rows(
    rows: Iterable[Mapping[str, Any]],
) -> tuple[dict[Key, dict[int, float]], dict[str, dict[int, float]]]:
    """Divergences of bits and of units. Raises ValueError, KeyError or TypeError for rows of another form."""
    bits: dict[Key, dict[int, float]] = {}
    units: dict[str, dict[int, float]] = {}
    for row in rows:
        what, name, value, divergence = row["what"], row["name"], int(row["value"]), float(row["divergence"])
        if what not in ("weight", "input", "units") or value < 1 or not math.isfinite(divergence):
            raise ValueError(f"a row {what}, {name}, {value}, {divergence}")
        if what == "units":
            units.setdefault(name, {})[value] = divergence
        else:
            bits.setdefault((name, "w" if what == "weight" else "a"), {})[value] = divergence
    return bits, units


def check_table(
    table: SensitivityTable,
    network: Network,
    model: str,
    source: str | Path,
    calibration: str | None = None,
    task: str = "",
) -> None:
    """Raise JpqError where the table is of another task, network, weights, or version of jpq.

    Args:
        table: as it was read.
        network: that it is to be used for.
        model: checksum of that network's float weights.
        source: the table's file, for messages.
        calibration: checksum of the samples that it must have been measured on; None: any.
        task: name of the task that it is to be used for; "": any.
    """
    names = {layer.name for layer in network.layers}
    missing = {layer for layer, _ in table.bits} - names
    if missing:
        raise JpqError(f"{source} is the table of another model: this one has no layer '{min(missing)}'.")
    if table.model != model:
        raise JpqError(f"{source} was measured with other weights of this model: measure it anew with jpq sensitivity.")
    if task and table.task and table.task != task:
        raise JpqError(
            f"{source} was measured for the task '{table.task}', and this is '{task}': give the same task, or measure "
            "it anew with jpq sensitivity."
        )
    if table.measured_by != version("jpq"):
        raise JpqError(
            f"{source} was measured by jpq {table.measured_by}, and this is {version('jpq')}: measure it anew with "
            "jpq sensitivity."
        )
    if calibration is not None and table.calibration != calibration:
        raise JpqError(
            f"{source} was measured on other samples than these: measure it anew, or give the same --data, --seed and "
            "--batch-size."
        )


def tensors_checksum(tensors: Iterable[Tensor]) -> str:
    """Sixteen hexadecimal digits that name these numbers."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
        digest.update(real.cpu().contiguous().to(torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_checksum(model: nn.Module) -> str:
    """The checksum of a model's parameters and buffers."""
    return tensors_checksum(t for _, t in sorted(model.state_dict().items()))
