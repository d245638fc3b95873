"""Files in a run's folder: written, read back as a `Result`, and loaded as a model."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from jpq.config import TARGETS, Config, write_toml
from jpq.costs.latency_table import LatencyTable
from jpq.export.origin import note_origin
from jpq.export.rebuild import build_from_plan
from jpq.export.saved_model import is_saved_model, load_into, load_program
from jpq.export.timing import layer_table
from jpq.files import tensors, untrusted
from jpq.files.atomic import replace_file
from jpq.files.model_files import keep_files, kept_model
from jpq.files.paths import find_run
from jpq.plan import Plan
from jpq.plan import read as read_plan
from jpq.results import readme
from jpq.results.plots import draw_curves, draw_layers, save_picture
from jpq.results.record import BudgetRecord, LayerRecord, ModelMetrics, Result
from jpq.tasks import models
from jpq.tracing.decompose import decompose
from jpq.training.history import FRONT, EpochRecord, write_history
from jpq.training.run_state import RunState
from jpq.types import JpqError

FRONT_PICTURE = "front.png"
SIZES_NAME = "sizes.csv"


def load(folder: str | Path, run_code: bool = False, model: nn.Module | None = None) -> tuple[nn.Module, Plan]:
    """(small model in eval mode, its plan) from a run's folder or one of `jpq.save`, without pickle or data.

    What `jpq.save` wrote is loaded without the model's code, as its stored graph, which is for evaluation.

    Args:
        folder: of a run, or of `jpq.save`.
        run_code: a run's model that is code (module:callable) is built only with this, since the folder chooses it.
        model: the large model that the small one was compressed from, with any weights: the small one is made of its
            code, and can be trained.

    Raises JpqError where files are missing, foreign or do not fit together.
    """
    folder = find_run(folder)
    if model is not None:
        return load_into(folder, model)
    if is_saved_model(folder):
        return load_program(folder)
    plan = read_plan(folder / "plan.json")
    dense = models.of_plan(plan, folder / "plan.json", folder / "model.safetensors", run_code)
    small = build_from_plan(plan, decompose(dense))
    tensors.load_tensors(small, folder / "model.safetensors")
    note_origin(small, plan)
    return small.eval(), plan


def budget_folder_name(name: str, config: Config) -> str:
    """Folder name of one budget on any file system, such as `bops-0.5pct` for 0.5 % of the BOPs."""
    cost = next(t for t in TARGETS if getattr(config.budget, t) == name)
    return f"{cost.removeprefix('target_')}-{re.sub(r'[^A-Za-z0-9.+-]', '', name.replace('%', 'pct'))}"


def prepare_folder(run: RunState, config: Config, table: LatencyTable | None) -> None:
    """Create the folder of one budget, with its settings and the table of measured layers."""
    try:
        run.folder.mkdir(exist_ok=True)
        write_toml(config, run.folder / "config.toml")
        keep_files(kept_model(config.task.model, run.top), run.folder)
    except OSError as error:
        raise JpqError(f"Cannot write to {run.folder}: {error.strerror}. Choose another folder with --out.") from error
    if table is not None:
        layer_table.write_table(list(table.entries), run.folder / layer_table.TABLE_NAME)


def read_budget(name: str, folder: Path) -> BudgetRecord:
    """The line of front.csv of a finished budget, read from its folder."""
    try:
        tree: dict[str, Any] = untrusted.parse_json(untrusted.read_text(folder / "result.json"), "result.json")
        now, seconds = tree["compressed"], tree["seconds"]["total"]
        accuracy = math.nan if now["accuracy"] is None else now["accuracy"]
        return BudgetRecord(
            name,
            accuracy,
            tree["held_out"]["compressed"],
            now["bops"],
            now["bops_share"],
            now["macs"],
            now["size_bytes"],
            seconds,
            folder.name,
        )
    except (JpqError, KeyError, TypeError) as error:
        raise JpqError(f"{folder} was finished earlier and cannot be read now. Run without --resume.") from error


def write_run(result: Result, config: Config) -> None:
    """Write every table of a run into its folder, and its pictures where it is final."""
    folder = result.folder
    write_history(result.history, folder)
    layers = pd.DataFrame([asdict(row) for row in result.layers], columns=[f.name for f in fields(LayerRecord)])
    replace_file(folder / "layers.csv", lambda path: layers.to_csv(path, index=False))
    text = json.dumps(_to_json(result_record(result)), indent=2, allow_nan=False) + "\n"
    replace_file(folder / "result.json", lambda path: path.write_text(text, encoding="utf-8"))
    if result.export:
        write_sizes(result)
        replace_file(folder / readme.NAME, lambda path: path.write_text(readme.readme_text(result), encoding="utf-8"))
    if result.final:
        draw_run(result, config)


def draw_run(result: Result, config: Config) -> None:
    """Write the pictures of a run into its folder."""
    save_picture(draw_curves(result, config), result.folder / "curves.png")
    save_picture(draw_layers(result, config), result.folder / "layers.png")


def read_run(folder: str | Path) -> Result:
    """The result in a run's folder. Raises JpqError where its files are missing, damaged or foreign."""
    folder = Path(folder)
    try:
        tree = untrusted.as_dict(
            untrusted.parse_json(untrusted.read_text(folder / "result.json", "result"), "result.json")
        )
        known = {f.name for f in fields(Result)}
        tree = {key: value for key, value in tree.items() if key in known}
        for side in ("float", "compressed"):
            figures = tree[side]
            tree[side] = ModelMetrics(**{**figures, "accuracy": _number(figures["accuracy"])})
        rows, layers = _read_rows(folder / "history.csv"), _read_rows(folder / "layers.csv")
        return Result(
            **{**tree, "folder": folder, "notes": tuple(tree.get("notes", ()))},
            layers=tuple(LayerRecord(**row) for row in layers),
            history=tuple(
                EpochRecord(**{k: _number(v) for k, v in row.items()} | {"budget": row.get("budget") or ""})
                for row in rows
            ),
        )
    except (JpqError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise JpqError(f"{folder} does not hold the result of a run ({type(error).__name__}: {reason}).") from error


def _number(value: Any) -> Any:
    """A number of a JSON or CSV file, where an empty cell stands for one that is not finite."""
    return math.nan if value is None else value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """A CSV's rows; empty cells are None."""
    untrusted.check_file(path, "table")
    table = pd.read_csv(path, dtype={"name": str, "budget": str}).astype(object)
    return [{str(k): v for k, v in row.items()} for row in table.where(table.notna(), None).to_dict("records")]


def read_finished(config: Config) -> Result:
    """The result of a finished run of these settings; of several budgets that of the last, with all in its `front`."""
    top = config.folder()
    folders = {name: top / budget_folder_name(name, each) if name else top for name, each in config.each().items()}
    result = read_run(folders[next(reversed(folders))])
    if len(folders) == 1:
        return result
    return replace(result, front=tuple(read_budget(name, folder) for name, folder in folders.items()))


def write_front(points: Sequence[BudgetRecord], folder: Path) -> None:
    """Write front.csv, one line a budget."""
    frame = pd.DataFrame([asdict(point) for point in points], columns=[f.name for f in fields(BudgetRecord)])
    replace_file(folder / FRONT, lambda path: frame.to_csv(path, index=False))


def result_record(result: Result) -> dict[str, Any]:
    """The content of result.json: all of a result but its tables, which have files of their own."""
    tree = {**asdict(result), "intervals": result.intervals}
    return {key: value for key, value in tree.items() if key not in ("folder", "layers", "history", "front")}


def _to_json(value: Any) -> Any:
    """A value in JSON's types; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(inner) for inner in value]
    if hasattr(value, "item"):  # numpy and torch scalars
        return _to_json(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def size_rows(result: Result) -> list[dict[str, Any]]:
    """Bytes of each exported file, and of the unpruned model in fp32 and int8, a row of sizes.csv each."""
    float_bytes = result.float.size_bytes
    int8_bytes = result.uniform.get("W8A8", {}).get("size")
    rows: list[dict[str, Any]] = [{"what": "unpruned, fp32, as counted", "bytes": float_bytes}]
    if int8_bytes is not None:
        rows.append({"what": "unpruned, int8, as counted", "bytes": int(int8_bytes)})
    if result.packed:
        rows.append({"what": "model.packed", "bytes": int(result.packed["total"])})
    rows += [{"what": form["file"], "bytes": int(form["bytes"])} for form in result.export.get("forms", {}).values()]
    for row in rows:
        row["share_of_fp32"] = row["bytes"] / float_bytes
        row["share_of_int8"] = row["bytes"] / int8_bytes if int8_bytes else None
    return rows


def write_sizes(result: Result) -> None:
    """Write sizes.csv into the run's folder."""

    def fill(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["what", "bytes", "share_of_fp32", "share_of_int8"])
            writer.writeheader()
            writer.writerows(size_rows(result))

    replace_file(result.folder / SIZES_NAME, fill)
