"""What somebody who prunes without data hands back, and what the client makes of it: a mask, and weights that obey it.

A folder holds `mask.json` (a plan without bits: which units of each layer stay, not which weights are zero) and
`weights.safetensors` (the pruned weights, by name). Nothing in them is executed.
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
from jpq.methods.structures import parse
from jpq.plan import MaskPlan, Plan
from jpq.tracing.network import Network
from jpq.tracing.sites import Site, masks
from jpq.types import JpqError, Units

MASK, WEIGHTS = "mask.json", "weights.safetensors"

SHOWN = 3  # layers that an error lists


@dataclass(frozen=True)
class ExternalMask:
    """A mask that was decided elsewhere, and where the weights that came with it lie."""

    plan: Plan
    source: Path
    weights: Path | None = None

    def sites(self, network: Network) -> tuple[Site, ...]:
        """A site for each layer that the mask is for.

        Raises JpqError, naming layers, where it is not for this network, keeps nothing of a layer, or keeps more of a
        row than its structure allows.
        """
        plan, every = self.plan, {layer.name: layer for layer in network.layers}
        strangers = [name for name in plan.masks if name not in every]
        if strangers:
            made = f" It was made for {plan.model['name']}." if "name" in plan.model else ""
            raise JpqError(
                f"The mask {self.source} is for {_some(strangers)}, which this model does not have.{made} "
                "Choose the --model that it was made for."
            )
        found: dict[str, Site] = {}
        unfit = []
        for name, text in plan.structures.items():
            parse(text)
            try:
                (found[name],) = masks(network, {name: text})
            except JpqError:
                unfit.append(f"{name} ({text})")
        self._refuse(unfit, "is of a structure that does not fit")
        wrong = [
            f"{name} (it has {mask.rows} x {mask.n} units, the layer {found[name].rows} x {found[name].n})"
            for name, mask in plan.masks.items()
            if (mask.rows, mask.n) != (found[name].rows, found[name].n)
        ]
        self._refuse(wrong, "has another shape than")
        units = {name: mask.units() for name, mask in plan.masks.items()}
        self._refuse([n for n, u in units.items() if not bool(u.any())], "keeps nothing in")
        for name, keep in units.items():
            structure = found[name].taps[0].structure
            quota = structure.quota()
            valid = structure.valid(Size(every[name].weight_shape))
            if quota is not None and int(keep.sum(1).max()) > quota:
                self._refuse([name], f"keeps more than the {quota} of each row that {plan.structures[name]} allows in")
            if valid is not None and bool((keep & ~valid).any()):
                self._refuse([name], "keeps units that stand for no weight in")
        return tuple(found[layer.name] for layer in network.layers if layer.name in plan.masks)

    def _refuse(self, layers: Sequence[str], what: str) -> None:
        if layers:
            raise JpqError(f"The mask {self.source} {what} {_some(layers)}. Ask for it anew, or choose another --mask.")

    def start(self, model: nn.Module, sites: Sequence[Site]) -> nn.Module:
        """A copy of `model` to begin with: with the weights that came with the mask, if any did, and masked.

        Ranges of quantizers are then fitted to what the masked network computes.
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
        """The same network, its gates holding this mask."""
        for gate, draw, keep in zip(net.gates, net.draws, self.units(net.sites), strict=True):
            gate.take(keep)
            draw.resample()
        return net

    def units(self, sites: Sequence[Site]) -> list[Units]:
        """`[rows, n]`, bool, for each site."""
        return [self.plan.masks[site.taps[0].layer].units() for site in sites]

    def require_same(self, state: Mapping[str, Tensor], sites: Sequence[Site]) -> None:
        """Raise JpqError where a checkpoint of the network (its state) holds another mask: the file has changed."""
        for i, (site, keep) in enumerate(zip(sites, self.units(sites), strict=True)):
            held = state.get(f"gates.{i}.kept")
            if held is not None and not torch.equal(held.bool(), keep):
                raise JpqError(
                    f"The mask {self.source} is no longer the one that this run began with: layer "
                    f"{site.taps[0].layer} keeps other units. Run without --resume."
                )

    def share_left(self, network: Network, sites: Sequence[Site]) -> dict[str, float]:
        """Cost -> share of it that the mask leaves."""
        left = {layer.name: float(layer.macs) for layer in network.layers}
        for site, keep in zip(sites, self.units(sites), strict=True):
            size = Size(network.layer(site.taps[0].layer).weight_shape)
            left[site.taps[0].layer] *= float(site.taps[0].structure.expand(keep.float(), size).expand(size).mean())
        share = sum(left.values()) / max(1, sum(layer.macs for layer in network.layers))
        regular = all(site.taps[0].structure.regular for site in sites)
        return {"bops": share, "bops-structured": share if regular else 1.0}

    @torch.no_grad()
    def obeyed(self, model: nn.Module, sites: Sequence[Site]) -> bool:
        """Whether the model's weights are zero already wherever the mask drops them."""
        pairs = [(model.get_submodule(s.taps[0].layer), s.taps[0].structure) for s in sites]
        masked: list[tuple[Any, Any, Units]] = [
            (layer, structure, keep) for (layer, structure), keep in zip(pairs, self.units(sites), strict=True)
        ]
        return all(not bool((m.weight * (1 - s.expand(k.to(m.weight), m.weight.shape))).any()) for m, s, k in masked)


def read(path: Path) -> ExternalMask:
    """A folder that `jpq prune-private` wrote, or a mask's file alone (`mask.json`, the `plan.json` of a run).

    Raises JpqError for what cannot be read, holds no mask, or drops whole channels.
    """
    if path.is_dir():
        missing = [name for name in (MASK, WEIGHTS) if not (path / name).is_file()]
        if missing:
            raise JpqError(
                f"--mask {path}: the folder has no {' and no '.join(missing)}. Give a folder that jpq "
                "prune-private wrote, or a mask's file alone."
            )
        return ExternalMask(_plan(path / MASK), path / MASK, path / WEIGHTS)
    if not path.is_file():
        raise JpqError(f"--mask {path}: there is no such file or folder.")
    return ExternalMask(_plan(path), path)


def _plan(path: Path) -> Plan:
    plan = plans.read(path)
    if any(not all(units) for units in plan.kept.values()):
        raise JpqError(f"{path} drops whole channels, and --mask holds masks inside layers only. Run its method again.")
    if not plan.masks:
        raise JpqError(f"{path} holds no mask: its method {plan.method} drops no weights inside layers.")
    return plan


def write(folder: Path, sites: Sequence[Site], kept: Sequence[Units], model: nn.Module, about: dict[str, Any]) -> None:
    """Put mask and weights into a folder that is there."""
    drops = {site.taps[0].layer: MaskPlan.of(keep) for site, keep in zip(sites, kept, strict=True)}
    structures = {site.taps[0].layer: site.taps[0].structure.spec() for site in sites}
    plan = Plan("prune-private", {}, {}, drops, structures, model=about)
    replace_file(folder / MASK, lambda path: path.write_text(plan.to_json()))
    tensors.save_tensors(model, folder / WEIGHTS)


def _some(names: Sequence[str]) -> str:
    """`layers a, b, c and 4 more`."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"layer{'s' if len(names) > 1 else ''} {', '.join(names[:SHOWN])}{more}"
