"""Command-line flags from dataclasses (tyro), and the texts of the help pages."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Collection, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

from jpq.cli.parse_errors import ALIASES, explain_parse_error
from jpq.files.paths import expand_paths, find_run
from jpq.types import JpqError

if TYPE_CHECKING:
    from jpq.config import Config
    from jpq.trials.settings import Study

T = TypeVar("T")

LONGEST_LINE = 100  # most characters of a line of text on a help page
POSITIONAL = get_args(tyro.conf.Positional[int])[1]  # tyro's mark of a setting that needs no flag

COMMANDS = {
    "optimize": "Prune and quantize a model together, onto a budget.",
    "study": "Search a front, accuracy against cost, by many runs; many workers may share it.",
    "prune-private": "Prune a trained model without any data; the mask is for jpq optimize --mask.",
    "sensitivity": "Measure which layers and channels the outputs depend on: table and heat map.",
    "inspect": "What jpq sees in a model: layers, channels that can go, why others stay, costs.",
    "pareto": "Show runs and studies as one front, table and picture, and choose a point.",
    "export": "Make a chosen run final: export, verify, and measure it on the test split.",
    "list": "A table of runs: when, model, data, method, target, accuracy and status.",
    "evaluate": "Accuracy of a saved model, or of an exported file in a runtime.",
    "bench": "Time exported models, or measure a model's layers into a table of latencies.",
    "methods": "The methods, what each decides, and when to choose it.",
}
EXAMPLES = {
    "optimize": (
        "jpq optimize --target-bops 1% --target-macs 20% --channel-multiple 8",
        "jpq optimize --model resnet20 --weights w.th --data cifar10 --target-bops 0.9%",
        "jpq optimize --max-drop 1% --minimize size",
        "jpq optimize --model resnet20 --weights w.th --data cifar10 --target-bops 1.6% --effort minutes",
        "jpq optimize --target-bops 12M --target-size 50KB --method djpq-pow2",
        "jpq optimize --config runs/0123456789ab/config.toml --seed 1",
        "jpq optimize --data folder:PHOTOS --image-size 64 --target-bops 2% --name a",
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
    "sensitivity": (
        "jpq sensitivity --out digits.csv",
        "jpq sensitivity --model resnet20 --weights w.th --data cifar10 --out resnet20.csv",
        "jpq sensitivity --model resnet20 --weights w.th --data cifar10 --out resnet20.csv --resume",
        "jpq sensitivity --model torchvision:resnet18 --weights w.pth --data folder:PHOTOS --image-size 224 "
        "--estimator fisher --samples 256",
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
    "list": (
        "jpq list",
        "jpq list runs studies/digits --all",
        "jpq list --csv > runs.csv",
    ),
    "evaluate": (
        "jpq evaluate runs/0123456789ab",
        "jpq evaluate runs/latest",
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
METAVARS = {
    name: metavar
    for metavar, names in {
        "COST": "target_bops target_macs max_bops max_macs",
        "DROP": "max_drop",
        "METRIC": "min_metric",
        "SIZE": "target_size max_size",
        "TIME": "target_latency max_latency",
        "MIN MAX": "w_bits a_bits density_range bops_range lr_range",
        "DECISIONS": "bits densities",
        "NAMES": "objectives vary methods structures",
        "URL": "storage",
        "SHARE": "density min_accuracy",
        "[COST ...]": "costs",
        "FROM": "warm_start",
        "INT": "limit most_runs reconstruction_steps reconstruction_samples tune_epochs channel_multiple",
        "CLASSES": "classes",
        "C H W": "input_shape",
        "PIXELS [PIXELS]": "image_size",
        "VALUE [VALUE ...]": "mean std",
        "[LAYER ...]": "skip keep_float",
        "FILE": "weights config mask latency_table table sensitivity",
        "FOLDER": "data_root out",
        "[RUN_FOLDER|FILE.onnx ...]": "what",
        "RUN_FOLDER|FILE.onnx ...": "saved",
        "RUNS ...": "runs",
        "FORM[,FORM ...]": "formats",
        "TYPE": "onnx_weights",
        "RUNTIME[,RUNTIME]": "runtime",
        "NAME": "estimator method score schedule allocator structure width model data device cost like proxy inputs "
        "name sampler per minimize effort batchnorm precision",
    }.items()
    for name in names.split()
}


def parse_optimize_flags(args: Sequence[str]) -> Config:
    """The config that flags of `jpq optimize` describe, on top of the file that --config names."""
    from jpq.config import Config, from_tree, read_tables

    file = _config_file(args)
    tree = read_tables(file) if file else {}
    if "study" in tree:
        raise JpqError(f"{file} is the file of a study. Go on with it by jpq study --config {file}.")
    return _parse_config(from_tree(tree, str(file)) if file else Config(), "optimize", args, file)[0]


def wants_all_layers(args: Sequence[str]) -> bool:
    """Whether arguments that `parse_optimize_flags` has read ask for a table of all layers."""
    given = [arg for arg in args if arg in ("--all", "--no-all")]
    return given[-1:] == ["--all"]


def parse_study_flags(args: Sequence[str]) -> tuple[Config, Study]:
    """The task and the study that flags of `jpq study` describe, on top of the file that --config names."""
    from jpq.config import Config, Run
    from jpq.trials.settings import Study, read_study

    file = _config_file(args)
    config, study = read_study(file) if file else (Config(run=Run(out=Path("runs/studies"))), Study())
    return _parse_config(config, "study", args, file, study)


def _config_file(args: Sequence[str]) -> Path | None:
    """The path behind --config in the arguments."""
    files = [value for flag, value in zip(args, [*args[1:], ""], strict=False) if flag == "--config" and value]
    files += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    return find_run(files[-1]) if files else None


def _parse_config(
    defaults: Config, command: str, args: Sequence[str], source: Path | None, study: T | None = None
) -> tuple[Config, T]:
    """The config, and for `jpq study` the study, that flags describe.

    Args:
        defaults: settings where no flag is given.
        source: the file that `defaults` were read from.
        study: defaults of the settings that only a study has.

    Raises JpqError where that file, and not a flag, names code to run.
    """
    from jpq.files.untrusted import check_no_code

    sections: dict[str, Any] = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
    sections |= {"study": study} if study is not None else {}
    parts: list[Any] = []
    own = {f.name for f in dataclasses.fields(study)} | {"overwrite"} if dataclasses.is_dataclass(study) else set()
    for name, section in sections.items():
        table = with_help(type(section), hidden=own if section is not study else ())
        parts.append((name, table, dataclasses.field(default=table(**vars(section)))))
    note = "Take settings from this TOML file, such as a run's config.toml; flags given here win."
    file = Annotated[Path | None, describe_setting("config", note)]
    parts.append(("config", file, None))
    if command == "optimize":
        note = "Show every layer at the end, where a long model's table is of the dearest 20."
        parts.append(("all", Annotated[bool, describe_setting("all", note)], False))
    flags = dataclasses.make_dataclass("Flags", parts, frozen=True)
    parsed: Any = parse_flags(flags, command, args)
    for what in ("model", "data", "task") if source else ():
        if not any(arg.partition("=")[0] == f"--{what}" for arg in args):
            name = getattr(defaults.task, what)
            check_no_code(what, name, str(source), f"say so: --{what} {name}")
    settings = {name: type(section)(**vars(getattr(parsed, name))) for name, section in sections.items()}
    study_settings: Any = settings.pop("study", None)
    return type(defaults)(**settings), study_settings


def parse_flags(flags: type[T], command: str, args: Sequence[str]) -> T:
    """The flags of one command. Ends the program on --help. Raises JpqError for flags that cannot be parsed."""
    width = min(LONGEST_LINE, shutil.get_terminal_size().columns)
    examples = (line for example in EXAMPLES[command] for line in _wrap_command(example, width))
    about = "\n".join([COMMANDS[command], "", "examples:", *examples])
    flat = (tyro.conf.OmitArgPrefixes,)
    try:
        with redirect_stderr(StringIO()):  # tyro's own page about an error
            parsed = tyro.cli(flags, prog=f"jpq {command}", description=about, args=list(args), config=flat)
        return expand_paths(parsed)
    except SystemExit as end:
        if not end.code:
            raise
    raise JpqError(explain_parse_error(flags, command, args, _without_flag(flags)))


def _wrap_command(command: str, width: int) -> list[str]:
    """Lines of an example, which a shell reads as one command."""
    lines = textwrap.wrap(command, width - 4, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [f"  {line} \\" for line in lines[:-1]] + [f"  {line}" for line in lines[-1:]]


def _without_flag(flags: type[Any]) -> str:
    """Metavar of the setting that needs no flag; empty where there is none."""
    hints = get_type_hints(flags, include_extras=True)
    for field in dataclasses.fields(flags):
        if POSITIONAL in getattr(hints[field.name], "__metadata__", ()):
            return METAVARS[field.name]
    return ""


def with_help(settings: type[T], positional: str = "", hidden: Collection[str] = ()) -> type[T]:
    """A subclass of a settings dataclass that tells tyro how its help page shows each value.

    Args:
        settings: the dataclass.
        positional: the one setting that needs no flag.
        hidden: settings that get no flag and keep their defaults.
    """
    hints = get_type_hints(settings)
    without_flag: Any = tyro.conf.Positional
    hints |= {positional: without_flag[hints[positional]]} if positional else {}
    without_any: Any = tyro.conf.Suppress
    fixed: Any = tyro.conf.Fixed
    hints |= {name: without_any[fixed[hints[name]]] for name in hidden if name in hints}
    described: Any = settings
    texts = read_setting_texts(described)
    columns: list[Any] = [
        (
            f.name,
            Annotated[hints[f.name], describe_setting(f.name, texts.get(f.name))],
            dataclasses.field(default=f.default),
        )
        for f in dataclasses.fields(described)
    ]
    subclass: Any = dataclasses.make_dataclass(settings.__name__, columns, bases=(settings,), frozen=True)
    subclass.__doc__ = settings.__doc__
    return subclass


@functools.cache
def read_setting_texts(settings: type[Any]) -> dict[str, str]:
    """The text below each setting in a dataclass and its bases, in one line, however its source is broken."""
    texts: dict[str, str] = {}
    for base in reversed(settings.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for setting, below in itertools.pairwise(getattr(body, "body", ())):
            if isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str() as text)):
                        texts[setting.target.id] = " ".join(text.split())
    return texts


def describe_setting(name: str, text: str | None = None) -> Any:
    """The metavar, text and default that the help page shows for one setting; empty defaults are left out."""
    other: dict[str, Any] = (
        {"name": ALIASES[name], "aliases": [f"--{name.replace('_', '-')}"]} if name in ALIASES else {}
    )
    return tyro.conf.arg(
        **other,
        metavar=METAVARS.get(name),
        help=text,
        help_behavior_hint=lambda default: "" if default in ("None", "", "''") else f"(default: {default})",
    )
