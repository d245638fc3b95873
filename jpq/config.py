"""Every setting of a run: the five sections and their flags' help, validation, the run's hash, and the TOML file.

The names of settings' values that code compares with stand first. A new setting needs a default that changes nothing:
all settings but those of [run] are in the hash that names a run's folder.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from jpq.files import untrusted
from jpq.files.atomic import replace_file
from jpq.files.formats import FORMATS
from jpq.files.paths import check_name, expand_home, expand_paths
from jpq.types import JpqError, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

MASKED = "masked"  # --method: set where --mask is given
MANUAL = "by-hand"  # --method: set where --bits or --densities are given
MEASURED = "measured"  # --method: decided by measurement
UNIFORM = "uniform"  # --method: one width for all weights and one for all activations
CHANNELS = "channels"  # --structure: units are channels that leave the network; all others are masks inside a layer
RULES = "rules"  # --structure: a mask structure for each layer, by rules
SEARCH = "search"  # --structure: a mask structure for each layer, by search on held-out data
STRUCTURE_CHOICES = ("pattern", "punched:8x8", "block:8x1")  # kinds that RULES and SEARCH choose from
PROXIES = ("projected", "trained")  # --proxy
BOPS = ("bops", "bops-structured")  # --cost, names in jpq.costs.COSTS
TARGETS = ("target_bops", "target_macs", "target_size", "target_latency")  # fields of Budget
ONNX_WEIGHTS = ("int8", "int4", "int2")  # --onnx-weights
TRAINING, MINUTES = EFFORTS = ("training", "minutes")  # --effort
RECONSTRUCTION = "reconstruction"  # --warm-start
AUTO, BATCH, FROZEN = BATCHNORM = ("auto", "batch", "frozen")  # --batchnorm
FLOAT32, BFLOAT16 = PRECISIONS = ("float32", "bfloat16")  # --precision
MINIMIZED = ("bops", "size", "latency", "macs")  # --minimize

# settings that version 0.1 did not have: left out of files and hashes at their defaults, so that those stay the same
ADDED = {
    "task": (
        "image_size",
        "mean",
        "std",
        "skip_bad",
        "task",
        "cache",
        "void",
        "noise",
        "scale",
        "crop",
        "target_column",
    ),
    "run": (
        "name",
        "embed_normalization",
    ),
    "decide": (
        "weight_levels",
        "keep_float",
        "sensitivity",
        "contest",
        "search_contest",
        "contest_share",
        "start",
        "resolve_at",
        "wider_ends",
    ),
    "train": ("effort", "warm_start", "reconstruction_steps", "reconstruction_samples", "batchnorm", "precision"),
    "budget": ("max_drop", "min_metric", "minimize", "most_runs"),
}

WEIGHT_LEVELS = ("all", "narrow")  # --weight-levels
STARTS = UNIFORM_START, MEASURED_START = (UNIFORM, MEASURED)  # --start

LARGEST_FILE = 2**20  # largest size of a settings file in bytes
LARGEST_SIDE = 2**14  # --image-size
LARGEST_SEED = 10**18 - 1  # --seed: others are derived from it, in 64 bits


class TextPaths:
    """A section of settings that takes text for paths."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if isinstance(value, str) and "Path" in str(entry.type):
                object.__setattr__(self, entry.name, Path(value))


@dataclass(frozen=True)
class Task(TextPaths):
    """What is made smaller, and the data that say how good it is."""

    model: str = "convnet"
    """convnet, lenet5, vgg7, resnet8/20/32/44/56, torchvision:NAME, timm:NAME, smp:ARCHITECTURE:ENCODER, hf:FOLDER (or
    a config.json of transformers), or module:callable (runs your code)."""
    weights: Path | None = None
    """Trained weights (.pth, .th, .safetensors), or imagenet: those that torchvision or timm publishes for the model.
    Without them a float model is trained first, in this run."""
    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100; folder:PATH (images in class folders, with masks, or to be
    restored), text:PATH, table:FILE.csv, sklearn:NAME, series:PATH, coco:PATH, hf-dataset:PATH;
    or module:callable (runs your code; it may return DataLoaders)."""
    data_root: Path = Path("data")
    """Where data sets lie, or are downloaded to."""
    held_out: float = 0.1
    """Share of the training data that steers the search; the test split is read once, at the end."""
    limit: int | None = None
    """Use only this many training samples (for a quick try)."""
    image_size: tuple[int, ...] = ()
    """Bring the images of folder:PATH to this size, as 224 (a square) or 192 256 (height, width): scaled until they
    just cover it, then cropped to the centre. Without it all must have one size."""
    mean: tuple[float, ...] = ()
    """Mean of each channel of the images, where bytes count as 0 to 1. Default: that of a known data set, ImageNet's
    for colour folders, 0.5 for grey ones, 0 for your own data. Three values turn grey images into colour ones."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, by which images are divided after --mean is subtracted."""
    skip_bad: bool = False
    """Leave out images of folder:PATH that cannot be read, with a note, in place of an error that lists them."""
    task: str = ""
    """What the model is for: classification, multi-label, segmentation, regression, restoration, text-classification,
    sequence-classification, detection, or module:callable (a jpq.tasks.base.Task of your own; runs your code). Default:
    what the data are for."""
    cache: str = "auto"
    """Where decoded images of folder:PATH are kept. memory; disk: bytes in ~/.cache/jpq, read as batches need them;
    none: files are decoded for every batch. auto: memory where they fit into a quarter of what is free, else disk where
    half of it stays free, else none. The batches are the same."""
    void: int = 255
    """For masks: the class of pixels that have none; they are not trained on and not counted."""
    noise: float = 0.0
    """For restoration: standard deviation, of 255, of the noise that is added to clean images."""
    scale: int = 1
    """For restoration: how many times smaller the input is than the image, by bicubic scaling (super-resolution)."""
    crop: tuple[int, ...] = ()
    """For masks and restoration: size of the random part of an image that is trained on, as 40 or 192 256."""
    target_column: str = ""
    """For table:FILE.csv: the column to predict. Numbers mean regression, texts and whole numbers of few values mean
    classes; --task says otherwise."""


@dataclass(frozen=True)
class Budget(TextPaths):
    """What the small model may cost. At least one target; all of them hold together."""

    target_bops: str | None = None
    """Bit-operations: "1%" of the fp32 model, or "12M", "1.2G". Every target may list values that one run follows down,
    such as 4%,2%,1%,0.5%: each becomes a run folder of its own; targets with one value hold for all."""
    cost: str = "bops"
    """How bit-operations are counted. bops: weights that a mask drops cost nothing. bops-structured: they cost what
    others do where they lie anywhere in a layer (--structure elementwise), since no common device skips those."""
    target_macs: str | None = None
    """Multiply-accumulates: "50%" or "12M"."""
    target_size: str | None = None
    """Weights on disk: "5%" of the fp32 model, or "50KB"."""
    target_latency: str | None = None
    """Time for one sample as --latency-table predicts it: "3ms", "250us", or "50%" of the fp32 model."""
    latency_table: Path | None = None
    """Measured layers of this model, from jpq bench --table FILE. Without a target the prediction is only reported."""
    max_drop: str | None = None
    """In place of targets: the cheapest model whose held-out metric is at most so much below the float model's, by
    several runs: "1%" is one point of an accuracy, and a share of a metric that is not in percent; "0.2" is 0.2 dB."""
    min_metric: str | None = None
    """In place of targets: the cheapest model of at least this held-out accuracy ("91%"), or other metric ("32")."""
    minimize: str = "bops"
    """The cost that --max-drop and --min-metric minimize: bops, size, latency (with --latency-table) or macs."""
    most_runs: int = 6
    """Runs, at most, by which --max-drop and --min-metric find the cheapest model."""

    @property
    def has_accuracy_target(self) -> bool:
        """Whether an accuracy stands in place of targets."""
        return bool(self.max_drop or self.min_metric)


@dataclass(frozen=True)
class Decide(TextPaths):
    """How keep-or-drop and bit-widths are decided."""

    method: str = "djpq"
    """What prunes, such as djpq, l0, dpf, pdp-2:4, uniform, two-stage or upscale: see `jpq methods`. Every method also
    takes another --structure and --width, where they go together."""
    score: str = ""
    """What ranks channels, for ranked, taylor, lookahead, catro, two-stage, measured and upscale: l1, l2, fpgm, lamp,
    hrank, taylor, taylor-full, taylor2, lookahead, lookahead-forward, lookahead-backward, lfp, lbp, catro, bn-scale or
    random. Default: the method's."""
    schedule: str = ""
    """When ranked channels close during the search: one-shot (at its start), iterative (ten steps) or cubic. Default:
    the method's."""
    classes: str = ""
    """For --score catro: only these classes (such as 0,3,5) need to be told apart when channels are ranked. Training,
    and every accuracy that is reported, is still on all classes."""
    allocator: str = ""
    """How much stays where, for upscale and two-stage. uniform: the same share of every layer, the same bits.
    threshold: one ranking of all channels, bits by noise. greedy: by gain per MAC, bits by noise. reinforce: a learned
    distribution over layers. sampled: an Optuna search. The last two try plans on held-out images. Default: threshold
    for scores that may be compared between layers, else uniform, with the same bits everywhere."""
    w_bits: tuple[int, int] = (2, 8)
    """Smallest and largest bit-width of weights."""
    a_bits: tuple[int, int] = (2, 8)
    """Smallest and largest bit-width of activations."""
    weight_levels: str = "all"
    """Levels of the weights' grids. all: 2^b of them, with the side of the one beyond the symmetric range chosen per
    output channel (at 2 bits -2..1 or -1..2; 8 bits are narrow). narrow: 2^b - 1 around 0, as in version 0.1. Methods
    that search on a grid of their own (gated widths, dead zones) are narrow."""
    image_bits: int = 8
    """Bit-width of the model's input, which is not learned."""
    output_bits: int = 0
    """Width of convolutions' results before sums and poolings, so that integer kernels compute them: rounding that is
    part of the model that trains (8 is a good choice). 0: those results stay in floating point."""
    channel_multiple: int | None = None
    """Keep channels in multiples of so many (8 or 16): integer kernels of CPUs and NPUs work on that many at once, and
    57 channels can take longer than 64. Layers that have fewer, or another number, may also keep all of theirs."""
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
    """Share of the weights that stay, for methods that are told how many (dpp, pdp, smart, dpf, dsp, spp, admm,
    scheme-mapping); N:M and patterns say it themselves. Share of the MACs that stays, for ranked, taylor, lookahead and
    catro when the search ends, for two-stage before bits are chosen (what the bits leave of the budget then opens more
    channels)."""
    bits: str | None = None
    """Weight and activation bits by hand, in place of a search: "4/4,conv1=8/8,layer1=4/3" (a layer, or all whose names
    begin so; 4/4 for the rest). No target is needed then; one that is given must hold."""
    densities: str | None = None
    """Share of the channels that stay by hand, the best by --score: "0.75,layer1=0.5" (sites of jpq inspect)."""
    skip: tuple[str, ...] = ()
    """Layers whose channels or weights are not pruned."""
    keep_float: tuple[str, ...] = ()
    """Layers (or all whose names begin so) that stay at 32 bits: no quantizer, 32 x 32 in costs, floating point in
    exported files. --bits conv1=32/32 says the same."""
    start: str = "uniform"
    """Widths that a search begins with, a quarter above its budget. uniform: one for all tensors. measured: those of
    least divergence by a sensitivity table, which also says how the rest of the budget is spent."""
    sensitivity: Path | None = None
    """A sensitivity table of this model to decide from (sensitivity.csv in the folder of a run with --method measured
    or --start measured, or from jpq sensitivity --out FILE), in place of measuring one."""
    contest: bool = True
    """For --method measured: before training, train the plan and those of uniform bits, uniform bits with wider ends
    and two stages for a short while each, and keep the best on held-out data. --no-contest keeps the measured plan."""
    search_contest: bool = False
    """Hold the same contest at the end of a search, with the plan that was learned."""
    contest_share: float = 0.05
    """Share of --epochs for which plans of a contest are trained: half of it each, at least 60 steps, then the better
    half of them for as much again as all had."""
    resolve_at: float = 0.0
    """Share of the fine-tuning after which bits are solved for again around the network as it has trained: widths move
    by single steps under the same budget, where that helps (docs/deciding.md). 0: never."""
    wider_ends: bool = False
    """For --method uniform: 8 bits for what the last layer reads, and one width of 4 to 8 bits, not below that of the
    other layers, for the weights of the first and last one."""
    mask: Path | None = None
    """A mask to hold while weights and bits learn, in place of a method: the folder of `jpq prune-private` (training
    begins with the weights in it; --weights names the dense model), or the file of a mask alone (mask.json, a run's
    plan.json)."""
    open_norms: bool = False
    """Also prune channels inside the averages of LayerNorm, RMSNorm and GroupNorm. NOT exact: fine-tuning, then of the
    rebuilt model, must repair what their absence does to the rest."""
    gate_lr: float = 0.05
    """Learning rate of the gates (Adam)."""
    bit_lr: float = 0.02
    """Learning rate of the bit-widths (Adam)."""
    gate_weight: float = 0.03
    """Weight of the gates' own regulariser, times the budget's pressure: a mean over units in nats (dpp), or the sum
    over units of their KL or probability, each times its price in the budget (djpq, l0, bayesian-bits, dais)."""


@dataclass(frozen=True)
class Train:
    """The training loop."""

    effort: str = "training"
    """training; or minutes: no training, the rounding of the weights is learned block by block from a few hundred
    samples without labels. The method is then measured, or one that decides without training (uniform, two-stage,
    by-hand)."""
    warm_start: str = ""
    """reconstruction: learn the rounding of the weights block by block, as with --effort minutes, before the
    fine-tuning."""
    reconstruction_steps: int = 500
    """Steps of the reconstruction for each block. 0: weights are rounded to nearest, and BatchNorm measured anew."""
    reconstruction_samples: int = 512
    """Training samples that the reconstruction looks at."""
    epochs: int = 40
    """Epochs of search and fine-tuning together. Several budgets share the search; the last is fine-tuned for the rest,
    as if it were alone, and each before it adds --tune-epochs."""
    search: float = 0.5
    """Share of the epochs that search; the rest fine-tunes the discretized model."""
    tune_epochs: int | None = None
    """Epochs that fine-tune each of several budgets but the last. Default: a quarter of the last one's."""
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
    batchnorm: str = "auto"
    """What BatchNorm normalises by in search and fine-tuning. batch: the statistics of each batch, measured anew at the
    end; frozen: those of the float model, which stay; auto: frozen where statistics that are measured anew cost the
    float model a tenth of its metric above chance (few samples per batch, as in denoising)."""
    precision: str = FLOAT32
    """Numbers in which layers compute while they learn: float32; or bfloat16, which is faster where the processor has
    instructions for it (ResNet20: three quarters of the time). Weights, decisions, and all that is measured stay
    float32."""


@dataclass(frozen=True)
class Run(TextPaths):
    """Where and how this run works. None of these changes what it computes, except the seed and the device."""

    seed: int = 0
    """Seeds the weights, the order of the data and every draw."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    threads: int = 0
    """CPU threads; 0: one for small nets, torch's choice for larger ones."""
    out: Path = Path("runs")
    """Folder for runs; this one goes to OUT/NAME."""
    name: str = ""
    """Name of this run's folder. Default: the hash of its settings."""
    formats: str = "onnx"
    """What to export: onnx (always), qonnx (for FPGA flows), pt2 (torch.export), such as onnx,pt2."""
    onnx_weights: str = "int8"
    """Type of the weights in model.onnx: int8, or where they fit int4 or int2 (not in OpenVINO) for a smaller file."""
    resume: bool = False
    """Go on from the last checkpoint of the same settings; of a finished run show the result again."""
    overwrite: bool = False
    """Run anew in a folder that holds a run already, whose files are removed first."""
    strict: bool = False
    """Exit with code 1 where an exported file differs from its model by more than the fixed limits. The run stays."""
    tensorboard: bool = False
    """Also write the history as TensorBoard events into the run's folder (pip install "jpq[tensorboard]")."""
    embed_normalization: bool = False
    """Put (x - mean) / std into the exported files, so that they take pixels / 255 (float32, 0 to 1), or columns
    of a table in their own units."""
    checkpoint_every: int = 0
    """Save after so many optimiser steps too; 0: after every epoch only. Ctrl-C and SIGTERM always save."""


@dataclass(frozen=True)
class Config:
    """Prune and quantize a model together, onto a budget."""

    task: Task = field(default_factory=Task)
    budget: Budget = field(default_factory=Budget)
    decide: Decide = field(default_factory=Decide)
    train: Train = field(default_factory=Train)
    run: Run = field(default_factory=Run)

    def check(self) -> Config:
        """The validated config; its method is `by-hand` or `masked` where decisions or a mask are given.

        Raises JpqError that names the setting to change.
        """
        expanded = expand_homes(self)
        d = expanded.decide
        pins_only = d.method == MEASURED and not d.densities  # --bits names widths that the solver keeps
        if (d.bits and not pins_only) or d.densities or d.method == MANUAL:
            d = _with_manual_method(d)
        elif d.mask is not None or d.method == MASKED:
            d = _with_masked_method(d, expanded.task.weights)
        if expanded.train.effort == MINUTES:  # a contest would train
            d = replace(d, method=MEASURED if d.method == Decide.method else d.method, contest=False)
        config = expanded if d is expanded.decide else replace(expanded, decide=d)
        _check_decide(d)
        _check_train(config.train, config.task)
        _check_images(config.task)
        _check_data(config.task)
        _check_effort(config.train, d)
        _check_rates(config.train, d)
        _check_run(config.run)
        _check_budget(config)
        return config

    def each(self) -> dict[str, Config]:
        """A config for each budget of this run, by the text that tells the budgets apart ("" for a single budget).

        Raises JpqError for lists that differ in length, and for values that are repeated or missing.
        """
        texts = {name: getattr(self.budget, name) for name in TARGETS}
        lists = {name: [v.strip() for v in text.split(",")] for name, text in texts.items() if "," in str(text)}
        if not lists:
            return {"": self}
        _check_lists(lists, {name: f"--{name.replace('_', '-')} {texts[name]}" for name in lists})
        return {
            value: replace(self, budget=replace(self.budget, **{name: listed[i] for name, listed in lists.items()}))
            for i, value in enumerate(next(iter(lists.values())))
        }

    def without_accuracy_target(self) -> Config:
        """The config of one run: without --max-drop, --min-metric and what belongs to them."""
        names = ADDED["budget"]
        return replace(self, budget=replace(self.budget, **{name: getattr(Budget, name) for name in names}))

    def folder(self) -> Path:
        """The run's folder: its name, or the hash of its settings, in the folder for runs."""
        return self.run.out / (self.run.name or self.hash())

    def hash(self) -> str:
        """Twelve hex digits of all settings that change the result; the default name of the run's folder."""
        tree = to_tree(self)
        tree["run"] = {"seed": tree["run"]["seed"]}
        tree["task"].pop("data_root", None)
        tree["task"].pop("cache", None)  # the batches are the same
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def expand_homes(config: Config) -> Config:
    """The config with `~` and `runs/latest` replaced in every path; the same object where there are none."""
    config = expand_paths(config)
    kind, _, path = config.task.data.partition(":")
    if kind == "folder" and path.startswith("~"):
        config = replace(config, task=replace(config.task, data=f"folder:{expand_home(path)}"))
    return config


def _with_manual_method(d: Decide) -> Decide:
    """The section where --bits or --densities give the decisions. Raises JpqError where another flag does so too."""
    if not (d.bits or d.densities):
        raise JpqError(f"--method {MANUAL}: say the decisions with --bits and --densities, or choose a method.")
    flag = "--bits" if d.bits else "--densities"
    if d.method not in (Decide.method, MANUAL):
        raise JpqError(f"{flag} says what is decided, and --method {d.method} would too. Leave one of them out.")
    rivals = {
        "--mask": d.mask,
        "--structure": d.structure,
        "--width": d.width,
        "--allocator": d.allocator,
        "--schedule": d.schedule,
    }
    for rival, value in rivals.items():
        if value:
            raise JpqError(f"{rival} {value}: {flag} says the decisions, on whole channels. Leave {rival} out.")
    return replace(d, method=MANUAL)


def _with_masked_method(d: Decide, weights: Path | None) -> Decide:
    """The section where --mask gives the masks. Raises JpqError where another flag decides them too."""
    if d.mask is not None and not d.mask.name:
        raise JpqError(f"--mask {d.mask}: give the folder or file of a mask.")
    if d.mask is None:
        raise JpqError("--method masked: there is no mask to hold. Give one with --mask, or choose a method.")
    if d.method not in (Decide.method, MASKED):
        raise JpqError(f"--mask says what is pruned, and --method {d.method} would too. Leave one of them out.")
    for flag, value in (("--structure", d.structure), ("--skip", " ".join(d.skip))):
        if value:
            raise JpqError(f"{flag} {value}: --mask says which weights are dropped, and where. Leave {flag} out.")
    if d.mask.is_dir() and weights is None:
        raise JpqError(
            f"--mask {d.mask} brings pruned weights: give the dense model that they come from with --weights, or "
            "the mask alone (its mask.json)."
        )
    return replace(d, method=MASKED)


def _check_decide(d: Decide) -> None:
    for flag, given in (("--w-bits", d.w_bits), ("--a-bits", d.a_bits)):
        bounds = tuple(given) if isinstance(given, Sequence) else (given,)
        whole = len(bounds) == 2 and all(isinstance(width, Integral) for width in bounds)
        if not whole or not 2 <= bounds[0] <= bounds[1] <= 8:
            text = " ".join(map(str, bounds))
            raise JpqError(f"{flag} {text}: give a smallest and a largest bit-width, 2 <= small <= large <= 8.")
    if not 0 < d.density <= 1:
        raise JpqError(f"--density {d.density} must lie above 0 and be at most 1: it is the share that stays.")
    if not 2 <= d.image_bits <= 8:
        raise JpqError(f"--image-bits {d.image_bits} is outside 2 to 8.")
    if d.output_bits and not 2 <= d.output_bits <= 8:
        raise JpqError(f"--output-bits {d.output_bits} is outside 2 to 8; 0 leaves results in floating point.")
    if d.weight_levels not in WEIGHT_LEVELS:
        raise unknown("choice of --weight-levels", d.weight_levels, WEIGHT_LEVELS)
    _check_measuring(d)
    if d.proxy not in PROXIES:
        raise unknown("proxy", d.proxy, PROXIES)


def _check_measuring(d: Decide) -> None:
    if not 0 < d.contest_share <= 1:
        raise JpqError(
            f"--contest-share {d.contest_share} must lie above 0 and be at most 1: it is a share of --epochs."
        )
    if not 0 <= d.resolve_at < 1:
        raise JpqError(f"--resolve-at {d.resolve_at} must lie from 0 to below 1: it is a share of the fine-tuning.")
    if d.resolve_at and d.open_norms:
        raise JpqError("--resolve-at cannot be with --open-norms, which fine-tunes the rebuilt model. Leave one out.")
    if d.wider_ends and d.method != UNIFORM:
        raise JpqError(f"--wider-ends is for --method {UNIFORM}, not for {d.method}: leave one of them out.")
    if d.start not in STARTS:
        raise unknown("choice of --start", d.start, STARTS)
    if d.sensitivity is not None and d.method != MEASURED and d.start != MEASURED_START:
        raise JpqError(
            f"--sensitivity {d.sensitivity}: only --method {MEASURED}, and a search with --start {MEASURED_START}, "
            "decide from a table. Choose one of them."
        )


def _check_train(t: Train, task: Task) -> None:
    if t.batchnorm not in BATCHNORM:
        raise unknown("choice of --batchnorm", t.batchnorm, BATCHNORM)
    if t.precision not in PRECISIONS:
        raise unknown("choice of --precision", t.precision, PRECISIONS)
    for flag, share in (("--search", t.search), ("--held-out", task.held_out)):
        if not 0 < share < 1:
            raise JpqError(f"{flag} {share} must lie between 0 and 1.")
    for flag, number in (("--epochs", t.epochs), ("--batch-size", t.batch_size)):
        if number < 2:
            raise JpqError(f"{flag} {number}: at least 2 are needed.")
    if t.float_epochs < 1 and task.weights is None:
        raise JpqError("--float-epochs 0 needs --weights: there is nothing trained to compress.")
    if t.tune_epochs is not None and t.tune_epochs < 1:
        raise JpqError(f"--tune-epochs {t.tune_epochs}: at least 1 is needed.")
    if task.limit is not None and task.limit < 20:
        raise JpqError(f"--limit {task.limit}: at least 20 samples are needed to split off a held-out part.")


CACHES = ("auto", "memory", "disk", "none")  # --cache


def _check_data(task: Task) -> None:
    if task.cache not in CACHES:
        raise unknown("choice of --cache", task.cache, CACHES)
    if not 0 <= task.noise <= 255:
        raise JpqError(f"--noise {task.noise}: give a standard deviation from 0 to 255, as 25.")
    if not 1 <= task.scale <= 16:
        raise JpqError(f"--scale {task.scale}: give 1 to 16, as 2.")
    if len(task.crop) > 2 or any(not 0 < side <= LARGEST_SIDE for side in task.crop):
        raise JpqError(
            f"--crop {' '.join(map(str, task.crop))}: give one number of pixels, as 40, or height and width."
        )


def _check_effort(t: Train, d: Decide) -> None:
    if t.effort not in EFFORTS:
        raise unknown("effort", t.effort, EFFORTS)
    if t.warm_start not in ("", RECONSTRUCTION):
        raise unknown("kind of --warm-start", t.warm_start, (RECONSTRUCTION,))
    for flag, number, least in (
        ("--reconstruction-steps", t.reconstruction_steps, 0),
        ("--reconstruction-samples", t.reconstruction_samples, 2),
    ):
        if number < least:
            raise JpqError(f"{flag} {number}: give {least} or more.")
    if t.effort == MINUTES and t.warm_start:
        raise JpqError(f"--warm-start {t.warm_start}: with --effort minutes nothing is trained after it. Leave it out.")
    if d.open_norms and (t.effort == MINUTES or t.warm_start):
        raise JpqError(
            "--open-norms is repaired by fine-tuning the rebuilt model, which a reconstruction cannot do: leave out "
            "--effort minutes and --warm-start."
        )


def _check_images(task: Task) -> None:
    if len(task.image_size) > 2 or any(not 0 < side <= LARGEST_SIDE for side in task.image_size):
        sides = " ".join(map(str, task.image_size))
        raise JpqError(
            f"--image-size {sides}: give one number of pixels for a square, as 224, or height and width, as 192 256."
        )
    if len(task.mean) != len(task.std):
        raise JpqError(
            f"--mean and --std have {len(task.mean)} and {len(task.std)} values: give both, one value for each channel."
        )
    if not all(isfinite(value) for value in task.mean) or not all(0 < value < float("inf") for value in task.std):
        raise JpqError("--mean and --std: give finite numbers, and --std above 0.")


def _check_rates(t: Train, d: Decide) -> None:
    rates = {"--lr": t.lr, "--gate-lr": d.gate_lr, "--bit-lr": d.bit_lr, "--temperature": t.temperature}
    for flag, rate in rates.items():
        if not 0 < rate < float("inf"):
            raise JpqError(f"{flag} {rate} must be a positive number.")
    weights = {"--weight-decay": t.weight_decay, "--distill": t.distill, "--gate-weight": d.gate_weight}
    for flag, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise JpqError(f"{flag} {weight} must be zero or a positive number.")


def _check_run(run: Run) -> None:
    if run.name:
        check_name(run.name)
    if run.resume and run.overwrite:
        raise JpqError("--resume and --overwrite: the one goes on with what is there, the other removes it. Give one.")
    check_formats(run.formats, run.onnx_weights)
    if abs(run.seed) > LARGEST_SEED:
        raise JpqError(f"--seed {run.seed}: give a whole number of at most 18 digits.")
    if run.checkpoint_every < 0:
        raise JpqError(f"--checkpoint-every {run.checkpoint_every}: give a number of steps, or 0 for none.")


def check_formats(formats: str, weights: str) -> None:
    """Raise JpqError for unknown export formats and unknown types of ONNX weights."""
    parse_formats(formats)
    if weights not in ONNX_WEIGHTS:
        raise unknown("type of weights", weights, ONNX_WEIGHTS)


def parse_formats(text: str) -> tuple[str, ...]:
    """The export formats in a list such as "onnx,pt2"; onnx is always among them. Raises JpqError for unknown ones."""
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in FORMATS:
            raise unknown("form", name, FORMATS)
    return ("onnx", *(name for name in FORMATS if name in named and name != "onnx"))


def _check_budget(config: Config) -> None:
    b = config.budget
    if b.cost not in BOPS:
        raise unknown("cost", b.cost, BOPS)
    config.each()
    if b.has_accuracy_target:
        _check_accuracy_target(config)
        return
    for name in ("minimize", "most_runs"):
        if getattr(b, name) != getattr(Budget, name):
            flag = f"--{name.replace('_', '-')} {getattr(b, name)}"
            raise JpqError(f"{flag} is for --max-drop and --min-metric, and neither is given. Leave it out.")
    if not any(getattr(b, name) for name in TARGETS) and config.decide.method != MANUAL:
        raise JpqError(
            "No target: give --target-bops 1% (or 12M, 1.2G), --target-size 50KB, --target-macs 50%, "
            "--target-latency 3ms, or --max-drop 1% for the cheapest model within it."
        )
    if b.target_latency and b.latency_table is None:
        raise JpqError(
            f"--target-latency {b.target_latency} needs measured layers: run `jpq bench --table FILE.csv "
            f"--model {config.task.model}`, then add --latency-table FILE.csv."
        )


def _check_accuracy_target(config: Config) -> None:
    """Raise JpqError where --max-drop or --min-metric stands beside what it replaces, or cannot be minimized for."""
    b = config.budget
    flag = f"--max-drop {b.max_drop}" if b.max_drop else f"--min-metric {b.min_metric}"
    if b.max_drop and b.min_metric:
        raise JpqError(f"{flag} and --min-metric {b.min_metric} both say how good the model must be. Give one.")
    for name in TARGETS:
        if getattr(b, name):
            given = f"--{name.replace('_', '-')} {getattr(b, name)}"
            raise JpqError(f"{flag} finds the budget, and {given} gives one. Leave one of them out.")
    if config.decide.method == MANUAL:
        raise JpqError(f"{flag} finds a budget for a method to meet: leave out --bits and --densities.")
    if b.minimize not in MINIMIZED:
        raise unknown("cost to --minimize", b.minimize, MINIMIZED)
    if b.minimize == "latency" and b.latency_table is None:
        raise JpqError(
            "--minimize latency needs measured layers: run `jpq bench --table FILE.csv "
            f"--model {config.task.model}`, then add --latency-table FILE.csv."
        )
    if b.most_runs < 2:
        raise JpqError(f"--most-runs {b.most_runs}: at least 2 are needed to find a budget.")


def _check_lists(lists: Mapping[str, list[str]], flags: Mapping[str, str]) -> None:
    """Raise JpqError unless all lists of targets have equal length, none missing, and no value of the first twice."""
    for name, listed in lists.items():
        if not all(listed):
            raise JpqError(f"{flags[name]}: a value is missing beside a comma. Write it like 4%,2%,1%.")
    (leading, values), *remaining = lists.items()
    for name, listed in remaining:
        if len(listed) != len(values):
            raise JpqError(
                f"{flags[leading]} lists {len(values)} budgets, and {flags[name]} has {len(listed)}. List as many, "
                "or one value that holds for all."
            )
    if len(set(values)) < len(values):
        twice = next(v for v in values if values.count(v) > 1)
        raise JpqError(f"{flags[leading]}: {twice} is there twice. List each budget once, from the largest down.")


def write_toml(config: Config, path: str | Path) -> None:
    """Save the config as TOML."""
    path = Path(path)
    text = tomli_w.dumps(to_tree(config))
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def to_tree(config: Config) -> dict[str, dict[str, Any]]:
    """The config as nested tables of plain values.

    Left out are unset values, as TOML has no null, later settings at their defaults (`ADDED`), and `overwrite`, which
    is meant for one command alone.
    """
    tree = {}
    defaults = Config()
    for section in (f.name for f in fields(config)):
        plain, usual = (_plain_values(getattr(settings, section)) for settings in (config, defaults))
        omitted = {k for k in ADDED.get(section, ()) if plain[k] == usual[k]}
        tree[section] = {k: v for k, v in plain.items() if v is not None and k not in omitted}
    tree["run"].pop("overwrite")
    return tree


def _plain_values(section: Any) -> dict[str, Any]:
    """The settings of a section in TOML's types, as a file gives them back."""
    return {f.name: _plain_value(getattr(section, f.name), str(f.type)) for f in fields(section)}


def _plain_value(value: Any, kind: str) -> Any:
    """A setting of this type: a whole number is a float where the type is, so that settings are equal in every hash."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        entry = kind.removeprefix("tuple[").partition(",")[0]
        return [_plain_value(v, entry) for v in value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return float(value) if kind == "float" else int(value)
    return value


def read_toml(path: str | Path) -> Config:
    """The config in a TOML file."""
    return from_tree(read_tables(path), str(path))


def read_tables(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises JpqError where it cannot be read, or is not valid TOML."""
    path = Path(path)
    try:
        return tomllib.loads(untrusted.read_text(path, "config file", LARGEST_FILE))
    except RecursionError as error:
        raise JpqError(f"{path} nests deeper than any settings do.") from error
    except ValueError as error:  # of TOML, and of numbers with thousands of digits
        raise JpqError(f"{path} is not valid TOML: {error}.") from error


def from_tree(tree: Mapping[str, Any], source: str) -> Config:
    """The config in these tables; settings that they leave out keep their defaults."""
    config = Config()
    known = {f.name for f in fields(config)}
    for section, table in tree.items():
        if section not in known:
            raise unknown(f"section in {source}", section, known)
        if not isinstance(table, Mapping):
            raise JpqError(f"{source}: '{section}' must be a table of settings, such as [{section}].")
        config = replace(config, **{section: fill_section(getattr(config, section), section, table, source)})
    return config


def fill_section(part: T, section: str, table: Mapping[str, Any], source: str) -> T:
    """A copy of the settings `part` (a frozen dataclass) with the values in one table of a file."""
    settings: Any = part
    types = {f.name: str(f.type) for f in fields(settings)}
    values = {}
    for key, value in table.items():
        if key not in types:
            raise unknown(f"setting in [{section}] of {source}", key, types)
        values[key] = _read_value(value, types[key], f"{source}: {section}.{key}")
    filled: T = replace(settings, **values)
    return filled


def _read_value(value: Any, kind: str, where: str) -> Any:
    """A TOML value as the type of its field. Raises JpqError that says which type was expected."""
    plain = kind.removesuffix(" | None")
    try:
        if not plain.startswith("tuple["):
            return READERS[plain](value)
        entry, rest = plain.removeprefix("tuple[").removesuffix("]").split(", ")
        entries = [READERS[entry](v) for v in untrusted.as_list(value)]
        if rest != "..." and len(entries) != 2:
            raise ValueError("a pair has two entries")
        return tuple(entries)
    except ValueError as error:
        raise JpqError(f"{where} is {repr(value)[:60]}; expected {kind}.") from error


def _as_text(value: Any) -> str:
    return untrusted.as_str(value, LARGEST_FILE)


def _as_path(value: Any) -> Path:
    text = _as_text(value)
    if "\0" in text:
        raise ValueError("a path with a null byte")
    return Path(text)


def _as_int64(value: Any) -> int:
    return untrusted.as_int(value, -(2**63), 2**63 - 1)


READERS: dict[str, Callable[[Any], Any]] = {  # type of a field -> reader of its TOML value
    "bool": untrusted.as_bool,
    "int": _as_int64,
    "float": untrusted.as_float,
    "str": _as_text,
    "Path": _as_path,
}
