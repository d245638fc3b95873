"""README's table of the networks that are covered, from coverage.csv."""

from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
FAMILIES = {  # how a name begins -> what README calls the family; the first that fits
    "convnext": "ConvNeXt",
    "densenet": "DenseNet",
    "efficientnet": "EfficientNet, V2",
    "maxvit": "MaxViT",
    "vit": "ViT",
    "swin": "Swin, V2",
    "regnet": "RegNet",
    "vgg": "VGG, AlexNet",
    "alexnet": "VGG, AlexNet",
    "res": "ResNet, ResNeXt, Wide ResNet",
    "wide_res": "ResNet, ResNeXt, Wide ResNet",
    "googlenet": "GoogLeNet, Inception",
    "inception": "GoogLeNet, Inception",
    "mobilenet": "MobileNet, MNASNet",
    "mnasnet": "MobileNet, MNASNet",
    "shufflenet": "ShuffleNet, SqueezeNet",
    "squeezenet": "ShuffleNet, SqueezeNet",
}
KINDS = {
    "segmentation": "segmentation: FCN, DeepLabV3, LR-ASPP",
    "detection": "backbones of the detectors",
    "video": "video: R3D, MC3, R(2+1)D, S3D, MViT, Swin3D",
}
OUTPUT = "reaches the model's output"


def family(name: str, kind: str) -> str:
    """The line of README's table that a network belongs to."""
    return KINDS.get(kind) or next((line for start, line in FAMILIES.items() if name.startswith(start)), name)


def stays(frozen: pd.Series) -> str:
    """Why channels stay, the classes that the model gives left out; with the number of networks, most first."""
    reasons: dict[str, int] = {}
    for text in frozen.dropna():
        for reason in {part.split(" ", 1)[1] for part in text.split("; ")} - {OUTPUT}:
            reasons[reason] = reasons.get(reason, 0) + 1
    found = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    every = len(frozen)
    return "; ".join(why if n == every else f"{why} ({n} of {every})" for why, n in found) or "nothing"


def span(values: pd.Series, digits: int = 0) -> str:
    """The smallest to the largest, as one number where they look alike."""
    low, high = f"{values.min():.{digits}f}", f"{values.max():.{digits}f}"
    return low if low == high else f"{low} to {high}"


def coverage() -> str:
    """What can be pruned in torchvision's networks, a row per family, from coverage.csv."""
    table = pd.read_csv(HERE / "results" / "coverage.csv")
    table = table.assign(exact=table.rebuilt_ok.astype(bool))
    done = table[table.exact]
    images = table[table.kind == "classification"]
    rest = table[table.kind != "classification"]
    lines = [
        f"{int(images.exact.sum())} of {len(images)} classification networks and {int(rest.exact.sum())} of "
        f"{len(rest)} others are rebuilt exactly: with a random half of the units of every site dropped, masked and "
        f"rebuilt network differ by at most {done.difference.max():.1g} (relative, float64, {span(done.seeds)} random "
        f"halves each; a mirrored image changes the same outputs by {done.sensitivity.min():.0e} at least). Random "
        f"weights, torch {table.torch.iloc[0]}, torchvision {table.torchvision.iloc[0]}; `python studies/coverage.py`, "
        "a row per network in `studies/results/coverage.csv`.",
        "",
        "| networks | exact | layers with so many % of the MACs are touched | MACs gone without every second unit, % "
        "| largest difference | what stays, besides the outputs |",
        "|---|---|---|---|---|---|",
    ]
    names = [family(*pair) for pair in zip(table.model, table.kind, strict=True)]
    for name, rows in table.groupby(pd.Series(names, index=table.index), sort=False):
        lines.append(
            f"| {name} | {int(rows.exact.sum())} of {len(rows)} | {span(100 * rows.prunable_macs)} "
            f"| {span(100 * rows.macs_gone_at_half)} | {rows.difference.max():.0e} | {stays(rows.frozen)} |"
        )
    failed = [f"{row.model}: {row.why_not}" for row in table[~table.exact].itertuples()]
    return "\n".join([*lines, "", *(["Not rebuilt: " + "; ".join(failed), ""] if failed else [])])
