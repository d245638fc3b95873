"""What a study varies, asks for, and when it ends."""

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
from jpq.costs.target import parse_share
from jpq.files.atomic import replace_file
from jpq.trials.storage import stored
from jpq.types import JpqError, unknown

OBJECTIVES = ("accuracy", "bops", "size", "latency", "macs")

VARIED = ("density", "bits", "structure", "method", "lr", "target")

PARTS = ("layer", "block", "network")

SAMPLERS = ("tpe", "nsga2", "gp", "random")

STEP = 0.05  # between densities

STUDY_FILE = "study.toml"
SETTINGS, WEIGHTS, CHANCE = "settings", "float weights", "accuracy of guessing"  # user attributes of the study
OWN = ("name", "trials", "storage", "dead_after", "pictures")  # settings that each worker may choose


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

    def asked(self) -> tuple[str, ...]:
        """The objectives; accuracy first."""
        return _names("objectives", self.objectives, OBJECTIVES)

    def varied(self) -> tuple[str, ...]:
        """What trials decide."""
        return _names("vary", self.vary, VARIED)

    def choices(self, name: str) -> tuple[str, ...]:
        """What trials choose from: the `methods` or the `structures`."""
        return _listed(name, getattr(self, name), "djpq,l0" if name == "methods" else "channels,2:4")

    def by_hand(self) -> bool:
        """Whether trials say every decision themselves, so that their cost is known before they train."""
        return {"density", "bits"} & {*self.varied()} != set() and {*self.varied()} <= {"density", "bits", "lr"}

    def limits(self) -> dict[str, str]:
        """Cost -> what it may be at most, as text."""
        asked = {"bops": self.max_bops, "size": self.max_size, "macs": self.max_macs, "latency": self.max_latency}
        return {cost: text for cost, text in asked.items() if text is not None}

    def check(self, config: Config) -> Study:
        """This study, once every value makes sense beside the task's settings. Raises JpqError with what to change."""
        if not self.name.strip() or self.name != self.name.strip(". ") or {*self.name} & {*"/\\:\0"}:
            raise JpqError(f"--name '{self.name}' cannot be a folder's name. Give a word, such as --name digits.")
        if config.run.resume:
            raise JpqError("A study goes on by itself: leave --resume out.")
        asked, varied = self.asked(), self.varied()
        if "accuracy" not in asked or len(asked) < 2:
            raise JpqError(
                f"--objectives {self.objectives}: give accuracy and at least one cost, such as accuracy,bops."
            )
        for flag, name, known in (("sampler", self.sampler, SAMPLERS), ("part for --per", self.per, PARTS)):
            if name not in known:
                raise unknown(flag, name, known)
        for flag, number, least in (
            ("--trials", self.trials, 1),
            ("--patience", self.patience, 1),
            ("--warm-up", self.warm_up, 1),
            ("--dead-after", self.dead_after, 2),
        ):
            if number < least:
                raise JpqError(f"{flag} {number}: at least {least} is needed.")
        if not 0 <= self.margin < 1:
            raise JpqError(f"--margin {self.margin} must lie between 0 and 1: it is a share of the held-out images.")
        low, high = self.density_range
        if not 0 < low <= high <= 1 or any(abs(d / STEP - round(d / STEP)) > 1e-9 for d in (low, high)):
            raise JpqError(f"--density-range {low} {high}: give two shares above 0 and at most 1, multiples of {STEP}.")
        if not 0 < self.lr_range[0] <= self.lr_range[1]:
            raise JpqError(f"--lr-range {self.lr_range[0]} {self.lr_range[1]}: give two factors, small and large.")
        if not parse_bops_share(self.bops_range[0]) < parse_bops_share(self.bops_range[1]):
            raise JpqError(f"--bops-range {' '.join(self.bops_range)}: give a smaller and a larger share.")
        if "latency" in {*asked, *self.limits()} and config.budget.latency_table is None:
            raise JpqError(
                "Latency as an objective or limit needs measured layers: run jpq bench --table FILE.csv "
                f"--model {config.task.model}, then add --latency-table FILE.csv."
            )
        self._check_decisions(config, varied)
        return self

    def _check_decisions(self, config: Config, varied: Sequence[str]) -> None:
        """Raises JpqError where the settings say what the trials are to decide."""
        b, d = config.budget, config.decide
        if self.by_hand():
            for cost in ("bops", "size", "macs", "latency"):
                text = getattr(b, f"target_{cost}")
                if text:
                    raise JpqError(
                        f"--target-{cost} {text}: in a study of {self.vary} the cost is what comes out. "
                        f"Give --max-{cost} {text.split(',')[0]}, or --vary target,method."
                    )
            said = {"bits": d.bits, "density": d.densities}
            for name, text in said.items():
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
        else:
            if "target" in varied and b.target_bops:
                raise JpqError(f"--target-bops {b.target_bops}: targets vary (--vary {self.vary}). Leave one out.")
            for name in TARGETS:
                text, flag = getattr(b, name) or "", f"--{name.replace('_', '-')}"
                if "," in text:
                    raise JpqError(
                        f"{flag} {text}: each trial of a study has one target. Give one, such as {flag} "
                        f"{text.split(',')[0].strip()}, or --vary target for BOPs."
                    )
            given = replace(b, target_bops="1%") if "target" in varied else b
            replace(config, budget=given).check()


def _names(flag: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in `text`, in the order of `known`."""
    names = _listed(flag, text, f"any of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown(f"name in --{flag}", name, known)
    return tuple(name for name in known if name in names)


def _listed(flag: str, text: str, instead: str) -> tuple[str, ...]:
    """The names between the commas, each once."""
    names = tuple(dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name))
    if not names:
        raise JpqError(f"--{flag} names nothing. Give {instead}.")
    return names


def parse_bops_share(text: str) -> Fraction:
    """`4%` as 1/25. Raises JpqError for any text but a percentage above 0 and at most 100."""
    share = parse_share(text)
    if not share or not text.endswith("%"):
        raise JpqError(f"--bops-range: '{text}' is not a share of the fp32 model's BOPs. Write it like 0.5%.")
    return share


def write_study(config: Config, study: Study, path: Path) -> None:
    """Save the settings as TOML: those of the task, and a table [study]; they hold from any folder, and no password."""
    task, weights = config.task, config.task.weights
    task = replace(task, weights=weights and weights.resolve(), data_root=task.data_root.resolve())
    table = config.budget.latency_table
    config = replace(config, task=task, budget=replace(config.budget, latency_table=table and table.resolve()))
    own = asdict(replace(study, storage=stored(study.storage)))
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items() if v is not None}
    replace_file(path, lambda part: part.write_text(tomli_w.dumps({**to_tree(config), "study": plain})))


def read_study(path: Path) -> tuple[Config, Study]:
    """The settings in a study's file, or in a run's config.toml.

    A file that lies in its study's own folder says with it where that study is.
    """
    tree = read_tables(path)
    table = tree.pop("study", {})
    if not isinstance(table, dict):
        raise JpqError(f"{path}: 'study' must be a table of settings, such as [study].")
    config, study = from_tree(tree, str(path)), fill_section(Study(), "study", table, str(path))
    folder = path.resolve().parent
    own = path.name == STUDY_FILE and folder.name == study.name
    return replace(config, run=replace(config.run, out=folder.parent if own else config.run.out, resume=False)), study


def begun(shared: optuna.Study) -> bool:
    """Whether a worker has noted all that the others need."""
    noted = shared.user_attrs.get(SETTINGS)
    return isinstance(noted, dict) and "study" in noted and WEIGHTS in shared.user_attrs


def require_own(shared: optuna.Study, directions: Sequence[StudyDirection]) -> None:
    """Raises JpqError for a study of somebody else's; one whose first worker has only begun is ours."""
    other = shared.directions != list(directions)
    if not begun(shared) and (other or (WEIGHTS not in shared.user_attrs and shared.get_trials(deepcopy=False))):
        raise JpqError(
            f"The storage holds a study '{shared.study_name}' that is not of jpq study. Choose another --name."
        )


def note(config: Config, study: Study, shared: optuna.Study) -> None:
    """Note the settings in the storage. They come last: a study that has them has all else (`begun`)."""
    shared.set_user_attr(SETTINGS, _shared(config, study))


def _shared(config: Config, study: Study) -> dict[str, dict[str, Any]]:
    """The settings that all workers must agree on."""
    tree: dict[str, Any] = {s: dict(t) for s, t in to_tree(config).items()}
    tree["run"] = {"seed": config.run.seed}
    for name in ("weights", "data_root"):  # where they lie on this machine
        tree["task"].pop(name, None)
    if config.budget.latency_table is not None:  # what it says, not where it lies
        tree["budget"]["latency_table"] = hashlib.sha256(config.budget.latency_table.read_bytes()).hexdigest()[:12]
    tree["study"] = {f.name: getattr(study, f.name) for f in fields(study) if f.name not in OWN}
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(tree))
    return plain


def agree(config: Config, study: Study, weights: str, shared: optuna.Study) -> None:
    """Raises JpqError where other workers have noted other settings or float weights in the storage."""
    ours = _shared(config, study)
    theirs = shared.user_attrs[SETTINGS]
    for section in ours:
        for key in sorted({*ours[section], *theirs.get(section, {})}):
            mine, other = ours[section].get(key), theirs.get(section, {}).get(key)
            if mine != other:
                raise JpqError(
                    f"Study '{study.name}' was begun with --{key.replace('_', '-')} {_said(other)}, and here it is "
                    f"{_said(mine)}. Go on with the study's own settings (--config with its {STUDY_FILE}), "
                    "or choose another --name."
                )
    if shared.user_attrs[WEIGHTS] != weights:
        raise JpqError(
            f"Study '{study.name}' was begun with other float weights. Copy its float.safetensors into this folder, or "
            "name the same file with --weights."
        )


def _said(value: Any) -> str:
    return "left out" if value in (None, "") else " ".join(map(str, value)) if isinstance(value, list) else str(value)
