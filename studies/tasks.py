"""Tasks beside the classification of images, on real data: the metric at a budget, and that of the file in runtimes.

    python -m pip install "jpq[metrics]" openvino; python -m pip install --no-deps aeon    # aeon brings the time series
    python studies/tasks.py [--cases regression text ...] [--methods djpq ...] [--seeds 0] [--shared DIR]

A case names task, data, network, budget and a short training (CASES); its first run trains the float model (or reads
the weights that are given), and all methods of a seed start from the same. Each run is `jpq.optimize`; its file is
then evaluated in onnxruntime and in OpenVINO, with their usual optimisations. Rows that the CSV has are not
measured again. Columns:

    baseline            metric without a network: bicubic scaling, the noisy image, the most frequent class, the mean
    float, metric       on the test split, of the float model and of the small one in PyTorch
    metric_RUNTIME      of the file there; agreement_RUNTIME: share of decisions that are the same as in PyTorch
    used                bit-operations over the budget, at most 1
    seconds             wall time of a run without the float model's training, on a machine that others use as well
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from support.grid import EpochPrinter, channels_kept
from support.result_rows import RESULTS, append_row, provenance, read_rows
from support.shapes import HARD
from support.shapes_coco import write_coco
from torch import Tensor

import jpq
from jpq.config import Budget, Decide, Run, Task, Train
from jpq.export import compare, open_session
from jpq.results import Result
from jpq.tasks import Data, read_data

PATH = RESULTS / "tasks.csv"
KEY = ["case", "method", "target", "seed"]
WEIGHTS = Path("runs/tasks")  # float models, by case and seed
CPU = torch.device("cpu")
RUNTIMES = ("onnxruntime", "openvino")

METHODS = {  # names in the CSV -> settings
    "uniform": Decide(method="uniform"),
    "bits 4/5": Decide(bits="4/5"),  # where uniform takes 5/4, of nearly the same cost
    "djpq": Decide(method="djpq"),
    "measured": Decide(method="measured"),
    "dhp": Decide(method="dhp"),
    "pdp 10%": Decide(method="pdp", density=0.1),
    "pdp-2:4": Decide(method="pdp-2:4"),
    "smart 2:4": Decide(method="smart", structure="2:4"),
    "ranked l1": Decide(method="ranked", score="l1", density=0.3),
    "ranked random": Decide(method="ranked", score="random", density=0.3),
}
JOINT = ("uniform", "djpq", "measured")


@dataclass(frozen=True)
class Case:
    """One line of the study: what is trained on what, for how long, and onto which budget."""

    task: str
    data: str  # as it is shown
    network: str  # as it is shown
    source: Callable[[Path, Path], Task]  # (shared data, folder for files) -> what jpq.optimize reads
    train: Train
    targets: Sequence[str] = ("2%",)
    methods: Sequence[str] = JOINT
    seeds: Sequence[int] = (0,)
    baseline: Callable[[Data], float] | None = None  # score without a network; None: chance


def diabetes(shared: Path, folder: Path) -> Task:
    """scikit-learn's table of 442 patients."""
    return Task(model="support.task_models:mlp", data="sklearn:diabetes")


def sentences(shared: Path, folder: Path) -> Task:
    """SST-2."""
    return Task(model="support.task_models:Transformer", data=f"text:{shared / 'sst2'}")


def camvid(model: str) -> Callable[[Path, Path], Task]:
    """180 images of CamVid, scaled to 96 x 128, and its whole test part."""

    def source(shared: Path, folder: Path) -> Task:
        return Task(model=model, data=f"folder:{shared / 'camvid'}", void=11, image_size=(96, 128), limit=180)

    return source


def grey_images(shared: Path, folder: Path, test: str, count: int) -> str:
    """A folder with the first images of Train400 as its training part and another set as its test part."""
    for part, name, most in (("train", "train400", count), ("test", test, None)):
        (folder / part).mkdir()
        for file in sorted((shared / "denoise" / name).glob("*.png"))[:most]:
            (folder / part / file.name).symlink_to(file.resolve())
    return f"folder:{folder}"


def noisy(test: str) -> Callable[[Path, Path], Task]:
    """10 images of Train400 with noise of sigma 25, the centres of a test set's images, and DnCNN's public weights."""

    def source(shared: Path, folder: Path) -> Task:
        return Task(
            model="support.task_models:DnCNN",
            weights=shared / "weights" / "dncnn_sigma25.safetensors",
            data=grey_images(shared, folder, test, 10),
            noise=25,
            crop=(40,),
            image_size=(80,),
        )

    return source


def halved(shared: Path, folder: Path) -> Task:
    """20 images of Train400 and the centres of Set12, to be doubled."""
    data = grey_images(shared, folder, "set12", 20)
    return Task(model="support.task_models:EDSR", data=data, scale=2, crop=(48,), image_size=(256,))


def hard_shapes(shared: Path, folder: Path) -> Task:
    """Drawn images of 128 x 128 with 4 to 8 shapes of six classes (support/shapes.py)."""
    data = write_coco(folder, {"train": (800, 1), "val": (100, 2), "test": (200, 5)}, HARD)
    return Task(model="torchvision:ssdlite320_mobilenet_v3_large", data=data)


def vowels(model: str) -> Callable[[Path, Path], Task]:
    """JapaneseVowels as the package aeon brings it: 12 cepstral coefficients, 25 points in time, 9 speakers."""

    def source(shared: Path, folder: Path) -> Task:
        spec = find_spec("aeon")  # only its files are read
        if spec is None or not spec.submodule_search_locations:
            raise jpq.JpqError("The time series lie in a package that is missing: `pip install --no-deps aeon`.")
        place = Path(spec.submodule_search_locations[0], "datasets", "data", "JapaneseVowels")
        arrays: dict[str, Any] = {}
        for part in ("train", "test"):
            arrays[f"x_{part}"], arrays[f"y_{part}"] = read_ts(place / f"JapaneseVowels_eq_{part.upper()}.ts")
        np.savez(folder / "vowels.npz", **arrays)
        return Task(model=f"support.task_models:{model}", data=f"series:{folder / 'vowels.npz'}")

    return source


def read_ts(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Windows [N, C, T] and classes [N] of a .ts file of equal lengths: channels between colons, the class last."""
    lines = path.read_text(encoding="utf-8").split("@data")[1].split()
    rows = [line.split(":") for line in lines]
    windows = np.array([[[float(v) for v in channel.split(",")] for channel in row[:-1]] for row in rows])
    return windows, np.array([int(row[-1]) for row in rows])


def bicubic(data: Data) -> float:
    """PSNR of bicubic scaling by 2."""

    def scale(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bicubic").clamp(0, 1)

    return data.task.evaluate(scale, data.test)


def untouched(data: Data) -> float:
    """PSNR of the noisy images."""
    return data.task.evaluate(lambda x: x, data.test)


def majority(data: Data) -> float:
    """Score of always the class that most training samples, or pixels, have."""
    counts = torch.zeros(data.classes)
    for _, y in data.train:
        counts += torch.bincount(y[y < data.classes].flatten(), minlength=data.classes)

    def scores(x: Tensor) -> Tensor:
        shape = (len(x), data.classes, *(x.shape[2:] if x.dim() == 4 else ()))
        return counts.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)

    return data.task.evaluate(scores, data.test)


DENOISE = Train(epochs=12, batch_size=4, lr=7e-4, distill=10.0)  # 540 steps
SERIES = Train(epochs=30, float_epochs=40, batch_size=16, lr=3e-3)
CAMVID_TRAIN = Train(epochs=8, float_epochs=40, batch_size=8, lr=4e-3)

CASES = {
    "regression": Case(
        "regression",
        "scikit-learn's diabetes",
        "MLP 10-64-64-1",
        diabetes,
        Train(epochs=40, float_epochs=40, batch_size=32, lr=2e-3),
        seeds=(0, 1, 2),
    ),
    "text": Case(
        "text-classification",
        "SST-2",
        "transformer, 2 layers, width 128, a token for 8 words",
        sentences,
        Train(epochs=4, float_epochs=3, batch_size=64, lr=1e-3),
        methods=(*JOINT, "pdp 10%", "pdp-2:4", "smart 2:4"),
        baseline=majority,
    ),
    "segmentation": Case(
        "segmentation",
        "180 of CamVid, 96 x 128",
        "U-Net, width 12",
        camvid("support.task_models:UNet"),
        CAMVID_TRAIN,
        baseline=majority,
    ),
    "denoising": Case(
        "restoration",
        "10 of Train400, Set12's centres of 80 x 80, sigma 25",
        "DnCNN, public weights",
        noisy("set12"),
        DENOISE,
        targets=("2%", "1%"),
        methods=(*JOINT, "bits 4/5", "dhp"),
        baseline=untouched,
    ),
    "series-conv": Case(
        "sequence-classification",
        "JapaneseVowels (in aeon)",
        "1-D conv, 3 layers",
        vowels("conv1d"),
        SERIES,
        seeds=(0, 1, 2),
        baseline=majority,
    ),
    "series-gru": Case(
        "sequence-classification",
        "JapaneseVowels (in aeon)",
        "GRU, 64 units",
        vowels("GRU"),
        replace(SERIES, epochs=16),
        baseline=majority,
    ),
    "super-resolution": Case(
        "restoration",
        "20 of Train400, Set12's centres of 256 x 256, x2",
        "EDSR, 4 blocks, width 32",
        halved,
        Train(epochs=4, float_epochs=8, batch_size=8, lr=2e-3),
        methods=(*JOINT, "bits 4/5"),
        seeds=(0, 1, 2),
        baseline=bicubic,
    ),
    "detection": Case(
        "detection",
        "800 drawn images, six shapes, 128 x 128",
        "torchvision ssdlite320_mobilenet_v3_large",
        hard_shapes,
        Train(epochs=4, float_epochs=14, batch_size=16, lr=2e-3),
        targets=("3%",),
        methods=("uniform", "djpq", "ranked l1", "ranked random"),
    ),
    "segmentation-lraspp": Case(
        "segmentation",
        "180 of CamVid, 96 x 128",
        "torchvision lraspp_mobilenet_v3_large",
        camvid("torchvision:lraspp_mobilenet_v3_large"),
        CAMVID_TRAIN,
        methods=("uniform", "djpq"),
        baseline=majority,
    ),
}


def run_cell(name: str, method: str, target: str, seed: int, shared: Path) -> dict[str, object]:
    """One run of `jpq.optimize` and its file in the runtimes, as a row."""
    case = CASES[name]
    command = f"python studies/tasks.py --cases {name} --methods '{method}' --targets {target} --seeds {seed}"
    with tempfile.TemporaryDirectory() as text:
        files, out = Path(text, "files"), Path(text, "runs")
        files.mkdir()
        weights = WEIGHTS / f"{name}-{seed}.safetensors"
        source = case.source(shared, files)
        if source.weights is None and weights.exists():
            source = replace(source, weights=weights)
        run = Run(seed=seed, out=out, threads=1, device="cpu")
        config = jpq.Config(source, Budget(target_bops=target), METHODS[method], case.train, run)
        result = jpq.optimize(config, EpochPrinter(), command)
        if source.weights is None:
            weights.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(result.folder / "float.safetensors", weights)
        row = {
            "case": name,
            "task": case.task,
            "data": case.data,
            "network": case.network,
            "method": method,
            "target": target,
            "seed": seed,
            **measured(case, result, config),
            **provenance(command, packages=("torch", *RUNTIMES)),
        }
    print(row, flush=True)
    return row


def measured(case: Case, result: Result, config: jpq.Config) -> dict[str, object]:
    """The figures of a finished run, with those of its file in the runtimes."""
    data = read_data(config, CPU)
    model, _ = jpq.load(result.folder, run_code=True)
    task = data.task

    def shown(score: float) -> float:
        return round(task.score(score) * (100 if task.metric_unit == "%" else 1), 3)

    baseline = task.chance(data.classes) if case.baseline is None else case.baseline(data)
    row: dict[str, object] = {
        "epochs": config.train.epochs,
        "search_epochs": sum(record.phase == "search" for record in result.history),
        "train_samples": data.train.size,
        "test_samples": data.test.size,
        "metric_name": task.metric_name,
        "unit": task.metric_unit,
        "baseline": shown(baseline),
        "float": shown(result.float.accuracy),
        "metric": shown(result.compressed.accuracy),
    }
    for runtime in RUNTIMES:
        session = open_session(runtime, result.folder / "model.onnx")
        row[f"metric_{runtime}"] = shown(task.evaluate(session, data.test))
        row[f"agreement_{runtime}"] = round(compare(model, session, data.test, task)["argmax_agreement"], 5)
    layers = result.layers
    seconds = result.seconds
    return row | {
        "bops_share": round(result.compressed.bops_share, 7),
        "used": round(result.targets["bops"]["used"], 4),
        "w_bits_mean": round(statistics.mean(x.w_bits for x in layers), 2),
        "a_bits_mean": round(statistics.mean(x.a_bits for x in layers), 2),
        "density": round(sum(x.macs for x in layers) / max(1, sum(x.macs / x.density for x in layers)), 4),
        "channels_kept": channels_kept(result),
        "size_bytes": result.compressed.size_bytes,
        "warnings": len(result.file_warnings),
        "seconds": round(seconds["total"] - seconds.get("float", 0), 1),
    }


def tasks_table() -> str:
    """README's table: a row per case, budget and method, means over seeds."""
    table = pd.read_csv(PATH)
    head = (
        "| task and data | network | BOPs asked | method | n | baseline | float | small model | in both runtimes | same"
    )
    lines = [f"{head} decisions | BOPs used % | seconds |", "|" + "---|" * 12]
    for (case, target, method), runs in table.groupby(["case", "target", "method"], sort=False):
        first = runs.iloc[0]
        unit = f" {first.unit}" if isinstance(first.unit, str) and first.unit else ""
        digits = 2 if first.unit in ("%", "dB") else 3
        spread = f" ({runs.metric.min():.{digits}f} to {runs.metric.max():.{digits}f})" if len(runs) > 1 else ""
        cells = [
            f"{case}: {first.data}",
            first.network,
            target,
            method,
            str(len(runs)),
            f"{runs.baseline.mean():.{digits}f}",
            f"{runs.float.mean():.{digits}f}",
            f"{runs.metric.mean():.{digits}f}{spread} {first.metric_name}{unit}",
            " / ".join(f"{runs[f'metric_{name}'].mean():.{digits}f}" for name in RUNTIMES),
            " / ".join(f"{100 * runs[f'agreement_{name}'].min():.2f} %" for name in RUNTIMES),
            f"{100 * runs.bops_share.mean():.3f}",
            f"{runs.seconds.mean():.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    caption = (
        f"Test split; baseline: bicubic scaling, the noisy images, the most frequent class, the mean. Runtimes: "
        f"onnxruntime / OpenVINO. {table.hardware.iloc[0]}, others running beside (`python studies/tasks.py`)."
    )
    return "\n".join([*lines, "", caption, ""])


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: those of each case")
    parser.add_argument("--targets", nargs="+", help="default: those of each case")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of each case")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder of the real data")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for name in args.cases:
        case = CASES[name]
        for seed in args.seeds or case.seeds:
            for target in args.targets or case.targets:
                for method in args.methods or case.methods:
                    known = read_rows(PATH, KEY)[KEY].to_numpy().tolist()
                    if [name, method, target, seed] not in known:
                        print(f"{name}: {method} {target} seed {seed}", flush=True)
                        append_row(PATH, run_cell(name, method, target, seed, args.shared))
    print(tasks_table())


if __name__ == "__main__":
    main()
