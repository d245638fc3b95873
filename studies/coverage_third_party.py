"""129 models of timm, transformers and others through the whole of jpq: read, counted, pruned, rebuilt and exported.

    pip install jpq[coverage]
    python studies/coverage_third_party.py [--models NAME ...] [--limit 240] [--read-only] [--again] [--out FILE.csv]

A row per model (`support/foreign_models.py`: 88 families of timm, 25 architectures of transformers, 16 others), with
random weights (`jpq.export.randomize`), batches of 2, processor seconds, small models first. Rows that the CSV has are
left as they are (--again: measured anew), so an interrupted run goes on. Each model has a process of its own (forked:
Linux, macOS) and `limit` processor seconds; what was measured before the limit stays. Models of more than 50 M
parameters are read, counted and rebuilt, but not compressed and exported: a step in float32 and verification in float64
would take minutes each. --read-only stops there for all; a run without it goes on with them.
Columns:

    traced, read_s       `jpq.decompose`, `jpq.trace` and `jpq.channels`, and their processor seconds
    layers, sites, units, prunable_macs, macs_gone_at_half, frozen, unknown_ops    as in studies/coverage.py
    macs                 multiply-accumulates of one sample by torch.utils.flop_counter, on the model as it came
    counted_share        those that jpq counts, over `macs`
    quantized_share      those in layers with quantizers, over `macs`
    products_share       those in products of two computed tensors (attention), over `macs`: at 32 bits
    float_layers         layers that stay at 32 bits, with the reason
    exact, difference    masked == rebuilt in float64 (difference at most 1e-9), a random half of every site dropped
    sensitivity          relative change of the same output for a mirrored input
    bops_goal, macs_goal 5 % of the BOPs of what can be quantized, and all of the rest; and MACs such that 60 % of what
                         goes without every second unit must go
    compressed, landing_s    `jpq.compress` and one step of Adam; `discretize`, in processor seconds
    final_difference     masked against small model in float64, after `finalize`
    exported, export_s   `jpq.export_onnx`; exported for a batch of 2
    verified             `jpq.verify` at a batch of 3; "warning" where more than a few decisions differ
    onnx_difference      largest relative difference of the small model and its file run as written, float32
    session_difference   the same in a default session of onnxruntime
    tp, tp_*             Torch-Pruning on the same model in its defaults (MetaPruner, magnitude, 50 %), by `tp_source`
    why_not              the stage that failed, and the error
    seconds              processor seconds of the whole row

Torch-Pruning's columns are from coverage_torch_pruning.csv: a run of 28 November 2026 on configurations of these models
that are the same but for details (vocabulary, numbers of positions).
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ["OMP_NUM_THREADS"] = "1"  # torch.set_num_threads would leave a pool of threads that forks cannot use

import pandas as pd
import torch
from support.foreign_models import ForeignModel, foreign_models
from support.independent_count import count_macs
from support.result_rows import RESULTS, provenance, read_rows
from support.staged import run_stages
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import jpq
from jpq.export import check_equivalence, randomize
from jpq.methods.quantizers import can_quantize
from jpq.tracing import Network, Site, call_model, collect_tensors, frozen_channels, halved_share, prunable_share

PATH = RESULTS / "coverage_third_party.csv"
TORCH_PRUNING = RESULTS / "coverage_torch_pruning.csv"
EXACT = 1e-9
LARGEST = 50_000_000  # parameters of the largest models that are compressed and exported
READ_ONLY = "not tried: read only"
BOPS = 0.05  # share of the BOPs that what can be quantized may keep
GONE = 0.6  # share of what goes without every second unit
PACKAGES = ("torch", "torchvision", "timm", "transformers", "segmentation-models-pytorch")
LAST_COLUMNS = ["tp", "tp_params_left", "tp_macs_gone", "tp_error", "tp_source", "why_not", "seconds"]
PROVENANCE = ["n", "threads", *(p.replace("-", "_") for p in PACKAGES), "hardware", "commit", "command"]

Row = dict[str, Any]


@dataclass
class Subject:
    """A model under measurement, with what the stages learn of it."""

    model: nn.Module
    example: Any
    batch: Any  # another batch, of 3 samples
    macs: int
    network: Network
    sites: tuple[Site, ...]
    quantized: float  # share of `macs`


def measure(foreign: ForeignModel, read_only: bool = False) -> Iterator[tuple[str, Row]]:
    """The stages of one model, or the first ones, with the columns measured before each."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, example = foreign.build().eval(), foreign.batch(2)
    parameters = sum(p.numel() for p in model.parameters())
    yield "count", {"input": _shapes(example), "params": parameters}
    randomize(model, example)
    model.float()
    macs = count_macs(model, foreign.batch(1))
    yield "read", {"macs": macs}
    start = time.process_time()
    plain = jpq.decompose(model, example)
    network = jpq.trace(plain, example)
    sites = jpq.channels(network)
    seconds = time.process_time() - start
    modules = dict(plain.named_modules())
    floats = {
        layer.name: layer.float_reason or type(modules.get(layer.name)).__name__
        for layer in network.layers
        if layer.float_reason or layer.name not in modules or not can_quantize(modules[layer.name])
    }
    quantized = sum(layer.macs for layer in network.layers if layer.name not in floats) / macs
    row = {"traced": True, "read_s": round(seconds, 2), "counted_share": round(network.macs / macs, 6)}
    row |= _network_columns(network, sites)
    row |= {
        "quantized_share": round(quantized, 4),
        "products_share": round(sum(p.macs for p in network.products) / macs, 4),
        "float_layers": "; ".join(f"{name}: {why}" for name, why in floats.items())[:300],
    }
    yield "rebuild", row
    subject = Subject(model, example, foreign.batch(3), macs, network, tuple(sites), quantized)
    row = _exactness_columns(plain, subject)
    if read_only or parameters > LARGEST:
        too_large = f"not tried: over {LARGEST // 1_000_000} M parameters"
        yield "", row | {"compressed": too_large if parameters > LARGEST else READ_ONLY}
        return
    yield "compress", row
    yield from _compress(subject)


def _network_columns(network: Network, sites: tuple[Site, ...]) -> Row:
    """What can go, and what cannot."""
    frozen = [f"{s.channels} {s.reason} [{', '.join(s.producers[:2])}]" for s in frozen_channels(network, sites)]
    return {
        "layers": len(network.layers),
        "sites": len(sites),
        "units": sum(site.n for site in sites),
        "prunable_macs": round(float(prunable_share(network, sites)), 4),
        "macs_gone_at_half": round(float(halved_share(network, sites)), 4),
        "frozen": "; ".join(frozen),
        "unknown_ops": " ".join(network.unknown_ops),
    }


def _exactness_columns(plain: nn.Module, subject: Subject) -> Row:
    """The equivalence of masked and rebuilt model in float64; nothing to compare where no channel can go."""
    if not subject.sites:
        return {"exact": "no site"}
    result = check_equivalence(plain.double(), subject.network, subject.sites, subject.example, seed=0)
    plain.float()
    return {
        "exact": result.difference <= EXACT,
        "difference": float(f"{result.difference:.3g}"),
        "sensitivity": float(f"{result.sensitivity:.2g}"),
    }


def _compress(subject: Subject) -> Iterator[tuple[str, Row]]:
    """One training step, discretization, the small model, its file, and their comparison."""
    halved = float(halved_share(subject.network, subject.sites))
    goals = {"bops": f"{ceil(100 * (BOPS * subject.quantized + 1 - subject.quantized))}%"}
    if subject.sites:
        goals["macs"] = f"{ceil(100 * (1 - GONE * halved))}%"
    session = jpq.compress(subject.model, subject.example, bops=goals["bops"], macs=goals.get("macs"), steps=2)
    session.train()
    optimizer = torch.optim.Adam(session.groups())
    loss = sum((t.float().square().mean() for t in _outputs(session, subject.example)), torch.zeros(()))
    (loss + session.pressure()).backward()
    optimizer.step()
    session.step()
    yield "land", {"bops_goal": goals["bops"], "macs_goal": goals.get("macs"), "compressed": True}
    start = time.process_time()
    session.discretize()
    yield "finalize", {"landing_s": round(time.process_time() - start, 2)}
    small = session.finalize()
    shares = {"bops_share": round(session.share(), 4), "macs_share": round(session.share("macs"), 4)}
    yield "export", shares
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "model.onnx", time.process_time()
        jpq.export_onnx(small, subject.example, path)
        yield "verify", {"exported": True, "export_s": round(time.process_time() - start, 2)}
        record = jpq.verify(session.net, small, path, [(subject.batch, None)], subject.example)
    written, default = record["rebuilt_vs_onnxruntime"], record["rebuilt_vs_onnxruntime_optimised"]
    yield (
        "",
        {
            "verified": "warning" if "warning" in record else True,
            "final_difference": float(f"{record['masked_vs_rebuilt_float64']:.3g}"),
            "onnx_difference": float(f"{written['largest_relative_difference']:.3g}"),
            "session_difference": float(f"{default['largest_relative_difference']:.3g}"),
        },
    )


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """The tensors of a model's output that a loss can use."""
    return [t for t in collect_tensors(call_model(model, example)) if t.is_floating_point() and t.requires_grad]


def _shapes(example: Any) -> str:
    return " ".join("x".join(map(str, leaf.shape)) for leaf in tree_leaves(example) if isinstance(leaf, Tensor))


def torch_pruning_columns(name: str) -> Row:
    """Torch-Pruning on the same model."""
    table = read_rows(TORCH_PRUNING, ["model"]).set_index("model")
    return {} if name not in table.index else table.loc[name].to_dict()


def coverage_third_party_table() -> str:
    """README's table: how many of the models of each group pass each stage."""
    table = pd.read_csv(PATH)
    groups = [(name, table[table.group == name]) for name in ("timm", "transformers", "others")]
    groups.append(("all", table))
    lines = [
        "| | " + " | ".join(f"{name} ({len(rows)})" for name, rows in groups) + " |",
        "|---|" + "---|" * len(groups),
    ]
    for title, cell in _CELLS.items():
        lines.append(f"| {title} | " + " | ".join(cell(rows) for _, rows in groups) + " |")
    row = table.iloc[0]
    lines += [
        "",
        f"Random weights; torch {row.torch}, timm {row.timm}, transformers {row.transformers}; {row.hardware}, one "
        "thread, processor seconds. Torch-Pruning in its defaults (MetaPruner, magnitude, 50 %), whether it runs, "
        "not whether its result is equal. `python studies/coverage_third_party.py`, a row per model in "
        "`studies/results/coverage_third_party.csv`.",
        "",
    ]
    failed = [f"`{row.model}` ({row.why_not.rstrip('.')})" for row in table[table.why_not.notna()].itertuples()]
    return "\n".join([*lines, *(["What failed: " + "; ".join(failed) + ".", ""] if failed else [])])


def _is_true(column: pd.Series) -> pd.Series:
    """Where a column that also holds sentences is True."""
    return column.astype(str) == "True"


def _tried(table: pd.DataFrame) -> int:
    """Number of models that were to be compressed: those that are read and not too large."""
    return int((_is_true(table.traced) & ~table.compressed.astype(str).str.startswith("not tried")).sum())


def _seconds(column: pd.Series) -> str:
    return f"{column.median():.1f} / {column.max():.0f}" if column.notna().any() else "-"


_CELLS = {
    "traced": lambda t: f"{_is_true(t.traced).sum()}",
    "rebuilt == masked in float64, of those with a site": lambda t: (
        f"{_is_true(t.exact).sum()} of {t.difference.notna().sum()}"
    ),
    "nothing can go (no site)": lambda t: f"{(t.exact == 'no site').sum()}",
    "all MACs by torch's counter are counted": lambda t: f"{(t.counted_share == 1).sum()} of {t.macs.notna().sum()}",
    "in quantized layers, % of all MACs, median (least)": lambda t: (
        f"{100 * t.quantized_share.median():.1f} ({100 * t.quantized_share.min():.1f})"
    ),
    "in products of attention, % of all MACs, median (most)": lambda t: (
        f"{100 * t.products_share.median():.1f} ({100 * t.products_share.max():.1f})"
    ),
    "layers that stay at 32 bits, number of models": lambda t: f"{t.float_layers.notna().sum()}",
    "MACs touched by sites, %, median (least)": lambda t: (
        f"{100 * t.prunable_macs.median():.0f} ({100 * t.prunable_macs.min():.0f})"
    ),
    "compressed and trained one step, of those tried": lambda t: f"{_is_true(t.compressed).sum()} of {_tried(t)}",
    "not compressed: over 50 M parameters / read only so far": lambda t: (
        f"{t.compressed.astype(str).str.contains('over').sum()} / {(t.compressed == READ_ONLY).sum()}"
    ),
    "landed": lambda t: f"{t.landing_s.notna().sum()}",
    "exported": lambda t: f"{_is_true(t.exported).sum()}",
    "verified at another batch size": lambda t: f"{_is_true(t.verified).sum()}",
    "seconds to read, median / worst": lambda t: _seconds(t.read_s),
    "seconds to land, median / worst": lambda t: _seconds(t.landing_s),
    "Torch-Pruning runs": lambda t: f"{(t.tp == 'ok').sum()}",
}


def main() -> None:
    """Measure the models that have no row yet; the CSV is written after each."""
    models = foreign_models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(models), metavar="NAME")
    parser.add_argument("--limit", type=int, default=240, metavar="PROCESSOR_SECONDS")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    command = shlex.join(["python", "studies/coverage_third_party.py", *sys.argv[1:]])
    for package in ("segmentation_models_pytorch", "timm", "transformers"):
        import_module(package)  # once, before processes are forked
    rows = read_rows(args.out, ["model", "compressed"], dtype=str)
    done = set(rows.model if args.read_only else rows.model[rows.compressed != READ_ONLY])
    for name in args.models:
        if name in done and not args.again:
            continue
        foreign = models[name]
        row: Row = {"model": name, "group": foreign.group}
        row |= run_stages(partial(measure, foreign, args.read_only), args.limit)
        row |= torch_pruning_columns(name) | provenance(command, 1, PACKAGES)
        _write_row(args.out, row, list(models))
        shown = ("model", "read_s", "counted_share", "quantized_share", "difference", "landing_s", "verified")
        print({k: row.get(k) for k in (*shown, "why_not", "seconds")}, flush=True)


def _write_row(path: Path, row: Row, order: list[str]) -> None:
    """Add or replace a model's row; models in their order, provenance last."""
    table = read_rows(path, ["model"], dtype=str)
    table = pd.concat([table[table.model != row["model"]], pd.DataFrame([row], dtype=object)], ignore_index=True)
    table = table.sort_values("model", key=lambda column: column.map(order.index), ignore_index=True)
    measured = [column for column in table.columns if column not in (*LAST_COLUMNS, *PROVENANCE)]
    table.reindex(columns=[*measured, *LAST_COLUMNS, *PROVENANCE]).to_csv(path, index=False)


if __name__ == "__main__":
    main()
