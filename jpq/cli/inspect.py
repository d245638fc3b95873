"""What `jpq inspect` shows: the layers and their costs, what can go, what must stay and why."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from jpq.cli.flags import parsed, shown
from jpq.cli.output import Column, label_grid, table, text_column
from jpq.results.formatting import format_number
from jpq.tasks import models
from jpq.tasks.data import load
from jpq.tracing.coverage import frozen_channels, halved_share, prunable_share
from jpq.tracing.network import Layer, Network
from jpq.tracing.open_norms import WARNING, opened_units
from jpq.tracing.sites import Site
from jpq.types import JpqError

ROWS = 26  # of a table, above which parts of the model are summed up
STAGES = 16  # parts into which they are summed up, at most
NAMED = 3  # layers that a cell names
T = TypeVar("T")


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


def inspect_command(args: list[str], console: Console) -> None:
    """Run `jpq inspect`."""
    wanted = parsed(shown(Inspect), "inspect", args)
    from jpq.tracing.decompose import decompose
    from jpq.tracing.sites import channels
    from jpq.tracing.trace import trace

    model, example = noise(wanted)
    model = decompose(model)
    start = time.perf_counter()
    network = trace(model, example, open_norms=wanted.open_norms)
    sites = channels(network)
    seconds = time.perf_counter() - start
    title = f"{wanted.model}, {' x '.join(map(str, example.shape[1:]))}"
    console.print(show_inspection(title, model, network, sites, seconds, wanted.all, wanted.open_norms))


def noise(wanted: Any) -> tuple[nn.Module, Tensor]:
    """The model that --model, --data, --input-shape and --classes describe, and two samples of noise for it."""
    shape, classes = models.usual(wanted.model) or (None, 1000)
    if wanted.data is not None:
        data = load(wanted.data, wanted.data_root)
        shape, classes = data.shape, data.classes
    shape, classes = wanted.input_shape or shape, wanted.classes or classes
    if shape is None:
        raise JpqError(f"Say what {wanted.model} takes: --input-shape 3 224 224, or a data set with --data NAME.")
    example = torch.randn(2, *shape)
    model = models.build(wanted.model, classes, shape[0]).eval()
    models.check_runs(model, example)
    return model, example


def show_inspection(
    name: str, model: nn.Module, network: Network, sites: Sequence[Site], seconds: float, every: bool, opened: bool
) -> Group:
    """Tables of layers, sites and frozen channels, and a summary.

    With `every`, long tables too have all their rows; `opened` says that averages were to be opened.
    """
    stage = stages([layer.name for layer in network.layers], every)
    parts = [_layers(network, sites, stage), _sites(sites, stage, every), _stuck(network, sites, stage)]
    return Group(*parts, _summary(name, model, network, sites, seconds, opened))


def stages(names: Sequence[str], every: bool) -> dict[str, str]:
    """Layer -> the part of the model that it is summed up in: as deep into the dotted names as gives STAGES parts."""
    if every or len(names) <= ROWS:
        return {name: name for name in names}
    for depth in range(max(name.count(".") for name in names) + 1, 0, -1):
        cut = {name: ".".join(name.split(".")[:depth]) for name in names}
        if len(set(cut.values())) <= STAGES:
            break
    sizes = Counter(cut.values())
    return {name: name if sizes[stage] == 1 else stage for name, stage in cut.items()}


def _layers(network: Network, sites: Sequence[Site], stage: Mapping[str, str]) -> Table:
    free = {int(c) for site in sites for c in site.labels}
    layers = network.layers
    macs, weights = sum(layer.macs for layer in layers), sum(math.prod(layer.weight_shape) for layer in layers)
    out, can = sum(len(layer.outputs) for layer in layers), sum(_free(layer, free) for layer in layers)
    columns = (
        text_column("layer", "total"),
        text_column("kind"),
        "in",
        Column("out", str(out)),
        Column("can go", str(can)),
        Column("weights", format_number(weights)),
        Column("MACs", format_number(macs)),
        Column("share", "100 %"),
        Column("fp32 BOPs", format_number(1024 * macs)),
    )
    rows = []
    for name, run in _grouped(layers, lambda layer: stage[layer.name]):
        spent, held = sum(layer.macs for layer in run), sum(math.prod(layer.weight_shape) for layer in run)
        kind, inputs = (_kind(run[0]), str(len(run[0].inputs))) if len(run) == 1 else (f"{len(run)} layers", "")
        outputs, gone = sum(len(layer.outputs) for layer in run), sum(_free(layer, free) for layer in run)
        costs = (
            format_number(held),
            format_number(spent),
            f"{100 * spent / max(1, macs):.1f} %",
            format_number(1024 * spent),
        )
        rows.append((escape(name), kind, inputs, str(outputs), str(gone), *costs))
    return table(columns, rows)


def _grouped(items: Sequence[T], key: Callable[[T], str]) -> list[tuple[str, list[T]]]:
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def _free(layer: Layer, free: set[int]) -> int:
    return sum(int(c) in free for c in layer.outputs)


def _kind(layer: Layer) -> str:
    name = layer.kind.value.replace("_", " ")
    if layer.groups == 1:
        return name
    return f"{name}, depthwise" if layer.depthwise else f"{name}, {layer.groups} groups"


def _sites(sites: Sequence[Site], stage: Mapping[str, str], every: bool) -> Table:
    rows = []
    if every or len(sites) <= ROWS:
        stage = {}
    for name, run in _grouped(sites, lambda site: stage.get(site.producers[0], site.name)):
        readers = [stage.get(tap.layer, tap.layer) for site in run for tap in site.taps]
        label = name if len(run) == 1 else f"{name} ({len(run)} sites)"
        rows.append((escape(label), str(sum(site.n for site in run)), escape(_some(readers))))
    return table((text_column("can go together"), "units", text_column("read by")), rows)


def _stuck(network: Network, sites: Sequence[Site], stage: Mapping[str, str]) -> Table:
    rows = [
        (str(row.channels), escape(row.reason), escape(_some([stage.get(m, m) for m in row.producers])))
        for row in frozen_channels(network, sites)
    ]
    return table(("must stay", text_column("because"), text_column("made by")), rows)


def _some(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    more = len(names) - NAMED
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:NAMED])} and {more} more"


def _summary(
    name: str, model: nn.Module, network: Network, sites: Sequence[Site], seconds: float, opened: bool
) -> Panel:
    macs, parameters = sum(layer.macs for layer in network.layers), sum(p.numel() for p in model.parameters())
    units = sum(site.n for site in sites)
    held = [row for row in frozen_channels(network, sites) if row.reason.endswith("Norm's average")]
    rows = label_grid()
    rows.add_row(
        "model",
        f"{len(network.layers)} layers, {format_number(parameters)} parameters, {format_number(macs)} MACs, "
        f"{format_number(1024 * macs)} BOPs in fp32",
    )
    touched, half = (f"{100 * float(f(network, sites)):.1f} %" for f in (prunable_share, halved_share))
    can = f"{units} units (channels, heads or groups) in {len(sites)} sites; layers with {touched} of the MACs make or "
    rows.add_row("can go", can + f"read them, and without every second one {half} of the MACs go")
    rows.add_row("time", f"read in {seconds:.1f} s")
    if network.unknown_ops:
        rows.add_row(
            "[yellow]note[/]",
            f"ops without a rule froze what they touch: {', '.join(network.unknown_ops)} "
            "(write one with jpq.tracing.rules)",
        )
    if network.idle:
        rows.add_row(
            "note",
            f"only training, or nobody, uses {', '.join(map(escape, network.idle[:6]))}"
            f"{' ...' if len(network.idle) > 6 else ''}",
        )
    inside = opened_units(network, sites)
    if opened:
        text = f"{inside} of the units lie inside averages that --open-norms opened"
        rows.add_row("[yellow]note[/]", f"{text}: {WARNING}" if inside else text)
    elif held:
        count = sum(row.channels for row in held)
        rows.add_row("hint", f"--open-norms lets the {count} channels inside a norm's average go too; {WARNING}")
    return Panel(
        Group(rows, *([] if sites else [Text("Nothing can go.", style="yellow")])),
        title=escape(name),
        title_align="left",
        border_style="cyan",
        expand=False,
    )
