"""`finalize()`: export, pack and verify the model of a finished run, and measure it on the test split."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpq.compression.usage import FLOAT_BITS
from jpq.config import Config, check_formats
from jpq.config import read_toml as read_config
from jpq.config import write_toml as write_config
from jpq.export import verify
from jpq.export.count import measure
from jpq.export.timing import layer_table
from jpq.files import tensors
from jpq.files.model_files import KEPT, kept_model
from jpq.files.untrusted import check_no_code
from jpq.plan import Plan
from jpq.results import run_folder
from jpq.results.embedding import as_exported
from jpq.results.finish import export_model
from jpq.results.formatting import format_metric
from jpq.results.record import UNREAD, WARNING, Result
from jpq.results.run_folder import load
from jpq.tasks.base import Task
from jpq.tasks.data import Data
from jpq.tasks.load import fit_sizes, load_dense_model, read_data
from jpq.types import JpqError

FINAL_FILES = ("model.onnx", "model.packed")  # files that only final runs have

FLOAT_WEIGHTS = "float.safetensors"

TOLERANCE = 0.005  # largest difference of a metric between machines, absolute up to 1 and relative above


def is_final(folder: Path) -> bool:
    """Whether a run is exported, verified and measured on the test split."""
    return run_folder.read_run(folder).final and all((folder / name).is_file() for name in FINAL_FILES)


def finalize(
    folder: Path,
    out: Path | None = None,
    data_root: Path | None = None,
    formats: str = "",
    onnx_weights: str = "",
    run_code: bool = False,
) -> Result:
    """Export, pack and verify the model of a finished run, read its test split once, and write the final result.

    A run that was final keeps the test metrics that it read then.

    Args:
        folder: of the run.
        out: another folder for the final run; `folder` then stays as it is.
        data_root: where the data lie now.
        formats, onnx_weights: instead of those in the run's config.
        run_code: let code run that the folder names (module:callable).

    Raises JpqError if the model is not the one that the result describes, where its files or data cannot be read, and
    where the exported model computes something else.
    """
    before = run_folder.read_run(folder)
    config = read_final_config(folder, data_root, formats, onnx_weights, run_code)
    small, plan = load(folder, run_code)
    data = read_data(config, torch.device("cpu"), folder)
    fit_sizes(data, small)
    check_costs(small, plan, before, data)
    notes = [*before.notes, *check_held_out(before, data.task.evaluate(small, data.held_out), data.task)]
    if config.decide.open_norms and verify.OPENED not in before.verified:
        notes.append("By --open-norms this model is not the masked one; how far apart they were, trials do not keep.")
    target = out or folder
    if out is not None:
        copy_run(folder, config, out)
    path, export_record = export_model(small, plan, data, target, config)
    seen, raw = as_exported(small, data, config)
    checked = verify.exported_with_metric(seen, path, raw.test, data.task)
    for record in (checked, checked["metric"]):
        if "warning" in record:
            notes.insert(0, f"{WARNING}{record['warning']}")
    compressed, float_metric = before.compressed.accuracy, before.float.accuracy
    if not before.final:
        compressed = checked["metric"]["file"]
        float_metric, missing = measure_float_model(folder, config, data, before)
        notes += missing
    result = replace(
        before,
        folder=target,
        final=True,
        verified={**before.verified, **checked},
        latency=measure_latency(folder, path, before),
        **export_record,
        notes=tuple(notes),
        compressed=replace(before.compressed, accuracy=compressed),
        float=replace(before.float, accuracy=float_metric),
    )
    run_folder.write_run(result, config)
    return result


def read_final_config(folder: Path, data_root: Path | None, formats: str, onnx_weights: str, run_code: bool) -> Config:
    """The run's config with other places and formats. Raises JpqError where it names code that may not run."""
    config = read_config(folder / "config.toml")
    if data_root is not None:
        config = replace(config, task=replace(config.task, data_root=data_root))
    named = {"formats": formats, "onnx_weights": onnx_weights}
    changes: dict[str, Any] = {name: value for name, value in named.items() if value}
    config = replace(config, run=replace(config.run, **changes))
    check_formats(config.run.formats, config.run.onnx_weights)
    if not run_code:
        check_no_code("data", config.task.data, folder / "config.toml", "add --run-code")
        check_no_code("task", config.task.task, folder / "config.toml", "add --run-code")
    return config


def check_costs(small: nn.Module, plan: Plan, before: Result, data: Data) -> None:
    """Raises JpqError where the saved model costs more or less than its result says."""
    measured = measure(small, data.example)
    in_float = measured["float_macs"]  # results of earlier versions have no record of it
    macs = sum(row.macs for row in before.layers if row.name in plan.layers)
    bops = sum(row.macs * row.w_bits * row.a_bits for row in before.layers if row.name in plan.layers)
    quantized_bops = measured["bops"] - in_float * FLOAT_BITS**2
    if (measured["macs"] - in_float, quantized_bops) != (macs, bops):
        raise JpqError(
            f"{before.folder}: the saved model costs {quantized_bops:,} BOPs, its layers.csv says {bops:,}. They are "
            "not of the same run; run it again."
        )


def check_held_out(before: Result, now: float, task: Task) -> list[str]:
    """A note where the held-out metric of the saved model has changed. Raises JpqError where it has changed much."""
    then = float(before.held_out["compressed"])
    if abs(now - then) > max(TOLERANCE, 0.05 * abs(then)):
        raise JpqError(
            f"{before.folder}: the saved model has a held-out {task.metric_name} of {format_metric(task, now)}, its "
            f"result says {format_metric(task, then)}. Weights or data are not those of the run."
        )
    if now == then:
        return []
    was, is_now = format_metric(task, then), format_metric(task, now)
    return [f"Held-out {task.metric_name} was {was} when the run ended and is {is_now} here."]


def copy_run(folder: Path, config: Config, out: Path) -> None:
    """Copy the files of a run that `write_run` and `export_model` do not write, into another folder."""
    if out.resolve() == folder.resolve():
        return
    if (out / "result.json").exists():
        raise JpqError(f"{out} holds a run already. Choose another folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_config(config, out / "config.toml")
        for name in ("plan.json", "model.safetensors", FLOAT_WEIGHTS, layer_table.TABLE_NAME):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
        if (folder / KEPT).is_dir():
            shutil.copytree(folder / KEPT, out / KEPT, dirs_exist_ok=True)
    except OSError as error:
        raise JpqError(f"Cannot write to {out}: {error.strerror}. Choose another folder with --out.") from error


def measure_latency(folder: Path, path: Path, before: Result) -> dict[str, Any]:
    """The exported model's time beside its prediction, where the run had a table of measured layers."""
    table_path, predicted_ms = folder / layer_table.TABLE_NAME, before.compressed.latency_ms
    if not table_path.is_file() or predicted_ms is None:
        return before.latency
    return layer_table.compare_with_prediction(path, predicted_ms, layer_table.read_table(table_path))


def measure_float_model(folder: Path, config: Config, data: Data, before: Result) -> tuple[float, list[str]]:
    """(test metric of the float model, notes); UNREAD with a note where its weights are not there or are others."""
    metric = data.task.metric_name
    model = read_float_model(folder, config, data)
    if model is None:
        weights = config.task.weights
        where = f"at {weights}" if weights is not None else f"in {folder}"
        return UNREAD, [f"The float model's weights are no longer {where}: its test {metric} was not read."]
    now, then = data.task.evaluate(model, data.held_out), before.held_out.get("float")
    if then is not None and math.isfinite(then) and abs(now - then) > TOLERANCE * max(1.0, abs(then)):
        return UNREAD, [
            f"The float weights have a held-out {metric} of {format_metric(data.task, now)} and those "
            f"of the run had {format_metric(data.task, then)}: their test {metric} was not read."
        ]
    return data.task.evaluate(model, data.test), []


def read_float_model(folder: Path, config: Config, data: Data) -> nn.Module | None:
    """The model that the run began with, from --weights or beside the run; None where its weights are gone."""
    weights, cpu = config.task.weights, torch.device("cpu")
    config = replace(config, task=replace(config.task, model=kept_model(config.task.model, folder)))
    if weights is not None and weights.is_file():
        return load_dense_model(config, data, cpu)
    folders = (folder, *folder.resolve().parents[:2])  # of the budget or run, of the run, of the study
    file = next((place / FLOAT_WEIGHTS for place in folders if (place / FLOAT_WEIGHTS).is_file()), None)
    if file is None:
        return None
    model = load_dense_model(replace(config, task=replace(config.task, weights=None)), data, cpu)
    tensors.load_tensors(model, file)
    return model.eval()
