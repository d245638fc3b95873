"""Settings of a study: what trials vary, objectives and limits; its TOML file, and its record in the storage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import optuna
import tomli_w
from optuna.study import StudyDirection

from jpq.config import TARGETS, Config, Decide, fill_section, from_tree, read_tables, to_tree
from jpq.files.atomic import replace_file
from jpq.files.model_files import tokenizer_checksum
from jpq.trials.storage import stored_url
from jpq.types import JpqError, unknown

OBJECTIVES = ("accuracy", "bops", "size", "latency", "macs")

VARIED = ("density", "bits", "structure", "method", "lr", "target")  # kinds of decisions

CHOICES = {  # setting that says what trials choose from -> kind of decision
    "methods": "method",
    "structures": "structure",
    "bops_range": "target",
    "lr_range": "lr",
    "density_range": "density",
}

PARTS = ("layer", "block", "network")  # parts of the network that share a decision

SAMPLERS = ("tpe", "nsga2", "gp", "random")

STEP = 0.05  # step between the densities that trials choose from

STUDY_FILE = "study.toml"
TOKENIZER = "tokenizer"  # user attribute of the study: checksum of the model's own, "" without one
SETTINGS, WEIGHTS, CHANCE = "settings", "float weights", "accuracy of guessing"  # user attributes of the study
DATA_PATH = "data_path"  # beside the recorded settings: the data with their absolute path on the first worker's machine
WORKER_SETTINGS = ("name", "trials", "storage", "dead_after", "pictures")  # each worker may choose its own


@dataclass(frozen=True)
class Study:
    """A study: what its trials vary, what they are judged by, and who else works on it."""

    name: str = "study"
    """The study's name, and its folder: OUT/NAME. The same name goes on with a study."""
    trials: int = 40
    """Trials in all, over all workers. Repeated ones, and ones that a --max flag rules out before they train, do not
    count."""
    sampler: str = "tpe"
    """What proposes the next trial: tpe, nsga2, gp or random."""
    objectives: str = "accuracy,bops"
    """Held-out accuracy, and what it is weighed against: any of bops, size, macs, latency (with --latency-table)."""
    vary: str = "density,bits"
    """What trials decide. density: share of the channels that stay. bits: widths of weights and activations. lr:
    learning rates. With those three alone each decision is said by hand and the cost is what comes out. With target (a
    share of the BOPs from --bops-range), method (--methods) or structure (--structures) a trial's method decides the
    rest: density is then its --density, bits are its largest widths."""
    per: str = "layer"
    """Density and bits for each layer, each block (layer1.0, features.3), or once for the network."""
    density_range: tuple[float, float] = (0.25, 1.0)
    """Smallest and largest density, in steps of 0.05. Widths lie within --w-bits and --a-bits."""
    bops_range: tuple[str, str] = ("0.25%", "4%")
    """Smallest and largest target, in shares of the fp32 model's BOPs, where targets vary."""
    lr_range: tuple[float, float] = (0.25, 4.0)
    """Smallest and largest factor on --lr (and --gate-lr, --bit-lr), where learning rates vary."""
    methods: str = "djpq,l0,djpq-pow2"
    """Methods to choose from, where they vary."""
    structures: str = "channels,elementwise,2:4"
    """Structures to choose from, where they vary."""
    max_bops: str | None = None
    """Only models of at most so many BOPs: "1%", "12M". The sampler is told."""
    max_size: str | None = None
    """Only models of at most so many bytes: "60KB", "5%"."""
    max_macs: str | None = None
    """Only models of at most so many MACs: "50%"."""
    max_latency: str | None = None
    """Only models of at most that latency, by --latency-table: "3ms"."""
    anchors: bool = True
    """Begin with all channels at uniform 8, 4, 3 and 2 bits, as far as those are allowed (density and bits only)."""
    early_stop: bool = True
    """Stop a trial that is worse than a finished one of at most its cost was at the same share of its fine-tuning.
    Where methods decide (--vary target, method, structure), only with --objectives accuracy,bops."""
    margin: float = 0.02
    """By how much held-out accuracy (1 is all) it must be worse."""
    patience: int = 2
    """For how many epochs in a row."""
    warm_up: int = 5
    """Finished trials before any is stopped."""
    pictures: bool = True
    """Draw the curves and layers of each trial, for optuna-dashboard."""
    storage: str = ""
    """Where Optuna keeps the study: sqlite:///FILE, postgresql+psycopg://USER@HOST/DB. Default: journal.log there."""
    dead_after: int = 120
    """Seconds without a sign of life after which another worker runs a trial again."""

    def objective_names(self) -> tuple[str, ...]:
        """The objectives; accuracy first."""
        return _known_names("objectives", self.objectives, OBJECTIVES)

    def varied_names(self) -> tuple[str, ...]:
        """The kinds of decisions that trials take, names in VARIED."""
        return _known_names("vary", self.vary, VARIED)

    def choices(self, name: str) -> tuple[str, ...]:
        """The `methods` or the `structures` that trials choose from."""
        return _split_names(name, getattr(self, name), "djpq,l0" if name == "methods" else "channels,2:4")

    def is_manual(self) -> bool:
        """Whether trials take every decision by hand, so that their costs are known before they train."""
        varied = {*self.varied_names()}
        return bool(varied & {"density", "bits"}) and varied <= {"density", "bits", "lr"}

    def limits(self) -> dict[str, str]:
        """Cost -> the largest amount that is allowed, as text."""
        texts = {"bops": self.max_bops, "size": self.max_size, "macs": self.max_macs, "latency": self.max_latency}
        return {cost: text for cost, text in texts.items() if text is not None}

    def check(self, config: Config) -> Study:
        """This study, once every value makes sense beside the task's settings. Raises JpqError with what to change."""
        if not self.name.strip() or self.name != self.name.strip(". ") or {*self.name} & {*"/\\:\0"}:
            raise JpqError(f"--name '{self.name}' cannot be a folder's name. Give a word, such as --name digits.")
        if config.run.resume:
            raise JpqError("A study goes on by itself: leave --resume out.")
        self._check_names(config)
        self._check_numbers()
        self._check_choices()
        if self.is_manual():
            self._check_manual_decisions(config)
        else:
            self._check_method_decisions(config)
        return self

    def _check_names(self, config: Config) -> None:
        """Raises JpqError for unknown objectives, samplers or parts, and for latency without a table."""
        objectives = self.objective_names()
        self.varied_names()
        if "accuracy" not in objectives or len(objectives) < 2:
            raise JpqError(
                f"--objectives {self.objectives}: give accuracy and at least one cost, such as accuracy,bops."
            )
        for flag, name, known in (("sampler", self.sampler, SAMPLERS), ("part for --per", self.per, PARTS)):
            if name not in known:
                raise unknown(flag, name, known)
        if "latency" in {*objectives, *self.limits()} and config.budget.latency_table is None:
            raise JpqError(
                "Latency as an objective or limit needs measured layers: run `jpq bench --table FILE.csv "
                f"--model {config.task.model}`, then add --latency-table FILE.csv."
            )

    def _check_numbers(self) -> None:
        """Raises JpqError for counts that are too small and ranges that make no sense."""
        for flag, number, least in (
            ("--trials", self.trials, 1),
            ("--patience", self.patience, 1),
            ("--warm-up", self.warm_up, 1),
            ("--dead-after", self.dead_after, 2),
        ):
            if number < least:
                raise JpqError(f"{flag} {number}: at least {least} is needed.")
        if not 0 <= self.margin < 1:
            raise JpqError(f"--margin {self.margin} must lie between 0 and 1: it is a share of the held-out samples.")
        low, high = self.density_range
        if not 0 < low <= high <= 1 or any(abs(d / STEP - round(d / STEP)) > 1e-9 for d in (low, high)):
            raise JpqError(f"--density-range {low} {high}: give two shares above 0 and at most 1, multiples of {STEP}.")
        if not 0 < self.lr_range[0] <= self.lr_range[1] < float("inf"):
            raise JpqError(f"--lr-range {self.lr_range[0]} {self.lr_range[1]}: give two factors, small and large.")
        if not parse_bops_share(self.bops_range[0]) < parse_bops_share(self.bops_range[1]):
            raise JpqError(f"--bops-range {' '.join(self.bops_range)}: give a smaller and a larger share.")

    def _check_choices(self) -> None:
        """Raises JpqError for choices of something that trials do not vary."""
        for setting, decision in CHOICES.items():
            if getattr(self, setting) != getattr(Study, setting) and decision not in self.varied_names():
                flag = f"--{setting.replace('_', '-')}"
                raise JpqError(
                    f"{flag} says what to choose from, and trials do not vary it. Add {decision} to --vary, or leave "
                    f"{flag} out."
                )

    def _check_manual_decisions(self, config: Config) -> None:
        """Raises JpqError where the task's settings take decisions that the trials take by hand."""
        b, d, varied = config.budget, config.decide, self.varied_names()
        for cost in ("bops", "size", "macs", "latency"):
            text = getattr(b, f"target_{cost}")
            if text:
                raise JpqError(
                    f"--target-{cost} {text}: in a study of {self.vary} the cost is what comes out. "
                    f"Give --max-{cost} {text.split(',')[0]}, or --vary target,method."
                )
        for name, text in {"bits": d.bits, "density": d.densities}.items():
            if name in varied and text:
                raise JpqError(
                    f"{name} is decided by the trials (--vary {self.vary}) and said by hand: {text}. "
                    "Leave one of them out."
                )
        if d.method != Decide.method:
            raise JpqError(
                f"--method {d.method}: in a study of {self.vary} the trials decide. Leave --method out, "
                "or --vary target."
            )
        replace(config, decide=replace(d, bits=d.bits or "8/8")).check()

    def _check_method_decisions(self, config: Config) -> None:
        """Raises JpqError where the task's settings take decisions that the trials leave to a method."""
        b, varied = config.budget, self.varied_names()
        if "target" in varied and b.target_bops:
            raise JpqError(f"--target-bops {b.target_bops}: targets vary (--vary {self.vary}). Leave one out.")
        for name in TARGETS:
            text, flag = getattr(b, name) or "", f"--{name.replace('_', '-')}"
            if "," in text:
                raise JpqError(
                    f"{flag} {text}: each trial of a study has one target. Give one, such as {flag} "
                    f"{text.split(',')[0].strip()}, or --vary target for BOPs."
                )
        replace(config, budget=replace(b, target_bops="1%") if "target" in varied else b).check()


def _known_names(flag: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in `text`, in the order of `known`."""
    names = _split_names(flag, text, f"any of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown(f"name in --{flag}", name, known)
    return tuple(name for name in known if name in names)


def _split_names(flag: str, text: str, example: str) -> tuple[str, ...]:
    """The names between the commas, each once."""
    names = tuple(dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name))
    if not names:
        raise JpqError(f"--{flag} names nothing. Give {example}.")
    return names


def parse_bops_share(text: str) -> Fraction:
    """`4%` as 1/25. Raises JpqError for any text but a percentage above 0 and at most 100."""
    from jpq.costs.target import parse_share  # imports torch, which --help does without

    share = parse_share(text)
    if not share or not text.endswith("%"):
        raise JpqError(f"--bops-range: '{text}' is not a share of the fp32 model's BOPs. Write it like 0.5%.")
    return share


def write_study(config: Config, study: Study, path: Path) -> None:
    """Save the task's settings and a table [study] as TOML, with absolute paths and without passwords."""
    config = with_absolute_paths(config)
    values = asdict(replace(study, storage=stored_url(study.storage)))
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}
    text = tomli_w.dumps({**to_tree(config), "study": plain})
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def with_absolute_paths(config: Config) -> Config:
    """The config with absolute paths of all files that it names, its data KIND:PATH among them."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.resolve()

    task, budget, decide = config.task, config.budget, config.decide
    data = _absolute_data(task.data)
    task = replace(task, weights=absolute(task.weights), data=data, data_root=task.data_root.resolve())
    budget = replace(budget, latency_table=absolute(budget.latency_table))
    decide = replace(decide, sensitivity=absolute(decide.sensitivity), mask=absolute(decide.mask))
    return replace(config, task=task, budget=budget, decide=decide)


def _absolute_data(data: str) -> str:
    """The name of data with an absolute path where it is KIND:PATH and they lie here; else as it is."""
    from jpq.tasks.data import READERS  # imports torch, which --help does without

    kind, _, path = data.partition(":")
    is_here = kind in READERS and kind != "sklearn" and path and Path(path).exists()
    return f"{kind}:{Path(path).resolve()}" if is_here else data


def read_study(path: Path) -> tuple[Config, Study]:
    """The settings in a study's file, or in a run's config.toml.

    The folder of a file that lies in its study's own folder is taken as that of the study.
    """
    tree = read_tables(path)
    table = tree.pop("study", {})
    if not isinstance(table, dict):
        raise JpqError(f"{path}: 'study' must be a table of settings, such as [study].")
    config, study = from_tree(tree, str(path)), fill_section(Study(), "study", table, str(path))
    folder = path.resolve().parent
    in_study = path.name == STUDY_FILE and folder.name == study.name
    return replace(
        config, run=replace(config.run, out=folder.parent if in_study else config.run.out, resume=False)
    ), study


def is_recorded(shared: optuna.Study) -> bool:
    """Whether a worker has recorded all that the others need."""
    record = shared.user_attrs.get(SETTINGS)
    return isinstance(record, dict) and "study" in record and WEIGHTS in shared.user_attrs


def check_is_ours(shared: optuna.Study, directions: Sequence[StudyDirection]) -> None:
    """Raises JpqError for a study that jpq did not make; one that its first worker has not yet recorded passes."""
    foreign = shared.directions != list(directions)
    if not is_recorded(shared) and (
        foreign or (WEIGHTS not in shared.user_attrs and shared.get_trials(deepcopy=False))
    ):
        raise JpqError(
            f"The storage holds a study '{shared.study_name}' that is not of jpq study. Choose another --name."
        )


def check_directions(shared: optuna.Study, directions: Sequence[StudyDirection]) -> None:
    """Raises JpqError for a study of an earlier version, which maximized errors too."""
    if shared.directions != list(directions):
        raise JpqError(
            f"Study '{shared.study_name}' was begun by an earlier version of jpq, which searched for a large error in "
            "place of a small one. Choose another --name."
        )


def record_settings(config: Config, study: Study, shared: optuna.Study) -> None:
    """Record the settings in the storage. They come last: a study that has them has all else (`is_recorded`)."""
    tree = _shared_settings(config, study)
    tree["task"][DATA_PATH] = _absolute_data(config.task.data)
    shared.set_user_attr(SETTINGS, tree)


def _shared_settings(config: Config, study: Study) -> dict[str, dict[str, Any]]:
    """The settings that all workers must agree on."""
    tree: dict[str, Any] = {s: dict(t) for s, t in to_tree(config).items()}
    tree["run"] = {"seed": config.run.seed}
    for name in ("weights", "data_root"):  # paths of this machine
        tree["task"].pop(name, None)
    for section, name in (("budget", "latency_table"), ("decide", "sensitivity"), ("decide", "mask")):
        path = getattr(getattr(config, section), name)
        if path is not None:  # its content, not its path
            tree[section][name] = _content_digest(path)
    tree["study"] = {f.name: getattr(study, f.name) for f in fields(study) if f.name not in WORKER_SETTINGS}
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(tree))
    return plain


def _content_digest(path: Path) -> str:
    """The first twelve digits of the SHA-256 of a file; of a folder, of the files in it by their names."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update((file.name.encode() if path.is_dir() else b"") + file.read_bytes())
    return digest.hexdigest()[:12]


def check_agreement(config: Config, study: Study, weights: str, shared: optuna.Study) -> None:
    """Raises JpqError where the storage records other settings or float weights.

    Args:
        config, study: settings of this worker.
        weights: digest of its float weights.
        shared: the study in its storage.
    """
    ours, spelled = _shared_settings(config, study), to_tree(config)  # earlier versions recorded paths as spelled
    theirs = {section: dict(table) for section, table in shared.user_attrs[SETTINGS].items()}
    if theirs["task"].pop(DATA_PATH, None) == _absolute_data(config.task.data):  # however they are spelled
        theirs["task"]["data"] = config.task.data
    for section in ours:
        for key in sorted({*ours[section], *theirs.get(section, {})}):
            mine, recorded = ours[section].get(key), theirs.get(section, {}).get(key)
            if recorded not in (mine, spelled.get(section, {}).get(key, mine)):
                raise JpqError(
                    f"Study '{study.name}' was begun with --{key.replace('_', '-')} {_format_setting(recorded)}, "
                    f"and here it is {_format_setting(mine)}. Go on with the study's own settings "
                    f"(--config with its {STUDY_FILE}), or choose another --name."
                )
    if shared.user_attrs[WEIGHTS] != weights:
        raise JpqError(
            f"Study '{study.name}' was begun with other float weights. Copy its float.safetensors into this folder, or "
            "name the same file with --weights."
        )
    if shared.user_attrs.get(TOKENIZER, "") != tokenizer_checksum(config.task.model):
        raise JpqError(
            f"Study '{study.name}' was begun with another tokenizer than that of --model {config.task.model}, or by an "
            "earlier version, which used none. Choose another --name."
        )


def _format_setting(value: Any) -> str:
    """A setting as its flag takes it."""
    return "left out" if value in (None, "") else " ".join(map(str, value)) if isinstance(value, list) else str(value)
