"""The command line: one function a command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jpq.interruption import Interruption
from jpq.usage import COMMANDS, EXAMPLES, METAVARS

if TYPE_CHECKING:
    from jpq.config import Config

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Inspect:
    """What inspect looks at."""

    model: str = "convnet"
    """convnet, lenet5, vgg7, resnet8/20/32/44/56, torchvision:NAME (classification, segmentation, video; a detector's
    NAME.backbone), or module:callable (runs your code)."""
    input_shape: tuple[int, ...] | None = None
    """One sample without the batch: channels, (frames,) height and width. Default: what the model usually takes."""
    classes: int | None = None
    """Number of classes. Default: what the model usually has."""
    data: str | None = None
    """A data set that says both instead."""
    data_root: Path = Path("data")
    """Where data sets lie, or are downloaded to."""
    open_norms: bool = False
    """Count channels inside the averages of LayerNorm, RMSNorm and GroupNorm as free (see jpq optimize --help)."""
    all: bool = False
    """Every layer and site, where a long model is summed up by parts otherwise."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Which saved model, on which images."""

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")]
    """Folder of an earlier run, such as runs/0123456789ab."""
    split: Literal["test", "held-out"] = "test"
    """Which images: the test split, or the part of the training data that steered the run."""
    run_code: bool = False
    """Run the code that the folder names as its model or data (module:callable): only for folders that you trust."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the number returned is the exit code: 0, 2 for bad input, 130 and 143 for Ctrl-C and SIGTERM."""
    args = list(sys.argv[1:] if argv is None else argv)
    console, errors = Console(), Console(stderr=True)
    try:
        with Interruption():
            code = _dispatch(args, console)
        console.file.flush()
        return code
    except SystemExit as end:  # the parser's --help and its errors; a pipe that rich found closed
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stopped:
        again = [arg for arg in args if arg not in ("--resume", "--no-resume")]
        how = f" Go on with: jpq {shlex.join(again)} --resume" if args[:1] == ["optimize"] else ""
        errors.print(f"Stopped.{escape(how)}", soft_wrap=True, highlight=False)
        return 128 + getattr(stopped, "number", 2)
    except OSError as error:
        _say_error(errors, f"{error.filename or 'A file'}: {error.strerror or error}.")
        return 2
    except Exception as error:
        if type(error).__name__ != "JpqError":
            raise
        _say_error(errors, str(error))
        return 2


def _say_error(errors: Console, text: str) -> None:
    errors.print(f"[bold red]error:[/] {escape(' '.join(text.split()))}", soft_wrap=True, highlight=False)


def _dispatch(args: list[str], console: Console) -> int:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA toolkit: nobody asked for one
    warnings.filterwarnings("ignore", message="fast_hadamard_transform")  # brevitas, on import
    commands: dict[str, Callable[[list[str], Console], None]] = {
        "optimize": _optimize, "prune-private": _prune_private, "inspect": _inspect, "evaluate": _evaluate,
        "pareto": _pareto, "export": _export, "bench": _bench, "methods": _methods,
    }  # fmt: skip
    if not args or args[0] in ("-h", "--help", "help"):
        _help(console)
    elif args[0] in ("-V", "--version"):
        torch, brevitas = version("torch"), version("brevitas")
        console.print(f"jpq {version('jpq')} (torch {torch}, brevitas {brevitas})", highlight=False)
    elif args[0] in commands:
        commands[args[0]](args[1:], console)
    else:
        close = difflib.get_close_matches(args[0], COMMANDS, n=2, cutoff=0.4)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Choose from {', '.join(COMMANDS)}."
        _say_error(Console(stderr=True), f"Unknown command '{args[0]}'. {hint} See jpq --help.")
        return 2
    return 0


def _help(console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for name, text in COMMANDS.items():
        table.add_row(f"  [bold cyan]{name}[/]", text)
    before = "[bold]jpq[/] makes a trained PyTorch model smaller: pruned and quantized together, onto a budget."
    start = "Start here (built-in data, under two minutes on two cores):\n  jpq optimize --target-bops 1%"
    more = "[bold]jpq COMMAND --help[/] lists the flags of a command, [bold]jpq --version[/] the versions."
    for part in (before, "", "usage: [bold]jpq COMMAND[/] \\[flags]", "", table, "", start, "", more):
        console.print(part, highlight=False)


def _optimize(args: list[str], console: Console) -> None:
    config = parse(args).check()
    from jpq.compose import compose
    from jpq.front_table import front_table
    from jpq.phases import phases
    from jpq.progress import Progress, layer_table, summary
    from jpq.recipe import optimize

    d = config.decide
    planned = {phase.title: phase.epochs for phase in phases(config, compose(d.method, d.structure, d.width))}
    with Progress(console, planned) as watch:
        result = optimize(config, watch, shlex.join(["jpq", "optimize", *args]))
    if result.front:
        console.print(front_table(result))
        return
    console.print(layer_table(result))
    console.print(summary(result))


def parse(args: Sequence[str]) -> Config:
    """The config that these flags of `jpq optimize` describe, upon the file that --config names."""
    from jpq.config import Config
    from jpq.foreign import require_no_code
    from jpq.settings import read

    named = [b for a, b in zip(args, [*args[1:], ""], strict=False) if a == "--config" and b]
    named += [a.partition("=")[2] for a in args if a.startswith("--config=")]
    base = read(Path(named[-1])) if named else Config()
    parts: list[Any] = []
    for field in dataclasses.fields(base):
        part = getattr(base, field.name)
        shown = _shown(type(part))
        parts.append((field.name, shown, dataclasses.field(default=shown(**vars(part)))))
    note = "Take settings from this TOML file, such as a run's config.toml; flags given here win."
    file = Annotated[Path | None, _arg("config", note)]
    flags = dataclasses.make_dataclass("Flags", [*parts, ("config", file, None)], frozen=True)
    settings: Any = _parsed(flags, "optimize", args)
    names = [field.name for field in dataclasses.fields(base)]
    for what in ("model", "data") if named else ():
        if not any(arg.partition("=")[0] == f"--{what}" for arg in args):
            name = getattr(base.task, what)
            require_no_code(what, name, named[-1], f"say so: --{what} {name}")
    return Config(**{name: type(getattr(base, name))(**vars(getattr(settings, name))) for name in names})


def _shown(part: type[T], place: str = "") -> type[T]:
    """The same settings with the names of values that a help page shows, and no "(default: None)"."""
    hints = get_type_hints(part)
    positional: Any = tyro.conf.Positional
    hints |= {place: positional[hints[place]]} if place else {}  # the one setting that needs no flag
    known: Any = part
    columns: list[Any] = [
        (f.name, Annotated[hints[f.name], _arg(f.name)], dataclasses.field(default=f.default))  # f itself is not ours
        for f in dataclasses.fields(known)
    ]
    made: Any = dataclasses.make_dataclass(part.__name__, columns, bases=(part,), frozen=True)
    made.__doc__ = part.__doc__
    return made


def _arg(name: str, text: str | None = None) -> Any:
    return tyro.conf.arg(
        metavar=METAVARS.get(name), help=text,
        help_behavior_hint=lambda default: "" if default in ("None", "", "''") else f"(default: {default})",
    )  # fmt: skip


def _parsed(flags: type[T], command: str, args: Sequence[str]) -> T:
    """The flags of one command. Ends the program on --help (0) and on flags that make no sense (2)."""
    about = "\n".join([COMMANDS[command], "", "examples:", *(f"  {line}" for line in EXAMPLES[command])])
    flat = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(flags, prog=f"jpq {command}", description=about, args=list(args), config=flat)


def _inspect(args: list[str], console: Console) -> None:
    wanted = _parsed(_shown(Inspect), "inspect", args)
    from jpq.inspection import inspection, noise
    from jpq.network.sites import channels
    from jpq.network.trace import trace
    from jpq.network.unpack import unpacked

    model, example = noise(wanted)
    model = unpacked(model)
    start = time.perf_counter()
    network = trace(model, example, open_norms=wanted.open_norms)
    sites = channels(network)
    seconds = time.perf_counter() - start
    title = f"{wanted.model}, {' x '.join(map(str, example.shape[1:]))}"
    console.print(inspection(title, model, network, sites, seconds, wanted.all, wanted.open_norms))


def _pareto(args: list[str], console: Console) -> None:
    from jpq import choosing

    choosing.run(_parsed(_shown(choosing.Pareto, "runs"), "pareto", args), console)


def _export(args: list[str], console: Console) -> None:
    from jpq import choosing

    choosing.export(_parsed(_shown(choosing.Export, "runs"), "export", args), console)


def _bench(args: list[str], console: Console) -> None:
    from jpq import benching

    benching.run(_parsed(_shown(benching.Bench, "what"), "bench", args), console)


def _prune_private(args: list[str], console: Console) -> None:
    from jpq.private import Private

    wanted = _parsed(_shown(Private), "prune-private", args).check()
    from jpq.designer import prune_private
    from jpq.private_report import layer_line, report

    watch = lambda row: console.print(layer_line(row), soft_wrap=True, highlight=False)  # noqa: E731
    console.print(report(prune_private(wanted, watch), wanted))


def _evaluate(args: list[str], console: Console) -> None:
    wanted = _parsed(Evaluate, "evaluate", args)
    from jpq.foreign import require_no_code
    from jpq.models import check_fits
    from jpq.outcome import load
    from jpq.recipe import read_data
    from jpq.result import percent
    from jpq.settings import read
    from jpq.train import evaluate
    from jpq.types import JpqError

    folder = wanted.run_folder
    if not (folder / "config.toml").is_file():
        raise JpqError(f"{folder} is not the folder of a run: it has no config.toml. Give one like runs/0123456789ab.")
    config = read(folder / "config.toml")
    if not wanted.run_code:
        require_no_code("data", config.task.data, folder / "config.toml", "add --run-code")
    model, _ = load(folder, wanted.run_code)
    import torch

    data = read_data(config, torch.device("cpu"))
    check_fits(model, data.example, data.classes)
    batches = data.test if wanted.split == "test" else data.held_out
    accuracy = evaluate(model, batches)
    console.print(f"{percent(accuracy)} of {batches.size} {wanted.split} images of {data.name} are right ({folder}).",
                  soft_wrap=True, highlight=False)  # fmt: skip


def _methods(args: list[str], console: Console) -> None:
    if args:
        _parsed(dataclasses.make_dataclass("Methods", [], frozen=True), "methods", args)
    from jpq.methods import METHODS

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, method in METHODS.items():
        table.add_row(f"[bold cyan]{name}[/]", f"[dim]decides:[/] {escape(method.decides)}")
        if method.gate is not None:
            table.add_row("", f"[dim]zeros:[/] {escape(method.structure)}")
        table.add_row("", f"[dim]choose:[/] {escape(method.choose)}")
        table.add_row("", f"[dim]{escape(method.paper)}[/]")
        table.add_row("", "")
    console.print(table)
    console.print("Every method takes another --structure and --width where they go together.", soft_wrap=True)
