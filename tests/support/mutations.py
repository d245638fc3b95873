"""One-line bugs put into a copy of jpq, one at a time, and the tests that must notice each.

    python tests/support/mutations.py            every mutation of the list
    python tests/support/mutations.py ramp dpp   those whose names contain a word

Each mutation replaces a text that must stand exactly once in its file, and runs the tests named beside it. A mutation
is caught when they fail. The exit code is 1 if any was missed, or no longer fits the code (then mend the list).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("jpq", "tests", "studies", "docs", "pyproject.toml", "README.md")
SECONDS = 600  # that the tests of one mutation may take


@dataclass(frozen=True)
class Mutation:
    """A bug: `old` becomes `new` in one file, and what must notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "distillation without the square of the temperature",
        "jpq/tasks/classification.py",
        "return temperature**2 * F.kl_div(",
        "return F.kl_div(",
        "tests/training/test_loop.py -k distillation",
    ),
    Mutation(
        "distillation trains the teacher",
        "jpq/tasks/classification.py",
        "for logits in (student, teacher.detach())",
        "for logits in (student, teacher)",
        "tests/tasks/test_task.py",
    ),
    Mutation(
        "regulariser without the budget's multiplier",
        "jpq/training/loop.py",
        "gate_weight * controller.multiplier() * net.penalty()",
        "gate_weight * net.penalty()",
        "tests/training/test_loop.py -k regulariser",
    ),
    Mutation(
        "weight decay on norms and biases",
        "jpq/training/loop.py",
        '(weights["plain"], lr, 0.0)',
        '(weights["plain"], lr, weight_decay)',
        "tests/training/test_loop.py -k decay",
    ),
    Mutation(
        "weight decay on the ranges of a model under compression",
        "jpq/compression/model.py",
        "decayed = [p for p in weights if p.dim() > 1 and id(p) not in ranges]",
        "decayed = [p for p in weights if p.dim() > 1]",
        "tests/training/test_loop.py -k decay",
    ),
    Mutation(
        "weight decay on the ranges of a rebuilt model",
        "jpq/training/loop.py",
        "if p.dim() > 1 and id(p) not in ranges}",
        "if p.dim() > 1}",
        "tests/training/test_loop.py -k decay",
    ),
    Mutation(
        "BatchNorm not measured anew after fine-tuning",
        "jpq/training/phases.py",
        'run.timed("fine-tune", lambda: reestimate_batchnorm(net, job.data.train.epoch(phase.before + phase.epochs)))',
        'run.timed("fine-tune", lambda: None)',
        "tests/training/test_loop.py -k batchnorm",
    ),
    Mutation(
        "learning rate does not fall",
        "jpq/training/loop.py",
        'phase.rate(position) if group["curve"] else 1.0',
        "1.0",
        "tests/training/test_loop.py -k rate",
    ),
    Mutation(
        "learning rate of decisions falls",
        "jpq/training/loop.py",
        'phase.rate(position) if group["curve"] else 1.0',
        "phase.rate(position)",
        "tests/training/test_loop.py -k rate",
    ),
    Mutation(
        "RL-Pruner's reward pays for cost",
        "jpq/allocation/reinforce.py",
        "reward = accuracy + policy.alpha * (1 - cost_share)",
        "reward = accuracy - policy.alpha * (1 - cost_share)",
        "tests/allocation/test_allocators.py -k cheaper_draw",
    ),
    Mutation(
        "ramp of the budget linear",
        "jpq/costs/target.py",
        "return target.limit * self.start[target.cost] ** left",
        "return target.limit * (1 + (self.start[target.cost] - 1) * left)",
        "tests/costs/test_costs.py",
    ),
    Mutation(
        "discretization opens the worst closed unit first",
        "jpq/compression/ladders.py",
        "best = set(self.decisions.order[ladder.site][:value])",
        "best = set(self.decisions.order[ladder.site][-value:])",
        "tests/compression/test_discretize.py -k unit_opens",
    ),
    Mutation(
        "discretization fills masks with the worst weights first",
        "jpq/compression/discretize.py",
        "closed.argsort(descending=True)",
        "closed.masked_fill(kept.flatten(), math.inf).argsort()",
        "tests/compression/test_discretize.py -k of_a_mask",
    ),
    Mutation(
        "discretization spends no slack",
        "jpq/compression/ladders.py",
        "positions, plan, queue, size = trial, candidate, queue[size:], 2 * size",
        "positions, plan, queue, size = trial, candidate, queue[:0], 2 * size",
        "tests/compression/test_discretize.py -k lands_under",
    ),
    Mutation(
        "BatchNorm averages by momentum",
        "jpq/compression/calibration.py",
        "norm.momentum = None  # cumulative average",
        "norm.momentum = 0.1",
        "tests/compression/test_calibration.py",
    ),
    Mutation(
        "BatchNorm keeps its old statistics",
        "jpq/compression/calibration.py",
        "        norm.reset_running_stats()\n",
        "",
        "tests/compression/test_calibration.py",
    ),
    Mutation(
        "smoothed count of the dead zone too narrow",
        "jpq/methods/gates/dead_zone.py",
        "torch.sigmoid(self.margin() / SOFT)",
        "torch.sigmoid(self.margin() / (0.8 * SOFT))",
        "tests/compression/test_codeq.py -k smoothed",
    ),
    Mutation(
        "packed weights clipped one integer too low",
        "jpq/export/packed/model.py",
        ".round().clamp(low, high)",
        ".round().clamp(low - 1, high)",
        "tests/export/test_packed_model.py -k beyond_its_range",
    ),
    Mutation(
        "DSP without the mixed second derivative",
        "jpq/methods/gates/lasso.py",
        "torch.autograd.grad(direct + mixed, p)",
        "torch.autograd.grad(direct, p)",
        "tests/methods/gates/test_lasso.py -k 'mixed or task_reaches'",
    ),
    Mutation(
        "DPP never cools",
        "jpq/methods/gates/gumbel_topk.py",
        "self.temperature.fill_(HOT * (1 - (1 - COLD / HOT) * min(1.0, progress)))",
        "self.temperature.fill_(HOT)",
        "tests/methods/gates/test_mask_gates.py -k temperature",
    ),
    Mutation(
        "size counts scales of pruned channels",
        "jpq/costs/counts.py",
        "u.mask_bits + u.outputs_all * u.outputs * _channel_bits(u)",
        "u.mask_bits + u.outputs_all * _channel_bits(u)",
        "tests/costs/test_costs.py",
    ),
    Mutation(
        "Taylor scores of shared gates not divided by uses",
        "jpq/methods/scores/taylor.py",
        "(torch.stack(parts).mean(0) / site.uses)",
        "torch.stack(parts).mean(0)",
        "tests/methods/test_scores.py tests/allocation/test_taylor.py",
    ),
    Mutation(
        "DPF masks the gradient",
        "jpq/methods/gates/feedback.py",
        "straight_through: ClassVar[bool] = True",
        "straight_through: ClassVar[bool] = False",
        "tests/methods/gates",
    ),
    Mutation(
        "ADMM's dual not rescaled when rho rises",
        "jpq/methods/gates/admm.py",
        "            self.dual(i).mul_(previous_rho / self.rho)\n",
        "            self.dual(i).mul_(1.0)\n",
        "tests/methods/gates/test_mask_gates.py",
    ),
    Mutation(
        "VIB's KL with sigma for sigma^2",
        "jpq/methods/gates/vib.py",
        "self.mu.square() / (self.log_var.exp() + EPS)",
        "self.mu.square() / ((0.5 * self.log_var).exp() + EPS)",
        "tests/methods/test_gates.py",
    ),
    Mutation(
        "P(kept) of hard concrete without beta",
        "jpq/methods/gates/hard_concrete.py",
        "torch.sigmoid(self.log_alpha + BETA * EDGE)",
        "torch.sigmoid(self.log_alpha + EDGE)",
        "tests/methods/test_gates.py",
    ),
)


def applied(mutation: Mutation, copy: Path) -> bool:
    """Put a mutation into the copy; False where its text does not stand exactly once."""
    path = copy / mutation.file
    text = path.read_text("utf-8") if path.is_file() else ""
    if text.count(mutation.old) != 1:
        return False
    path.write_text(text.replace(mutation.old, mutation.new), "utf-8")
    return True


def passes(tests: str, copy: Path) -> bool:
    """Whether these tests pass on the copy."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *shlex.split(tests)]
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if run.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {tests}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 0


def outcome(mutation: Mutation) -> str:
    """Apply one mutation to a fresh copy and say what its tests made of it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            elif source.is_file():
                shutil.copy(source, copy / name)
        if not applied(mutation, copy):
            return "does not fit the code"
        return "MISSED" if passes(mutation.tests, copy) else "caught"


def main(words: list[str]) -> int:
    """Run the mutations whose names contain any of the words (all without words); the exit code."""
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    failed = 0
    for mutation in chosen:
        start = time.perf_counter()
        what = outcome(mutation)
        failed += what != "caught"
        print(f"{what:22} {mutation.name}  ({mutation.file}, {time.perf_counter() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} caught")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
