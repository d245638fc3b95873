"""A mask decided elsewhere (`--mask`), by `jpq prune-private` or another run: its files, and holding it in training.

A folder of `jpq prune-private` has `mask.json` (a plan without bits: the kept units of each layer, not its zero
weights) and `weights.safetensors` (the pruned weights, by name). Nothing in them is executed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from jpq import plan as plans
from jpq.compression.model import CompressedModel
from jpq.files import tensors
from jpq.files.atomic import replace_file
from jpq.files.paths import find_run
from jpq.methods.structures import parse_structure
from jpq.plan import MaskPlan, Plan
from jpq.tracing.network import Network
from jpq.tracing.sites import Site, masks
from jpq.types import JpqError, Units

MASK, WEIGHTS = "mask.json", "weights.safetensors"  # files of a folder

SHOWN_LAYERS = 3  # number of layers that an error lists


@dataclass(frozen=True)
class ExternalMask:
    """A mask that was decided elsewhere, and the pruned weights that came with it."""

    plan: Plan
    source: Path  # file of the mask
    weights: Path | None = None  # file of the pruned weights

    def sites(self, network: Network) -> tuple[Site, ...]:
        """A mask site for each layer that the mask has units of.

        Raises JpqError, naming layers, where it is for another network, keeps nothing of a layer, or keeps more of a
        row than its structure allows.
        """
        plan, layers = self.plan, {layer.name: layer for layer in network.layers}
        unknown = [name for name in plan.masks if name not in layers]
        if unknown:
            origin = f" It was made for {plan.model['name']}." if "name" in plan.model else ""
            raise JpqError(
                f"The mask {self.source} is for {_listed(unknown)}, which this model does not have.{origin} "
                "Choose the --model that it was made for."
            )
        sites: dict[str, Site] = {}
        unfit = []
        for name, text in plan.structures.items():
            parse_structure(text)
            try:
                (sites[name],) = masks(network, {name: text})
            except JpqError:
                unfit.append(f"{name} ({text})")
        self._refuse(unfit, "is of a structure that does not fit")
        wrong = [
            f"{name} (it has {mask.rows} x {mask.n} units, the layer {sites[name].rows} x {sites[name].n})"
            for name, mask in plan.masks.items()
            if (mask.rows, mask.n) != (sites[name].rows, sites[name].n)
        ]
        self._refuse(wrong, "has another shape than")
        units = {name: mask.units() for name, mask in plan.masks.items()}
        self._refuse([n for n, u in units.items() if not bool(u.any())], "keeps nothing in")
        for name, keep in units.items():
            structure = sites[name].taps[0].structure
            quota = structure.quota()
            valid = structure.valid(Size(layers[name].weight_shape))
            if quota is not None and int(keep.sum(1).max()) > quota:
                self._refuse([name], f"keeps more than the {quota} of each row that {plan.structures[name]} allows in")
            if valid is not None and bool((keep & ~valid).any()):
                self._refuse([name], "keeps units that stand for no weight in")
        return tuple(sites[layer.name] for layer in network.layers if layer.name in plan.masks)

    def _refuse(self, layers: Sequence[str], fault: str) -> None:
        """Raise JpqError where any layers have this fault."""
        if layers:
            raise JpqError(
                f"The mask {self.source} {fault} {_listed(layers)}. Ask for it anew, or choose another --mask."
            )

    def start(self, model: nn.Module, sites: Sequence[Site]) -> nn.Module:
        """A masked copy of `model`, with the weights that came with the mask if there are any.

        Ranges of quantizers are then fitted to the activations of the masked network.
        """
        model = copy.deepcopy(model)
        if self.weights is not None:
            tensors.load_tensors(model, self.weights)
        for site, keep in zip(sites, self.units(sites), strict=True):
            layer: Any = model.get_submodule(site.taps[0].layer)
            weight = layer.weight.data
            weight.mul_(site.taps[0].structure.expand(keep.to(weight), weight.shape))
        return model

    def put(self, net: CompressedModel) -> CompressedModel:
        """The model `net` with this mask in its gates."""
        for gate, draw, keep in zip(net.gates, net.draws, self.units(net.sites), strict=True):
            gate.take(keep)
            draw.resample()
        return net

    def units(self, sites: Sequence[Site]) -> list[Units]:
        """The kept units of each site, `[rows, n]`, bool."""
        return [self.plan.masks[site.taps[0].layer].units() for site in sites]

    def check_same(self, state: Mapping[str, Tensor], sites: Sequence[Site]) -> None:
        """Raise JpqError where the state of a checkpoint holds another mask: the file has changed since."""
        for i, (site, keep) in enumerate(zip(sites, self.units(sites), strict=True)):
            saved = state.get(f"gates.{i}.kept")
            if saved is not None and not torch.equal(saved.bool(), keep):
                raise JpqError(
                    f"The mask {self.source} is no longer the one that this run began with: layer "
                    f"{site.taps[0].layer} keeps other units. Run without --resume."
                )

    def share_left(self, network: Network, sites: Sequence[Site]) -> dict[str, float]:
        """Cost -> share of it that remains under the mask."""
        left = {layer.name: float(layer.macs) for layer in network.layers}
        for site, keep in zip(sites, self.units(sites), strict=True):
            size = Size(network.layer(site.taps[0].layer).weight_shape)
            left[site.taps[0].layer] *= float(site.taps[0].structure.expand(keep.float(), size).expand(size).mean())
        share = sum(left.values()) / max(1, sum(layer.macs for layer in network.layers))
        regular = all(site.taps[0].structure.regular for site in sites)
        return {"bops": share, "bops-structured": share if regular else 1.0}

    @torch.no_grad()
    def is_held_by(self, model: nn.Module, sites: Sequence[Site]) -> bool:
        """Whether the model's weights are zero wherever the mask drops them."""
        pairs = [(model.get_submodule(s.taps[0].layer), s.taps[0].structure) for s in sites]
        masked: list[tuple[Any, Any, Units]] = [
            (layer, structure, keep) for (layer, structure), keep in zip(pairs, self.units(sites), strict=True)
        ]
        return all(not bool((m.weight * (1 - s.expand(k.to(m.weight), m.weight.shape))).any()) for m, s, k in masked)


def read(path: str | Path) -> ExternalMask:
    """The mask in a folder of `jpq prune-private`, or in a file (`mask.json`, the `plan.json` of a run).

    Raises JpqError for what cannot be read, holds no mask, or drops whole channels.
    """
    path = find_run(path)
    if path.is_dir():
        missing = [name for name in (MASK, WEIGHTS) if not (path / name).is_file()]
        if missing:
            raise JpqError(
                f"--mask {path}: the folder has no {' and no '.join(missing)}. Give a folder that jpq "
                "prune-private wrote, or a mask's file alone."
            )
        return ExternalMask(_read_plan(path / MASK), path / MASK, path / WEIGHTS)
    if not path.is_file():
        raise JpqError(f"--mask {path}: there is no such file or folder.")
    return ExternalMask(_read_plan(path), path)


def _read_plan(path: Path) -> Plan:
    plan = plans.read(path)
    if any(not all(units) for units in plan.kept.values()):
        raise JpqError(f"{path} drops whole channels, and --mask holds masks inside layers only. Run its method again.")
    if not plan.masks:
        raise JpqError(f"{path} holds no mask: its method {plan.method} drops no weights inside layers.")
    return plan


def write(
    folder: Path, sites: Sequence[Site], kept: Sequence[Units], model: nn.Module, model_info: dict[str, Any]
) -> None:
    """Write mask and weights into an existing folder; `model_info`: how to build the dense model."""
    masks_by_layer = {site.taps[0].layer: MaskPlan.of(keep) for site, keep in zip(sites, kept, strict=True)}
    structures = {site.taps[0].layer: site.taps[0].structure.spec() for site in sites}
    plan = Plan("prune-private", {}, {}, masks_by_layer, structures, model=model_info)
    replace_file(folder / MASK, lambda path: path.write_text(plan.to_json(), encoding="utf-8"))
    tensors.save_tensors(model, folder / WEIGHTS)


def _listed(names: Sequence[str]) -> str:
    """`layers a, b, c and 4 more`."""
    more = f" and {len(names) - SHOWN_LAYERS} more" if len(names) > SHOWN_LAYERS else ""
    return f"layer{'s' if len(names) > 1 else ''} {', '.join(names[:SHOWN_LAYERS])}{more}"
