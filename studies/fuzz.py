"""Random small networks through the whole of jpq: counted, pruned, rebuilt and exported as they compute.

    python studies/fuzz.py [--seeds 0:2000] [--threads 1] [--out FILE.csv]

Faults that it has found are listed in `results/fuzz_faults.csv`, with the commit that mended each.

A row per seed (`support.random_networks`: groups, dilation, transposed, 1-d to 3-d, reshapes, branches, shared and
computed weights, norms of all kinds, recurrent layers, attention). Seeds that have a row are left as they are, so an
interrupted run goes on, and two processes can share the work. Columns:

    kind, parts          dims of the example; kinds of modules in the network
    macs, counted        multiply-accumulates of one sample by torch's FlopCounterMode, and by `jpq.trace`
    decomposed           relative difference of `jpq.decompose`'s model in float64
    shrunk               the same of a model without a random half of the units of every site, and the masked one
    method               drawn by the seed; one training step, then it is discretized and rebuilt
    rebuilt              relative difference of masked and rebuilt model in float64
    planned, measured    bit-operations by the plan, and by running the rebuilt model
    exported             largest relative difference of the rebuilt model and its ONNX file in a default session of
                         onnxruntime, float32, 8 samples
    spread               largest difference of an output of these samples from its mean, over the largest output
    crossed              samples of these beyond 1e-3 x spread, and beyond what rounding of single-precision numbers
                         explains (2^-20): a value fell on the other side of a rounding boundary
    unstable             the same, of samples that have an inexact value so close to a boundary that two programs may
                         round it differently (`samples_at_a_boundary`, decided without the file): they break no law
    failed               what did not hold: "macs", "decomposed", "shrunk", "rebuilt", "measured", "exported", or the
                         step that raised; "" where everything holds
    why                  the message, where there was one

Seed 1416 has no row: plain training of its float network ends in memory that PyTorch corrupts (2.14 on a CPU, the
gradient of `Conv2d(4, 4, 1, stride=2)` for 10 x 10 pixels).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import shlex
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pandas as pd
import torch
from support.independent_count import count_macs
from support.random_networks import random_network
from support.result_rows import RESULTS, append_row, provenance, read_rows
from torch import Tensor, nn

import jpq
from jpq.costs import bops
from jpq.export import check_equivalence, randomize
from jpq.methods.quantizers import act_quantizer

PATH = RESULTS / "fuzz.csv"
EXACT = 1e-9  # relative difference in float64
CLOSE = 1e-3  # relative difference in float32 below which no rounding boundary was crossed
ROUNDING = 2**-20  # relative difference that 16 roundings to 24 binary digits explain
METHODS = (
    *(
        "djpq",
        "djpq",
        "djpq",
        "djpq-pow2",
        "l0",
        "l0",
        "gdp",
        "uniform",
        "two-stage",
        "bayesian-bits",
        "dhp",
        "upscale",
    ),
    *("dais", "dpp", "pdp", "smart", "codeq", "spp"),
)
TARGETS = ("0.5%", "1%", "2%", "4%", "6%", "15%", "40%", "98%")  # bit-operations; 6.25 % is the whole network at 8 bits
SAMPLES = 8
MARGIN = 2**-12  # steps of a quantizer: 16 roundings to 24 binary digits of its largest integer, 127


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


@torch.no_grad()
def check_float(row: dict[str, Any], model: nn.Module, x: Tensor, seed: int) -> nn.Module:
    """Count the model, decompose it, and drop half of its units; gives the decomposed model."""
    row["step"] = "decompose"
    row["macs"] = count_macs(model, x) // len(x)
    wide = copy.deepcopy(model).double()
    decomposed = jpq.decompose(wide, x.double()).eval()
    row["decomposed"] = relative_difference(wide(x.double()), decomposed(x.double()))
    plain = jpq.decompose(model, x).eval()
    row["step"] = "trace"
    network = jpq.trace(plain, x)
    sites = jpq.channels(network)
    row["counted"] = sum(layer.macs for layer in network.layers) + sum(product.macs for product in network.products)
    row |= {"layers": len(network.layers), "products": len(network.products), "units": sum(s.n for s in sites)}
    row["step"] = "shrink"
    randomize(decomposed, x.double())
    row["shrunk"] = check_equivalence(decomposed, network, sites, x.double(), seed).difference if sites else 0.0
    return plain


def compress(model: nn.Module, x: Tensor, method: str, start: int) -> tuple[jpq.CompressionSession, str]:
    """A session at the first target, from TARGETS[start] on, that the network can meet, and that target."""
    for target in TARGETS[start:-1]:
        with contextlib.suppress(jpq.JpqError):
            return jpq.compress(model, x, method, bops=target, steps=2), target
    try:
        return jpq.compress(model, x, method, bops=TARGETS[-1], steps=2), TARGETS[-1]
    except jpq.JpqError as error:
        if "density" not in str(error):
            raise
    try:
        most = 0.95  # so few channels may go that half of the MACs cannot
        return jpq.compress(model, x, method, bops=TARGETS[-1], steps=2, density=most), TARGETS[-1]
    except jpq.JpqError as error:
        if "density" not in str(error):
            raise
    return jpq.compress(model, x, method, bops=TARGETS[-1], steps=2, density=1.0), TARGETS[-1]  # none can


@torch.no_grad()
def samples_at_a_boundary(small: nn.Module, samples: Tensor) -> Tensor:
    """Which samples have a value that no two programs need round alike, by PyTorch alone: bool [SAMPLES].

    Such a value is read by a quantizer, from a tensor that is not the same in single and in double precision (it comes
    from a norm, a softmax, a sigmoid, an average), and lies within MARGIN steps of a rounding boundary, or on it, as
    the sigmoid of 0 may.
    """
    seen: list[Tensor] = []
    layers = [m for m in small.modules() if hasattr(m, "weight_quant")]
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.append(args[0] / act_quantizer(m).scale())) for m in layers
    ]
    try:
        for x in (samples, samples.double()):
            small.to(x.dtype)(x)
    finally:
        small.float()
        for hook in hooks:
            hook.remove()
    found = torch.zeros(len(samples), dtype=torch.bool)
    for single, double in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
        close = (double - double.floor() - 0.5).abs() < MARGIN
        risky = close & bool((single.double() != double).any())
        if len(risky) % len(samples) == 0:
            found |= risky.reshape(len(samples), -1).any(1)
        else:  # the batch is not the first dim
            found |= risky.any()
    return found


def check_compressed(row: dict[str, Any], model: nn.Module, x: Tensor, folder: Path) -> None:
    """One step of a search, then rebuild, count by running, export and run."""
    row["step"] = "compress"
    session, row["target"] = compress(model, x, row["method"], start=row["seed"] % 4)
    session.train()
    optimizer = torch.optim.Adam(session.groups())
    row["step"] = "train"
    (session(x).square().mean() + session.pressure()).backward()
    optimizer.step()
    session.step()
    row["step"] = "finalize"
    small = session.finalize().eval()
    session.eval()
    row["step"] = "compare"
    row["planned"] = int(bops(session.net.exact_usage()))
    row["measured"] = jpq.measure(small, x)["bops"]
    with torch.no_grad():
        wide = [net.double()(x.double()) for net in (session, small)]
    row["rebuilt"] = relative_difference(*wide)
    small.float()
    row["step"] = "export"
    path = folder / "model.onnx"
    jpq.export_onnx(small, x, path)
    row["step"] = "run"
    samples = torch.randn(SAMPLES, *x.shape[1:])
    runner = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    at_boundary = samples_at_a_boundary(small, samples)
    with torch.no_grad():
        inside = small(samples)
    outside = torch.from_numpy(runner.run(None, {runner.get_inputs()[0].name: samples.numpy()})[0])
    apart = (inside - outside).abs().flatten(1).amax(1) / inside.abs().max().clamp_min(1e-30)
    spread = float((inside - inside.mean(0)).abs().max() / inside.abs().max().clamp_min(1e-30))
    far = apart > max(CLOSE * min(1.0, spread), ROUNDING)
    row |= {"spread": spread, "exported": float(apart.max())}
    row |= {"crossed": int((far & ~at_boundary).sum()), "unstable": int((far & at_boundary).sum())}


def failures(row: dict[str, Any]) -> str:
    """The laws that a finished row breaks."""
    broken = [law for law in ("decomposed", "shrunk", "rebuilt") if not row[law] <= EXACT]
    broken += ["macs"] * (row["macs"] != row["counted"]) + ["measured"] * (row["planned"] != row["measured"])
    return " ".join(broken + ["exported"] * (row["crossed"] > 0))


def examine(seed: int) -> dict[str, Any]:
    """The row of one seed."""
    model, x = random_network(seed)
    parts = sorted({type(m).__name__ for m in model.modules()} - {"Sequential", "ModuleList"})
    row: dict[str, Any] = {"seed": seed, "kind": x.dim() - 2, "parts": " ".join(parts)}
    row["method"] = random.Random(seed).choice(METHODS)
    try:
        plain = check_float(row, model, x, seed)
        with tempfile.TemporaryDirectory() as folder:
            check_compressed(row, model if seed % 2 else plain, x, Path(folder))
        row["failed"] = failures(row)
    except Exception as error:  # whatever it is, it is a finding
        row["failed"] = row.pop("step")
        row["why"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return row


COLUMNS = (
    *("seed", "kind", "method", "layers", "products", "units", "macs", "counted", "decomposed", "shrunk", "rebuilt"),
    *(
        "target",
        "planned",
        "measured",
        "spread",
        "exported",
        "crossed",
        "unstable",
        "failed",
        "why",
        "seconds",
        "parts",
    ),
)


def fuzz_table() -> str:
    """Totals of the networks that were examined, and the faults that they have found."""
    table = pd.read_csv(PATH)
    held = table[table.failed.isna()]
    compared = held[held.unstable == 0]
    same_macs, same_bops = int((table.macs == table.counted).sum()), int((held.planned == held.measured).sum())
    exact, unstable = int((compared.exported == 0).sum()), int((held.unstable > 0).sum())
    absent = ", ".join(map(str, sorted(set(range(table.seed.min(), table.seed.max())) - set(table.seed))))
    seeds = f"{table.seed.min()} to {table.seed.max()}" + (f" without {absent}" if absent else "")
    lines = [
        f"{len(table):,} random small networks (seeds {seeds}; each through one method "
        f"and one training step): {len(held)} hold every law, {len(table) - len(held)} break one. Multiply-accumulates "
        f"equal torch's own counter in {same_macs}, the rebuilt model's bit-operations the plan's in {same_bops} of "
        f"{len(held)}. The largest difference of masked and rebuilt model is {held.rebuilt.max():.0e}, of masked and "
        f"shrunk float model {held.shrunk.max():.0e} (float64). In a default session of onnxruntime {exact} of "
        f"{len(compared)} files give the model's numbers to the bit, the largest difference is "
        f"{compared.exported.max():.0e}; {unstable} more have a value on a rounding boundary behind a sigmoid, norm or "
        "average. `python studies/fuzz.py`, [fuzz.csv](results/fuzz.csv).",
        "",
        "| fault that they found | cause | mended in |",
        "|---|---|---|",
    ]
    faults = pd.read_csv(RESULTS / "fuzz_faults.csv")
    lines += [f"| {fault} | {cause} | {mended} |" for fault, cause, mended in faults.itertuples(index=False)]
    return "\n".join(lines)


def main() -> None:
    """Examine the seeds that have no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:2000", metavar="FROM:TO")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    first, last = map(int, args.seeds.split(":"))
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    command = shlex.join(["python", "studies/fuzz.py", "--seeds", args.seeds])
    done = set(read_rows(args.out, ["seed"]).seed) if args.out.exists() else set()
    for seed in range(first, last):
        if seed in done:
            continue
        start = time.process_time()
        row = examine(seed)
        row["seconds"] = round(time.process_time() - start, 1)
        if row["failed"]:
            print(f"{seed}: {row['failed']}: {row.get('why', '')}"[:200], flush=True)
        append_row(args.out, {c: row.get(c, "") for c in COLUMNS} | provenance(command, 1, ("torch", "onnxruntime")))


if __name__ == "__main__":
    main()
