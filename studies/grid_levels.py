"""All levels of the weights' grids against narrow ranges: errors without training, and short training at uniform bits.

    python studies/grid_levels.py errors --data-root DIR --weights resnet20-12fca82f.th
    python studies/grid_levels.py training --data digits [--model convnet] [--epochs 10] [--seeds 3]

`errors`: all weights of ResNet20 (public weights) rounded at 2 to 8 bits, nothing else, ranges fitted per output
channel; the mean over layers of the relative squared error |q - w|^2 / |w|^2, and the divergence KL(float || rounded)
of the class probabilities in nats, on 512 CIFAR-10 training images. `training`: a float model is trained once, then
compressed by `jpq.compress(method="uniform")` at 2 and 3 bits of weights and activations with both choices of
`weight_levels` under the same seeds and trained on (Adam, cosine, no distillation); test accuracy. Rows go to
studies/results/grid_levels.csv and grid_levels_training.csv.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

import torch
from support.result_rows import RESULTS, append_row, provenance
from torch import Tensor, nn
from torch.nn import functional as F

import jpq
from jpq import tasks
from jpq.methods.quantizers import Fixed, IntegerQuantizer, fit_weight_grid

ERRORS, TRAINING = RESULTS / "grid_levels.csv", RESULTS / "grid_levels_training.csv"
LEVELS = ("narrow", "all")
IMAGES = 512


def main() -> None:
    """Measure one part, and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("errors", "training"))
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, help="for errors: weights of ResNet20")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="convnet")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--bits", type=int, nargs="+")
    parser.add_argument("--float-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    places = {str(args.data_root): "DIR", str(args.weights): args.weights and args.weights.name}
    command = "python studies/grid_levels.py " + shlex.join(places.get(text) or text for text in sys.argv[1:])
    if args.part == "errors":
        measure_errors(args, command)
    else:
        measure_training(args, command)


@torch.no_grad()
def measure_errors(args: argparse.Namespace, command: str) -> None:
    """Round all weights of ResNet20 at each width, and append a row for each choice of levels."""
    model = tasks.build_model("resnet20", 10)
    tasks.load_weights(model, args.weights)
    model.eval()
    source = tasks.load_data("cifar10", args.data_root, batch_size=128, augment=False, seed=0)
    images = torch.cat([x for x, _ in islice(source.train, IMAGES // 128)])
    reference = model(images).log_softmax(1)
    for bits in args.bits or range(2, 9):
        for levels in LEVELS:
            rounded, errors = round_weights(model, bits, levels == "all")
            divergence = F.kl_div(rounded(images).log_softmax(1), reference, reduction="batchmean", log_target=True)
            row = {"model": "resnet20", "data": "cifar10", "bits": bits, "weight_levels": levels}
            row |= {"relative_squared_error": f"{mean(errors):.5f}", "divergence_nats": f"{float(divergence):.4f}"}
            print(row)
            append_row(ERRORS, row | {"layers": len(errors)} | provenance(command, IMAGES))


def round_weights(model: nn.Module, bits: int, all_levels: bool) -> tuple[nn.Module, list[float]]:
    """(a copy with every convolution's and linear layer's weight on its grid, relative squared error of each)."""
    rounded, errors = copy.deepcopy(model), []
    for layer in rounded.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight: Tensor = layer.weight.detach()
            threshold, side = fit_weight_grid(weight, bits, True, all_levels)
            q = IntegerQuantizer(threshold, Fixed(bits), True, side)(weight)[0].detach()
            errors.append(float((q - weight).square().sum() / weight.square().sum()))
            layer.weight.data.copy_(q)
    return rounded, errors


def measure_training(args: argparse.Namespace, command: str) -> None:
    """Train a float model once, compress it at each width with both choices, and append a row for each."""
    source = tasks.load_data(args.data, args.data_root, batch_size=64, limit=args.limit, seed=0)
    float_model = train_float(args, source).eval()
    float_accuracy = accuracy(float_model, source)
    for bits in args.bits or (2, 3):
        for levels in LEVELS:
            start = time.perf_counter()
            found = [train_compressed(args, float_model, bits, levels, seed) for seed in range(args.seeds)]
            row: dict[str, object] = {"model": args.model, "data": args.data, "bits": bits, "weight_levels": levels}
            row |= {"limit": args.limit or "", "epochs": args.epochs, "float": f"{float_accuracy:.2f}"}
            row |= {"accuracy": f"{mean(found):.2f}", "deviation": f"{stdev(found) if len(found) > 1 else 0.0:.2f}"}
            row |= {"each": " ".join(f"{value:.2f}" for value in found)}
            row |= {"seconds": round(time.perf_counter() - start)}
            print(row, flush=True)
            append_row(TRAINING, row | provenance(command, args.seeds))


def train_compressed(args: argparse.Namespace, float_model: nn.Module, bits: int, levels: str, seed: int) -> float:
    """Test accuracy in percent of the small model after training at uniform bits from a float model.

    The seed draws the split, the order of the samples and the augmentation.
    """
    source = tasks.load_data(args.data, args.data_root, batch_size=64, limit=args.limit, seed=seed)
    example = next(iter(source.train))[0]
    session = jpq.compress(
        float_model,
        example,
        method="uniform",
        bops="100%",
        w_bits=(bits, bits),
        a_bits=(bits, bits),
        weight_levels=levels,
        steps=1,
    )
    session.discretize()
    optimizer = torch.optim.Adam(session.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for _ in range(args.epochs):
        session.train()
        for x, y in source.train:
            optimizer.zero_grad()
            F.cross_entropy(session(x), y).backward()
            optimizer.step()
        schedule.step()
    return accuracy(session.finalize(), source)


@torch.no_grad()
def accuracy(model: nn.Module, source: tasks.Data) -> float:
    """The share of test samples whose largest output is their class, in percent."""
    right = [(model(x).argmax(1) == y).float() for x, y in source.test]
    return 100 * float(torch.cat(right).mean())


def train_float(args: argparse.Namespace, source: tasks.Data) -> nn.Module:
    """A float model, trained with Adam and a cosine."""
    torch.manual_seed(0)
    model = tasks.build_model(args.model, source.classes, source.shape[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.float_epochs)
    for _ in range(args.float_epochs):
        for x, y in source.train:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return model


if __name__ == "__main__":
    main()
