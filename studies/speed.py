"""Time of compressed models in onnxruntime beside fp32 and plain int8 of the unpruned model, by budget.

Weights are random: time does not depend on them. A budget is met by channels until 8 bits fit it, or (at 1 %) by fewer
channels and 4 bits: a CPU's time follows MACs and integer kernels, not bits below 8. Results before sums and poolings
are rounded (output_bits=8) but for the rows that say "float results". Channels stay in multiples (of 16 where there
are depthwise convolutions, else of 8, or of 4 where 8 leave too much) but for the rows that say "any channels". All
models of one architecture take turns in one process; a ratio to fp32 is the median of the turns' ratios, one to int8
that of the two medians. "clock": with one thread the processor's time too, which other processes on the machine hardly
disturb (they do disturb the wall clock, and two threads most of all). AMD EPYC, November 2026, n = 40 turns or more:
ResNet18 at 1 % and 8 bits is 8.9 times as fast as fp32 with one thread.

    python studies/speed.py --model torchvision:resnet18 --rounds 40
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from support.result_rows import RESULTS, provenance
from torch import Tensor, nn

import jpq
from jpq.config import Budget, Decide
from jpq.export.packed import pack_model
from jpq.export.timing import FULL, INT8, Timing, reference_models, time_in_turns
from jpq.tasks import build_model

PATH = RESULTS / "speed.csv"
SHAPES = {"resnet20": (3, 32, 32), "torchvision:resnet18": (3, 224, 224), "torchvision:mobilenet_v2": (3, 224, 224)}
FLOAT_PRODUCT_BITS = 32 * 32  # weight bits x activation bits
MULTIPLES = {"resnet20": 8, "torchvision:resnet18": 8, "torchvision:mobilenet_v2": 16}
COLUMNS = [
    "model",
    "what",
    "budget",
    "output_bits",
    "channel_multiple",
    "bops_share",
    "macs_share",
    "w_bits_mean",
    "a_bits_mean",
    "packed_bytes",
    "clock",
    "threads",
    "batch",
    "median_ms",
    "p95_ms",
    "least_ms",
    "times_as_fast_as_fp32",
    "times_as_fast_as_int8",
    "float_layers",
    "layers",
    "onnx_bytes",
    "onnx_bytes_over_fp32",
    "n",
    "hardware",
    "onnxruntime",
    "torch",
    "commit",
    "command",
]


@dataclass(frozen=True)
class Variant:
    """One compressed model: its budget, bits, whether results are rounded, whether channels stay in multiples."""

    budget: str
    bits: int
    output_bits: int = 8  # 0: results of layers stay in floating point
    in_multiples: bool = True

    @property
    def label(self) -> str:
        """The name in the column `what`."""
        text = f"{self.budget}, {self.bits} bits" + ("" if self.output_bits else ", float results")
        return text if self.in_multiples else f"{text}, any channels"


VARIANTS = [
    *(Variant(budget, bits) for budget, bits in [("4%", 8), ("2%", 8), ("1%", 8), ("1%", 4), ("0.5%", 8)]),
    *(Variant(budget, bits, in_multiples=False) for budget, bits in [("4%", 8), ("1%", 8), ("1%", 4)]),
    *(Variant("1%", bits, output_bits=0) for bits in (8, 4)),
]


def compress(
    model: nn.Module, example: Tensor, variant: Variant, multiple: int
) -> tuple[nn.Module, jpq.Plan, float, int]:
    """(small model, plan, share of the BOPs, multiple): as many channels as leave room for the bits everywhere.

    The multiple is halved, down to 4, where the budget leaves too few channels for it.
    """
    share = float(variant.budget.rstrip("%")) / 100
    decide = Decide(
        method="two-stage",
        density=min(1.0, share * FLOAT_PRODUCT_BITS / variant.bits**2),
        allocator="uniform",
        score="l1",
        w_bits=(2, variant.bits),
        a_bits=(2, variant.bits),
        output_bits=variant.output_bits,
        channel_multiple=multiple,
    )
    try:
        session = jpq.compress(model, example, decide=decide, budget=Budget(target_bops=variant.budget))
    except jpq.JpqError:  # too few channels for that multiple
        if multiple <= 4:
            raise
        return compress(model, example, variant, multiple // 2)
    session.discretize()
    small, plan = jpq.rebuild(session.net, model)
    return small, plan, session.share(), multiple


def export_variants(
    name: str, dense: nn.Module, example: Tensor, folder: Path
) -> tuple[dict[str, Path], dict[str, dict[str, object]]]:
    """(ONNX files of all models by label, columns that describe the compressed ones by label)."""
    macs = dense_macs(dense, example)
    columns, paths = {}, {}
    for variant in VARIANTS:
        multiple = MULTIPLES[name] if variant.in_multiples else 1
        small, plan, share, multiple = compress(dense, example, variant, multiple)
        path = folder / f"{len(paths)}c.onnx"
        if not paths:
            paths = reference_models(dense, plan, SHAPES[name], folder)
            paths.pop("fp32, pruned")
        jpq.export_onnx(small, example, path)
        widths = [(p.w_bits, p.a_bits) for p in plan.layers.values()]
        columns[variant.label] = {
            "budget": variant.budget,
            "output_bits": variant.output_bits,
            "channel_multiple": multiple,
            "bops_share": round(share, 6),
            "macs_share": round(jpq.measure(small, example)["macs"] / macs, 4),
            "w_bits_mean": round(sum(w for w, _ in widths) / len(widths), 2),
            "a_bits_mean": round(sum(a for _, a in widths) / len(widths), 2),
            "packed_bytes": pack_model(small, plan, example[..., :64, :64], folder / "packed").total,
        }
        paths[variant.label] = path
        print(name, variant.label, columns[variant.label], flush=True)
    return paths, columns


def dense_macs(dense: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of the unpruned model, counted by running it."""
    decide = Decide(method="uniform", w_bits=(8, 8), a_bits=(8, 8))
    session = jpq.compress(dense, example, decide=decide, budget=Budget(target_bops="100%"))
    return jpq.measure(session.finalize(), example)["macs"]


def measure_rows(name: str, threads: list[int], rounds: int, command: str) -> Iterator[dict[str, object]]:
    """A row for each model of one architecture, clock and number of threads."""
    torch.manual_seed(0)
    dense = build_model(name, 10 if SHAPES[name][-1] == 32 else 1000, 3).eval()
    example = torch.randn(1, *SHAPES[name], generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        paths, columns = export_variants(name, dense, example, Path(folder))
        processor = time_in_turns(paths, ["onnxruntime"], [1], [1], rounds, clock=time.process_time)
        wall = time_in_turns(paths, ["onnxruntime"], threads, [1], rounds)
    timings = [*(("processor", t) for t in processor), *(("wall", t) for t in wall)]
    int8_ms = {(clock, t.threads): t.median_ms for clock, t in timings if t.model == INT8}
    full_bytes = next(t.bytes for _, t in timings if t.model == FULL)
    for clock, t in timings:
        yield {
            "model": name,
            "what": t.model,
            **columns.get(t.model, {}),
            "clock": clock,
            **_timing_columns(t, int8_ms[clock, t.threads], full_bytes),
            **provenance(command, t.n, ("onnxruntime", "torch"), t.threads),
        }


def _timing_columns(t: Timing, int8_ms: float, full_bytes: int) -> dict[str, object]:
    """Measured time and size of one model."""
    return {
        "batch": t.batch,
        "median_ms": round(t.median_ms, 4),
        "p95_ms": round(t.p95_ms, 4),
        "least_ms": round(t.least_ms, 4),
        "times_as_fast_as_fp32": round(t.over_full, 3),
        "times_as_fast_as_int8": round(int8_ms / t.median_ms, 3),
        "float_layers": t.float_layers,
        "layers": t.layers,
        "onnx_bytes": t.bytes,
        "onnx_bytes_over_fp32": round(t.bytes / full_bytes, 4),
    }


def speed_table() -> str:
    """README's table: time and size of compressed models beside fp32 and plain int8."""
    table = pd.read_csv(PATH, keep_default_na=False)
    lines = [
        "| model | BOPs, bits | channels in multiples of | MACs, % | ms | as fast as fp32 | as fast as int8 "
        "| two threads: fp32 | int8 | layers in float | `model.onnx`, % of fp32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, what in table[["model", "what"]].drop_duplicates().itertuples(index=False):
        rows = table[(table.model == model) & (table.what == what)]
        single, double = rows[rows.clock == "processor"].iloc[0], rows[rows.threads == 2].iloc[0]
        macs = 100 * float(single.macs_share) if single.macs_share else 100
        multiple = int(float(single.channel_multiple)) if single.channel_multiple else ""
        ratios = [f"{r:.2f}x" for t in (single, double) for r in (t.times_as_fast_as_fp32, t.times_as_fast_as_int8)]
        lines.append(
            f"| {model.split(':')[-1]} | {what.removesuffix(', any channels')} | {multiple} | {macs:.0f} "
            f"| {single.median_ms:.2f} | {' | '.join(ratios)} | {single.float_layers} of {single.layers} "
            f"| {100 * single.onnx_bytes_over_fp32:.1f} |"
        )
    head = table.iloc[0]
    lines += [
        "",
        f"Random weights, one image, onnxruntime {head.onnxruntime} on {head.hardware} otherwise idle; "
        f"medians of {head.n} turns in one process: the processor's time with one thread, the wall clock's ratios "
        "with two. Channels in multiples: `--channel-multiple`. int8: all channels at 8 bits, results rounded. Float "
        "results: without `--output-bits`. `python studies/speed.py`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure each architecture; its rows replace the old ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    command = shlex.join(["python", "studies/speed.py", *sys.argv[1:]])
    for name in args.model:
        rows = list(measure_rows(name, args.threads, args.rounds, command))
        earlier = []
        if args.out.exists():
            with args.out.open(newline="", encoding="utf-8") as file:
                earlier = [r for r in csv.DictReader(file) if r["model"] != name]
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows([*earlier, *rows])
        shown = ("model", "what", "clock", "threads", "median_ms", "times_as_fast_as_fp32", "times_as_fast_as_int8")
        for row in rows:
            print(*(row[k] for k in shown))


if __name__ == "__main__":
    main()
