"""One tree of frozen dataclasses: the flags, the TOML file and the run's hash all come from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jpq import formats
from jpq.options import BOPS, BY_HAND, MASKED, PROXIES, TARGETS, Budget, Decide, Run, Task, Train
from jpq.types import JpqError, unknown

__all__ = [
    "BOPS",
    "BY_HAND",
    "MASKED",
    "PROXIES",
    "TARGETS",
    "Budget",
    "Config",
    "Decide",
    "Run",
    "Task",
    "Train",
    "to_tree",
]


@dataclass(frozen=True)
class Config:
    """Prune and quantize a model together, onto a budget."""

    task: Task = field(default_factory=Task)
    budget: Budget = field(default_factory=Budget)
    decide: Decide = field(default_factory=Decide)
    train: Train = field(default_factory=Train)
    run: Run = field(default_factory=Run)

    def check(self) -> Config:
        """This config, once every value makes sense; with a mask, under the method `masked`, or `by-hand`.

        Raises JpqError with the flag to change.
        """
        if self.decide.bits or self.decide.densities or self.decide.method == BY_HAND:
            return replace(self, decide=self._by_hand())._checked()
        masked = self.decide.mask is not None or self.decide.method == MASKED
        return replace(self, decide=self._masked())._checked() if masked else self._checked()

    def _by_hand(self) -> Decide:
        """The decisions that are left where bits or densities are said by hand."""
        d = self.decide
        if not (d.bits or d.densities):
            raise JpqError(f"--method {BY_HAND}: say the decisions with --bits and --densities, or choose a method.")
        flag = "--bits" if d.bits else "--densities"
        if d.method not in (Decide.method, BY_HAND):
            raise JpqError(f"{flag} says what is decided, and --method {d.method} would too. Leave one of them out.")
        others = {"--mask": d.mask, "--structure": d.structure, "--width": d.width, "--allocator": d.allocator,
                  "--schedule": d.schedule}  # fmt: skip
        for other, value in others.items():
            if value:
                raise JpqError(f"{other} {value}: {flag} says the decisions, on whole channels. Leave {other} out.")
        return replace(d, method=BY_HAND)

    def _masked(self) -> Decide:
        """The decisions that are left where a mask is given."""
        d = self.decide
        if d.mask is not None and not d.mask.name:
            raise JpqError(f"--mask {d.mask}: give the folder or file of a mask.")
        if d.mask is None:
            raise JpqError("--method masked: there is no mask to hold. Give one with --mask, or choose a method.")
        if d.method not in (Decide.method, MASKED):
            raise JpqError(f"--mask says what is pruned, and --method {d.method} would too. Leave one of them out.")
        for flag, value in (("--structure", d.structure), ("--skip", " ".join(d.skip))):
            if value:
                raise JpqError(f"{flag} {value}: --mask says which weights are dropped, and where. Leave {flag} out.")
        if d.mask.is_dir() and self.task.weights is None:
            raise JpqError(
                f"--mask {d.mask} brings pruned weights: give the dense model that they come from with --weights, or "
                "the mask alone (its mask.json)."
            )
        return replace(d, method=MASKED)

    def _checked(self) -> Config:
        """This config, once every value that does not depend on a mask makes sense."""
        d, t = self.decide, self.train
        for flag, (low, high) in (("--w-bits", d.w_bits), ("--a-bits", d.a_bits)):
            if not 2 <= low <= high <= 8:
                raise JpqError(
                    f"{flag} {low} {high}: give a smallest and a largest bit-width, 2 <= small <= large <= 8."
                )
        if not 0 < d.density <= 1:
            raise JpqError(f"--density {d.density} must lie above 0 and be at most 1: it is the share that stays.")
        if not 2 <= d.image_bits <= 8:
            raise JpqError(f"--image-bits {d.image_bits} is outside 2 to 8.")
        if d.output_bits and not 2 <= d.output_bits <= 8:
            raise JpqError(f"--output-bits {d.output_bits} is outside 2 to 8; 0 leaves results in floating point.")
        for flag, share in (("--search", t.search), ("--held-out", self.task.held_out)):
            if not 0 < share < 1:
                raise JpqError(f"{flag} {share} must lie between 0 and 1.")
        for flag, number in (("--epochs", t.epochs), ("--batch-size", t.batch_size)):
            if number < 2:
                raise JpqError(f"{flag} {number}: at least 2 are needed.")
        for flag, rate in (
            ("--lr", t.lr),
            ("--gate-lr", d.gate_lr),
            ("--bit-lr", d.bit_lr),
            ("--temperature", t.temperature),
        ):
            if not 0 < rate < float("inf"):
                raise JpqError(f"{flag} {rate} must be a positive number.")
        weights = {"--weight-decay": t.weight_decay, "--distill": t.distill, "--gate-weight": d.gate_weight}
        for flag, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise JpqError(f"{flag} {weight} must be zero or a positive number.")
        if t.float_epochs < 1 and self.task.weights is None:
            raise JpqError("--float-epochs 0 needs --weights: there is nothing trained to compress.")
        if self.task.limit is not None and self.task.limit < 20:
            raise JpqError(f"--limit {self.task.limit}: at least 20 samples are needed to split off a held-out part.")
        formats.require(self.run.formats, self.run.onnx_weights)
        if self.run.checkpoint_every < 0:
            raise JpqError(f"--checkpoint-every {self.run.checkpoint_every}: give a number of steps, or 0 for none.")
        if d.proxy not in PROXIES:
            raise unknown("proxy", d.proxy, PROXIES)
        if self.budget.cost not in BOPS:
            raise unknown("cost", self.budget.cost, BOPS)
        if t.tune_epochs is not None and t.tune_epochs < 1:
            raise JpqError(f"--tune-epochs {t.tune_epochs}: at least 1 is needed.")
        self.each()
        b = self.budget
        if not any(getattr(b, f) for f in TARGETS) and d.method != BY_HAND:
            raise JpqError("No target: give --target-bops 1% (or 12M, 1.2G), --target-size 50KB, --target-macs 50% or "
                           "--target-latency 3ms.")  # fmt: skip
        if b.target_latency and b.latency_table is None:
            raise JpqError(f"--target-latency {b.target_latency} needs measured layers: run jpq bench --table FILE.csv "
                           f"--model {self.task.model}, then add --latency-table FILE.csv.")  # fmt: skip
        return self

    def each(self) -> dict[str, Config]:
        """A config with one value a target for each budget of this one, by the value that tells them apart.

        A single budget is called "". Raises JpqError for lists that differ in length, or repeat or miss a value.
        """
        texts = {f: getattr(self.budget, f) for f in TARGETS}
        lists = {f: [v.strip() for v in text.split(",")] for f, text in texts.items() if text and "," in text}
        if not lists:
            return {"": self}
        flags = {f: f"--{f.replace('_', '-')} {texts[f]}" for f in lists}
        (first, values), *others = lists.items()
        for f, listed in lists.items():
            if not all(listed):
                raise JpqError(f"{flags[f]}: a value is missing beside a comma. Write it like 4%,2%,1%.")
        for f, listed in others:
            if len(listed) != len(values):
                raise JpqError(f"{flags[first]} lists {len(values)} budgets, {flags[f]} {len(listed)}. List as many, "
                               "or one value that holds for all.")  # fmt: skip
        if len(set(values)) < len(values):
            twice = next(v for v in values if values.count(v) > 1)
            raise JpqError(f"{flags[first]}: {twice} is there twice. List each budget once, from the largest down.")
        return {
            value: replace(self, budget=replace(self.budget, **{f: listed[i] for f, listed in lists.items()}))
            for i, value in enumerate(values)
        }

    def hash(self) -> str:
        """Twelve hex digits of everything that changes the result: the name of the run's folder."""
        tree = to_tree(self)
        tree["run"] = {"seed": self.run.seed}
        tree["task"].pop("data_root", None)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def to_tree(config: Config) -> dict[str, dict[str, Any]]:
    """The config as plain nested tables, unset values left out (TOML has no null)."""
    tree = {}
    for section, table in asdict(config).items():
        plain = {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in table.items()}
        tree[section] = {k: v for k, v in plain.items() if v is not None}
    return tree
