"""Other tools that make networks smaller, at the same cost as jpq: ResNet8 on CIFAR-10, a few epochs.

    CIFAR10_ROOT=DIR python studies/other_tools.py [--tools ...] [--targets 1% 0.5%] [--seeds 0 1 2] [--epochs 4]
    python studies/other_tools.py --list           # the tools, and what to install for each

Float weights, 8,000 training images, batches, epochs and test images are those of joint_cifar.py, which makes jpq's
own rows. A tool is driven as its documentation says, by its public functions; the training loop, which all of them
leave to the user, is nearly jpq's for everyone (studies/support/tools/job.py). Bit-operations are counted the same
way for all: MACs of convolutions and linear layers of the network as it came out, times bits of weights, times bits of
inputs. Test accuracy is read once per run. Rows go to results/other_tools.csv; a run whose row is there is skipped.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product

import pandas as pd
import torch
from joint_cifar import BASE
from support.result_rows import RESULTS, append_row, provenance, read_rows
from support.tools.job import Job, Small, count_macs

from jpq.tasks import CLASSIFICATION, build_model, load_weights, read_data
from jpq.types import JpqError

ROWS = RESULTS / "other_tools.csv"
KEY = ("tool", "target", "seed", "epochs")
OWN = ("djpq", "measured", "uniform 3 bits, wider ends", "uniform 2 bits, wider ends")  # of jpq, beside the tools


@dataclass(frozen=True)
class Tool:
    """A tool, and how to get it."""

    module: str  # in studies/support/tools, with a function `run(job) -> Small`
    packages: tuple[str, ...]  # on PyPI
    says: str


TOOLS: Mapping[str, Tool] = {
    "brevitas": Tool("plain_brevitas", ("brevitas",), "training at one width for the body and one for the ends"),
    "torch-pruning": Tool("torch_pruning_brevitas", ("torch-pruning", "brevitas"), "channels pruned, then one width"),
    "oto": Tool("oto_brevitas", ("only_train_once", "brevitas"), "channels pruned while training, then one width"),
    "mct": Tool("sony_mct", ("model-compression-toolkit",), "widths of each layer by integer programming"),
    "modelopt": Tool("nvidia_modelopt", ("nvidia-modelopt",), "training at one width for the body, one for the ends"),
    "nncf": Tool("intel_nncf", ("nncf",), "training at 8 bits, or 4 for a target of 1.57% or more"),
    "pquantml": Tool("pquantml", ("pquant-ml",), "training in fixed point at one width for the body, one for the ends"),
}


def main() -> None:
    """Run what is missing, one row a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--targets", nargs="+", default=["1%", "0.5%"], help="of the float network's bit-operations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=BASE.train.epochs)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the tools, and what to install for each")
    args = parser.parse_args()
    if args.list:
        for name, tool in TOOLS.items():
            print(f"{name:16} {tool.says}; {', '.join(tool.packages)}, see studies/support/tools/{tool.module}.py")
        return
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    for seed, target, name in product(args.seeds, args.targets, args.tools):
        if (name, target, str(seed), str(args.epochs)) in known_keys():
            continue
        print(f"other_tools: {name} {target} seed {seed}", flush=True)
        given = ["--tools", name, "--targets", target, "--seeds", str(seed), "--epochs", str(args.epochs)]
        try:
            row = run_tool(name, target, seed, args.epochs)
        except (JpqError, ModuleNotFoundError) as error:  # such as a tool that has no bits so few, or is not installed
            print(f"  not possible: {error}", flush=True)
            continue
        command = shlex.join(["python", "studies/other_tools.py", *given])
        append_row(ROWS, row | provenance(command, 1, ("torch",)))
        print(f"  {row['accuracy']:.2%} at {row['bops_share']:.3%} of the BOPs: {row['note']}", flush=True)


def run_tool(name: str, target: str, seed: int, epochs: int) -> dict[str, object]:
    """One run; its figures."""
    tool = TOOLS[name]
    torch.manual_seed(seed)
    config = replace(BASE, train=replace(BASE.train, epochs=epochs), run=replace(BASE.run, seed=seed))
    data = read_data(config, torch.device("cpu"))
    net = build_model(config.task.model, data.classes)
    assert config.task.weights is not None
    load_weights(net, config.task.weights)
    job = Job(net.eval(), data, float(target.rstrip("%")) / 100, epochs)
    begin = time.perf_counter()
    small: Small = importlib.import_module(f"support.tools.{tool.module}").run(job)
    seconds = time.perf_counter() - begin
    macs = count_macs(small.net, job.sample())
    bits = [small.widths.get(layer, (32, 32)) for layer in macs]
    return {
        "tool": name,
        "target": target,
        "seed": seed,
        "epochs": epochs,
        "epochs_trained": round(job.steps / len(data.train), 2),
        "float_accuracy": round(CLASSIFICATION.evaluate(net, data.test), 4),
        "accuracy": round(CLASSIFICATION.evaluate(small.net, data.test), 4),
        "bops_share": round(small.bops(job.sample()) / job.full_bops, 7),
        "macs_share": round(sum(macs.values()) / sum(count_macs(net, job.sample()).values()), 4),
        "w_bits_mean": round(sum(w for w, _ in bits) / len(bits), 2),
        "a_bits_mean": round(sum(a for _, a in bits) / len(bits), 2),
        "note": small.note,
        "test_images": data.test.size,
        "seconds": round(seconds, 1),
        "version": " ".join(f"{package} {version(package)}" for package in tool.packages),
    }


def other_tools_table() -> str:
    """Accuracy of each tool beside jpq's methods at the same targets, images and epochs."""
    tools = pd.read_csv(ROWS)
    own = pd.read_csv(RESULTS / "joint_cifar.csv")
    own = own[own.method.isin(OWN) & own.target.isin(tools.target) & own.epochs.isin(tools.epochs)]
    own = own.assign(tool="jpq, `" + own.method + "`", version="", note="channels kept: " + _percent(own.channels_kept))
    columns = ["tool", "target", "epochs", "seed", "accuracy", "bops_share", "version", "note"]
    both = pd.concat([tools[columns], own[columns]])
    lines = [
        "| BOPs asked | tool | n | test accuracy % | BOPs used % | versions | how, in the first run |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = both.groupby(["target", "tool"])
    means = groups.accuracy.mean()
    for target, tool in sorted(means.index, key=lambda key: (-float(key[0].rstrip("%")), -means[key])):
        runs = groups.get_group((target, tool)).sort_values("seed")
        accuracy = 100 * runs.accuracy
        spread = f" ({accuracy.min():.2f} to {accuracy.max():.2f})" if len(runs) > 1 else ""
        lines.append(
            f"| {target} | {tool} | {len(runs)} | {accuracy.mean():.2f}{spread} | {100 * runs.bops_share.mean():.3f} "
            f"| {runs.version.iloc[0]} | {runs.note.iloc[0]} |"
        )
    return "\n".join([*lines, ""])


def _percent(shares: pd.Series) -> pd.Series:
    """Shares as texts."""
    return shares.map(lambda share: f"{100 * share:.0f} %")


def known_keys() -> set[tuple[str, ...]]:
    """The keys of the rows that are there already; looked up anew before each run, as others may write."""
    table = read_rows(ROWS, KEY, str)
    return {tuple(row) for row in table[list(KEY)].itertuples(index=False)}


if __name__ == "__main__":
    main()
