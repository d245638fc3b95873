"""Pruning of a trained model on random images (`jpq prune-private`): a mask and weights for the owner of the data.

1 model and weights - 2 random images - 3 trace, sites - 4 layer by layer (`layerwise_admm`) - 5 mask, weights, report.
The client, who has the data, trains under the mask with `jpq optimize --mask`.

Y. Gong et al., GLSVLSI 2020, arXiv:2003.06513. No data set is opened here: `jpq.tasks.data` lends constants only.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jpq.compression import external_mask
from jpq.data_free.layerwise_admm import AdmmSettings, DrawImages, LayerReport, dense_teacher, prune_layerwise
from jpq.data_free.settings import DataFreeSettings
from jpq.files.atomic import replace_file
from jpq.files.paths import expand_paths
from jpq.methods.gates.admm import Admm
from jpq.tasks import models
from jpq.tasks.data import IMAGENET, PREPROCESSING
from jpq.tasks.published_weights import load_named_weights
from jpq.tracing.decompose import decompose
from jpq.tracing.forward import call_model, collect_tensors
from jpq.tracing.model_checks import check_full_precision
from jpq.tracing.network import Network
from jpq.tracing.sites import Site, masks
from jpq.tracing.trace import trace
from jpq.training.environment import pick_device, restored_threads, set_threads, versions
from jpq.types import JpqError, Units, unknown

ChannelMoments = tuple[Sequence[float], Sequence[float]]  # mean and deviation of each channel


@dataclass(frozen=True)
class DataFreeResult:
    """A model pruned without data, its masks, and its errors on random images."""

    model: nn.Module  # its weights lie on the sites' structures
    sites: tuple[Site, ...]
    kept: tuple[Units, ...]  # [rows, n] of each site, 0 or 1
    layers: tuple[LayerReport, ...]
    error: float  # of the whole model's output on new images, ||y - yhat|| / ||yhat||, norms as the images were matched
    error_one_shot: float  # the same error with all layers projected at once, without ADMM

    @property
    def density(self) -> float:
        """Share of the masked layers' weights that stays."""
        return sum(x.density * x.weights for x in self.layers) / sum(x.weights for x in self.layers)


def prune_private(
    settings: DataFreeSettings, report_layer: Callable[[LayerReport], None] = lambda row: None
) -> DataFreeResult:
    """Prune the trained model on random images, and write mask, weights and reports into the folder of the settings.

    report_layer: called with each layer's report as soon as it is done.
    Raises JpqError for settings and files that cannot work.
    """
    settings = expand_paths(settings.check())
    _make_folder(settings.out)
    device = pick_device(settings.device)
    usual_shape, usual_classes = models.usual_input(settings.model) or (None, 1000)
    shape, classes = settings.input_shape or usual_shape, settings.classes or usual_classes
    model = models.build(settings.model, classes, shape[0] if shape else None).to(device).eval()
    if shape is None:
        raise JpqError(f"Say what {settings.model} takes: --input-shape 3 224 224.")
    moments = input_moments(settings.like, shape)
    assert settings.weights is not None
    load_named_weights(model, settings.model, settings.weights)
    draw_images = random_images(shape, moments, settings.seed, device)
    example = draw_images(2)
    models.check_runs(model, example)
    model = decompose(model, example).eval()
    admm = AdmmSettings(
        settings.steps,
        settings.rho,
        settings.images,
        settings.batch_size,
        settings.lr,
        settings.inputs == "matched",
        settings.seed,
    )
    result = prune_model(
        model, draw_images, settings.structure, settings.share(), settings.skip, admm, report_layer, settings.threads
    )
    model_description = {"name": settings.model, "classes": classes, "channels": shape[0]}
    external_mask.write(settings.out, result.sites, result.kept, result.model, model_description)
    _write_reports(settings.out, result, settings)
    return result


def _make_folder(folder: Path) -> None:
    """Make the output folder. Raises JpqError where the system does not let it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JpqError(f"Cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error


def input_moments(data_set: str, shape: Sequence[int]) -> ChannelMoments:
    """Mean and deviation of each input channel, published for a data set, or its default for this shape.

    Raises JpqError for an unknown name, and for another number of channels.
    """
    known: dict[str, ChannelMoments] = {"imagenet": IMAGENET, **{n: (r.mean, r.std) for n, r in PREPROCESSING.items()}}
    if data_set and data_set not in known:
        raise unknown("data set in --like", data_set, known)
    plain = ((0.0,) * shape[0], (1.0,) * shape[0])
    moments = known[data_set] if data_set else IMAGENET if shape[0] == 3 else plain
    if len(moments[0]) != shape[0]:
        raise JpqError(f"--like {data_set} has {len(moments[0])} channels, and the model's input has {shape[0]}.")
    return moments


def random_images(shape: Sequence[int], moments: ChannelMoments, seed: int, device: torch.device) -> DrawImages:
    """A source of images of independent pixels, uniform on 0 to 255, normalised by channel; shape: of one image."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(c).view(-1, *[1] * (len(shape) - 1)) for c in moments)

    def draw(count: int) -> Tensor:
        pixels = torch.randint(256, (count, *shape), generator=generator)
        return ((pixels / 255 - mean) / std).to(device)

    return draw


@restored_threads()
def prune_model(
    model: nn.Module,
    draw_images: DrawImages,
    structure: str,
    density: float,
    skip: Sequence[str] = (),
    settings: AdmmSettings | None = None,
    report_layer: Callable[[LayerReport], None] = lambda row: None,
    threads: int = 0,
) -> DataFreeResult:
    """Prune a trained float model by layer-wise ADMM, without files; `model` went through `jpq.decompose` already.

    Args:
        draw_images: number -> that many new images, normalised as the model expects.
        structure: where zeros may lie, a text as for `--structure`.
        density: share that stays in each layer: of the kernels, for patterns; of the weights, for other structures.
        skip: layers that stay dense.
        settings: of ADMM; default: `AdmmSettings()`.
        report_layer: called with each layer's report as soon as it is done.
        threads: CPU threads meanwhile; 0: one for a small network, else as many as there are.
    """
    settings = settings or AdmmSettings()
    check_full_precision(model)
    network = trace(model, draw_images(2))
    set_threads(threads, network.macs * settings.batch_size)
    sites = mask_sites(network, structure, skip)
    device = next(model.parameters()).device
    gates, one_shot_gates = (
        [build_layer_gate(network, site, density, settings).to(device) for site in sites] for _ in range(2)
    )
    reports: list[LayerReport] = []

    def collect(report: LayerReport) -> None:
        reports.append(report)
        report_layer(report)

    pruned = prune_layerwise(model, sites, gates, draw_images, settings, collect)
    one_shot = project_weights_once(model, sites, one_shot_gates)
    dense, x = dense_teacher(model, draw_images, settings), draw_images(settings.batch_size)
    errors = [_output_error(dense, _with_weights(dense, m, sites), x) for m in (pruned, one_shot)]
    return DataFreeResult(pruned, sites, tuple(gate.keep() for gate in gates), tuple(reports), *errors)


def mask_sites(network: Network, structure: str, skip: Sequence[str]) -> tuple[Site, ...]:
    """Masks inside layers; patterns leave depthwise layers alone, which have one kernel for each channel."""
    depthwise = [x.name for x in network.layers if x.groups > 1 and x.groups == len(x.inputs)]
    return masks(network, structure, [*skip, *(depthwise if structure.startswith("pattern") else [])])


def build_layer_gate(network: Network, site: Site, density: float, settings: AdmmSettings) -> Admm:
    """An ADMM gate that keeps `density` of one layer; with patterns, of its kernels (all, if it reads the image)."""
    layer, structure = network.layer(site.taps[0].layer), site.taps[0].structure
    connected = 1.0 if structure.partition or layer.reads_input else density
    gate = Admm(site.rows, site.n, density, settings.rhos, connected)
    gate.set_site(structure.sizes(torch.Size(layer.weight_shape)), structure.quota())
    return gate


@torch.no_grad()
def project_weights_once(model: nn.Module, sites: Sequence[Site], gates: Sequence[Admm]) -> nn.Module:
    """Project the dense weights of a copy of `model` at once: magnitude pruning on the same structure."""
    model = copy.deepcopy(model)
    for site, gate in zip(sites, gates, strict=True):
        layer: Any = model.get_submodule(site.taps[0].layer)
        gate.observe_weights([(layer.weight.detach().clone(), site.taps[0].structure)])
        layer.weight.data.copy_(gate.near(0))
    return model


@torch.no_grad()
def _with_weights(dense: nn.Module, pruned: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """A copy of `dense` with the masked layers' weights of `pruned`."""
    model = copy.deepcopy(dense)
    for site in sites:
        layer, pruned_layer = (m.get_submodule(site.taps[0].layer) for m in (model, pruned))
        layer.load_state_dict(pruned_layer.state_dict())
    return model


@torch.no_grad()
def _output_error(dense: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    """||y - yhat|| / ||yhat|| over all outputs."""
    pairs = list(zip(collect_tensors(call_model(pruned, x)), collect_tensors(call_model(dense, x)), strict=True))
    distance = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((distance / max(1e-30, sum(float(b.square().sum()) for _, b in pairs))) ** 0.5)


def _write_reports(folder: Path, result: DataFreeResult, settings: DataFreeSettings) -> None:
    """Write layers.csv and report.json."""

    def write_layers(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, [f.name for f in fields(LayerReport)])
            table.writeheader()
            table.writerows(asdict(row) for row in result.layers)

    replace_file(folder / "layers.csv", write_layers)
    report = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()},
        "density": result.density,
        "error": result.error,
        "error_one_shot": result.error_one_shot,
        "versions": versions(),
    }
    replace_file(folder / "report.json", lambda path: path.write_text(json.dumps(report, indent=1), encoding="utf-8"))
