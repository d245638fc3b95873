"""A structure for each layer: who chooses it in a run, and what the record of the choice looks like."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jpq import foreign
from jpq.allocators.scheme_search import SAMPLES, Found, search
from jpq.allocators.schemes import Latency, frugal, hard, milliseconds, project, rules, source, stays, timed, variants
from jpq.compose import RULES, SEARCH, legal
from jpq.data import Batches, Data
from jpq.files import replace_file
from jpq.methods import Method
from jpq.network.record import Network
from jpq.network.sites import layout
from jpq.structures import by_layer, parse
from jpq.train import evaluate, optimizer, reestimate
from jpq.types import DENSE, JpqError, unknown

NAME = "schemes.json"
JUDGES = 512  # held-out samples that judge a mapping
SETTLE = 5  # training batches that BatchNorm's statistics are measured on after a projection
SHARE = 0.1  # of the training data, where mappings are trained before they are judged

Mapped = Mapping[str, str]  # layer -> structure


def mapped(
    method: Method,
    network: Network,
    example: Any,
    density: float,
    skip: Collection[str] = (),
    latency: Latency = timed,
) -> dict[str, str] | None:
    """{layer: structure} where the method's structure says so layer by layer; None where all layers have the same.

    Before a search the mapping is the cheapest there is, to tell whether a target is possible. Raises JpqError for a
    layer that the model does not have.
    """
    fits = legal(method)
    if method.structure == RULES:
        return rules(network, density, hard(network, example), legal=fits, skip=skip, latency=latency)
    if method.structure == SEARCH:
        return frugal(network, density, legal=fits, skip=skip)
    given = by_layer(method.structure)
    for name in given:
        if name not in (known := [layer.name for layer in network.layers]):
            raise unknown("layer", name, known)
    return {layer.name: given.get(layer.name, DENSE) for layer in network.layers} if given else None


def searched(
    method: Method, network: Network, model: nn.Module, data: Data, density: float, skip: Collection[str], *,
    trained: bool = False, lr: float = 1e-3, seed: int = 0, samples: int = SAMPLES, latency: Latency = timed,
) -> tuple[Found, float]:  # fmt: skip
    """(what the search found, its limit in ms): as fast as the rules' mapping, and as accurate as it gets.

    Args:
        model: the trained float model; it is not changed.
        data: the held-out split judges; the test split is not read.
        density: share of the weights that stays.
        trained: whether each mapping is trained for an epoch of a tenth of the data before it is judged.
        lr: of that training. seed, samples: of the search.
    """
    fits = legal(method)
    start = rules(network, density, hard(network, data.example), legal=fits, skip=skip, latency=latency)
    limit = sum(milliseconds(network, start, density, latency).values())
    ms: dict[str, dict[str, float]] = {}
    for layer in network.layers:
        kinds = {DENSE: (DENSE,)} if layer.name in skip else variants(layer, fits)
        each = [structure for kind in kinds.values() for structure in kind]
        ms[layer.name] = {s: latency(layer, s, stays(layer, s, density)) for s in each}
    proxy = Proxy(network, model, data, density, trained=trained, lr=lr)
    return search(ms, proxy, limit, start=start, seed=seed, samples=samples), limit


class Proxy:
    """Held-out accuracy of the float model once a mapping's units are zeroed, as a guess at what training makes of it.

    BatchNorm's statistics are measured anew on a few training batches: without that nearly every mapping is at chance.
    """

    def __init__(
        self, network: Network, model: nn.Module, data: Data, density: float, *, trained: bool = False, lr: float = 1e-3
    ):
        self.network, self.density, self.trained, self.lr = network, density, trained, lr
        self.model = copy.deepcopy(model).eval()
        self.before = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.train = [batch for _, batch in zip(range(SETTLE), data.train.epoch(0), strict=False)]
        self.lesson = list(part(data.train, SHARE).epoch(0)) if trained else []
        self.judges = part(data.held_out, JUDGES / data.held_out.size)
        self.known: dict[tuple[str, str], Tensor] = {}  # (layer, structure) -> projected weight

    def __call__(self, mapping: Mapped) -> float:
        """In [0, 1]; the same for the same mapping, whatever was asked before."""
        self.model.load_state_dict(self.before)
        masked = {name: s for name, s in mapping.items() if s != DENSE}
        for name, structure in masked.items():
            self.weight(name).data.copy_(self.projected(name, structure))
        if self.trained:
            self.study(masked)
        reestimate(self.model, self.train)
        return evaluate(self.model, self.judges)

    def weight(self, name: str) -> Tensor:
        """Of a layer, as it stands."""
        return self.model.get_parameter(self.network.layer(name).weight)

    def projected(self, name: str, structure: str) -> Tensor:
        """The float model's weight with the weakest units zeroed."""
        if (name, structure) not in self.known:
            layer = self.network.layer(name)
            own = parse(structure, layout(layer))
            self.known[name, structure] = project(self.before[layer.weight], own, self.density)
        return self.known[name, structure]

    def study(self, masked: Mapped) -> None:
        """One short epoch; what is masked stays zero."""
        self.model.train()
        optim = optimizer(self.model, self.lr, 0.0)
        zeros = {name: self.projected(name, s) == 0 for name, s in masked.items()}
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of dropout
            for x, y in self.lesson:
                optim.zero_grad()
                nn.functional.cross_entropy(self.model(x), y).backward()
                optim.step()
                for name, zero in zeros.items():
                    self.weight(name).data[zero] = 0
        self.model.eval()


def part(batches: Batches, share: float) -> Batches:
    """A fixed random part of the samples, not augmented and always in one order; all of them from a share of 1 on."""
    count = max(1, min(batches.size, round(share * batches.size)))
    which = torch.randperm(batches.size, generator=torch.Generator().manual_seed(0))[:count].to(batches.images.device)
    return Batches(
        batches.images[which], batches.labels[which], mean=batches.mean, std=batches.std,
        batch_size=batches.batch_size, seed=batches.seed,
    )  # fmt: skip


def record(network: Network, mapping: Mapped, density: float | Mapping[str, float], by: str) -> dict[str, Any]:
    """What a report says of a mapping: every layer's structure, its milliseconds, and where those are from."""
    ms = milliseconds(network, mapping, density)
    dense = milliseconds(network, {}, 1.0)
    return {
        "by": by,
        "latency": source(network, mapping),
        "ms": sum(ms.values()),
        "dense_ms": sum(dense.values()),
        "layers": {name: {"structure": mapping.get(name, DENSE), "ms": ms[name]} for name in ms},
    }


def save(path: Path, about: Mapping[str, Any]) -> None:
    """Keep a record, for the reader and for a run that is resumed."""
    replace_file(path, lambda part: part.write_text(json.dumps(about, indent=1) + "\n"))


def read(path: Path) -> dict[str, str]:
    """The mapping in a record. Raises JpqError where it is none."""
    try:
        layers = foreign.table(foreign.table(foreign.tree_of(foreign.text_of(path), str(path)))["layers"])
        return {name: foreign.text(foreign.table(layer)["structure"]) for name, layer in layers.items()}
    except (JpqError, ValueError, KeyError) as error:
        raise JpqError(f"{path} is not a mapping of schemes that jpq wrote; start anew without --resume.") from error
