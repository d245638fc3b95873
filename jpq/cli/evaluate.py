"""The command `jpq evaluate`: how often a saved model, or an exported file in a runtime, is right."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from jpq.cli.flags import parsed, shown
from jpq.types import JpqError


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Which saved model, on which images."""

    saved: Path
    """Folder of an earlier run, such as runs/0123456789ab, or an exported file, such as its model.onnx."""
    split: Literal["test", "held-out"] = "test"
    """Which images: the test split, or the part of the training data that steered the run."""
    runtime: str = ""
    """Where the exported file is run: onnxruntime, openvino, or both (onnxruntime,openvino). Default: the PyTorch model
    for a folder, onnxruntime for a file."""
    data: str | None = None
    """Data set for a file, normalised as for training. Default: that of the run whose folder the file lies in."""
    data_root: Path | None = None
    """Where data sets lie, or are downloaded to. Default: where the run read them, else data."""
    run_code: bool = False
    """Run the code that the folder names as its model or data (module:callable): only for folders that you trust."""


def run_evaluate(wanted: Evaluate, console: Console) -> None:
    """Measure what was asked for. Raises JpqError for files and data that do not go together."""
    import torch

    from jpq.export.runtimes import open_session, parse_runtimes
    from jpq.results.formatting import format_metric
    from jpq.results.run_folder import load
    from jpq.tasks import models

    single = wanted.saved.is_file()
    if single and (wanted.saved.suffix == ".pt2" or wanted.saved.name.endswith(".qonnx.onnx")):
        raise JpqError(f"{wanted.saved} is for other tools than runtimes. Give the run's folder, or its model.onnx.")
    folder = wanted.saved.parent if single else wanted.saved
    known = (folder / "config.toml").is_file()
    if not known and not single:
        raise JpqError(f"{folder} is not the folder of a run: it has no config.toml. Give one like runs/0123456789ab.")
    runtimes = parse_runtimes(wanted.runtime or "onnxruntime") if wanted.runtime or single else ()
    data = _data(wanted, folder if known else None)
    batches = data.test if wanted.split == "test" else data.held_out
    task, samples = data.task, f"{batches.size} {wanted.split} images of {data.name}"
    outputs: dict[str, list[Any]] = {}  # model that was run -> a tensor per batch
    if known and not (single and wanted.data):
        model, _ = load(folder, wanted.run_code)
        models.check_fits(model, data.example, data.classes, data.task)
        with torch.no_grad():
            outputs["the PyTorch model"] = [model(x) for x, _ in batches]
        if not single:
            metric = format_metric(task, task.evaluate(model, batches))
            _say(console, f"{task.report(metric, samples)} ({wanted.saved}).")
    file = wanted.saved if single else folder / "model.onnx"
    for name in runtimes:
        session = open_session(name, file)
        _require_fits(file, session, data)
        found = [session(x) for x, _ in batches]
        replayed = iter(found)
        metric = format_metric(task, task.evaluate(lambda _, replayed=replayed: next(replayed), batches))
        agreement = ", ".join(f"{_agreement(task, found, other)} as {model}" for model, other in outputs.items())
        agrees = f" The same {task.decision_name} for {agreement}." if agreement else ""
        _say(console, f"{task.report(metric, samples)} ({file} in {name}).{agrees}")
        outputs[name] = found


def _agreement(task: Any, outputs: list[Any], others: list[Any]) -> str:
    """How many decisions of two models' outputs, a tensor per batch, are the same."""
    import torch

    same = torch.cat([task.same_decision(a, b).flatten() for a, b in zip(outputs, others, strict=True)])
    return f"{int(same.sum())} of {len(same)}"


def _data(wanted: Evaluate, folder: Path | None) -> Any:
    """The data set that is named, or that of the run."""
    from dataclasses import replace

    import torch

    from jpq.config import read_toml
    from jpq.files.untrusted import check_no_code
    from jpq.tasks.data import load
    from jpq.tasks.load import read_data

    if wanted.data is not None:
        return load(wanted.data, wanted.data_root or Path("data"))
    if folder is None:
        raise JpqError(
            f"Say which images {wanted.saved} is to be tried on: --data digits (or cifar10, folder:PATH ...)."
        )
    config = read_toml(folder / "config.toml")
    if not wanted.run_code:
        check_no_code("data", config.task.data, folder / "config.toml", "add --run-code")
    if wanted.data_root is not None:
        config = replace(config, task=replace(config.task, data_root=wanted.data_root))
    return read_data(config, torch.device("cpu"))


def _require_fits(file: Path, session: Any, data: Any) -> None:
    """Raise JpqError where the file takes other images or knows other classes than the data have."""
    x, _ = next(iter(data.test))
    try:
        out = session(x)
    except JpqError:
        raise
    except Exception as error:  # a runtime has classes of its own for every kind of failure
        size = "x".join(map(str, data.shape))
        reason = " ".join(str(error).split())[:160]
        raise JpqError(f"{file} cannot take batches of {size} images, as {data.name} has them: {reason}") from error
    if not data.task.fits(out, len(x), data.classes):
        shape = "several tensors" if isinstance(out, tuple) else "x".join(map(str, out.shape))
        row = data.task.row_text(data.classes)
        raise JpqError(f"{file} gives {shape} for {len(x)} images, not {row} for each.")


def _say(console: Console, line: str) -> None:
    console.print(escape(line), soft_wrap=True, highlight=False)


def evaluate_command(args: list[str], console: Console) -> None:
    """Run `jpq evaluate`."""
    run_evaluate(parsed(shown(Evaluate, "saved"), "evaluate", args), console)
