"""`jpq evaluate`: the metric of a saved model, or of an exported file in a runtime."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from jpq.cli.flags import parse_flags, with_help
from jpq.cli.inspect import READING, check_reading
from jpq.cli.output import print_line
from jpq.types import JpqError


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Flags of `jpq evaluate`: saved models, and the data."""

    saved: tuple[Path, ...] = ()
    """Folders of earlier runs, such as runs/0123456789ab or runs/latest, or exported files, such as its model.onnx."""
    split: Literal["test", "held-out"] = "test"
    """Which samples: the test split, or the part of the training data that steered the run."""
    runtime: str = ""
    """Where the exported file is run: onnxruntime, openvino, or both (onnxruntime,openvino). Default: onnxruntime for a
    file, none for a folder, whose model is always measured in PyTorch."""
    data: str | None = None
    """Data set for a file, normalised as for training. Default: that of the run whose folder the file lies in."""
    data_root: Path | None = None
    """Where data sets lie, or are downloaded to. Default: where the run read them, else data."""
    task: str = ""
    """What the model is for, as jpq optimize has it. Default: what the run is for, or the data."""
    image_size: tuple[int, ...] = ()
    """With --data: size that images are brought to, as 224 or 192 256 (height, width). Default: as the file says."""
    noise: float = 0.0
    """With --data that are clean images to be restored: noise that is added, of 255. Default: as the file says."""
    scale: int = 1
    """With --data that are clean images to be restored: how many times smaller the input is. Default: as the file
    says."""
    target_column: str = ""
    """With --data table:FILE.csv: the column that is predicted."""
    run_code: bool = False
    """Run the code that the folder names as its model, data or task (module:callable): only for folders that you
    trust."""


def evaluate_command(args: list[str], console: Console) -> None:
    """Run `jpq evaluate`."""
    run_evaluate(parse_flags(with_help(Evaluate, "saved"), "evaluate", args), console)


def run_evaluate(flags: Evaluate, console: Console) -> None:
    """Print the metric of each named model or file. Raises JpqError for files and data that do not go together."""
    if not flags.saved:
        raise JpqError("Name RUN_FOLDER|FILE.onnx. See jpq evaluate --help.")
    check_reading(flags, [name for name in READING if name != "task"])  # which a run's own data may have too
    distinct: dict[Path, Path] = {}
    for path in flags.saved:  # runs/* names a run twice, by runs/latest too
        distinct.setdefault(path.resolve(), path)
    for saved in distinct.values():
        evaluate_saved(saved, flags, console)


def evaluate_saved(saved: Path, flags: Evaluate, console: Console) -> None:
    """Print the metric of one model or file."""
    from jpq.export.runtimes import open_session, parse_runtimes
    from jpq.results.run_folder import load
    from jpq.tasks import models
    from jpq.tasks.load import fit_sizes

    is_file = saved.is_file()
    if is_file and (saved.suffix == ".pt2" or saved.name.endswith(".qonnx.onnx")):
        raise JpqError(f"{saved} is for other tools than runtimes. Give the run's folder, or its model.onnx.")
    folder = saved.parent if is_file else saved
    is_run = (folder / "config.toml").is_file()
    if not saved.exists():
        raise JpqError(f"There is no file or folder {saved}. Give the folder of a run, or its model.onnx.")
    if not is_run and not is_file:
        raise JpqError(f"{folder} is not the folder of a run: it has no config.toml. Give one like runs/0123456789ab.")
    _refuse_pytorch(flags.runtime, is_file)
    runtimes = parse_runtimes(flags.runtime or "onnxruntime") if flags.runtime or is_file else ()
    data = read_data_of(saved, flags, folder if is_run else None)
    file = saved if is_file else folder / "model.onnx"
    sessions = {name: open_session(name, file) for name in runtimes}
    model = load(folder, flags.run_code)[0] if is_run and not (is_file and flags.data) else None
    cut = [note for each in (model, *sessions.values()) if each is not None for note in fit_sizes(data, each)]
    for note in (*data.notes, *cut):
        print_line(console, f"[yellow]note[/] {escape(note)}")
    batches = data.test if flags.split == "test" else data.held_out
    outputs: dict[str, list[Any]] = {}  # model that was run -> a tensor per batch
    if model is not None:
        models.check_fits(model, data.example, data.classes, data.task)
        outputs["the PyTorch model"] = _run(model, batches)
        if not is_file:
            sentence = describe_metric(data, flags.split, outputs["the PyTorch model"])
            print_line(console, escape(f"{sentence} ({saved})."))
    for name, session in sessions.items():
        seen = as_file_takes(file, data)
        _check_fits(file, session, seen)
        computed = _run(session, seen.test if flags.split == "test" else seen.held_out)
        agreement = ", ".join(
            f"{_agreement(data.task, computed, reference_outputs)} as {model}"
            for model, reference_outputs in outputs.items()
        )
        agrees = f" The same {data.task.decision_name} for {agreement}." if agreement else ""
        print_line(console, escape(f"{describe_metric(data, flags.split, computed)} ({file} in {name}).{agrees}"))
        outputs[name] = computed


def _refuse_pytorch(runtimes: str, is_file: bool) -> None:
    """Raise JpqError where PyTorch is among the named runtimes, which run exported files."""
    if not {name.strip().lower() for name in runtimes.split(",")} & {"torch", "pytorch"}:
        return
    if is_file:
        raise JpqError(
            "PyTorch does not run an exported file. Give the run's folder: its model is measured in PyTorch."
        )
    raise JpqError(
        "PyTorch needs no --runtime: the model of a folder is always measured in it. Leave the flag away, or name what "
        "runs its exported file beside it: onnxruntime, openvino."
    )


def as_file_takes(file: Path, data: Any) -> Any:
    """The data with inputs as a file takes them: not normalised, where its graph does that (--embed-normalization)."""
    from jpq.export.onnx.metadata import read_metadata
    from jpq.tasks.data import without_normalisation

    return without_normalisation(data) if "embedded_mean" in read_metadata(file) else data


def _run(model: Any, batches: Any) -> list[Any]:
    """The output for each batch of a split, as the task reads it, of a module in evaluation mode or a session."""
    import torch

    from jpq.tracing.forward import call_model

    with torch.no_grad():
        return [call_model(model, x) for x, _ in batches]


def describe_metric(data: Any, split: str, outputs: list[Any]) -> str:
    """A sentence on the task's metric of a split, others in brackets, from a model's output for each batch of it."""
    from jpq.results.formatting import format_metric, format_value

    batches, task = data.test if split == "test" else data.held_out, data.task
    replayed = iter(outputs)
    score, others = task.evaluate_all(lambda *_, **__: next(replayed), batches)
    more = ", ".join(
        f"{name} {format_value(value, unit)}{_in_unit(data, name, value)}" for name, (value, unit) in others.items()
    )
    metric = format_metric(task, score) + (f" ({more})" if more else "")
    return str(task.report(metric, f"{batches.size} {split} {data.sample_names} of {data.name}"))


def _in_unit(data: Any, name: str, value: float) -> str:
    """What an error of standardised targets is in the target's own unit, in words; "" for other metrics and data."""
    from jpq.results.formatting import format_value

    std = data.about.get("target_std")
    if name != "RMSE" or std is None:
        return ""
    return f" standard deviations, {format_value(value * float(std), '')} in the target's unit"


def _agreement(task: Any, outputs: list[Any], reference_outputs: list[Any]) -> str:
    """Number of equal decisions in two models' outputs (a tensor per batch), as text."""
    import torch

    pairs = zip(outputs, reference_outputs, strict=True)
    same = torch.cat([task.same_decision(*map(task.main_output, pair)).flatten() for pair in pairs])
    return f"{int(same.sum()):,} of {len(same):,}"


def read_data_of(saved: Path, flags: Evaluate, folder: Path | None) -> Any:
    """The data set that --data names, or that of the run in `folder`."""
    from dataclasses import replace

    import torch

    from jpq.config import read_toml
    from jpq.files.untrusted import check_no_code
    from jpq.tasks import with_task
    from jpq.tasks.data import load
    from jpq.tasks.load import read_data

    place = saved.parent if saved.is_file() else saved
    if flags.data is not None:
        root = flags.data_root or Path("data")
        unset = {field.name: field.default for field in dataclasses.fields(Evaluate)}
        reading = {key: getattr(flags, key) for key in READING if getattr(flags, key) != unset[key]}
        try:
            data = load(flags.data, root, **(_preparation(saved, flags.data) | _tokenizer(place) | reading))
        except JpqError:  # images of other channels: the file is held to them as they are
            data = load(flags.data, root, **(_tokenizer(place) | reading))
        return with_task(data, flags.task)
    if folder is None:
        raise JpqError(f"Say which data {saved} is to be tried on: --data digits (or folder:PATH, table:FILE.csv ...).")
    config = read_toml(folder / "config.toml")
    if not flags.run_code:
        check_no_code("data", config.task.data, folder / "config.toml", "add --run-code")
        if not flags.task:
            check_no_code("task", config.task.task, folder / "config.toml", "add --run-code")
    if flags.task:
        config = replace(config, task=replace(config.task, task=flags.task))
    if flags.data_root is not None:
        config = replace(config, task=replace(config.task, data_root=flags.data_root))
    return read_data(config, torch.device("cpu"), folder)


def _tokenizer(folder: Path) -> dict[str, Any]:
    """How texts are read for the models in a run's folder that keeps the files of a model of transformers."""
    from jpq.export.onnx.metadata import read_metadata
    from jpq.files.model_files import KEPT, PREFIX, tokenizer_files

    model, file = f"{PREFIX}{folder / KEPT}", folder / "model.onnx"
    if not tokenizer_files(model):
        return {}
    length = read_metadata(file).get("length", "") if file.is_file() else ""
    found = {"text_model": model, "attention_mask": True}
    return found | ({"text_length": int(length)} if str(length).isdigit() else {})


def _preparation(saved: Path, data: str) -> dict[str, Any]:
    """How the metadata of an ONNX file say that its images are prepared, as arguments of `jpq.tasks.data.load`."""
    from jpq.export.onnx.dynamic_sizes import takes_any_size
    from jpq.export.onnx.metadata import read_metadata

    kind, colon, _ = data.partition(":")
    if not saved.is_file() or saved.suffix != ".onnx" or (colon and kind != "folder"):  # others are prepared already
        return {}
    stored = read_metadata(saved)
    mean, std, size = (stored.get(key) for key in ("mean", "std", "input_size"))
    found: dict[str, Any] = {}
    if all(isinstance(part, list) and all(type(n) in (int, float) for n in part) for part in (mean, std)):
        found |= {"mean": mean, "std": std}
    readings: dict[str, Callable[[str], float]] = {"noise": float, "scale": int}  # what is done to clean images
    for key, read in readings.items():
        with contextlib.suppress(KeyError, ValueError):
            found[key] = read(stored[key])
    if takes_any_size(saved):
        return found
    if data.startswith("folder:") and isinstance(size, list) and len(size) == 3 and all(type(n) is int for n in size):
        found["image_size"] = size[1:]
    return found


def _check_fits(file: Path, session: Any, data: Any) -> None:
    """Raise JpqError where the file takes other images or knows other classes than the data have."""
    from jpq.tracing.forward import batch_size, call_model

    x, _ = next(iter(data.test))
    try:
        out = data.task.main_output(call_model(session, x))
    except JpqError:
        raise
    except Exception as error:  # a runtime has classes of its own for every kind of failure
        size = "x".join(map(str, data.shape))
        reason = " ".join(str(error).split())[:160]
        raise JpqError(
            f"{file} cannot take batches of {size} {data.sample_names}, as {data.name} has them: {reason}"
        ) from error
    samples = batch_size(x)
    if not data.task.fits(out, samples, data.classes):
        shape = "several tensors" if isinstance(out, tuple) else "x".join(map(str, out.shape))
        row = data.task.row_text(data.classes)
        raise JpqError(f"{file} gives {shape} for {samples} {data.sample_names}, not {row} for each.")
