"""The program `jpq`: dispatch to the module of a command, exit codes, the error line, and `jpq methods`.

A command's module is imported when it is called, and torch when its work begins: help pages need neither.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper

from rich.console import Console
from rich.markup import escape

from jpq.cli.flags import COMMANDS, EXAMPLES, parse_flags
from jpq.cli.output import label_grid, print_line
from jpq.training.signals import Interruption
from jpq.types import JpqError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one command: 0, 2 for bad input, 130 and 143 for Ctrl-C and SIGTERM."""
    args = list(sys.argv[1:] if argv is None else argv)
    _print_any_character()
    console, errors = (Console(stderr=stderr, emoji=False) for stderr in (False, True))  # else text:notes: is a note
    try:
        with Interruption() as stop:
            try:
                code = _dispatch(args, console)
            except KeyboardInterrupt as stopped:
                stop.end(for_good=argv is None)
                return _report_stop(args, stopped, errors)
        console.file.flush()
        return code
    except SystemExit as end:  # the parser's --help and its errors; a pipe that rich found closed
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stopped:  # before or after the command itself
        return _report_stop(args, stopped, errors)
    except OSError as error:
        _print_error(errors, f"{error.filename or 'A file'}: {error.strerror or error}.")
        return 2
    except JpqError as error:
        _print_error(errors, error.command_line)
        return 2


def _print_any_character() -> None:
    """Let screens and logs that are not UTF-8 show `?` in place of characters that they do not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and "utf" not in (stream.encoding or "").lower():
            stream.reconfigure(errors="replace")


def _report_stop(args: Sequence[str], stopped: KeyboardInterrupt, errors: Console) -> int:
    """Print the command that goes on with a stopped run; returns the exit code."""
    resume_args = [arg for arg in args if arg not in ("--resume", "--no-resume")]
    hint = f" Go on with: jpq {shlex.join(resume_args)} --resume" if args[:1] in (["optimize"], ["sensitivity"]) else ""
    hint = f" Go on with: jpq {shlex.join(args)}" if args[:1] == ["study"] else hint
    _print_once(errors, f"Stopped.{escape(hint)}")
    return 128 + getattr(stopped, "number", 2)


def _print_error(errors: Console, text: str) -> None:
    """Print an error in one line, without control characters that names from files may hold."""
    plain = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    _print_once(errors, f"[bold red]error:[/] {escape(plain)}")


def _print_once(errors: Console, text: str) -> None:
    """Print a sentence from one of the processes that torchrun started, which all end together."""
    distributed = sys.modules.get("jpq.training.distributed")  # imported only after the flags were read
    if distributed is None or distributed.should_report():
        print_line(errors, text)


def _dispatch(args: list[str], console: Console) -> int:
    """Call the command that the first argument names; returns the exit code."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA toolkit: nobody asked for one
    warnings.filterwarnings("ignore", message="fast_hadamard_transform")  # brevitas, on import
    if not args or args[0] in ("-h", "--help", "help"):
        _print_help(console)
    elif args[0] in ("-V", "--version"):
        torch, brevitas = version("torch"), version("brevitas")
        console.print(f"jpq {version('jpq')} (torch {torch}, brevitas {brevitas})", highlight=False)
    elif args[0] == "methods":
        _print_methods(args[1:], console)
    elif args[0] in COMMANDS:
        name = args[0].replace("-", "_")
        getattr(import_module(f"jpq.cli.{name}"), f"{name}_command")(args[1:], console)
    else:
        close = difflib.get_close_matches(args[0], COMMANDS, n=2, cutoff=0.4)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Choose from {', '.join(COMMANDS)}."
        _print_error(Console(stderr=True, emoji=False), f"Unknown command '{args[0]}'. {hint} See jpq --help.")
        return 2
    return 0


def _print_help(console: Console) -> None:
    """Print the page of `jpq --help`."""
    commands = label_grid([(f"  [bold cyan]{name}[/]", text) for name, text in COMMANDS.items()])
    before = "[bold]jpq[/] makes a trained PyTorch model smaller: pruned and quantized together, onto a budget."
    start = f"Start here (built-in data, under a minute on two cores):\n  {EXAMPLES['optimize'][0]}"
    more = "[bold]jpq COMMAND --help[/] lists the flags of a command, [bold]jpq --version[/] the versions."
    for part in (before, "", "usage: [bold]jpq COMMAND[/] \\[flags]", "", commands, "", start, "", more):
        console.print(part, highlight=False)


def _print_methods(args: list[str], console: Console) -> None:
    """Run `jpq methods`: what each method decides, and when to choose it."""
    if args:
        parse_flags(dataclasses.make_dataclass("Methods", [], frozen=True), "methods", args)
    from jpq.methods.table import METHODS

    grid = label_grid()
    for name, method in METHODS.items():
        grid.add_row(f"[bold cyan]{name}[/]", f"[dim]decides:[/] {escape(method.decides)}")
        if method.gate is not None:
            grid.add_row("", f"[dim]zeros:[/] {escape(method.structure)}")
        grid.add_row("", f"[dim]choose:[/] {escape(method.choose)}")
        grid.add_row("", f"[dim]{escape(method.paper)}[/]")
        grid.add_row("", "")
    console.print(grid)
    console.print("Every method takes another --structure and --width where they go together.")
