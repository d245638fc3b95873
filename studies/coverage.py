"""Prunable share of torchvision's networks, and the equivalence of masked and rebuilt network in float64.

    python studies/coverage.py [--models resnet18 ...] [--seeds 3] [--threads 1] [--again] [--out FILE.csv]

A row per network: the 80 classification and the 6 segmentation models, the backbones of the 12 detectors, and the 9
video models, with random weights. Rows that results/coverage.csv has already are left as they are (--again: measured
anew), so an interrupted run goes on. Columns:

    input                what is traced, two samples of it: the usual size of the network; MACs are of one sample
    sites, units         sites, and units in all of them (a unit is one channel, head or group that goes or stays)
    prunable_macs        share of the dense MACs in layers of whose inputs or outputs at least one channel is in a site
    macs_gone_at_half    share of the dense MACs that go when every second unit of every site goes
    layers, macs         layers with weights (each once, however often it is called), and their MACs
    frozen               channels that layers make and that must stay, by reason
    unknown_ops          ops without a rule that touched a channel
    trace_s              processor seconds of trace and sites; of them export_s in torch.export, check_s in running
                         smaller copies, labels_s in the rest
    rebuild_s            processor seconds of building the small model, the longest over seeds (float64)
    exact_input          what masked and rebuilt model are compared on: smaller than `input` where the network allows it
    rebuilt_ok           every seed's relative difference is at most 1e-9
    difference           the largest relative difference, |masked - rebuilt| / |masked| over all outputs, in float64; in
                         each seed a random half of the units of every site is dropped (weights: `randomize`)
    sensitivity          the smallest relative change of the rebuilt output when the image is mirrored: a wrong channel
                         changes the output by about that much, so a difference far below it is a finding
    why_not              the error, where there was one
    seconds              processor seconds of the whole row

All 80 classification networks and 27 others are rebuilt exactly (three seeds each, x86-64 CPU, November 2026).
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from support.result_rows import RESULTS, provenance, read_rows
from support.wrapping import time_calls

import jpq
from jpq.export import check_equivalence, randomize
from jpq.tasks import zoo
from jpq.tracing import Network, Site, freeze_unshrinkable, frozen_channels, halved_share, prunable_share

PATH = RESULTS / "coverage.csv"
EXACT = 1e-9
FULL_SIZE = ("vit", "maxvit", "mvit", "s3d", "ssd300")  # their code or their last pooling fixes the size of the input
SMALLER = {"classification": (3, 96, 96), "segmentation": (3, 96, 96), "detection": (3, 128, 128)}
CLIP = (3, 8, 64, 64)
FAMILIES = {  # beginning of a name -> README's name of the family; the first that fits
    "convnext": "ConvNeXt",
    "densenet": "DenseNet",
    "efficientnet": "EfficientNet, V2",
    "maxvit": "MaxViT",
    "vit": "ViT",
    "swin": "Swin, V2",
    "regnet": "RegNet",
    "vgg": "VGG, AlexNet",
    "alexnet": "VGG, AlexNet",
    "res": "ResNet, ResNeXt, Wide ResNet",
    "wide_res": "ResNet, ResNeXt, Wide ResNet",
    "googlenet": "GoogLeNet, Inception",
    "inception": "GoogLeNet, Inception",
    "mobilenet": "MobileNet, MNASNet",
    "mnasnet": "MobileNet, MNASNet",
    "shufflenet": "ShuffleNet, SqueezeNet",
    "squeezenet": "ShuffleNet, SqueezeNet",
}
KINDS = {
    "segmentation": "segmentation: FCN, DeepLabV3, LR-ASPP",
    "detection": "backbones of the detectors",
    "video": "video: R3D, MC3, R(2+1)D, S3D, MViT, Swin3D",
}
OUTPUT = "reaches the model's output"
LAST_COLUMNS = ["difference", "sensitivity", "seeds", "why_not", "seconds"]
PROVENANCE = ["n", "threads", "torch", "torchvision", "hardware", "commit", "command"]


def names() -> list[str]:
    """Every network of the table."""
    return [name + zoo.BACKBONE * (kind == "detection") for name, kind in zoo.kinds().items()]


def exact_shape(name: str) -> tuple[int, ...]:
    """Shape of one sample that masked and rebuilt model are compared on."""
    if name.startswith(FULL_SIZE):
        return zoo.usual_shape(name)
    return SMALLER.get(zoo.kind_of(name), CLIP)


def measure(name: str, seeds: Sequence[int], shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The row of one network, traced on two samples of `shape` (default: its usual one)."""
    kind, shape = zoo.kind_of(name), shape or zoo.usual_shape(name)
    row: dict[str, Any] = {"model": name, "kind": kind, "input": _times(shape)}
    torch.manual_seed(0)
    try:
        model = jpq.decompose(zoo.build_torchvision(name, zoo.CLASSES[kind]).eval())
        start = time.process_time()
        with time_calls(torch.export.export, freeze_unshrinkable) as seconds:
            network = jpq.trace(model, torch.zeros(2, *shape))
        sites = jpq.channels(network)
        row |= _prunable_columns(network, sites)
        row |= _second_columns(time.process_time() - start, seconds["export"], seconds["freeze_unshrinkable"])
        row |= _exactness_columns(name, model, network, sites, seeds)
    except (jpq.JpqError, RuntimeError) as error:
        row |= {"rebuilt_ok": False, "why_not": " ".join(str(error).split())[:300]}
    return row


def _prunable_columns(network: Network, sites: Sequence[Site]) -> dict[str, Any]:
    """Sites, shares of the MACs, and what is frozen."""
    return {
        "sites": len(sites),
        "units": sum(site.n for site in sites),
        "prunable_macs": round(float(prunable_share(network, sites)), 4),
        "macs_gone_at_half": round(float(halved_share(network, sites)), 4),
        "layers": len(network.layers),
        "frozen": "; ".join(f"{s.channels} {s.reason}" for s in frozen_channels(network, sites)),
        "unknown_ops": " ".join(network.unknown_ops),
        "macs": sum(layer.macs for layer in network.layers),
    }


def _second_columns(total: float, export: float, check: float) -> dict[str, float]:
    """Processor seconds of tracing and its stages."""
    return {
        "trace_s": round(total, 2),
        "export_s": round(export, 2),
        "check_s": round(check, 2),
        "labels_s": round(total - export - check, 2),
    }


def _exactness_columns(
    name: str, model: torch.nn.Module, network: Network, sites: Sequence[Site], seeds: Sequence[int]
) -> dict[str, Any]:
    """The equivalence of masked and rebuilt model on random halves of the units, in float64."""
    x = torch.randn(1, *exact_shape(name), dtype=torch.double)
    randomize(model, x)
    results = [check_equivalence(model, network, sites, x, seed) for seed in seeds]
    worst = max(r.difference for r in results)
    return {
        "rebuild_s": round(max(r.seconds for r in results), 2),
        "exact_input": _times(exact_shape(name)),
        "rebuilt_ok": worst <= EXACT,
        "difference": float(f"{worst:.3g}"),
        "sensitivity": float(f"{min(r.sensitivity for r in results):.2g}"),
        "seeds": len(results),
    }


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def family(name: str, kind: str) -> str:
    """The line of README's table that a network belongs to."""
    return KINDS.get(kind) or next((line for start, line in FAMILIES.items() if name.startswith(start)), name)


def count_reasons(frozen: pd.Series) -> str:
    """Reasons why channels stay, but for the model's outputs, with the number of networks; most frequent first."""
    reasons: dict[str, int] = {}
    for text in frozen.dropna():
        for reason in {part.split(" ", 1)[1] for part in text.split("; ")} - {OUTPUT}:
            reasons[reason] = reasons.get(reason, 0) + 1
    total = len(frozen)
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(why if n == total else f"{why} ({n} of {total})" for why, n in ordered) or "nothing"


def span(values: pd.Series, digits: int = 0) -> str:
    """The smallest to the largest value, as one number where they look alike."""
    low, high = f"{values.min():.{digits}f}", f"{values.max():.{digits}f}"
    return low if low == high else f"{low} to {high}"


def coverage_table() -> str:
    """README's table: the share of torchvision's networks that can be pruned, a row per family."""
    table = pd.read_csv(PATH)
    table = table.assign(exact=table.rebuilt_ok.astype(bool))
    done = table[table.exact]
    images = table[table.kind == "classification"]
    rest = table[table.kind != "classification"]
    lines = [
        f"{int(images.exact.sum())} of {len(images)} classification networks and {int(rest.exact.sum())} of "
        f"{len(rest)} others are rebuilt exactly: with a random half of the units of every site dropped, masked and "
        f"rebuilt network differ by at most {done.difference.max():.1g} (relative, float64, {span(done.seeds)} random "
        f"halves each; a mirrored image changes the same outputs by {done.sensitivity.min():.0e} at least). Random "
        f"weights, torch {table.torch.iloc[0]}, torchvision {table.torchvision.iloc[0]}; `python studies/coverage.py`, "
        "a row per network in `studies/results/coverage.csv`.",
        "",
        "| networks | exact | layers with so many % of the MACs are touched | MACs gone without every second unit, % "
        "| largest difference | what stays, besides the outputs |",
        "|---|---|---|---|---|---|",
    ]
    families = [family(*pair) for pair in zip(table.model, table.kind, strict=True)]
    for name, rows in table.groupby(pd.Series(families, index=table.index), sort=False):
        lines.append(
            f"| {name} | {int(rows.exact.sum())} of {len(rows)} | {span(100 * rows.prunable_macs)} "
            f"| {span(100 * rows.macs_gone_at_half)} | {rows.difference.max():.0e} | {count_reasons(rows.frozen)} |"
        )
    failed = [f"{row.model}: {row.why_not}" for row in table[~table.exact].itertuples()]
    return "\n".join([*lines, "", *(["Not rebuilt: " + "; ".join(failed), ""] if failed else [])])


def main() -> None:
    """Measure the networks that have no row yet; the CSV is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=names(), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    command = shlex.join(["python", "studies/coverage.py", *sys.argv[1:]])
    table = read_rows(args.out, ["model"])
    for name in args.models:
        if not args.again and name in set(table.model):
            continue
        start = time.process_time()
        row = measure(name, range(args.seeds))
        row |= {"seconds": round(time.process_time() - start, 1)}
        row |= provenance(command, args.seeds, ("torch", "torchvision"))
        gc.collect()
        table = _with_row(table, row)
        table.to_csv(args.out, index=False)
        shown = ("model", "units", "prunable_macs", "trace_s", "difference", "sensitivity", "why_not", "seconds")
        print({k: row.get(k) for k in shown}, flush=True)


def _with_row(table: pd.DataFrame, row: dict[str, Any]) -> pd.DataFrame:
    """The table with a network's row added or replaced, in the order of `names`, provenance last."""
    table = pd.concat([table[table.model != row["model"]], pd.DataFrame([row], dtype=object)], ignore_index=True)
    order = {known: i for i, known in enumerate(names())}
    table = table.sort_values("model", key=lambda column: column.map(order), ignore_index=True)
    measured = [column for column in table.columns if column not in (*LAST_COLUMNS, *PROVENANCE)]
    return table.reindex(columns=[*measured, *LAST_COLUMNS, *PROVENANCE])


if __name__ == "__main__":
    main()
