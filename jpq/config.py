"""One tree of frozen dataclasses: the flags, the TOML file and the run's hash all come from it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from jpq.types import JpqError, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Task:
    """What is made smaller, and the data that say how good it is."""

    model: str = "convnet"
    """convnet, lenet5, vgg7, resnet8/20/32/44/56, torchvision:NAME, or module:callable (runs your code)."""
    weights: Path | None = None
    """Trained weights (.pth, .th, .safetensors). Without them a float model is trained first, in this run."""
    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, folder:PATH, or module:callable (runs your code)."""
    data_root: Path = Path("data")
    """Where data sets lie, or are downloaded to."""
    held_out: float = 0.1
    """Share of the training data that steers the search; the test split is read once, at the end."""
    limit: int | None = None
    """Use only this many training samples (for a quick try)."""


BOPS = ("bops", "bops-structured")  # names in jpq.costs.COSTS that --cost may have


@dataclass(frozen=True)
class Budget:
    """What the small model may cost. At least one target; all of them hold together."""

    target_bops: str | None = None
    """Bit-operations: "1%" of the fp32 model, or "12M", "1.2G"."""
    cost: str = "bops"
    """How bit-operations are counted. bops: weights that a mask drops cost nothing. bops-structured: they cost what
    others do where they lie anywhere in a layer (--structure elementwise), since no common device skips those."""
    target_macs: str | None = None
    """Multiply-accumulates: "50%" or "12M"."""
    target_size: str | None = None
    """Weights on disk: "5%" of the fp32 model, or "50KB"."""


PROXIES = ("projected", "trained")


@dataclass(frozen=True)
class Decide:
    """How keep-or-drop and bit-widths are decided."""

    method: str = "djpq"
    """What prunes, such as djpq, l0, dpf, pdp-2:4, uniform, two-stage or upscale: see `jpq methods`. Every method also
    takes another --structure and --width, where they go together."""
    score: str = "l1"
    """What ranks channels, for upscale and two-stage: l1, l2, fpgm, lamp or hrank."""
    w_bits: tuple[int, int] = (2, 8)
    """Smallest and largest bit-width of weights."""
    a_bits: tuple[int, int] = (2, 8)
    """Smallest and largest bit-width of activations."""
    image_bits: int = 8
    """Bit-width of the model's input, which is not learned."""
    structure: str = ""
    """Where zeros may lie: channels, elementwise, per-output, kernels, 2:4, block:8x4, pattern ... rules gives each
    layer what suits it, search learns that on held-out data, and conv1=pattern,fc=block:8x1 says it. Default: the
    method's."""
    proxy: str = "projected"
    """How --structure search judges a mapping: projected (zeroed at once), or trained (then also trained for an epoch
    of a tenth of the data: twice the time on the digits, and a somewhat better guess; studies/schemes.py)."""
    width: str = ""
    """How bits are chosen: learned, power-of-two, gated, squashed, or fixed (the largest of --w-bits and --a-bits, so
    that only pruning can reach the target). Default: the method's."""
    density: float = 0.5
    """Share of the weights that stay, for methods that are told how many (dpp, pdp, smart, dpf, dsp, spp, admm); N:M
    and patterns say it themselves. For two-stage: share of the MACs that stays before bits are chosen (what the bits
    leave of the budget then opens more channels)."""
    skip: tuple[str, ...] = ()
    """Layers whose channels or weights are not pruned."""
    open_norms: bool = False
    """Also prune channels inside the averages of LayerNorm, RMSNorm and GroupNorm. NOT exact: fine-tuning, then of the
    rebuilt model, must repair what their absence does to the rest."""
    gate_lr: float = 0.05
    """Learning rate of the gates (Adam)."""
    bit_lr: float = 0.02
    """Learning rate of the bit-widths (Adam)."""
    gate_weight: float = 0.03
    """Weight of the gates' own regulariser (nats, mean over units), times the budget's pressure."""


@dataclass(frozen=True)
class Train:
    """The training loop."""

    epochs: int = 40
    """Epochs of search and fine-tuning together."""
    search: float = 0.5
    """Share of the epochs that search; the rest fine-tunes the landed model."""
    float_epochs: int = 40
    """Epochs that train the float model when no weights are given."""
    batch_size: int = 64
    """Samples per step."""
    lr: float = 2e-3
    """Peak learning rate of the weights (Adam, cosine)."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of the weights."""
    distill: float = 1.0
    """Weight of distillation from the float model; 0 turns it off."""
    temperature: float = 2.0
    """Temperature of the distillation."""
    augment: bool = True
    """Random shifts, crops and flips, as is usual for the data set."""


@dataclass(frozen=True)
class Run:
    """Where and how this run works. None of these changes what it computes, except the seed and the device."""

    seed: int = 0
    """Seeds the weights, the order of the data and every draw."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    threads: int = 0
    """CPU threads; 0: one for small nets, torch's choice for larger ones."""
    out: Path = Path("runs")
    """Folder for runs; this one goes to OUT/<hash of its settings>."""
    resume: bool = False
    """Go on from the last checkpoint of the same settings."""


@dataclass(frozen=True)
class Config:
    """Prune and quantize a model together, onto a budget."""

    task: Task = field(default_factory=Task)
    budget: Budget = field(default_factory=Budget)
    decide: Decide = field(default_factory=Decide)
    train: Train = field(default_factory=Train)
    run: Run = field(default_factory=Run)

    def check(self) -> Config:
        """This config, once every value makes sense. Raises JpqError with the flag to change."""
        d, t = self.decide, self.train
        for flag, (low, high) in (("--w-bits", d.w_bits), ("--a-bits", d.a_bits)):
            if not 2 <= low <= high <= 8:
                raise JpqError(
                    f"{flag} {low} {high}: give a smallest and a largest bit-width, 2 <= small <= large <= 8."
                )
        if not 0 < d.density <= 1:
            raise JpqError(f"--density {d.density} must lie above 0 and be at most 1: it is the share that stays.")
        if not 2 <= d.image_bits <= 8:
            raise JpqError(f"--image-bits {d.image_bits} is outside 2 to 8.")
        for flag, share in (("--search", t.search), ("--held-out", self.task.held_out)):
            if not 0 < share < 1:
                raise JpqError(f"{flag} {share} must lie between 0 and 1.")
        for flag, number in (("--epochs", t.epochs), ("--batch-size", t.batch_size)):
            if number < 2:
                raise JpqError(f"{flag} {number}: at least 2 are needed.")
        for flag, rate in (
            ("--lr", t.lr),
            ("--gate-lr", d.gate_lr),
            ("--bit-lr", d.bit_lr),
            ("--temperature", t.temperature),
        ):
            if not 0 < rate < float("inf"):
                raise JpqError(f"{flag} {rate} must be a positive number.")
        for flag, weight in (
            ("--weight-decay", t.weight_decay),
            ("--distill", t.distill),
            ("--gate-weight", d.gate_weight),
        ):
            if not 0 <= weight < float("inf"):
                raise JpqError(f"{flag} {weight} must be zero or a positive number.")
        if t.float_epochs < 1 and self.task.weights is None:
            raise JpqError("--float-epochs 0 needs --weights: there is nothing trained to compress.")
        if self.task.limit is not None and self.task.limit < 20:
            raise JpqError(f"--limit {self.task.limit}: at least 20 samples are needed to split off a held-out part.")
        if d.proxy not in PROXIES:
            raise unknown("proxy", d.proxy, PROXIES)
        if self.budget.cost not in BOPS:
            raise unknown("cost", self.budget.cost, BOPS)
        if not any(v for k, v in asdict(self.budget).items() if k != "cost"):
            raise JpqError("No target: give --target-bops 1% (or 12M, 1.2G), --target-size 50KB or --target-macs 50%.")
        return self

    def hash(self) -> str:
        """Twelve hex digits of everything that changes the result: the name of the run's folder."""
        tree = to_tree(self)
        tree["run"] = {"seed": self.run.seed}
        tree["task"].pop("data_root", None)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def to_tree(config: Config) -> dict[str, dict[str, Any]]:
    """The config as plain nested tables, unset values left out (TOML has no null)."""
    tree = {}
    for section, table in asdict(config).items():
        plain = {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in table.items()}
        tree[section] = {k: v for k, v in plain.items() if v is not None}
    return tree


def from_tree(tree: Mapping[str, Any], source: str) -> Config:
    """The config that these tables describe; what they leave out keeps its default."""
    config = Config()
    known = {f.name for f in fields(config)}
    for section, table in tree.items():
        if section not in known:
            raise unknown(f"section in {source}", section, known)
        if not isinstance(table, Mapping):
            raise JpqError(f"{source}: '{section}' must be a table of settings, such as [{section}].")
        part = getattr(config, section)
        types = {f.name: f.type for f in fields(part)}
        values = {}
        for key, value in table.items():
            if key not in types:
                raise unknown(f"setting in [{section}] of {source}", key, types)
            values[key] = _typed(value, str(types[key]), f"{source}: {section}.{key}")
        config = replace(config, **{section: replace(part, **values)})
    return config


def _typed(value: Any, kind: str, where: str) -> Any:
    """A TOML value as the field's type, or an error that says what was expected."""
    if kind.startswith("Path") and isinstance(value, str):
        return Path(value)
    if kind == "tuple[int, int]" and isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value):
        return tuple(value)
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    plain: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}
    want = plain.get(kind.split(" | ")[0])
    if want is not None and isinstance(value, want) and (kind == "bool") == isinstance(value, bool):
        return float(value) if kind.startswith("float") else value
    raise JpqError(f"{where} is {value!r}; expected {kind}.")


def read(path: Path) -> Config:
    """The config in a TOML file."""
    try:
        return from_tree(tomllib.loads(path.read_text()), str(path))
    except OSError as error:
        raise JpqError(f"Cannot read the config file {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JpqError(f"{path} is not valid TOML: {error}.") from error


def write(config: Config, path: Path) -> None:
    """Save the config as TOML."""
    path.write_text(tomli_w.dumps(to_tree(config)))
