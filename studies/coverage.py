"""What jpq can prune in torchvision's networks, and whether the rebuilt networks are exact.

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
                         each seed a random half of the units of every site is dropped (weights: `law.scramble`)
    sensitivity          the smallest relative change of the rebuilt output when the image is mirrored: a wrong channel
                         changes the output by about that much, so a difference far below it is a finding
    why_not              what stopped it, where something did
    seconds              processor seconds of the whole row
"""

from __future__ import annotations

import argparse
import gc
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from jpq.export import float_equivalence
from jpq.tasks import zoo
from jpq.tracing import trace as tracing
from jpq.tracing.coverage import frozen_channels, halved_share, prunable_share
from jpq.tracing.decompose import decompose
from jpq.tracing.sites import channels
from jpq.types import JpqError

RESULTS = Path(__file__).parent / "results" / "coverage.csv"
EXACT = 1e-9
FULL_SIZE = ("vit", "maxvit", "mvit", "s3d", "ssd300")  # their code or their last pooling fixes the size of the input
SMALLER = {"classification": (3, 96, 96), "segmentation": (3, 96, 96), "detection": (3, 128, 128)}
CLIP = (3, 8, 64, 64)


def names() -> list[str]:
    """Every network of the table."""
    return [name + zoo.BACKBONE * (kind == "detection") for name, kind in zoo.kinds().items()]


def exact_shape(name: str) -> tuple[int, ...]:
    """One sample of what masked and rebuilt model are compared on."""
    if name.startswith(FULL_SIZE):
        return zoo.usual_shape(name)
    return SMALLER.get(zoo.kind_of(name), CLIP)


@contextmanager
def timed(module: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Inside, what `module.name` takes is added to `seconds[name]`."""
    work = getattr(module, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return work(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - start

    setattr(module, name, watched)
    try:
        yield
    finally:
        setattr(module, name, work)


def measure(name: str, seeds: Sequence[int], shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The row of one network, traced on two samples of `shape` (default: its usual one)."""
    kind, shape = zoo.kind_of(name), shape or zoo.usual_shape(name)
    row: dict[str, Any] = {"model": name, "kind": kind, "input": _times(shape)}
    torch.manual_seed(0)
    try:
        model = decompose(zoo.build_torchvision(name, zoo.CLASSES[kind]).eval())
        seconds: dict[str, float] = {}
        start = time.process_time()
        with timed(torch.export, "export", seconds), timed(tracing, "runs_smaller", seconds):
            network = tracing.trace(model, torch.zeros(2, *shape))
        sites = channels(network)
        whole = time.process_time() - start
        export, check = seconds["export"], seconds["runs_smaller"]
        row |= {
            "sites": len(sites),
            "units": sum(site.n for site in sites),
            "prunable_macs": round(float(prunable_share(network, sites)), 4),
            "macs_gone_at_half": round(float(halved_share(network, sites)), 4),
            "layers": len(network.layers),
            "frozen": "; ".join(f"{s.channels} {s.reason}" for s in frozen_channels(network, sites)),
            "unknown_ops": " ".join(network.unknown_ops),
            "macs": sum(layer.macs for layer in network.layers),
            "trace_s": round(whole, 2),
            "export_s": round(export, 2),
            "check_s": round(check, 2),
            "labels_s": round(whole - export - check, 2),
        }
        x = torch.randn(1, *exact_shape(name), dtype=torch.double)
        float_equivalence.randomize(model, x)
        found = [float_equivalence.check_equivalence(model, network, sites, x, seed) for seed in seeds]
        worst = max(v.difference for v in found)
        row |= {
            "rebuild_s": round(max(v.seconds for v in found), 2),
            "exact_input": _times(exact_shape(name)),
            "rebuilt_ok": worst <= EXACT,
            "difference": float(f"{worst:.3g}"),
            "sensitivity": float(f"{min(v.sensitivity for v in found):.2g}"),
            "seeds": len(found),
        }
    except (JpqError, RuntimeError) as error:
        row |= {"rebuilt_ok": False, "why_not": " ".join(str(error).split())[:300]}
    return row


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=names(), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = pd.read_csv(args.out) if args.out.exists() else pd.DataFrame({"model": []})
    for name in args.models:
        if not args.again and name in set(table.model):
            continue
        start = time.process_time()
        row = measure(name, range(args.seeds)) | {
            "seconds": round(time.process_time() - start, 1),
            "threads": args.threads,
            "torch": version("torch"),
            "torchvision": version("torchvision"),
            "hardware": f"{platform.machine()} CPU",
            "command": shlex.join(["python", "studies/coverage.py", *sys.argv[1:]]),
        }
        gc.collect()
        table = pd.concat([table[table.model != name], pd.DataFrame([row])], ignore_index=True)
        order = {known: i for i, known in enumerate(names())}
        table = table.sort_values("model", key=lambda column: column.map(order), ignore_index=True)
        last = ["difference", "sensitivity", "seeds", "why_not", "seconds", "threads", "torch", "torchvision"]
        first = [column for column in table.columns if column not in (*last, "hardware", "command")]
        table.reindex(columns=[*first, *last, "hardware", "command"]).to_csv(args.out, index=False)
        print(
            {
                k: row.get(k)
                for k in (
                    "model",
                    "units",
                    "prunable_macs",
                    "trace_s",
                    "difference",
                    "sensitivity",
                    "why_not",
                    "seconds",
                )
            },
            flush=True,
        )


if __name__ == "__main__":
    main()
