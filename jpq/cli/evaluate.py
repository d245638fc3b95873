"""`jpq evaluate`: the metric of a saved model, or of an exported file in a runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from jpq.cli.flags import parse_flags, with_help
from jpq.cli.output import print_line
from jpq.types import JpqError


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Flags of `jpq evaluate`: saved models, and the images."""

    saved: tuple[Path, ...] = ()
    """Folders of earlier runs, such as runs/0123456789ab or runs/latest, or exported files, such as its model.onnx."""
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


def evaluate_command(args: list[str], console: Console) -> None:
    """Run `jpq evaluate`."""
    run_evaluate(parse_flags(with_help(Evaluate, "saved"), "evaluate", args), console)


def run_evaluate(flags: Evaluate, console: Console) -> None:
    """Print the metric of each named model or file. Raises JpqError for files and data that do not go together."""
    if not flags.saved:
        raise JpqError("Name RUN_FOLDER|FILE.onnx. See jpq evaluate --help.")
    distinct: dict[Path, Path] = {}
    for path in flags.saved:  # runs/* names a run twice, by runs/latest too
        distinct.setdefault(path.resolve(), path)
    for saved in distinct.values():
        evaluate_saved(saved, flags, console)


def evaluate_saved(saved: Path, flags: Evaluate, console: Console) -> None:
    """Print the metric of one model or file."""
    import torch

    from jpq.export.runtimes import open_session, parse_runtimes
    from jpq.results.formatting import format_metric
    from jpq.results.run_folder import load
    from jpq.tasks import models

    is_file = saved.is_file()
    if is_file and (saved.suffix == ".pt2" or saved.name.endswith(".qonnx.onnx")):
        raise JpqError(f"{saved} is for other tools than runtimes. Give the run's folder, or its model.onnx.")
    folder = saved.parent if is_file else saved
    is_run = (folder / "config.toml").is_file()
    if not is_run and not is_file:
        raise JpqError(f"{folder} is not the folder of a run: it has no config.toml. Give one like runs/0123456789ab.")
    runtimes = parse_runtimes(flags.runtime or "onnxruntime") if flags.runtime or is_file else ()
    data = _data(saved, flags, folder if is_run else None)
    for note in data.notes:
        print_line(console, f"[yellow]note[/] {escape(note)}")
    batches = data.test if flags.split == "test" else data.held_out
    task, samples = data.task, f"{batches.size} {flags.split} images of {data.name}"
    outputs: dict[str, list[Any]] = {}  # model that was run -> a tensor per batch
    if is_run and not (is_file and flags.data):
        model, _ = load(folder, flags.run_code)
        models.check_fits(model, data.example, data.classes, data.task)
        with torch.no_grad():
            outputs["the PyTorch model"] = [model(x) for x, _ in batches]
        if not is_file:
            metric = format_metric(task, task.evaluate(model, batches))
            print_line(console, escape(f"{task.report(metric, samples)} ({saved})."))
    file = saved if is_file else folder / "model.onnx"
    for name in runtimes:
        session = open_session(name, file)
        _check_fits(file, session, data)
        computed = [session(x) for x, _ in batches]
        replayed = iter(computed)
        metric = format_metric(task, task.evaluate(lambda _, replayed=replayed: next(replayed), batches))
        agreement = ", ".join(
            f"{_agreement(task, computed, reference_outputs)} as {model}"
            for model, reference_outputs in outputs.items()
        )
        agrees = f" The same {task.decision_name} for {agreement}." if agreement else ""
        print_line(console, escape(f"{task.report(metric, samples)} ({file} in {name}).{agrees}"))
        outputs[name] = computed


def _agreement(task: Any, outputs: list[Any], reference_outputs: list[Any]) -> str:
    """Number of equal decisions in two models' outputs (a tensor per batch), as text."""
    import torch

    same = torch.cat([task.same_decision(a, b).flatten() for a, b in zip(outputs, reference_outputs, strict=True)])
    return f"{int(same.sum())} of {len(same)}"


def _data(saved: Path, flags: Evaluate, folder: Path | None) -> Any:
    """The data set that --data names, or that of the run in `folder`."""
    from dataclasses import replace

    import torch

    from jpq.config import read_toml
    from jpq.files.untrusted import check_no_code
    from jpq.tasks.data import load
    from jpq.tasks.load import read_data

    if flags.data is not None:
        root = flags.data_root or Path("data")
        try:
            return load(flags.data, root, **_preparation(saved, flags.data))
        except JpqError:  # images of other channels: the file is held to them as they are
            return load(flags.data, root)
    if folder is None:
        raise JpqError(f"Say which images {saved} is to be tried on: --data digits (or cifar10, folder:PATH ...).")
    config = read_toml(folder / "config.toml")
    if not flags.run_code:
        check_no_code("data", config.task.data, folder / "config.toml", "add --run-code")
    if flags.data_root is not None:
        config = replace(config, task=replace(config.task, data_root=flags.data_root))
    return read_data(config, torch.device("cpu"))


def _preparation(saved: Path, data: str) -> dict[str, Any]:
    """How the metadata of an ONNX file say that its images are prepared, as arguments of `jpq.tasks.data.load`."""
    from jpq.export.onnx.metadata import read_metadata
    from jpq.files.untrusted import names_code

    if not saved.is_file() or saved.suffix != ".onnx" or names_code(data):  # data of the user's are prepared already
        return {}
    stored = read_metadata(saved)
    mean, std, size = (stored.get(key) for key in ("mean", "std", "input_size"))
    found: dict[str, Any] = {}
    if all(isinstance(part, list) and all(type(n) in (int, float) for n in part) for part in (mean, std)):
        found |= {"mean": mean, "std": std}
    if data.startswith("folder:") and isinstance(size, list) and len(size) == 3 and all(type(n) is int for n in size):
        found["image_size"] = size[1:]
    return found


def _check_fits(file: Path, session: Any, data: Any) -> None:
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
