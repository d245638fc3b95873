"""Flags from dataclasses: what tyro is told about their names, defaults and help."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import tyro

from jpq.usage import COMMANDS, EXAMPLES, METAVARS

if TYPE_CHECKING:
    from jpq.config import Config
    from jpq.trials.settings import Study

T = TypeVar("T")


def parse(args: Sequence[str]) -> Config:
    """The config that these flags of `jpq optimize` describe, upon the file that --config names."""
    from jpq.config import Config
    from jpq.settings import from_tree, tables
    from jpq.types import JpqError

    named = _named(args)
    tree = tables(named) if named else {}
    if "study" in tree:
        raise JpqError(f"{named} is the file of a study. Go on with it by jpq study --config {named}.")
    return _flags(from_tree(tree, str(named)) if named else Config(), "optimize", args, named)[0]


def parse_study(args: Sequence[str]) -> tuple[Config, Study]:
    """The task and the study that these flags of `jpq study` describe, upon the file that --config names."""
    from jpq.config import Config, Run
    from jpq.trials.record import read
    from jpq.trials.settings import Study

    named = _named(args)
    config, settings = read(named) if named else (Config(run=Run(out=Path("runs/studies"))), Study())
    return _flags(config, "study", args, named, settings)


def _named(args: Sequence[str]) -> Path | None:
    """The file after --config."""
    named = [b for a, b in zip(args, [*args[1:], ""], strict=False) if a == "--config" and b]
    named += [a.partition("=")[2] for a in args if a.startswith("--config=")]
    return Path(named[-1]) if named else None


def _flags(
    base: Config, command: str, args: Sequence[str], source: Path | None, more: T | None = None
) -> tuple[Config, T]:  # fmt: skip
    """The config that flags describe, whose defaults `base` has, and with it one more table of settings.

    Raises JpqError where the file that `base` is from, and not a flag, names code to run.
    """
    from jpq.foreign import require_no_code

    known: dict[str, Any] = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    known |= {"study": more} if more is not None else {}
    parts: list[Any] = []
    for name, part in known.items():
        table = shown(type(part))
        parts.append((name, table, dataclasses.field(default=table(**vars(part)))))
    note = "Take settings from this TOML file, such as a run's config.toml; flags given here win."
    file = Annotated[Path | None, arg("config", note)]
    flags = dataclasses.make_dataclass("Flags", [*parts, ("config", file, None)], frozen=True)
    settings: Any = parsed(flags, command, args)
    for what in ("model", "data") if source else ():
        if not any(given.partition("=")[0] == f"--{what}" for given in args):
            name = getattr(base.task, what)
            require_no_code(what, name, str(source), f"say so: --{what} {name}")
    made = {name: type(part)(**vars(getattr(settings, name))) for name, part in known.items()}
    study: Any = made.pop("study", None)
    return type(base)(**made), study


def shown(part: type[T], place: str = "") -> type[T]:
    """The same settings with the names of values that a help page shows, and no "(default: None)"."""
    hints = get_type_hints(part)
    positional: Any = tyro.conf.Positional
    hints |= {place: positional[hints[place]]} if place else {}  # the one setting that needs no flag
    known: Any = part
    columns: list[Any] = [
        (f.name, Annotated[hints[f.name], arg(f.name)], dataclasses.field(default=f.default))  # f itself is not ours
        for f in dataclasses.fields(known)
    ]
    made: Any = dataclasses.make_dataclass(part.__name__, columns, bases=(part,), frozen=True)
    made.__doc__ = part.__doc__
    return made


def arg(name: str, text: str | None = None) -> Any:
    """How tyro shows one setting: what stands for its value, its text, and a default where that says something."""
    return tyro.conf.arg(
        metavar=METAVARS.get(name), help=text,
        help_behavior_hint=lambda default: "" if default in ("None", "", "''") else f"(default: {default})",
    )  # fmt: skip


def parsed(flags: type[T], command: str, args: Sequence[str]) -> T:
    """The flags of one command. Ends the program on --help (0) and on flags that make no sense (2)."""
    about = "\n".join([COMMANDS[command], "", "examples:", *(f"  {line}" for line in EXAMPLES[command])])
    flat = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(flags, prog=f"jpq {command}", description=about, args=list(args), config=flat)
