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

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jpq.flags import parse, parse_study, parsed, shown
from jpq.interruption import Interruption
from jpq.usage import COMMANDS


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the number returned is the exit code: 0, 2 for bad input, 130 and 143 for Ctrl-C and SIGTERM."""
    args = list(sys.argv[1:] if argv is None else argv)
    console, errors = Console(), Console(stderr=True)
    try:
        with Interruption() as stop:
            try:
                code = _dispatch(args, console)
            except KeyboardInterrupt as stopped:
                stop.end(for_good=argv is None)
                return _stopped(args, stopped, errors)
        console.file.flush()
        return code
    except SystemExit as end:  # the parser's --help and its errors; a pipe that rich found closed
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stopped:  # between one thing and the other
        return _stopped(args, stopped, errors)
    except OSError as error:
        _say_error(errors, f"{error.filename or 'A file'}: {error.strerror or error}.")
        return 2
    except Exception as error:
        if type(error).__name__ != "JpqError":
            raise
        _say_error(errors, str(error))
        return 2


def _stopped(args: Sequence[str], stopped: KeyboardInterrupt, errors: Console) -> int:
    """Say how to go on; the exit code."""
    again = [arg for arg in args if arg not in ("--resume", "--no-resume")]
    how = f" Go on with: jpq {shlex.join(again)} --resume" if args[:1] == ["optimize"] else ""
    how = f" Go on with: jpq {shlex.join(args)}" if args[:1] == ["study"] else how
    _say(errors, f"Stopped.{escape(how)}")
    return 128 + getattr(stopped, "number", 2)


def _say_error(errors: Console, text: str) -> None:
    """In one line; names from files may hold what a terminal would obey."""
    plain = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    _say(errors, f"[bold red]error:[/] {escape(plain)}")


def _say(errors: Console, text: str) -> None:
    """One sentence, from the first of several processes that end together."""
    ranks = sys.modules.get("jpq.ranks")  # which takes seconds to import, and most mistakes are found before
    if ranks is None or ranks.speaks():
        errors.print(text, soft_wrap=True, highlight=False)


def _dispatch(args: list[str], console: Console) -> int:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA toolkit: nobody asked for one
    warnings.filterwarnings("ignore", message="fast_hadamard_transform")  # brevitas, on import
    commands: dict[str, Callable[[list[str], Console], None]] = {
        "optimize": _optimize, "study": _study, "prune-private": _prune_private, "inspect": _inspect,
        "evaluate": _evaluate, "pareto": _pareto, "export": _export, "bench": _bench, "methods": _methods,
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
    from jpq import ranks
    from jpq.compose import compose
    from jpq.front_table import front_table
    from jpq.phases import phases
    from jpq.progress import Progress, layer_table, summary
    from jpq.recipe import optimize

    ranks.begin(config.run.device)
    console.quiet = not ranks.is_first()
    d = config.decide
    planned = {phase.title: phase.epochs for phase in phases(config, compose(d.method, d.structure, d.width))}
    with Progress(console, planned) as watch:
        result = optimize(config, watch, shlex.join(["jpq", "optimize", *args]))
    ranks.end()
    if result.front:
        console.print(front_table(result))
        return
    console.print(layer_table(result))
    console.print(summary(result))


def _study(args: list[str], console: Console) -> None:
    config, settings = parse_study(args)
    settings.check(config)
    from jpq.study_screen import run

    run(config, settings, console)


def _inspect(args: list[str], console: Console) -> None:
    wanted = parsed(shown(Inspect), "inspect", args)
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

    choosing.run(parsed(shown(choosing.Pareto, "runs"), "pareto", args), console)


def _export(args: list[str], console: Console) -> None:
    from jpq import choosing

    choosing.export(parsed(shown(choosing.Export, "runs"), "export", args), console)


def _bench(args: list[str], console: Console) -> None:
    from jpq import benching

    benching.run(parsed(shown(benching.Bench, "what"), "bench", args), console)


def _prune_private(args: list[str], console: Console) -> None:
    from jpq.private import Private

    wanted = parsed(shown(Private), "prune-private", args).check()
    from jpq.designer import prune_private
    from jpq.private_report import layer_line, report

    watch = lambda row: console.print(layer_line(row), soft_wrap=True, highlight=False)  # noqa: E731
    console.print(report(prune_private(wanted, watch), wanted))


def _evaluate(args: list[str], console: Console) -> None:
    from jpq import assessing

    assessing.run(parsed(shown(assessing.Evaluate, "saved"), "evaluate", args), console)


def _methods(args: list[str], console: Console) -> None:
    if args:
        parsed(dataclasses.make_dataclass("Methods", [], frozen=True), "methods", args)
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
