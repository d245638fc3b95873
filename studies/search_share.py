"""How much of a short training should search: `djpq` with half and with a quarter of its epochs.

    CIFAR10_ROOT=DIR python studies/search_share.py [--settings digits-0.5 ...] [--shares 0.5 0.25] [--seeds 0 1 2]
    CIFAR10_ROOT=DIR python studies/search_share.py --settings wide-0.25 --data-root DIR
    python studies/search_share.py --summary

The learning rate follows one cosine over search and fine-tuning, so a long search leaves low rates to a network that
has just lost most of its bits. Rows hold the last held-out accuracy of a run, paired by seed. The rule was fixed before
the runs, of which one pair (resnet8-0.5, seed 0) had been seen: a share takes the place of the default 0.5 where its
mean gain over all settings and seeds exceeds two standard errors, and in no setting it is worse by more than two.
"""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import joint_cifar
import joint_pruning
import pandas as pd
from support.grid import EpochPrinter, channels_kept, with_float_weights
from support.result_rows import RESULTS, append_row, provenance, read_rows

import jpq

ROWS = RESULTS / "search_share.csv"
TODAY = 0.5
KEY = ["setting", "share", "seed"]


@dataclass(frozen=True)
class Setting:
    """A network, its data and its budget."""

    title: str
    base: jpq.Config
    target: str

    def config(self, share: float, seed: int, data_root: Path | None, folder: Path) -> jpq.Config:
        """The run of one share and seed."""
        base = self.base
        if self.base is joint_pruning.BASE:
            base = replace(base, task=replace(base.task, data_root=data_root))
            base = with_float_weights(base, joint_pruning.WEIGHTS)
        return replace(
            base,
            budget=replace(base.budget, target_bops=self.target),
            train=replace(base.train, search=share),
            run=replace(base.run, seed=seed, out=folder, threads=1),
        )


SETTINGS: Mapping[str, Setting] = {
    "digits-0.25": Setting("convnet on digits, 40 epochs, 0.25 %", jpq.Config(), "0.25%"),
    "digits-0.5": Setting("convnet on digits, 40 epochs, 0.5 %", jpq.Config(), "0.5%"),
    "resnet8-0.5": Setting("ResNet8 on CIFAR-10, 8,000 images, 4 epochs, 0.5 %", joint_cifar.BASE, "0.5%"),
    "resnet8-1": Setting("ResNet8 on CIFAR-10, 8,000 images, 4 epochs, 1 %", joint_cifar.BASE, "1%"),
    "wide-0.25": Setting(
        "ResNet8 of twice its width on Fashion-MNIST, 3,000 images, 8 epochs, 0.25 %", joint_pruning.BASE, "0.25%"
    ),
}


def run_row(name: str, share: float, seed: int, data_root: Path | None) -> dict[str, object]:
    """One run as a CSV row."""
    with tempfile.TemporaryDirectory() as folder:
        config = SETTINGS[name].config(share, seed, data_root, Path(folder))
        command = f"python studies/search_share.py --settings {shlex.quote(name)} --shares {share} --seeds {seed}"
        result = jpq.optimize(config, EpochPrinter(), command)
        return {
            "setting": name,
            "share": share,
            "seed": seed,
            "accuracy": round(result.history[-1].accuracy, 4),
            "search_epochs": sum(r.phase == "search" for r in result.history),
            "channels_kept": channels_kept(result),
            "target_used": round(result.targets["bops"]["used"], 4),
            "seconds": result.seconds["total"],
            **provenance(command),
        }


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """Per setting and share other than today's, and over all settings: the gain in points, paired by seed."""
    pairs = rows.pivot(index=["setting", "seed"], columns="share", values="accuracy")
    found = []
    for share in [s for s in pairs if s != TODAY]:
        gain = 100 * (pairs[share] - pairs[TODAY]).dropna()
        groups = [(name, gain[gain.index.get_level_values(0) == name]) for name in SETTINGS]
        for name, part in [*groups, ("all", gain)]:
            if len(part):
                error = float(part.std() / math.sqrt(len(part))) if len(part) > 1 else math.nan
                found.append({"setting": name, "share": share, "n": len(part), "gain": part.mean(), "error": error})
    return pd.DataFrame(found, columns=["setting", "share", "n", "gain", "error"])


def share_table() -> str:
    """Accuracy and kept channels of every setting and share, with the gain over today's share."""
    rows = pd.read_csv(ROWS)
    found = gains(rows).set_index(["setting", "share"])
    lines = [
        "| setting | share that searches | n | held-out accuracy % | channels kept % | gain, points |",
        "|---|---|---|---|---|---|",
    ]

    def gain_of(name: str, share: float) -> str:
        if (name, share) not in found.index:
            return ""
        row = found.loc[(name, share)]
        return f"{row.gain:+.2f}" + ("" if math.isnan(row.error) else f" +- {row.error:.2f}")

    for name, setting in SETTINGS.items():
        for share, part in rows[rows.setting == name].groupby("share", sort=True):
            accuracy, kept = 100 * part.accuracy.mean(), 100 * part.channels_kept.mean()
            gain = gain_of(name, share)
            lines.append(f"| {setting.title} | {share:g} | {len(part)} | {accuracy:.2f} | {kept:.0f} | {gain} |")
    for share in sorted(set(rows.share) - {TODAY}):
        pairs = int(found.loc[("all", share)].n) if ("all", share) in found.index else 0
        lines.append(f"| all | {share:g} | {pairs} | | | {gain_of('all', share)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--shares", nargs="+", type=float, default=[TODAY, 0.25])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-root", type=Path, help="where Fashion-MNIST lies, for wide-0.25")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    for name in () if args.summary else args.settings:
        for seed in args.seeds:
            for share in args.shares:
                known = read_rows(ROWS, KEY)[KEY]
                if not (known == pd.Series({"setting": name, "share": share, "seed": seed})).all(axis=1).any():
                    print(f"{name}, share {share}, seed {seed}", flush=True)
                    append_row(ROWS, run_row(name, share, seed, args.data_root))
    print(share_table())


if __name__ == "__main__":
    main()
