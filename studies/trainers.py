"""Other libraries' trainers beside jpq's own loop: the same float weights, budget, data, batches, epochs and rates.

    pip install "jpq[lightning]" "jpq[transformers]"
    python studies/trainers.py [--cases digits sst2] [--seeds 0 1 2] [--sst2 DIR]

`digits`: convnet at 1 % of the BOPs, `jpq.optimize` and Lightning's Trainer. `sst2`: a BERT of one layer and width 64
on 1,000 sentences of SST-2 (--sst2: the folder with train.tsv, dev.tsv and test.tsv) at 2 %, `jpq.optimize` and Hugging
Face's Trainer. Adam with a cosine rate, distillation 1.0 at temperature 2, half of the steps search. The trainers have
one cosine over all steps, as jpq has, and their own order of the samples. Lightning clips no
gradients unless told so; here it is (at a norm of 5, as jpq does), and once it is not. Rows that the CSV has are not
measured again. Columns:

    used        counted BOPs of the small model over the budget, at most 1
    accuracy    of the small model on the test split; float_accuracy: of the model that it was made from
    seconds     processor time of search, fine-tuning and finalizing; jpq.optimize also exports and verifies
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from support.grid import with_float_weights
from support.result_rows import RESULTS, append_row, provenance, read_rows
from torch import nn
from torch.utils.data import DataLoader, Dataset

import jpq
from jpq.config import Budget, Decide, Run, Task, Train
from jpq.tasks import Data, load_dense_model, read_data

PATH = RESULTS / "trainers.csv"
KEY = ["case", "trainer", "seed"]
CPU = torch.device("cpu")

BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 8000,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 64,
}


class Rows(Dataset):  # type: ignore[type-arg]
    """A split's samples, in the order of the data set."""

    def __init__(self, data: Data) -> None:
        batches = list(data.train)
        self.x = torch.cat([ids_of(x) for x, _ in batches])
        self.y = torch.cat([y for _, y in batches])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[n], self.y[n]


def ids_of(x: Any) -> torch.Tensor:
    """The first tensor of a batch's inputs: images, or token ids, whose mask the model derives from them."""
    tensor: torch.Tensor = x["input_ids"] if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x
    return tensor


def train_lightning(
    model: nn.Module, data: Data, config: jpq.Config, settings: dict[str, Any], max_norm: float | None = 5.0
) -> nn.Module:
    """The small model after Lightning's Trainer; gradients are clipped to a norm of `max_norm`, if it is given."""
    import lightning.pytorch as lightning

    from jpq.integrations.lightning import CompressionCallback

    train, steps = config.train, config.train.epochs * (len(Rows(data)) // config.train.batch_size)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=train.lr, weight_decay=train.weight_decay)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    callback = CompressionCallback("net", example_inputs=ids_of(data.example), search=train.search, **settings)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=train.epochs, callbacks=[callback], gradient_clip_val=max_norm, **quiet
    )
    trainer.fit(Module(), DataLoader(Rows(data), train.batch_size, shuffle=True, drop_last=True))
    return checked(callback.small)


def train_transformers(model: nn.Module, data: Data, config: jpq.Config, settings: dict[str, Any]) -> nn.Module:
    """The small model after Hugging Face's Trainer."""
    import transformers

    from jpq.integrations.transformers import CompressionCallback

    train, rows = config.train, Rows(data)

    class WithLoss(nn.Module):
        """The model with the loss that the Trainer expects."""

        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            logits = self.net(input_ids)
            return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    steps = train.epochs * (len(rows) // train.batch_size)
    example = {"input_ids": ids_of(data.example)}
    callback = CompressionCallback(WithLoss().eval(), example, steps=round(train.search * steps), **settings)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=train.batch_size,
            learning_rate=train.lr,
            weight_decay=train.weight_decay,
            lr_scheduler_type="cosine",
            seed=config.run.seed,
            dataloader_drop_last=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        columns = [{"input_ids": x, "labels": y} for x, y in rows]
        transformers.Trainer(callback.model, arguments, train_dataset=columns, callbacks=[callback]).train()
    return checked(callback.small)


def checked(small: nn.Module | None) -> nn.Module:
    """The small model, which must be there."""
    if small is None:
        raise jpq.JpqError("The trainer ended before its search did.")
    return small


@dataclass(frozen=True)
class Case:
    """Model, data and budget, the trainers beside jpq's own loop, and the package that they are of."""

    trainers: Mapping[str, Callable[[nn.Module, Data, jpq.Config, dict[str, Any]], nn.Module]]
    package: str
    target: str
    config: Callable[[Path, Path], jpq.Config]  # (folder for files, folder of SST-2) -> settings


def digits_config(folder: Path, sst2: Path) -> jpq.Config:
    """The digits with convnet."""
    return jpq.Config(train=Train(epochs=12, float_epochs=20, augment=False))


def sst2_config(folder: Path, sst2: Path) -> jpq.Config:
    """SST-2 with a small BERT of random weights, trained in the run."""
    path = folder / "bert.json"
    path.write_text(json.dumps(BERT), encoding="utf-8")
    task = Task(model=f"hf:{path}", data=f"text:{sst2}", limit=1000)
    return jpq.Config(task=task, train=Train(epochs=4, float_epochs=3, batch_size=32, lr=1e-3, augment=False))


CASES = {
    "digits": Case(
        {"lightning": train_lightning, "lightning, gradients not clipped": partial(train_lightning, max_norm=None)},
        "lightning",
        "1%",
        digits_config,
    ),
    "sst2": Case({"transformers": train_transformers}, "transformers", "2%", sst2_config),
}


def rows_of(name: str, seed: int, known: list[list[object]], sst2: Path) -> None:
    """Measure what is missing of one case and seed, and append it."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        config = case.config(folder, sst2)
        config = replace(config, run=Run(seed=seed, out=folder, threads=1, device="cpu"))
        config = replace(config, budget=Budget(target_bops=case.target), decide=Decide())
        weights = folder / "float.safetensors"
        config = with_float_weights(config, weights)
        for trainer in ("jpq", *case.trainers):
            if [name, trainer, seed] not in known:
                append_row(PATH, measure(name, trainer, config))


def measure(name: str, trainer: str, config: jpq.Config) -> dict[str, object]:
    """One row: a whole run of jpq, or one of the trainer."""
    case, start = CASES[name], time.process_time()
    data = read_data(config, CPU)
    model = load_dense_model(config, data, CPU)
    float_accuracy = data.task.evaluate(model, data.test)
    if trainer == "jpq":
        result = jpq.optimize(config)
        share, accuracy, packages = result.compressed.bops_share, result.compressed.accuracy, ["torch"]
        used = result.targets["bops"]["used"]
    else:
        torch.manual_seed(config.run.seed)
        settings = {"bops": case.target, "distill": config.train.distill, "temperature": config.train.temperature}
        small = case.trainers[trainer](model, data, config, settings)
        example = ids_of(data.example)
        full = sum(layer.macs for layer in jpq.trace(model, (example,)).layers)
        full += sum(product.macs for product in jpq.trace(model, (example,)).products)
        share = jpq.measure(small, example)["bops"] / (full * 32 * 32)
        used, packages = share / (float(case.target.rstrip("%")) / 100), ["torch", case.package]
        accuracy = data.task.evaluate(plain(small), data.test)
    row = {
        "case": name,
        "trainer": trainer,
        "seed": config.run.seed,
        "target": case.target,
        "epochs": config.train.epochs,
        "train_samples": data.train.size,
        "test_samples": data.test.size,
        "float_accuracy": round(float_accuracy, 4),
        "accuracy": round(accuracy, 4),
        "bops_share": round(share, 7),
        "used": round(used, 5),
        "seconds": round(time.process_time() - start, 1),
        **{"lightning": "", "transformers": ""},
        **provenance(f"python studies/trainers.py --cases {name} --seeds {config.run.seed}", packages=packages),
    }
    print(row, flush=True)
    return row


def plain(small: nn.Module) -> Callable[..., torch.Tensor]:
    """The small model as a function of a batch's inputs."""

    def run(*args: Any, **inputs: Any) -> torch.Tensor:
        output = small(ids_of(inputs) if inputs else args[0])
        return output["logits"] if isinstance(output, dict) else output

    return run


def trainers_table() -> str:
    """README's table: a row per case and trainer, means over seeds with their ends."""
    table = pd.read_csv(PATH)
    lines = ["| case | trainer | n | float, % right | small model, % right | budget used | seconds |", "|" + "---|" * 7]
    for (case, trainer), runs in table.groupby(["case", "trainer"], sort=False):
        low, mean, high = (100 * value for value in (runs.accuracy.min(), runs.accuracy.mean(), runs.accuracy.max()))
        cells = [
            f"{case} at {runs.target.iloc[0]}",
            str(trainer),
            str(runs.seed.nunique()),
            f"{100 * runs.float_accuracy.mean():.2f}",
            f"{mean:.2f} ({low:.2f} to {high:.2f})",
            f"{100 * runs.used.min():.1f} to {100 * runs.used.max():.1f} %",
            f"{runs.seconds.mean():.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    hardware = table.hardware.iloc[0]
    caption = f"Test split, processor seconds without the float model; {hardware} (`python studies/trainers.py`)."
    return "\n".join([*lines, "", caption, ""])


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sst2", type=Path, default=Path("../shared/data/sst2"))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in args.cases:
        for seed in args.seeds:
            known = read_rows(PATH, KEY)[KEY].to_numpy().tolist()
            rows_of(name, seed, known, args.sst2)
    print(trainers_table())


if __name__ == "__main__":
    main()
