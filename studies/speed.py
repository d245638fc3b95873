"""How fast compressed models are in onnxruntime, beside fp32 and beside plain int8 of the unpruned model, by budget.

Weights are random: time does not depend on them. A budget is met by channels until 8 bits fit it, or (at 1 %) by fewer
channels and 4 bits: a CPU's time follows MACs and integer kernels, not bits below 8. Results before sums and poolings
are rounded (output_bits=8) but for the rows that say "float results". Channels stay in multiples (of 16 where there
are depthwise convolutions, else of 8, or of 4 where 8 leave too much) but for the rows that say "any channels". All
models of one architecture take turns in one process; a ratio to fp32 is the median of the turns' ratios, one to int8
that of the two medians. "clock": with one thread the processor's time too, which other processes on the machine hardly
disturb (they do disturb the wall clock, and two threads most of all).

    python studies/speed.py --model torchvision:resnet18 --rounds 40
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

import jpq
from jpq.export.onnx import export
from jpq.export.packed.model import pack
from jpq.export.timing.compare import FULL, INT8, reference_models, time_in_turns
from jpq.export.timing.runner import hardware
from jpq.tasks import models

RESULTS = Path(__file__).parent / "results" / "speed.csv"
SHAPES = {"resnet20": (3, 32, 32), "torchvision:resnet18": (3, 224, 224), "torchvision:mobilenet_v2": (3, 224, 224)}
FLOAT_BITS = 32 * 32
MULTIPLES = {"resnet20": 8, "torchvision:resnet18": 8, "torchvision:mobilenet_v2": 16}
POINTS = [("4%", 8), ("2%", 8), ("1%", 8), ("1%", 4), ("0.5%", 8)]
ROUNDED = [(budget, bits, 8, True) for budget, bits in POINTS]
ROWS = [*ROUNDED, ("4%", 8, 8, False), ("1%", 8, 8, False), ("1%", 4, 8, False), ("1%", 8, 0, True), ("1%", 4, 0, True)]


def compressed(model, example, budget, bits, output_bits, multiple):
    """(small model, plan, share of the BOPs, multiple): as many channels as leave room for `bits` everywhere."""
    share = float(budget.rstrip("%")) / 100
    density = min(1.0, share * FLOAT_BITS / bits**2)
    try:
        joint = jpq.compress(
            model,
            example,
            method="two-stage",
            bops=budget,
            density=density,
            allocator="uniform",
            score="l1",
            w_bits=(2, bits),
            a_bits=(2, bits),
            output_bits=output_bits,
            channel_multiple=multiple,
        )
    except jpq.JpqError:  # too few channels for that multiple
        if multiple <= 4:
            raise
        return compressed(model, example, budget, bits, output_bits, multiple // 2)
    joint.discretize()
    small, plan = jpq.rebuild(joint.net, joint._dense[0])
    return small, plan, joint.share(), multiple


def study(name, threads, rounds, command):
    torch.manual_seed(0)
    shape = SHAPES[name]
    dense = models.build(name, 10 if shape[-1] == 32 else 1000, 3).eval()
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    full = jpq.compress(dense, example, method="uniform", bops="100%", w_bits=(8, 8), a_bits=(8, 8))
    macs = jpq.measure(full.finalize(), example)["macs"]
    about, paths = {}, {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for budget, bits, output_bits, even in ROWS:
            multiple = MULTIPLES[name] if even else 1
            small, plan, share, multiple = compressed(dense, example, budget, bits, output_bits, multiple)
            label = f"{budget}, {bits} bits" + ("" if output_bits else ", float results")
            label += "" if even else ", any channels"
            path = folder / f"{len(paths)}c.onnx"
            if not paths:
                paths = reference_models(dense, plan, shape, folder)
                paths.pop("fp32, pruned")
            export.export(small, example, path)
            packed = pack(small, plan, example[..., :64, :64], folder / "packed").total
            counted = jpq.measure(small, example)
            widths = [(p.w_bits, p.a_bits) for p in plan.layers.values()]
            about[label] = {
                "budget": budget,
                "output_bits": output_bits,
                "channel_multiple": multiple,
                "bops_share": round(share, 6),
                "macs_share": round(counted["macs"] / macs, 4),
                "w_bits_mean": round(sum(w for w, _ in widths) / len(widths), 2),
                "a_bits_mean": round(sum(a for _, a in widths) / len(widths), 2),
                "packed_bytes": packed,
            }
            paths[label] = path
            print(name, label, about[label], flush=True)
        times = [
            ("processor", t) for t in time_in_turns(paths, ["onnxruntime"], [1], [1], rounds, clock=time.process_time)
        ]
        times += [("wall", t) for t in time_in_turns(paths, ["onnxruntime"], threads, [1], rounds)]
    int8 = {(clock, t.threads): t.median_ms for clock, t in times if t.model == INT8}
    first = next(t.bytes for _, t in times if t.model == FULL)
    for clock, t in times:
        row = {
            "model": name,
            "what": t.model,
            **about.get(t.model, {}),
            "clock": clock,
            "threads": t.threads,
            "batch": t.batch,
            "median_ms": round(t.median_ms, 4),
            "p95_ms": round(t.p95_ms, 4),
            "least_ms": round(t.least_ms, 4),
            "times_as_fast_as_fp32": round(t.over_full, 3),
            "times_as_fast_as_int8": round(int8[clock, t.threads] / t.median_ms, 3),
            "float_layers": t.float_layers,
            "layers": t.layers,
            "onnx_bytes": t.bytes,
            "onnx_bytes_over_fp32": round(t.bytes / first, 4),
            "n": t.n,
            "hardware": hardware(),
            "onnxruntime": version("onnxruntime"),
            "torch": torch.__version__,
            "command": command,
        }
        yield row


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
    "command",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    command = shlex.join(["python", "studies/speed.py", *sys.argv[1:]])
    for name in args.model:
        rows = list(study(name, args.threads, args.rounds, command))
        old = []
        if args.out.exists():
            with args.out.open(newline="") as file:
                old = [r for r in csv.DictReader(file) if r["model"] != name]
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows([*old, *rows])
        shown = ("model", "what", "clock", "threads", "median_ms", "times_as_fast_as_fp32", "times_as_fast_as_int8")
        for row in rows:
            print(*(row[k] for k in shown))


if __name__ == "__main__":
    main()
