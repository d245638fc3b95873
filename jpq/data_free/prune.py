"""`jpq prune-private`: the designer's half of privacy-preserving pruning, who has the trained model and no data.

1 model and weights - 2 random images - 3 trace, sites - 4 layer by layer (`layerwise_admm`) - 5 mask, weights, report.
The client's half is `jpq optimize --mask`, on her own data.

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
from jpq.compression.attach import refuse_tied
from jpq.data_free.layerwise_admm import AdmmSettings, Draw, LayerReport, frozen, prune
from jpq.data_free.settings import DataFreeSettings
from jpq.files.atomic import replace_file
from jpq.methods.gates.admm import Admm
from jpq.tasks import models
from jpq.tasks.data import IMAGENET, RECIPES
from jpq.tracing.decompose import decompose
from jpq.tracing.forward import call_model, tensors
from jpq.tracing.model_checks import require_wide
from jpq.tracing.network import Network
from jpq.tracing.sites import Site, masks
from jpq.tracing.trace import trace
from jpq.training.environment import pick_device, set_threads, versions
from jpq.types import JpqError, Units, unknown

Constants = tuple[Sequence[float], Sequence[float]]  # mean and deviation of each channel


@dataclass(frozen=True)
class DataFreeResult:
    """A model pruned without data: the weights lie on the structure, and `kept` says on which units."""

    model: nn.Module
    sites: tuple[Site, ...]
    kept: tuple[Units, ...]
    layers: tuple[LayerReport, ...]
    error: float  # of the whole model's output on new images, ||y - yhat|| / ||yhat||, norms as the images were matched
    error_one_shot: float  # the same, all layers projected without ADMM

    @property
    def density(self) -> float:
        """Share of the masked layers' weights that stays."""
        return sum(x.density * x.weights for x in self.layers) / sum(x.weights for x in self.layers)


def prune_private(settings: DataFreeSettings, note: Callable[[LayerReport], None] = lambda row: None) -> DataFreeResult:
    """Prune the trained model on random images, and write what goes back to the client.

    Raises JpqError for settings and files that cannot work.
    """
    s = settings.check()
    folder = s.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JpqError(f"Cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error
    device = pick_device(s.device)
    usual, usual_classes = models.usual(s.model) or (None, 1000)
    shape, classes = s.input_shape or usual, s.classes or usual_classes
    model = models.build(s.model, classes, shape[0] if shape else None).to(device).eval()
    if shape is None:
        raise JpqError(f"Say what {s.model} takes: --input-shape 3 224 224.")
    constants = normalisation(s.like, shape)
    assert s.weights is not None
    models.load_weights(model, s.weights)
    draw = noise(shape, constants, s.seed, device)
    models.check_runs(model, draw(2))
    model = decompose(model).eval()
    how = AdmmSettings(s.steps, s.rho, s.images, s.batch_size, s.lr, s.inputs == "matched", s.seed)
    done = pruned(model, draw, s.structure, s.share(), s.skip, how, note, s.threads)
    about = {"name": s.model, "classes": classes, "channels": shape[0]}
    external_mask.write(folder, done.sites, done.kept, done.model, about)
    _report(folder, done, s)
    return done


def pruned(
    model: nn.Module,
    draw: Draw,
    structure: str,
    density: float,
    skip: Sequence[str] = (),
    how: AdmmSettings | None = None,
    note: Callable[[LayerReport], None] = lambda row: None,
    threads: int = 0,
) -> DataFreeResult:
    """The same without files: `model` is trained, in floating point, and taken apart (`jpq.decompose`) already.

    Args:
        draw: so many new images, normalised as the model expects.
        structure: where zeros may lie, as `--structure` says it.
        density: share that stays in each layer: of the kernels, for patterns; of the weights, for other structures.
        skip: layers that stay dense.
    """
    how = how or AdmmSettings()
    require_wide(model)
    network = trace(model, draw(2))
    set_threads(threads, sum(layer.macs for layer in network.layers) * how.batch_size)
    sites = sites_of(network, structure, skip)
    for site in sites:
        refuse_tied(model, network.layer(site.taps[0].layer))
    device = next(model.parameters()).device
    gates, others = ([gate_of(network, x, density, how).to(device) for x in sites] for _ in range(2))
    rows: list[LayerReport] = []

    def noted(row: LayerReport) -> None:
        rows.append(row)
        note(row)

    small = prune(model, sites, gates, draw, how, noted)
    crude = one_shot(model, sites, others)
    dense, x = frozen(model, draw, how), draw(how.batch_size)
    errors = [_apart(dense, _with_weights(dense, other, sites), x) for other in (small, crude)]
    return DataFreeResult(small, sites, tuple(gate.keep() for gate in gates), tuple(rows), *errors)


@torch.no_grad()
def one_shot(model: nn.Module, sites: Sequence[Site], gates: Sequence[Admm]) -> nn.Module:
    """A copy of `model`, its dense weights projected at once: magnitude pruning on the same structure."""
    model = copy.deepcopy(model)
    for site, gate in zip(sites, gates, strict=True):
        layer: Any = model.get_submodule(site.taps[0].layer)
        gate.observe_weights([(layer.weight.detach().clone(), site.taps[0].structure)])
        layer.weight.data.copy_(gate.near(0))
    return model


def sites_of(network: Network, structure: str, skip: Sequence[str]) -> tuple[Site, ...]:
    """Masks inside layers; patterns leave depthwise layers alone, whose kernels are all that a channel has."""
    alone = [layer.name for layer in network.layers if layer.depthwise]
    return masks(network, structure, [*skip, *(alone if structure.startswith("pattern") else [])])


def gate_of(network: Network, site: Site, density: float, how: AdmmSettings) -> Admm:
    """A gate that keeps so much of one layer; where patterns are chosen, of its kernels (all, if it reads images)."""
    layer, structure = network.layer(site.taps[0].layer), site.taps[0].structure
    connected = 1.0 if structure.partition or layer.reads_input else density
    gate = Admm(site.rows, site.n, density, how.rhos, connected)
    gate.set_site(structure.sizes(torch.Size(layer.weight_shape)), structure.quota())
    return gate


def noise(shape: Sequence[int], constants: Constants, seed: int, device: torch.device) -> Draw:
    """Images of independent pixels, uniform on 0 to 255, normalised with a mean and a deviation per channel."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(c).view(-1, *[1] * (len(shape) - 1)) for c in constants)

    def draw(count: int) -> Tensor:
        pixels = torch.randint(256, (count, *shape), generator=generator)
        return ((pixels / 255 - mean) / std).to(device)

    return draw


def normalisation(like: str, shape: Sequence[int]) -> Constants:
    """Mean and deviation of each channel. Raises JpqError for an unknown name, and for another number of channels."""
    known: dict[str, Constants] = {"imagenet": IMAGENET, **{n: (r.mean, r.std) for n, r in RECIPES.items()}}
    if like and like not in known:
        raise unknown("data set in --like", like, known)
    plain = ((0.0,) * shape[0], (1.0,) * shape[0])
    found = known[like] if like else IMAGENET if shape[0] == 3 else plain
    if len(found[0]) != shape[0]:
        raise JpqError(f"--like {like} has {len(found[0])} channels, and the model's input has {shape[0]}.")
    return found


@torch.no_grad()
def _with_weights(dense: nn.Module, other: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """A copy of `dense` with the masked layers' weights of `other`."""
    model = copy.deepcopy(dense)
    for site in sites:
        ours, theirs = (m.get_submodule(site.taps[0].layer) for m in (model, other))
        ours.load_state_dict(theirs.state_dict())
    return model


@torch.no_grad()
def _apart(dense: nn.Module, other: nn.Module, x: Tensor) -> float:
    """||y - yhat|| / ||yhat|| over all outputs."""
    pairs = list(zip(tensors(call_model(other, x)), tensors(call_model(dense, x)), strict=True))
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((apart / max(1e-30, sum(float(b.square().sum()) for _, b in pairs))) ** 0.5)


def _report(folder: Path, done: DataFreeResult, settings: DataFreeSettings) -> None:
    """layers.csv and report.json."""

    def lines(path: Path) -> None:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, [f.name for f in fields(LayerReport)])
            table.writeheader()
            table.writerows(asdict(row) for row in done.layers)

    replace_file(folder / "layers.csv", lines)
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
    tree = {
        "settings": plain,
        "density": done.density,
        "error": done.error,
        "error_one_shot": done.error_one_shot,
        "versions": versions(),
    }
    replace_file(folder / "report.json", lambda path: path.write_text(json.dumps(tree, indent=1)))
