"""Flags from dataclasses: what tyro is told about their names, defaults and help."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import tyro

if TYPE_CHECKING:
    from jpq.config import Config
    from jpq.trials.settings import Study

T = TypeVar("T")

COMMANDS = {
    "optimize": "Prune and quantize a model together, onto a budget.",
    "study": "Search a front of models, accuracy against cost, by many runs; any number of workers share it.",
    "prune-private": "Prune a trained model without any data; the mask is for jpq optimize --mask.",
    "inspect": "What jpq sees in a model: layers, channels that can go, parts that must stay, and costs.",
    "pareto": "Runs and studies as one front, as table and picture; and a point of it, by what it may cost.",
    "export": "Make a point final: ONNX and packed files, verified, and its accuracy on the test split.",
    "evaluate": "Accuracy of a model that an earlier run saved, or of an exported file in a runtime.",
    "bench": "Measure a model's layers into a table of latencies, or exported models against one.",
    "methods": "The methods, what each decides, and when to choose it.",
}
EXAMPLES = {
    "optimize": (
        "jpq optimize --target-bops 1%",
        "jpq optimize --model resnet20 --weights w.th --data cifar10 --target-bops 0.9%",
        "jpq optimize --target-bops 12M --target-size 50KB --method djpq-pow2",
        "jpq optimize --config runs/0123456789ab/config.toml --seed 1",
    ),
    "study": (
        "jpq study --trials 40",
        "jpq study --name r20 --model resnet20 --weights w.th --data cifar10 --epochs 3 --per block --sampler nsga2",
        "jpq study --name small --objectives accuracy,size --max-size 60KB",
        "jpq study --name shared --storage postgresql+psycopg://jpq@server/jpq",
        "jpq study --vary target,method,lr --methods djpq,l0,dhp --bops-range 0.25% 2%",
    ),
    "prune-private": (
        "jpq prune-private --model resnet20 --weights w.th --synthetic --out private",
        "jpq optimize --mask private --model resnet20 --weights w.th --data cifar10 --target-bops 0.5%",
    ),
    "inspect": (
        "jpq inspect --model lenet5 --data fashion-mnist",
        "jpq inspect --model torchvision:densenet121 --all",
        "jpq inspect --model torchvision:r3d_18 --input-shape 3 16 112 112",
    ),
    "pareto": (
        "jpq pareto runs",
        "jpq pareto runs/0123456789ab studies/digits --costs size --all",
        "jpq pareto runs --min-accuracy 97% --max-size 20KB",
        "jpq pareto runs --knee --out figures",
    ),
    "export": (
        "jpq export runs/0123456789ab",
        "jpq export studies/digits --max-bops 0.5%",
        "jpq export runs --knee --out final",
    ),
    "evaluate": (
        "jpq evaluate runs/0123456789ab",
        "jpq evaluate runs/0123456789ab/model.onnx --runtime onnxruntime,openvino",
        "jpq evaluate model.onnx --data cifar10",
    ),
    "bench": (
        "jpq bench --table convnet.csv --model convnet",
        "jpq bench --table resnet20.csv --model resnet20 --data cifar10 --threads 2",
        "jpq bench runs/0123456789ab --threads 1 2 --runtime onnxruntime,openvino",
        "jpq bench runs/0123456789ab --table resnet20.csv",
        "jpq bench runs/0123456789ab/model.onnx other.onnx",
    ),
    "methods": ("jpq methods",),
}


def parse(args: Sequence[str]) -> Config:
    """The config that these flags of `jpq optimize` describe, upon the file that --config names."""
    from jpq.config import Config, from_tree, read_tables
    from jpq.types import JpqError

    named = _named(args)
    tree = read_tables(named) if named else {}
    if "study" in tree:
        raise JpqError(f"{named} is the file of a study. Go on with it by jpq study --config {named}.")
    return _flags(from_tree(tree, str(named)) if named else Config(), "optimize", args, named)[0]


def parse_study(args: Sequence[str]) -> tuple[Config, Study]:
    """The task and the study that these flags of `jpq study` describe, upon the file that --config names."""
    from jpq.config import Config, Run
    from jpq.trials.settings import Study, read_study

    named = _named(args)
    config, settings = read_study(named) if named else (Config(run=Run(out=Path("runs/studies"))), Study())
    return _flags(config, "study", args, named, settings)


def _named(args: Sequence[str]) -> Path | None:
    """The file after --config."""
    named = [b for a, b in zip(args, [*args[1:], ""], strict=False) if a == "--config" and b]
    named += [a.partition("=")[2] for a in args if a.startswith("--config=")]
    return Path(named[-1]) if named else None


def _flags(
    base: Config, command: str, args: Sequence[str], source: Path | None, more: T | None = None
) -> tuple[Config, T]:
    """The config that flags describe, whose defaults `base` has, and with it one more table of settings.

    Raises JpqError where the file that `base` is from, and not a flag, names code to run.
    """
    from jpq.files.untrusted import check_no_code

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
            check_no_code(what, name, str(source), f"say so: --{what} {name}")
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
        metavar=METAVARS.get(name),
        help=text,
        help_behavior_hint=lambda default: "" if default in ("None", "", "''") else f"(default: {default})",
    )


def parsed(flags: type[T], command: str, args: Sequence[str]) -> T:
    """The flags of one command. Ends the program on --help (0) and on flags that make no sense (2)."""
    about = "\n".join([COMMANDS[command], "", "examples:", *(f"  {line}" for line in EXAMPLES[command])])
    flat = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(flags, prog=f"jpq {command}", description=about, args=list(args), config=flat)


METAVARS = {
    name: shown
    for shown, names in {
        "COST": "target_bops target_macs max_bops max_macs",
        "SIZE": "target_size max_size",
        "TIME": "target_latency max_latency",
        "MIN MAX": "w_bits a_bits density_range bops_range lr_range",
        "DECISIONS": "bits densities",
        "NAMES": "objectives vary methods structures",
        "URL": "storage",
        "SHARE": "density min_accuracy",
        "[COST ...]": "costs",
        "INT": "limit tune_epochs channel_multiple",
        "CLASSES": "classes",
        "C H W": "input_shape",
        "[LAYER ...]": "skip",
        "FILE": "weights config mask latency_table table",
        "FOLDER": "data_root out",
        "[RUN_FOLDER|FILE.onnx ...]": "what",
        "RUN_FOLDER|FILE.onnx": "saved",
        "RUNS ...": "runs",
        "NAME": "method score schedule allocator structure width model data device cost like proxy inputs "
        "name sampler per",
    }.items()
    for name in names.split()
}
