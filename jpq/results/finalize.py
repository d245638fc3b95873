"""A run that is not final, made so: exported, packed, verified, and measured on the test split."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpq.config import Config, check_formats
from jpq.config import read_toml as read_config
from jpq.config import write_toml as write_config
from jpq.export import verify
from jpq.export.timing import layer_table
from jpq.files import tensors
from jpq.files.untrusted import check_no_code
from jpq.plan import Plan
from jpq.results import run_folder
from jpq.results.finish import ship
from jpq.results.formatting import format_metric
from jpq.results.record import UNREAD, Result
from jpq.results.run_folder import load
from jpq.tasks.base import Task
from jpq.tasks.data import Data
from jpq.tasks.load import dense_model, read_data
from jpq.types import JpqError

FILES = ("model.onnx", "model.packed")  # what a final run has beside its model and tables

FLOAT = "float.safetensors"

NEAR = 0.005  # by how much an accuracy may differ on another machine


def is_final(folder: Path) -> bool:
    """Whether nothing is left to do."""
    return run_folder.read_run(folder).final and all((folder / name).is_file() for name in FILES)


def finalize(
    folder: Path,
    out: Path | None = None,
    data_root: Path | None = None,
    formats: str = "",
    onnx_weights: str = "",
    run_code: bool = False,
) -> Result:
    """Export, pack and verify the model of a finished run, read its test split once, and say so in its result.json.

    With `out` the run's folder stays as it is, and a complete one is written there. A run that was final keeps the
    accuracies that it read then. `run_code` lets code run that the folder names (module:callable). Raises JpqError if
    the model is not the one that the result describes, where its files or data cannot be read, and where the exported
    model computes something else.
    """
    before = run_folder.read_run(folder)
    config = read_config(folder / "config.toml")
    if data_root is not None:
        config = replace(config, task=replace(config.task, data_root=data_root))
    named = {"formats": formats, "onnx_weights": onnx_weights}
    given: dict[str, Any] = {name: value for name, value in named.items() if value}
    config = replace(config, run=replace(config.run, **given))
    check_formats(config.run.formats, config.run.onnx_weights)
    if not run_code:
        check_no_code("data", config.task.data, folder / "config.toml", "add --run-code")
    small, plan = load(folder, run_code)
    data = read_data(config, torch.device("cpu"))
    require_same(small, plan, before, data)
    notes = [*before.notes, *_moved(before, data.task.evaluate(small, data.held_out), data.task)]
    if config.decide.open_norms and verify.OPENED not in before.verified:
        notes.append("By --open-norms this model is not the masked one; how far apart they were, trials do not keep.")
    target = out or folder
    if out is not None:
        _copy(folder, config, out)
    path, files = ship(small, plan, data, target, config)
    verified = {**before.verified, **verify.exported(small, path, data.test, data.task)}
    timing = before.latency
    if (folder / layer_table.TABLE_NAME).is_file() and before.compressed.latency_ms is not None:
        timing = layer_table.compare_with_prediction(
            path, before.compressed.latency_ms, layer_table.read_table(folder / layer_table.TABLE_NAME)
        )
    right, first = before.compressed.accuracy, before.float.accuracy
    if not before.final:
        model, missing = float_model(folder, config, data, before)
        right, first = (
            data.task.evaluate(small, data.test),
            UNREAD if model is None else data.task.evaluate(model, data.test),
        )
        notes += missing
    result = replace(
        before,
        folder=target,
        final=True,
        verified=verified,
        latency=timing,
        **files,
        notes=tuple(notes),
        compressed=replace(before.compressed, accuracy=right),
        float=replace(before.float, accuracy=first),
    )
    run_folder.write_run(result, config)
    return result


def require_same(small: nn.Module, plan: Plan, before: Result, data: Data) -> None:
    """Raises JpqError where the model in the folder does not cost what its result says."""
    counted = verify.measure(small, data.example)
    told = sum(row.macs for row in before.layers if row.name in plan.layers)
    bits = sum(row.macs * row.w_bits * row.a_bits for row in before.layers if row.name in plan.layers)
    if (counted["macs"], counted["bops"]) != (told, bits):
        raise JpqError(
            f"{before.folder}: the saved model costs {counted['bops']:,} BOPs, its layers.csv says {bits:,}. They are "
            "not of the same run; run it again."
        )


def _moved(before: Result, now: float, task: Task) -> list[str]:
    """A note where the saved model's held-out metric is not what it was. Raises JpqError where it is far from it."""
    then = float(before.held_out["compressed"])
    if abs(now - then) > max(NEAR, 0.05 * abs(then)):
        raise JpqError(
            f"{before.folder}: the saved model has a held-out {task.metric_name} of {format_metric(task, now)}, its "
            f"result says {format_metric(task, then)}. Weights or data are not those of the run."
        )
    if now == then:
        return []
    was, is_now = format_metric(task, then), format_metric(task, now)
    return [f"Held-out {task.metric_name} was {was} when the run ended and is {is_now} here."]


def float_model(folder: Path, config: Config, data: Data, before: Result) -> tuple[nn.Module | None, list[str]]:
    """The model that the run began with, where its weights are still there, else None and a note."""
    places = [place / FLOAT for place in (folder, *folder.resolve().parents[:2])]  # its own, its run's, its study's
    given = config.task.weights
    try:
        if given is not None and given.is_file():
            model = dense_model(config, data, torch.device("cpu"))
        else:
            found = next(place for place in places if place.is_file())
            model = dense_model(replace(config, task=replace(config.task, weights=None)), data, torch.device("cpu"))
            tensors.load_tensors(model, found)
            model.eval()
    except StopIteration:
        where = f"at {given}" if given is not None else f"in {folder}"
        return None, [
            f"The float model's weights are no longer {where}: its test {data.task.metric_name} was not read."
        ]
    right, then = data.task.evaluate(model, data.held_out), before.held_out.get("float")
    if then is not None and math.isfinite(then) and abs(right - then) > NEAR:
        return None, [
            f"The float weights have a held-out {data.task.metric_name} of {format_metric(data.task, right)} and those "
            f"of the run had {format_metric(data.task, then)}: their test {data.task.metric_name} was not read."
        ]
    return model, []


def _copy(folder: Path, config: Config, out: Path) -> None:
    """What `report.write` and `ship` do not write, into another folder."""
    if out.resolve() == folder.resolve():
        return
    if (out / "result.json").exists():
        raise JpqError(f"{out} holds a run already. Choose another folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_config(config, out / "config.toml")
        for name in ("plan.json", "model.safetensors", FLOAT, layer_table.TABLE_NAME):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
    except OSError as error:
        raise JpqError(f"Cannot write to {out}: {error.strerror}. Choose another folder with --out.") from error
