"""Float weights for studies of searching, trained on 45,000 CIFAR-10 images; the other 5,000 stay unseen.

    python studies/float_weights.py --data-root DIR [--model resnet20] [--epochs 100] [--bfloat16] [--resume]

The 45,000 are jpq's own training split (held-out share 0.1, seed 0), so `jpq optimize --seed 0` judges its decisions
on images that these weights have never seen, which it cannot do with published weights of the whole training split.
SGD with Nesterov momentum 0.9, batches of 128, weight decay 5e-4, learning rate 0.1 after one epoch of warm-up, then
a cosine down to 0; random crops and flips. With --bfloat16 layers compute in bfloat16 while they learn, which halves
the seconds where the processor has instructions for it; weights and all accuracies are of float32. A checkpoint after
each epoch; at the end studies/weights/NAME.safetensors and a row in studies/results/float_weights.csv with the test
accuracy, read once.
"""

from __future__ import annotations

import argparse
import math
import shlex
import time
from functools import partial
from pathlib import Path

import torch
from support.result_rows import RESULTS, STUDIES, append_row, provenance
from torch import nn
from torch.nn import functional as F

from jpq.files import replace_file, save_tensors
from jpq.tasks import Batches, build_model, load_data

WEIGHTS = STUDIES / "weights"
LEARNING_RATE = 0.1
BATCH = 128


def learning_rate(step: int, steps: int, steps_per_epoch: int) -> float:
    """The rate at one step: a linear rise over the first epoch, then half a cosine."""
    if step < steps_per_epoch:
        return LEARNING_RATE * (step + 1) / steps_per_epoch
    position = (step - steps_per_epoch) / max(1, steps - steps_per_epoch)
    return LEARNING_RATE * (1 + math.cos(math.pi * position)) / 2


@torch.no_grad()
def accuracy(net: nn.Module, batches: Batches) -> float:
    """The share of samples whose largest output is their class."""
    net.eval()
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in batches)
    return right / batches.size


def main() -> None:
    """Train, or go on from the last epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 in training")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/float_weights.pt"))
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    source = load_data("cifar10", args.data_root, batch_size=BATCH, held_out=0.1, seed=0)
    net = build_model(args.model, source.classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    start, spent, step = 0, 0.0, 0
    if args.resume:
        saved = torch.load(args.checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        start, spent, step = saved["epoch"], saved["seconds"], saved["step"]
    steps_per_epoch = math.ceil(source.train.size / BATCH)
    steps = args.epochs * steps_per_epoch
    for epoch in range(start, args.epochs):
        begin = time.perf_counter()
        net.train()
        for x, y in source.train.epoch(epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, steps_per_epoch)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
                output = net(x.contiguous(memory_format=torch.channels_last))
            F.cross_entropy(output.float(), y).backward()
            optimizer.step()
            step += 1
        spent += time.perf_counter() - begin
        print(
            f"epoch {epoch + 1}/{args.epochs} held-out {accuracy(net, source.held_out):.2%} {spent:.0f} s", flush=True
        )
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"epoch": epoch + 1, "seconds": spent, "step": step}
        replace_file(args.checkpoint, partial(torch.save, state))
    WEIGHTS.mkdir(exist_ok=True)
    path = WEIGHTS / f"{args.model}_cifar10_45000.safetensors"
    save_tensors(net.to(memory_format=torch.contiguous_format), path)
    given = ["--data-root", "DIR", "--model", args.model, "--epochs", str(args.epochs)]
    given += ["--bfloat16"] if args.bfloat16 else []
    command = shlex.join(["python", "studies/float_weights.py", *given])
    row = {
        "model": args.model,
        "epochs": args.epochs,
        "held_out_accuracy": accuracy(net, source.held_out),
        "test_accuracy": accuracy(net, source.test),
        "seconds": round(spent),
    }
    append_row(RESULTS / "float_weights.csv", row | provenance(command, 1, ("torch", "torchvision")))


if __name__ == "__main__":
    main()
