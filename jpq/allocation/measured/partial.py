"""The entries of a table while it is measured: noted in a file as soon as they are found, for `--resume`.

The first line says what the entries must have in common with a measurement that goes on with them, each other line is
one entry. The file lies beside the table and is removed when the table is complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpq.allocation.measured.measure import Bounds, Change, measure_table
from jpq.allocation.measured.probe import Probe
from jpq.allocation.measured.table import FORMAT, SensitivityTable, tensors_checksum
from jpq.files import untrusted
from jpq.files.atomic import replace_file
from jpq.tracing.forward import collect_tensors
from jpq.types import JpqError


@dataclass(frozen=True)
class PartialTable:
    """Where the entries of a table are noted while it is measured."""

    path: Path
    resume: bool = False  # begin with the entries that are there
    writes: bool = True  # False: they are read alone, as in all processes but the first
    task: str = ""  # whose distance the entries are of


def measure_noted(
    probe: Probe,
    w_bits: Bounds,
    a_bits: Bounds,
    model: str,
    notes: PartialTable | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    estimator: str = "single",
    wanted: Collection[Change] | None = None,
) -> SensitivityTable:
    """The table of single changes of an attached network, whose entries are noted as soon as they are found.

    Arguments as for `measure_table`; `estimator` is noted beside the entries. Raises JpqError where the noted entries
    are of another measurement.
    """
    if notes is None:
        return measure_table(probe, w_bits, a_bits, model, progress=progress, wanted=wanted)
    head = partial_head(estimator, model, probe, w_bits, a_bits, notes.task)
    known = read_partial(notes.path, head) if notes.resume and notes.path.exists() else {}
    if not notes.writes:
        return measure_table(probe, w_bits, a_bits, model, progress=progress, known=known, wanted=wanted)
    lines = [json.dumps(head), *(_line(change, divergence) for change, divergence in known.items())]
    replace_file(notes.path, lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    with notes.path.open("a", encoding="utf-8") as file:

        def note(change: Change, divergence: float) -> None:
            file.write(_line(change, divergence) + "\n")
            file.flush()

        return measure_table(probe, w_bits, a_bits, model, progress=progress, known=known, record=note, wanted=wanted)


def _line(change: Change, divergence: float) -> str:
    """One noted entry."""
    return json.dumps([change.what, change.name, change.value, divergence])


def partial_head(estimator: str, model: str, probe: Probe, w_bits: Bounds, a_bits: Bounds, task: str) -> dict[str, Any]:
    """What the entries of an interrupted measurement must have in common with the one that goes on with them."""
    return {
        "format": FORMAT,
        "estimator": estimator,
        "task": task,
        "model": model,
        "calibration": tensors_checksum(collect_tensors(probe.batches)),
        "w_bits": list(w_bits),
        "a_bits": list(a_bits),
    }


def read_partial(path: Path, head: Mapping[str, Any]) -> dict[Change, float]:
    """The entries that an interrupted measurement has noted; a last line that was cut is left out.

    Raises JpqError where they are of another measurement.
    """
    first, *lines = untrusted.read_text(path, "list of measured entries").splitlines() or [""]
    try:
        same = {"task": head["task"], **json.loads(first)} == dict(head)  # files of before did not name it
    except (TypeError, ValueError):
        same = False
    if not same:
        raise JpqError(f"{path} is of another model, data or setting than this measurement. Run without --resume.")
    known: dict[Change, float] = {}
    for line in lines:
        try:
            what, name, value, divergence = json.loads(line)
            known[Change(str(what), str(name), int(value))] = float(divergence)
        except (TypeError, ValueError):
            break
    return known


def noted_estimator(path: Path) -> str | None:
    """The estimator whose entries an interrupted measurement has noted; None where no file says it."""
    if not path.exists():
        return None
    first = untrusted.read_text(path, "list of measured entries").partition("\n")[0]
    try:
        name = json.loads(first)["estimator"]
    except (KeyError, TypeError, ValueError):
        return None
    return name if isinstance(name, str) else None


def partial_path(out: Path) -> Path:
    """The file beside a table that its entries are noted in."""
    return out.with_name(f"{out.name}.part")
