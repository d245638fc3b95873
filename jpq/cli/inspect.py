"""`jpq inspect`: a model's layers and costs, the channels that pruning may remove, and why others must stay."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jpq.cli.flags import parse_flags, with_help
from jpq.cli.output import Column, label_grid, name_column, table, text_column
from jpq.results.formatting import format_number
from jpq.types import JpqError

if TYPE_CHECKING:  # --help shows without torch
    from torch import nn

    from jpq.tracing.network import Layer, Network
    from jpq.tracing.sites import Site

MAX_ROWS = 26  # largest number of rows of a table; longer models are summed up by parts
MAX_PARTS = 16  # largest number of parts of a model that is summed up
MAX_NAMES = 3  # largest number of layers that a cell names

READING = ("task", "image_size", "noise", "scale", "target_column")  # flags that say how --data are read

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Flags of `jpq inspect`: the model, its input, and how much is shown."""

    model: str = "convnet"
    """convnet, lenet5, vgg7, resnet8/20/32/44/56, torchvision:NAME (classification, segmentation, video; an SSD or
    RetinaNet with --data of boxes, else a detector's NAME.backbone), timm:NAME, smp:ARCHITECTURE:ENCODER, hf:FOLDER (or
    a config.json of transformers), or module:callable (runs your code)."""
    input_shape: tuple[int, ...] | None = None
    """One sample without the batch: channels, (frames,) height and width; of a text its number of tokens. Default: what
    the model usually takes."""
    classes: int | None = None
    """Number of classes. Default: what the model usually has."""
    data: str | None = None
    """A data set that says both instead."""
    data_root: Path = Path("data")
    """Where data sets lie, or are downloaded to."""
    task: str = ""
    """What the data are for, as for jpq optimize (restoration, say). Default: as the data say."""
    image_size: tuple[int, ...] = ()
    """Size that images of --data are brought to, as 224 (a square) or 192 256 (height, width)."""
    noise: float = 0.0
    """For --data that are clean images to be restored: the noise that jpq optimize adds, of 255."""
    scale: int = 1
    """For --data that are clean images to be restored: how many times smaller the input is."""
    target_column: str = ""
    """For --data table:FILE.csv: the column that is predicted."""
    open_norms: bool = False
    """Count channels inside the averages of LayerNorm, RMSNorm and GroupNorm as free (see jpq optimize --help)."""
    all: bool = False
    """Every layer and site, where a long model is summed up by parts otherwise."""


def inspect_command(args: list[str], console: Console) -> None:
    """Run `jpq inspect`."""
    flags = parse_flags(with_help(Inspect), "inspect", args)
    from jpq.tracing.decompose import decompose
    from jpq.tracing.forward import collect_tensors
    from jpq.tracing.sites import channels
    from jpq.tracing.trace import trace

    model, example = model_and_example(flags)
    model = decompose(model, example)
    start = time.perf_counter()
    network = trace(model, example, open_norms=flags.open_norms)
    sites = channels(network)
    seconds = time.perf_counter() - start
    title = f"{flags.model}, {' x '.join(map(str, collect_tensors(example)[0].shape[1:]))}"
    console.print(show_inspection(title, model, network, sites, seconds, flags.all, flags.open_norms))


def check_reading(flags: Any, names: Sequence[str] = READING) -> None:
    """Raise JpqError for one of these flags where there are no --data that it could say something of."""
    unset = {field.name: field.default for field in dataclasses.fields(flags)}
    for name in names:
        if flags.data is None and getattr(flags, name) != unset[name]:
            raise JpqError(f"--{name.replace('_', '-')} says how --data are read, and there are none. Leave it out.")


def model_and_example(flags: Any) -> tuple[nn.Module, Any]:
    """The model that --model, --data, --input-shape and --classes describe, and a batch of two noise samples."""
    import torch

    from jpq.files.model_files import PREFIX
    from jpq.tasks import models, with_task
    from jpq.tasks.data import load

    check_reading(flags)
    shape, classes = models.usual_input(flags.model) or (None, 1000)
    reading = {key: getattr(flags, key) for key in READING if getattr(flags, key, None)}
    if flags.model.startswith(PREFIX):
        reading |= {"text_model": flags.model, "attention_mask": True}
    data = None
    if flags.data is not None:
        data = with_task(load(flags.data, flags.data_root, **reading), str(reading.get("task", "")))
    if data is not None:
        shape, classes = data.shape, data.classes
    shape, classes = flags.input_shape or shape, classes if flags.classes is None else flags.classes
    if shape is None:
        raise JpqError(f"Say what {flags.model} takes: --input-shape 3 224 224, or a data set with --data NAME.")
    sides = dict(zip(("height", "width"), shape[1:], strict=True)) if len(shape) == 3 else {}
    known = data.arguments if data else {}
    arguments = {**known, **sides} if flags.model.startswith("timm:") else known
    model = models.build(flags.model, classes, shape[0], arguments).eval()
    example = models.noise(model, 2, shape)
    if data is not None and not (isinstance(data.example, torch.Tensor) and data.example.is_floating_point()):
        example = data.example  # token ids, or several inputs: no noise stands for them
    models.check_runs(model, example)
    return model, example


def show_inspection(
    title: str,
    model: nn.Module,
    network: Network,
    sites: Sequence[Site],
    seconds: float,
    all_rows: bool,
    open_norms: bool,
) -> Group:
    """Tables of layers, sites and frozen channels, and a summary.

    Args:
        title: of the summary: model and input shape.
        model: what was read; network: its layers; sites: channels that are kept or removed together.
        seconds: time that reading took.
        all_rows: show every row of long tables.
        open_norms: whether averages of norms were to be opened.
    """
    parts = assign_parts([layer.name for layer in network.layers], all_rows)
    tables = [
        _layer_table(network, sites, parts),
        _site_table(sites, parts, all_rows),
        _frozen_table(network, sites, parts),
    ]
    if float_work := find_float_work(network, model):
        tables.insert(1, _float_table(float_work, network))
    return Group(*tables, _summary(title, model, network, sites, seconds, open_norms))


def assign_parts(names: Sequence[str], all_rows: bool) -> dict[str, str]:
    """Layer -> the part of the model that it is summed up in, by as many dotted names as give MAX_PARTS at most."""
    if all_rows or len(names) <= MAX_ROWS:
        return {name: name for name in names}
    for depth in range(max(name.count(".") for name in names) + 1, 0, -1):
        cut = {name: ".".join(name.split(".")[:depth]) for name in names}
        if len(set(cut.values())) <= MAX_PARTS:
            break
    sizes = Counter(cut.values())
    return {name: name if sizes[part] == 1 else part for name, part in cut.items()}


def _layer_table(network: Network, sites: Sequence[Site], parts: Mapping[str, str]) -> Table:
    """Channels, weights and costs of each layer or part, with totals."""
    free = {int(c) for site in sites for c in site.labels}
    total = dataclasses.replace(_count(network.layers, free), macs=network.macs)
    columns = (
        name_column("layer", "total"),
        text_column("kind"),
        "in",
        Column("out", str(total.outputs)),
        Column("can go", str(total.free)),
        Column("weights", format_number(total.weights), optional=1),
        Column("MACs", format_number(total.macs)),
        Column("share", "100 %"),
        Column("fp32 BOPs", format_number(1024 * total.macs), optional=2),
    )
    rows = []
    for name, layers in _group(network.layers, lambda layer: parts[layer.name]):
        counts = _count(layers, free)
        single = len(layers) == 1
        rows.append(
            (
                escape(name),
                _kind(layers[0]) if single else f"{len(layers)} layers",
                str(len(layers[0].inputs)) if single else "",
                str(counts.outputs),
                str(counts.free),
                format_number(counts.weights),
                format_number(counts.macs),
                f"{100 * counts.macs / max(1, total.macs):.1f} %",
                format_number(1024 * counts.macs),
            )
        )
    if network.products:
        macs, n = sum(product.macs for product in network.products), len(network.products)
        name = f"{n} product{'s' * (n > 1)}"
        share = f"{100 * macs / max(1, total.macs):.1f} %"
        rows.append((name, "", "", "", "", "", format_number(macs), share, format_number(1024 * macs)))
    return table(columns, rows)


def find_float_work(network: Network, model: nn.Module) -> list[tuple[str, str, int]]:
    """(name, reason, MACs) of each product, and of each layer that cannot be quantized, in a float model."""
    from jpq.compression.float_work import OTHER_CLASS, PRODUCT
    from jpq.methods.quantizers import can_quantize

    modules = dict(model.named_modules())
    found = []
    for layer in network.layers:
        module = modules.get(layer.name)
        own = module is not None and layer.weight == f"{layer.name}.weight" and can_quantize(module)
        if layer.float_reason or not own:
            found.append((layer.name, layer.float_reason or OTHER_CLASS, layer.macs))
    return found + [(product.name, PRODUCT, product.macs) for product in network.products]


def _float_table(float_work: Sequence[tuple[str, str, int]], network: Network) -> Table:
    """What is computed and counted at 32 bits, by reason, with its share of the MACs."""
    rows = []
    for reason, parts in _group(float_work, lambda part: part[1]):
        macs = sum(part[2] for part in parts)
        names = escape(_join_names([part[0] for part in parts]))
        rows.append((names, format_number(macs), f"{100 * macs / max(1, network.macs):.1f} %", escape(reason)))
    return table((text_column("stays at 32 bits"), "MACs", "share", text_column("because")), rows)


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Sums of channels, weights and costs over layers."""

    outputs: int  # channels
    free: int  # output channels that pruning may remove
    weights: int
    macs: int


def _count(layers: Sequence[Layer], free: set[int]) -> _Counts:
    return _Counts(
        sum(len(layer.outputs) for layer in layers),
        sum(int(c) in free for layer in layers for c in layer.outputs),
        sum(math.prod(layer.weight_shape) for layer in layers),
        sum(layer.macs for layer in layers),
    )


def _group(items: Sequence[T], key: Callable[[T], str]) -> list[tuple[str, list[T]]]:
    """Items of equal keys together, in the order of their first."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def _kind(layer: Layer) -> str:
    """`conv2d, depthwise`."""
    name = layer.kind.value.replace("_", " ")
    if layer.groups == 1:
        return name
    return f"{name}, depthwise" if layer.depthwise else f"{name}, {layer.groups} groups"


def _site_table(sites: Sequence[Site], parts: Mapping[str, str], all_rows: bool) -> Table:
    """Channels that are kept or removed together, and the layers that read them."""
    if all_rows or len(sites) <= MAX_ROWS:
        parts = {}
    rows = []
    for name, group in _group(sites, lambda site: parts.get(site.producers[0], site.name)):
        consumers = [parts.get(tap.layer, tap.layer) for site in group for tap in site.taps]
        label = name if len(group) == 1 else f"{name} ({len(group)} sites)"
        rows.append((escape(label), str(sum(site.n for site in group)), escape(_join_names(consumers))))
    return table((name_column("can go together"), "units", text_column("read by")), rows)


def _frozen_table(network: Network, sites: Sequence[Site], parts: Mapping[str, str]) -> Table:
    """Channels that must stay, with the reason and the layers that produce them."""
    from jpq.tracing.coverage import frozen_channels

    rows = [
        (str(row.channels), escape(row.reason), escape(_join_names([parts.get(m, m) for m in row.producers])))
        for row in frozen_channels(network, sites)
    ]
    return table(("must stay", text_column("because"), text_column("made by")), rows)


def _join_names(names: Sequence[str]) -> str:
    """Distinct names, the last ones as a number where there are many."""
    names = list(dict.fromkeys(names))
    more = len(names) - MAX_NAMES
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:MAX_NAMES])} and {more} more"


def _summary(
    title: str, model: nn.Module, network: Network, sites: Sequence[Site], seconds: float, open_norms: bool
) -> Panel:
    """Size of the model, share of it that pruning reaches, and notes."""
    from jpq.tracing.coverage import halved_share, prunable_share

    macs, parameters = network.macs, sum(p.numel() for p in model.parameters())
    units = sum(site.n for site in sites)
    touched, half = (f"{100 * float(share(network, sites)):.1f} %" for share in (prunable_share, halved_share))
    rows = [
        (
            "model",
            f"{len(network.layers)} layers, {format_number(parameters)} parameters, {format_number(macs)} MACs, "
            f"{format_number(1024 * macs)} BOPs in fp32",
        ),
        (
            "can go",
            f"{units} units (channels, heads or groups) in {len(sites)} sites; layers with {touched} of the MACs make "
            f"or read them, and without every second one {half} of the MACs go",
        ),
        ("time", f"read in {seconds:.1f} s"),
        *_notes(network, sites, open_norms),
    ]
    warning = [] if sites else [Text("Nothing can go.", style="yellow")]
    return Panel(
        Group(label_grid(rows), *warning), title=escape(title), title_align="left", border_style="cyan", expand=False
    )


def _notes(network: Network, sites: Sequence[Site], open_norms: bool) -> list[tuple[str, str]]:
    """Labels and texts about ops without a rule, unused layers, and averages of norms."""
    from jpq.tracing.coverage import frozen_channels
    from jpq.tracing.open_norms import WARNING, opened_units

    notes = []
    if network.unknown_ops:
        notes.append(
            (
                "[yellow]note[/]",
                f"ops without a rule froze what they touch: {', '.join(network.unknown_ops)} "
                "(write one with jpq.tracing.rules)",
            )
        )
    if network.idle:
        more = " ..." if len(network.idle) > 6 else ""
        notes.append(("note", f"only training, or nobody, uses {', '.join(map(escape, network.idle[:6]))}{more}"))
    closed = [row for row in frozen_channels(network, sites) if row.reason.lower().endswith("norm's average")]
    if open_norms:
        inside = opened_units(network, sites)
        text = f"{inside} of the units lie inside averages that --open-norms opened"
        notes.append(("[yellow]note[/]", f"{text}: {WARNING}" if inside else text))
    elif closed:
        count = sum(row.channels for row in closed)
        notes.append(("hint", f"--open-norms lets the {count} channels inside a norm's average go too; {WARNING}"))
    return notes
