"""The recipe of short quantization-aware training, one line of it changed at a time.

    python studies/qat_recipe.py --data-root DIR --weights studies/weights/resnet8_cifar10_45000.safetensors
        [--lines NAME ...] [--bits "2/2,conv1=8/8,linear=8/8"] [--seeds 0 1 2 3 4] [--images 10000] [--epochs 3]
    python studies/qat_recipe.py --summary

Every run starts from the same float weights, trained on 45,000 images of CIFAR-10, and sees the same batches; bits are
fixed from the start. Judged by the accuracy on 5,000 images that no training has seen. A line is kept where its mean
difference from today's recipe, paired by seed, exceeds two standard errors. Rows go to results/qat_recipe.csv, and may
come from several processes (give each its own --seeds); --summary prints the means and gains.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from support.result_rows import RESULTS, append_row, provenance, read_rows
from torch import Tensor, nn
from torch.nn import functional as F

import jpq
from jpq.compression import reestimate_batchnorm, round_activation_steps
from jpq.tasks import CLASSIFICATION, Batches, Data, build_model, load_data, load_weights

ROWS = RESULTS / "qat_recipe.csv"
LR, BATCH, MAX_NORM = 2e-3, 100, 5.0
RECONSTRUCTION_IMAGES = 512
TODAY = "today"


@dataclass(frozen=True)
class Recipe:
    """Settings of one training; the defaults are those of `jpq optimize`."""

    lr: float = LR  # peak rate of the weights
    range_lr: float = LR  # of the quantizers' ranges
    batch: int = BATCH
    hard: float = 1.0  # weight of the cross entropy
    temperature: float = 2.0  # of the distillation
    weight_decay: float = 1e-4
    average: float = 0.0  # factor of the moving average of all weights; 0: none
    stages: tuple[str, ...] = ()  # bits of the first third of the steps, one stage after another
    gradient_scaling: float = 0.0  # delta of EWGS
    freeze_above: float = 0.0  # frequency of oscillation above which a weight is frozen; 0: none
    transitions: float = 0.0  # share of weights that may change their level in a step, at the start; 0: Adam's steps
    weight_levels: str = ""  # of the grid; "": jpq's default
    reconstruction: int = 0  # steps for each block whose rounding is learned before the training; 0: no warm start
    free_steps: bool = False  # steps of activations are learned numbers, not powers of two: integers are not exact
    precision: str = "float32"  # in which layers compute while they learn


LINES: Mapping[str, tuple[str, Recipe]] = {
    TODAY: ("AdamW, cosine, CE + T^2 KL at T = 2, squared-error range fit, BatchNorm measured anew", Recipe()),
    "narrow-grid": ("2^b - 1 levels of the weights", Recipe(weight_levels="narrow")),
    "slow-ranges": ("ranges at 1e-4", Recipe(range_lr=1e-4)),
    "slower-ranges": ("ranges at 1e-5", Recipe(range_lr=1e-5)),
    "kl-only": ("KL at T = 1 alone", Recipe(hard=0.0, temperature=1.0)),
    "t1": ("CE + KL at T = 1", Recipe(temperature=1.0)),
    "stages": ("8, then 4 bits in the first third of the steps, ranges fitted anew", Recipe(stages=("8/8", "4/4"))),
    "transitions": ("step size follows the share of weights that change level (2404.19248)", Recipe(transitions=5e-3)),
    "ewgs": ("gradient scaled by the rounding error, delta 1e-3 (2104.00903)", Recipe(gradient_scaling=1e-3)),
    "freeze": ("weights that oscillate are frozen (2203.11086)", Recipe(freeze_above=0.02)),
    "no-decay": ("no weight decay", Recipe(weight_decay=0.0)),
    "average": ("moving average of the weights, 0.99", Recipe(average=0.99)),
    "half-rate": ("weights at 1e-3", Recipe(lr=LR / 2)),
    "double-rate": ("weights at 4e-3", Recipe(lr=2 * LR)),
    "half-batch": ("batches of 50: twice the steps", Recipe(batch=BATCH // 2)),
    "free-steps": ("steps of activations not rounded to powers of two", Recipe(free_steps=True)),
    "bfloat16": ("layers compute in bfloat16 while they learn", Recipe(precision="bfloat16")),
    "reconstruction": ("warm start: rounding learned, 500 steps a block, 512 images", Recipe(reconstruction=500)),
}


class GradientScaling:
    """Element-wise gradient scaling: g (1 + delta sign(g) (x - q) / s) for what a quantizer gives.

    J. Lee, D. Kim, B. Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv:2104.00903,
    equation 4, with a constant delta. The scaled gradient reaches the range too, which the paper's does not.
    """

    def __init__(self, net: nn.Module, delta: float):
        self.delta = delta
        for module in net.modules():
            if hasattr(module, "log_threshold"):
                module.register_forward_hook(self._hook)

    def _hook(self, _: nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        q, scale = out[0], out[1].detach()
        if q.requires_grad:
            error = (args[0].detach() - q.detach()) / scale
            q.register_hook(lambda g: g * (1 + self.delta * g.sign() * error.clamp(-1, 1)))


class LevelWatch:
    """The level of every quantized weight from step to step: share that changes, and weights that oscillate.

    Oscillation and freezing: M. Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
    arXiv:2203.11086, equations 5 to 7: a change of level in the direction opposite to the last one counts; weights
    whose moving frequency of it exceeds a threshold stay at their average level.
    """

    def __init__(self, session: jpq.CompressionSession, momentum: float = 0.02):
        self.momentum = momentum
        self.weights: list[tuple[nn.Parameter, Any]] = []
        for layer in session.net.network.layers:
            pair = session.net.quantizers(layer.name)
            module = session.net.layer(layer.name)
            if pair and module is not None:
                shape = module.weight.shape
                own = [p for p in module.parameters() if p.shape == shape and p.dim() > 1]
                self.weights.append((own[0], pair[0]))
        self.levels = [self._levels(p, q) for p, q in self.weights]
        self.direction = [torch.zeros_like(p) for p, _ in self.weights]
        self.frequency = [torch.zeros_like(p) for p, _ in self.weights]
        self.average = [level.clone() for level in self.levels]
        self.frozen = [torch.zeros_like(p, dtype=torch.bool) for p, _ in self.weights]

    @staticmethod
    @torch.no_grad()
    def _levels(parameter: nn.Parameter, quantizer: Any) -> Tensor:
        q, scale, _, _ = quantizer(parameter)
        return (q / scale).round()

    @torch.no_grad()
    def step(self) -> float:
        """Compare with the step before; the share of weights that have changed their level."""
        changed, total = 0, 0
        for i, (p, quantizer) in enumerate(self.weights):
            now = self._levels(p, quantizer)
            move = (now - self.levels[i]).sign()
            back = (move * self.direction[i]) < 0
            self.frequency[i].lerp_(back.float(), self.momentum)
            self.average[i].lerp_(now, self.momentum)
            self.direction[i] = torch.where(move != 0, move, self.direction[i])
            changed, total = changed + int((move != 0).sum()), total + p.numel()
            self.levels[i] = now
        return changed / max(1, total)

    @torch.no_grad()
    def freeze(self, above: float) -> None:
        """Freeze what oscillates more often than `above`, at its average level."""
        for i, (p, quantizer) in enumerate(self.weights):
            self.frozen[i] |= self.frequency[i] > above
            at = self.average[i].round() * quantizer.scale()
            p.copy_(torch.where(self.frozen[i], at, p))


class TransitionRate:
    """Step size of the quantized weights that keeps to a target share of level changes.

    J. Lee, J. Jeon, D. Kim, B. Ham, "Transition Rate Scheduling for Quantization-Aware Training", 2024,
    arXiv:2404.19248: U <- max(0, U + eta (R - K)), K the moving share, R the target, which falls by a cosine. Here U
    multiplies Adam's step; eta is chosen so that U moves by its start when K is off by R's start for 20 steps.
    """

    def __init__(self, start: float, lr: float):
        self.start, self.lr, self.rate, self.share = start, lr, lr, start

    def step(self, share: float, progress: float) -> float:
        """The learning rate of the next step."""
        self.share += 0.1 * (share - self.share)
        target = self.start * (1 + math.cos(math.pi * progress)) / 2
        self.rate = max(0.0, self.rate + self.lr / 20 * (target - self.share) / self.start)
        return self.rate


def optimizer_of(session: jpq.CompressionSession, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with groups for weights, ranges, and all else."""
    ranges = {id(p) for name, p in session.net.named_parameters() if name.endswith("log_threshold")}
    weights = session.net.weights()
    groups = [
        {"params": weights["decayed"], "peak": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": [p for p in weights["plain"] if id(p) in ranges], "peak": recipe.range_lr, "weight_decay": 0.0},
        {"params": [p for p in weights["plain"] if id(p) not in ranges], "peak": recipe.lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([{**g, "lr": g["peak"]} for g in groups if g["params"]])


def batches_of(part: Batches, seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of all epochs, their order given by the seed."""
    for epoch in range(epochs):
        yield from part.epoch(1000 * seed + epoch)


def start(model: nn.Module, data: Data, bits: str, recipe: Recipe) -> jpq.CompressionSession:
    """The float model with quantizers at these bits."""
    extra: dict[str, Any] = {"weight_levels": recipe.weight_levels} if recipe.weight_levels else {}
    x, _ = next(iter(data.train.epoch(0)))
    return jpq.compress(model, x, bits=bits, **extra)


class Rules:
    """What a recipe adds to plain steps: its learning rates, frozen weights, stages of bits and averaged weights."""

    def __init__(self, session: jpq.CompressionSession, recipe: Recipe, steps: int):
        self.session, self.recipe, self.steps = session, recipe, steps
        self.optimizer = optimizer_of(session, recipe)
        self.watch = LevelWatch(session) if recipe.freeze_above or recipe.transitions else None
        self.rate = TransitionRate(recipe.transitions, recipe.lr) if recipe.transitions else None
        self.average = [p.detach().clone() for p in session.net.parameters()] if recipe.average else []
        if recipe.gradient_scaling:
            GradientScaling(session.net, recipe.gradient_scaling)

    def before_step(self, step: int) -> None:
        """Set the learning rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * (1 + math.cos(math.pi * step / self.steps)) / 2
        if self.rate is not None:
            self.optimizer.param_groups[0]["lr"] = self.rate.rate

    def after_step(self, step: int) -> None:
        """Follow levels and averages."""
        progress = step / self.steps
        if self.watch is not None:
            share = self.watch.step()
            if self.rate is not None:
                self.rate.step(share, progress)
            if self.recipe.freeze_above and progress > 0.3:
                self.watch.freeze(self.recipe.freeze_above)
        if self.average:
            now = [p.detach() for p in self.session.net.parameters()]
            torch._foreach_lerp_(self.average, now, 1 - self.recipe.average)

    @torch.no_grad()
    def finish(self) -> None:
        """Take the averaged weights."""
        for p, mean in zip(self.session.net.parameters(), self.average, strict=False):
            p.copy_(mean)


def train(model: nn.Module, data: Data, bits: str, recipe: Recipe, seed: int, images: int, epochs: int) -> float:
    """Held-out accuracy after training by a recipe."""
    torch.manual_seed(seed)
    part = data.train.first(images)
    steps = len(part) * epochs
    widths = [*recipe.stages, bits]
    session = start(model, data, widths[0], recipe)
    if recipe.reconstruction:
        still = part.first(RECONSTRUCTION_IMAGES).fixed_part(1.0)
        session.discretize()
        session.reconstruct([x for x, _ in still.epoch(0)], recipe.reconstruction, seed)
    if recipe.free_steps:
        free_activation_steps(session)
    changes = {round(steps * (i + 1) / (3 * len(recipe.stages))): b for i, b in enumerate(widths[1:])}
    rules = Rules(session, recipe, steps)
    session.train()
    for step, (x, y) in enumerate(batches_of(part, seed, epochs)):
        if step in changes:
            session.net.freeze(start(model, data, changes[step], recipe).net.plan())
            round_activation_steps(session.net)
        rules.before_step(step)
        rules.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            output = session(x)
        loss_of(output.float(), y, model, x, recipe).backward()
        nn.utils.clip_grad_norm_(rules.optimizer.param_groups[0]["params"], MAX_NORM)
        rules.optimizer.step()
        session.step()
        rules.after_step(step)
    rules.finish()
    reestimate_batchnorm(session.net, part.epoch(10**6))
    return CLASSIFICATION.evaluate(session.net, data.held_out)


@torch.no_grad()
def free_activation_steps(session: jpq.CompressionSession) -> None:
    """Let the steps of activations be any numbers."""
    for layer in session.net.network.layers:
        if pair := session.net.quantizers(layer.name):
            pair[1].step.zero_()
            pair[1].power_of_two.fill_(False)


def loss_of(output: Tensor, y: Tensor, teacher: nn.Module, x: Tensor, recipe: Recipe) -> Tensor:
    """Cross entropy and distillation."""
    with torch.no_grad():
        target = teacher(x)
    loss = CLASSIFICATION.distill(output, target, recipe.temperature)
    return loss + recipe.hard * F.cross_entropy(output, y) if recipe.hard else loss


def gains(known: pd.DataFrame) -> pd.DataFrame:
    """Per setting and line: mean accuracy, and the gain over today's recipe, paired by seed, with its standard error.

    `kept` says whether the gain exceeds two standard errors; "worse" where the loss does.
    """
    rows = []
    for (model, bits, images, epochs), part in known.groupby(["model", "bits", "images", "epochs"], sort=False):
        table = part.pivot(index="seed", columns="line", values="accuracy")
        for line in [name for name in LINES if name in table]:
            gain = (table[line] - table[TODAY]).dropna()
            error = float(gain.std() / math.sqrt(len(gain))) if len(gain) > 1 else math.nan
            sign = 1 if gain.mean() > 2 * error else -1 if gain.mean() < -2 * error else 0
            rows.append(
                {
                    "setting": f"{model}, bits {bits}, {images:,} images, {epochs} epochs",
                    "line": line,
                    "n": len(gain),
                    "accuracy": float(table[line].mean()),
                    "gain": float(gain.mean()),
                    "standard_error": error,
                    "kept": "" if line == TODAY else {1: "yes", 0: "no", -1: "worse"}[sign],
                }
            )
    return pd.DataFrame(rows)


def recipe_table() -> str:
    """What each line of the recipe gains over today's."""
    table = gains(pd.read_csv(ROWS))
    lines = []
    for setting, part in table.groupby("setting", sort=False):
        lines += [
            f"{setting}; held-out accuracy:",
            "",
            "| line | instead of today's | n | accuracy % | gain, points | exceeds two standard errors |",
            "|---|---|---|---|---|---|",
        ]
        for row in part.itertuples():
            gain = "" if row.line == TODAY else f"{100 * row.gain:+.2f}"
            gain += f" +- {100 * row.standard_error:.2f}" if gain and row.n > 1 else ""
            lines.append(
                f"| {row.line} | {LINES[row.line][0]} | {row.n} | {100 * row.accuracy:.2f} | {gain} | {row.kept} |"
            )
        lines.append("")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--lines", nargs="+", choices=list(LINES), default=list(LINES))
    parser.add_argument("--bits", default="2/2,conv1=8/8,linear=8/8")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args(argv)
    if not args.summary and (args.data_root is None or args.weights is None):
        parser.error("--data-root and --weights are needed")
    return args


def each_missing(args: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Seed and line of every run whose row is not there yet; looked up anew before each."""
    for seed in args.seeds:
        for line in args.lines:
            known = read_rows(ROWS, ["model", "bits", "images", "epochs", "line", "seed"])
            key = {"model": args.model, "bits": args.bits, "images": args.images, "epochs": args.epochs}
            key |= {"line": line, "seed": seed}
            if not (known[list(key)] == pd.Series(key)).all(axis=1).any():
                yield seed, line


def main() -> None:
    """Run what is missing, or summarise."""
    args = parse()
    if args.summary:
        print(recipe_table())
        return
    torch.set_num_threads(1)
    sizes = {BATCH} | {LINES[line][1].batch for line in args.lines}
    data_of = {n: load_data("cifar10", args.data_root, batch_size=n, held_out=0.1, seed=0) for n in sizes}
    data = data_of[BATCH]
    model = build_model(args.model, data.classes)
    load_weights(model, args.weights)
    model.eval()
    for seed, line in each_missing(args):
        begin = time.perf_counter()
        recipe = LINES[line][1]
        accuracy = train(model, data_of[recipe.batch], args.bits, recipe, seed, args.images, args.epochs)
        row = {"model": args.model, "bits": args.bits, "images": args.images, "epochs": args.epochs}
        row |= {"line": line, "seed": seed, "accuracy": round(accuracy, 4)}
        seconds = round(time.perf_counter() - begin, 1)
        print(f"{line} seed {seed}: {accuracy:.2%} in {seconds:.0f} s", flush=True)
        weights = f"DIR/{args.weights.name}" if args.weights.is_absolute() else args.weights
        flags = f"--data-root DIR --model {args.model} --weights {weights} --bits '{args.bits}'"
        cell = f"--lines {line} --seeds {seed} --images {args.images} --epochs {args.epochs}"
        command = f"python studies/qat_recipe.py {flags} {cell}"
        append_row(ROWS, row | {"seconds": seconds} | provenance(command))


if __name__ == "__main__":
    main()
