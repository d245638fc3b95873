"""Which estimate of a plan's damage predicts its accuracy after training: rank correlations over random plans.

    python studies/estimators.py --model resnet20 --weights WEIGHTS.safetensors --data cifar10 --data-root DIR \
        --budget 0.9% --images 10000 --part 0/2 &      # and --part 1/2 beside it: they share the files
    python studies/estimators.py --model convnet --data digits --budget 1% --images 1400 --plans 20    # seconds a plan

Plans of equal BOPs (within 1.5 %) give every layer's weight and input a random width of 2 to 8 bits; no channel goes.
Each is trained for one pass over N training images (AdamW, 2e-3, warm-up of a tenth, cosine; cross entropy and
distillation at T = 2; BatchNorm's statistics measured anew) and judged on held-out images, which the float weights of
studies/float_weights.py have not seen. Every estimator predicts each plan's divergence; its figure is Spearman's rank
correlation of the negative prediction with the accuracy, with a bootstrapped interval over the plans. Estimators:

    training images           sum of single sensitivities, measured on 512 training images
    mixed                     the same on pairs of training images mixed half and half; also on 256 of them
    mixed, activations x3     the same with the sensitivities of activations times 3 (10, 30)
    around uniform            single changes around the uniform plan of that budget, mixed; also with activations x3
    after uniform training    the same on a network trained as above at the uniform plan, against the float outputs
    after random widths       the same on a network trained with a random width for every tensor at each step
    fisher                    squared gradients times squared rounding errors, mixed (FIT)
    law                       sensitivities at 4 bits, mixed, times 4^(4 - b)
    joint                     each plan's divergence with all its widths at once: mixed; on training images; on the
                              network of random widths

`--part i/n` trains every n-th plan; part 0 also predicts, and writes the summary of what is there at its end; run
`--summary` when all are done. Seconds are those of one core. Rows: results/estimators_plans.csv (plans and
accuracies), results/estimators_predictions.csv, results/estimators.csv (the summary).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import math
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from support.grid import with_float_weights
from support.result_rows import RESULTS, append_row, provenance, read_rows
from torch import Tensor, nn

import jpq
from jpq.allocation import (
    Probe,
    SensitivityTable,
    coarse_table,
    decide_uniform_bits,
    fisher_table,
    joint_divergence,
    measure_table,
    mix_pairs,
    predicted_divergence,
)
from jpq.compression import recalibrate, reestimate_batchnorm
from jpq.config import Run, Task, Train
from jpq.costs import bops, parse_targets
from jpq.methods.gates import Frozen
from jpq.methods.quantizers import Fixed
from jpq.tasks import Data, build_model, load_data, load_weights
from jpq.training import Objective, build_optimizer

PLANS = RESULTS / "estimators_plans.csv"
PREDICTIONS = RESULTS / "estimators_predictions.csv"
SUMMARY = RESULTS / "estimators.csv"
KEY = ["model", "data", "budget", "images", "seed"]
WIDTHS = (2, 8)
SAMPLES, COARSE_SAMPLES, BATCH = 512, 128, 64
LEARNING_RATE, WEIGHT_DECAY, TEMPERATURE = 2e-3, 1e-4, 2.0
NORM_BATCHES = 50
LEAST_SHARE = 0.985  # of the uniform plan's BOPs
RESAMPLES = 2000  # of the plans, for intervals
UNIFORM = "uniform"  # name of that plan, which takes no part in correlations


@dataclass(frozen=True)
class Setting:
    """One network, its data, its float weights and a budget."""

    args: argparse.Namespace
    data: Data
    model: nn.Module  # float
    uniform: jpq.Plan  # of that budget

    @property
    def key(self) -> dict[str, object]:
        """The columns that name it."""
        a = self.args
        return {"model": a.model, "data": a.data, "budget": a.budget, "images": a.images, "seed": a.seed}

    def calibration(self) -> list[Tensor]:
        """Training images, not mixed, in batches."""
        return [x for x, _ in islice(self.data.train.epoch(0), math.ceil(SAMPLES / BATCH))]

    def attach(self) -> jpq.CompressedModel:
        """The float network with quantizers."""
        torch.manual_seed(self.args.seed)
        return attach(self.model, self.calibration())

    def probe(
        self, net: jpq.CompressedModel, mixed: bool = True, against_float: bool = False, samples: int = SAMPLES
    ) -> Probe:
        """What measures divergences in a network: from its own float outputs, or from those of the float model."""
        plain = self.calibration()[: math.ceil(samples / BATCH)]
        inputs = [mix_pairs(x) for x in plain] if mixed else plain
        probe = Probe(net, inputs, plain, self.data.task.divergence, {})
        if against_float:
            with torch.no_grad():
                probe.references = [self.model(x) for x in inputs]
        return probe


def attach(model: nn.Module, inputs: list[Tensor]) -> jpq.CompressedModel:
    """A network whose tensors can be rounded, and whose channels all stay."""
    network = jpq.trace(model, inputs[0][:2])

    def eight_bits(layer: object) -> tuple[Fixed, Fixed]:
        return Fixed(8), Fixed(8)

    return jpq.attach(model, network, (), Frozen.all, eight_bits, inputs, "uniform")


def random_plan(base: jpq.Plan, net: jpq.CompressedModel, level: float, rng: np.random.Generator) -> jpq.Plan:
    """A plan of random widths that costs LEAST_SHARE to 1 times `level` BOPs."""
    names, image = list(base.layers), image_layers(net)
    for _ in range(200):
        spread, skew = rng.uniform(0.5, 2.0), rng.uniform(-1.5, 1.5)
        noise = spread * rng.standard_normal((len(names), 2)) + np.array([skew, -skew])

        def at(offset: float, noise: np.ndarray = noise) -> jpq.Plan:
            widths = np.clip(np.round(offset + noise), *WIDTHS).astype(int)
            return with_widths(base, image, dict(zip(names, widths.tolist(), strict=True)))

        low, high = -8.0, 18.0
        if cost(net, at(low)) > level:
            continue
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(net, at(middle)) <= level else (low, middle)
        plan = filled(at(low), net, image, level, rng)
        if cost(net, plan) >= LEAST_SHARE * level:
            return plan
    raise SystemExit(f"No random plan costs {LEAST_SHARE:.1%} of the budget or more: give a larger --budget.")


def filled(
    plan: jpq.Plan, net: jpq.CompressedModel, image: set[str], level: float, rng: np.random.Generator
) -> jpq.Plan:
    """A plan with random single bits added while they fit."""
    steps = [(name, side) for name in plan.layers for side in (0, 1) if side == 0 or name not in image]
    for place in rng.permutation(len(steps)):
        name, side = steps[place]
        layer = plan.layers[name]
        pair = [layer.w_bits, layer.a_bits]
        pair[side] += 1
        if pair[side] <= WIDTHS[1]:
            more = with_widths(plan, image, {name: pair})
            plan = more if cost(net, more) <= level else plan
    return plan


def with_widths(plan: jpq.Plan, image: set[str], widths: Mapping[str, list[int]]) -> jpq.Plan:
    """A plan with other widths of weights and inputs; the image keeps its own."""
    layers = dict(plan.layers)
    for name, (w, a) in widths.items():
        layers[name] = replace(layers[name], w_bits=w, a_bits=layers[name].a_bits if name in image else a)
    return replace(plan, layers=layers)


def image_layers(net: jpq.CompressedModel) -> set[str]:
    """The layers that read the image."""
    return {layer.name for layer in net.network.layers if layer.reads_input}


def cost(net: jpq.CompressedModel, plan: jpq.Plan) -> float:
    """Bit-operations of a plan."""
    return float(bops(net.exact_usage(plan)))


def train(net: jpq.CompressedModel, setting: Setting, before_step: Callable[[], None] = lambda: None) -> None:
    """One pass over the training images with the study's recipe; `before_step` may change widths."""
    objective = Objective(setting.model, 1.0, TEMPERATURE, task=setting.data.task)
    optimizer = build_optimizer(net, LEARNING_RATE, WEIGHT_DECAY)
    batches = setting.data.train.first(setting.args.images)
    torch.manual_seed(setting.args.seed)
    net.train()
    for i, (x, y) in enumerate(batches.epoch(1)):
        before_step()
        position = (i + 1) / len(batches)
        rate = min(1.0, position / 0.1) * (1 + math.cos(math.pi * i / len(batches))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        optimizer.zero_grad()
        objective(net, x, y, 1.0).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        net.after_step(1.0)
    measure_norms(net, setting)


def measure_norms(net: jpq.CompressedModel, setting: Setting) -> None:
    """Measure BatchNorm's statistics anew, on training images."""
    reestimate_batchnorm(net, setting.data.train.epoch(2), NORM_BATCHES)


def uniform_network(setting: Setting) -> jpq.CompressedModel:
    """A network trained at the uniform plan."""
    net = setting.attach()
    net.freeze(setting.uniform)
    train(net, setting)
    recalibrate(net, setting.calibration())
    return net


def random_width_network(setting: Setting) -> jpq.CompressedModel:
    """A network trained with a random width for every tensor at every step; then at the uniform plan.

    Ranges are those that fit: of weights at each step, of inputs once for each width.
    """
    net = setting.attach()
    image, rng = image_layers(net), np.random.default_rng(setting.args.seed)
    plans = {
        b: with_widths(setting.uniform, image, {n: [b, b] for n in setting.uniform.layers})
        for b in range(WIDTHS[0], WIDTHS[1] + 1)
    }
    ranges: dict[tuple[str, int], Tensor] = {}
    for b, plan in plans.items():
        net.freeze(plan)
        for name in plan.layers:
            ranges[name, b] = net.quantizers(name)[1].log_threshold.detach().clone()

    @torch.no_grad()
    def draw() -> None:
        for name in setting.uniform.layers:
            weight, inputs = net.quantizers(name)
            w, a = (int(b) for b in rng.integers(WIDTHS[0], WIDTHS[1] + 1, 2))
            weight.fix(w)
            weight.refit(net.layer(name).weight, w)
            if name not in image:
                inputs.fix(a)
                inputs.log_threshold.copy_(ranges[name, a])

    train(net, setting, draw)
    net.freeze(setting.uniform)
    measure_norms(net, setting)
    recalibrate(net, setting.calibration())
    return net


def power_law(table: SensitivityTable) -> SensitivityTable:
    """The table that the sensitivities at 4 bits give by the law 4^-b."""
    bits = {key: {b: row[4] * 4.0 ** (4 - b) for b in row} for key, row in table.bits.items()}
    return replace(table, bits=bits)


def around(setting: Setting, probe: Probe) -> SensitivityTable:
    """The table of single changes around the uniform plan."""
    image, widths = image_layers(probe.net), {}
    for name, layer in setting.uniform.layers.items():
        widths[name, "w"] = layer.w_bits
        if name not in image:
            widths[name, "a"] = layer.a_bits
    return measure_table(probe, WIDTHS, WIDTHS, "-", around=widths)


@contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """A context whose CPU seconds are noted."""
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


def predictions(setting: Setting, plans: Mapping[str, jpq.Plan]) -> Iterator[tuple[str, dict[str, float], float]]:
    """(estimator, plan -> predicted divergence, CPU seconds), the cheapest first."""
    seconds: dict[str, float] = {}

    def of_table(table: SensitivityTable) -> dict[str, float]:
        return {name: predicted_divergence(table, plan) for name, plan in plans.items()}

    def of_plans(probe: Probe) -> dict[str, float]:
        return {name: joint_divergence(probe, plan) for name, plan in plans.items()}

    net = setting.attach()
    with clock(seconds, "fisher"):
        fisher = fisher_table(setting.probe(net), WIDTHS, WIDTHS, "-")
    yield "fisher", of_table(fisher), seconds["fisher"]
    with clock(seconds, "coarse"):
        coarse = coarse_table(setting.probe(net, samples=COARSE_SAMPLES), WIDTHS, WIDTHS, "-")
    yield "coarse", of_table(coarse), seconds["coarse"]
    with clock(seconds, "half"):
        half = measure_table(setting.probe(net, samples=SAMPLES // 2), WIDTHS, WIDTHS, "-")
    yield "mixed, half of the samples", of_table(half), seconds["half"]
    with clock(seconds, "joint"):
        joint = of_plans(setting.probe(net))
    yield "joint, mixed", joint, seconds["joint"]
    with clock(seconds, "joint"):
        joint = of_plans(setting.probe(net, mixed=False))
    yield "joint, training images", joint, seconds["joint"]
    with clock(seconds, "plain"):
        plain = measure_table(setting.probe(net, mixed=False), WIDTHS, WIDTHS, "-")
    yield "training images", of_table(plain), seconds["plain"]
    with clock(seconds, "mixed"):
        mixed = measure_table(setting.probe(net), WIDTHS, WIDTHS, "-")
    yield "mixed", of_table(mixed), seconds["mixed"]
    for factor in (3, 10, 30):
        yield f"mixed, activations x{factor}", of_table(mixed.scaled(factor)), seconds["mixed"]
    yield "law", of_table(power_law(mixed)), seconds["mixed"] / (WIDTHS[1] - WIDTHS[0] + 1)
    yield from around_predictions("around uniform", setting, net, seconds, of_table)
    with clock(seconds, "training"):
        net = uniform_network(setting)
    yield from around_predictions("after uniform training", setting, net, seconds, of_table, trained=True)
    with clock(seconds, "training"):
        net = random_width_network(setting)
    yield from around_predictions("after random widths", setting, net, seconds, of_table, trained=True)
    with clock(seconds, "joint"):
        joint = of_plans(setting.probe(net, against_float=True))
    yield "joint, after random widths", joint, seconds["training"] + seconds["joint"]


def around_predictions(
    name: str,
    setting: Setting,
    net: jpq.CompressedModel,
    seconds: dict[str, float],
    of_table: Callable[[SensitivityTable], dict[str, float]],
    trained: bool = False,
) -> Iterator[tuple[str, dict[str, float], float]]:
    """The predictions of tables around the uniform plan: as measured, and with activations times 3."""
    with clock(seconds, "around"):
        table = around(setting, setting.probe(net, against_float=trained))
    spent = seconds["around"] + (seconds["training"] if trained else 0.0)
    yield name, of_table(table), spent
    yield f"{name}, activations x3", of_table(table.scaled(3)), spent


def add_row(path: Path, row: dict[str, object]) -> None:
    """Append a row, one process at a time."""
    with (Path(tempfile.gettempdir()) / f"{path.name}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        append_row(path, row)


def known_rows(path: Path, setting: Setting, columns: list[str]) -> pd.DataFrame:
    """The rows of this setting in a file."""
    table = read_rows(path, [*KEY, *columns])
    for name, value in setting.key.items():
        table = table[table[name].astype(str) == str(value)]
    return table


def make_plans(setting: Setting) -> dict[str, jpq.Plan]:
    """The uniform plan, and the random ones by their numbers: the same ones in every process."""
    net = setting.attach()
    level = cost(net, setting.uniform)
    plans = {UNIFORM: setting.uniform}
    for number in range(setting.args.plans):
        rng = np.random.default_rng([setting.args.seed, number])
        plans[str(number)] = random_plan(setting.uniform, net, level, rng)
    return plans


def train_plans(setting: Setting, plans: Mapping[str, jpq.Plan], part: tuple[int, int], command: str) -> None:
    """Train the plans of this part that have no row yet."""
    net, data = setting.attach(), setting.data
    full = cost(net, with_float_widths(setting.uniform))
    for place, (name, plan) in enumerate(plans.items()):
        done = set(known_rows(PLANS, setting, ["plan"]).plan.astype(str))
        if place % part[1] != part[0] or name in done:
            continue
        start = time.process_time()
        trained = setting.attach()
        trained.freeze(plan)
        train(trained, setting)
        accuracy = data.task.evaluate(trained, data.held_out)
        widths = {layer: [bits.w_bits, bits.a_bits] for layer, bits in plan.layers.items()}
        row = {
            **setting.key,
            "plan": name,
            "bops_share": round(cost(net, plan) / full, 7),
            "held_out": round(accuracy, 5),
            "held_out_images": data.held_out.size,
            "cpu_seconds": round(time.process_time() - start, 1),
            "bits": json.dumps(widths, separators=(",", ":")),
            **provenance(command),
        }
        add_row(PLANS, row)
        print(f"plan {name}: held-out {accuracy:.2%} after {row['cpu_seconds']} CPU seconds", flush=True)


def with_float_widths(plan: jpq.Plan) -> jpq.Plan:
    """The plan of the float model: 32 bits everywhere."""
    layers = {name: replace(layer, w_bits=32, a_bits=32) for name, layer in plan.layers.items()}
    return replace(plan, layers=layers)


def predict(setting: Setting, plans: Mapping[str, jpq.Plan], command: str) -> None:
    """Write the predictions of every estimator, those that are missing."""
    known = known_rows(PREDICTIONS, setting, ["estimator", "plan"])
    done = {name for name, rows in known.groupby("estimator") if set(plans) <= set(rows.plan.astype(str))}
    if len(done) >= ESTIMATORS:
        return
    for estimator, divergences, seconds in predictions(setting, plans):
        if estimator in done:
            continue
        for name, value in divergences.items():
            row = {**setting.key, "estimator": estimator, "plan": name, "prediction": f"{value:.6g}"}
            add_row(PREDICTIONS, row | {"cpu_seconds": round(seconds, 1)} | provenance(command))
        print(f"{estimator}: {seconds:.1f} CPU seconds", flush=True)
        done.add(estimator)
        if len(done) >= ESTIMATORS:
            return


ESTIMATORS = 18  # that `predictions` gives


def summarise(setting: Setting, command: str) -> None:
    """Replace this setting's rows of the summary, and print them."""
    plans = known_rows(PLANS, setting, ["plan", "held_out"])
    reached = plans.assign(plan=plans.plan.astype(str)).set_index("plan").held_out
    accuracy, uniform = reached[reached.index != UNIFORM], reached[reached.index == UNIFORM]
    rows = []
    for estimator, part in known_rows(PREDICTIONS, setting, ["estimator", "plan"]).groupby("estimator", sort=False):
        predicted = part.assign(plan=part.plan.astype(str)).set_index("plan").prediction
        both = pd.concat([accuracy, -predicted], axis=1, join="inner").to_numpy(float)
        if len(both) < 5:
            continue
        resampled = bootstrap(both, setting.args.seed)
        rows.append(
            {
                **setting.key,
                "estimator": estimator,
                "spearman": round(rank_correlation(both), 3),
                "standard_error": round(float(resampled.std()), 3),
                "low": round(float(np.quantile(resampled, 0.025)), 3),
                "high": round(float(np.quantile(resampled, 0.975)), 3),
                "cpu_seconds": part.cpu_seconds.iloc[0],
                "best_accuracy": both[:, 0].max(),
                "accuracy_of_best_predicted": both[both[:, 1].argmax(), 0],
                "uniform_accuracy": uniform.iloc[0] if len(uniform) else "",
                **provenance(command, len(both)),
            }
        )
    if not rows:
        return
    table = read_rows(SUMMARY, KEY)
    same = np.logical_and.reduce([table[k].astype(str) == str(v) for k, v in setting.key.items()])
    table = pd.concat([table[~same], pd.DataFrame(rows)]) if len(table) else pd.DataFrame(rows)
    table.to_csv(SUMMARY, index=False)
    shown = ["estimator", "spearman", "standard_error", "low", "high", "cpu_seconds", "accuracy_of_best_predicted", "n"]
    print(pd.DataFrame(rows)[shown].sort_values("spearman", ascending=False).to_string(index=False))


def rank_correlation(pairs: np.ndarray) -> float:
    """Spearman's rank correlation of two columns; ties share their mean rank."""
    ranks = pd.DataFrame(pairs).rank()
    return float(ranks[0].corr(ranks[1]))


def bootstrap(pairs: np.ndarray, seed: int) -> np.ndarray:
    """Rank correlations of plans drawn with replacement."""
    rng = np.random.default_rng(seed)
    draws = [rank_correlation(pairs[rng.integers(len(pairs), size=len(pairs))]) for _ in range(RESAMPLES)]
    return np.array([value for value in draws if math.isfinite(value)])


def read_setting(args: argparse.Namespace) -> Setting:
    """Data, float model and uniform plan; without --weights float weights are trained once and kept in runs/."""
    if args.weights is None:
        task = Task(args.model, data=args.data, data_root=args.data_root)
        config = jpq.Config(task, train=Train(lr=3e-3, float_epochs=15), run=Run(seed=args.seed, threads=1))
        path = Path("runs") / "estimators" / f"{args.model}-{args.data}-{args.seed}.safetensors"
        args.weights = with_float_weights(config, path).task.weights
    data = load_data(args.data, args.data_root, batch_size=BATCH, held_out=0.1, seed=0)
    model = build_model(args.model, data.classes, data.shape[0])
    load_weights(model, args.weights)
    model = jpq.decompose(model.eval(), data.example).eval()
    net = attach(model, [data.example])
    targets = parse_targets({"bops": args.budget}, net.exact_usage())
    both = range(WIDTHS[0], WIDTHS[1] + 1)
    uniform = decide_uniform_bits(net, targets, both, both)
    return Setting(args, data, model, uniform)


def estimators_table() -> str:
    """README's tables: per setting a row for every estimator, the best correlation first."""
    lines: list[str] = []
    for key, rows in pd.read_csv(SUMMARY).groupby(KEY, sort=False):
        model, data, budget, images, _ = key
        first = rows.iloc[0]
        lines += [
            "| estimator | rank correlation | standard error | 95 % interval | best predicted reaches, % | seconds |",
            "|" + "---|" * 6,
        ]
        for row in rows.sort_values("spearman", ascending=False).itertuples():
            lines.append(
                f"| {row.estimator} | {row.spearman:.2f} | {row.standard_error:.2f} | {row.low:.2f} to {row.high:.2f} "
                f"| {100 * row.accuracy_of_best_predicted:.2f} | {row.cpu_seconds:.0f} |"
            )
        lines += [
            "",
            f"{model} on {data}, {first.n} random plans at the cost of the widest uniform bits within {budget} of the "
            f"BOPs, each trained once on {images:,} images; held-out accuracy of the best plan "
            f"{100 * first.best_accuracy:.2f} %, of uniform bits {100 * first.uniform_accuracy:.2f} %; processor "
            f"seconds of one core; {first.hardware} "
            "(`python studies/estimators.py`).",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Train plans, predict, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnet")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--budget", default="0.9%", help="budget of the widest uniform bits, whose cost all plans have")
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--images", type=int, default=10000, help="training images of a plan's one epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1", help="i/n: train every n-th plan, beginning with the i-th")
    parser.add_argument("--summary", action="store_true", help="only summarise what is there")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    given = ["--model", args.model, "--data", args.data, "--budget", args.budget, "--images", str(args.images)]
    given += ["--plans", str(args.plans), "--seed", str(args.seed)]
    given += ["--weights", f"studies/weights/{args.weights.name}"] if args.weights else []
    command = shlex.join(["python", "studies/estimators.py", *given])
    index, count = (int(number) for number in args.part.split("/"))
    setting = read_setting(args)
    if not args.summary:
        plans = make_plans(setting)
        train_plans(setting, plans, (index, count), command)
        if index == 0:
            predict(setting, plans, command)
    summarise(setting, command)


if __name__ == "__main__":
    main()
