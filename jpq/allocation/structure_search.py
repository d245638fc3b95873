"""A structure for each layer: who chooses it in a run, and what the record of the choice looks like."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jpq.allocation.structure_rules import (
    Latency,
    cheapest_mapping,
    is_hard_task,
    kept_share,
    milliseconds,
    project,
    rules,
    source,
    timed,
    variants,
)
from jpq.compression.calibration import reestimate_batchnorm
from jpq.config import RULES, SEARCH
from jpq.files import untrusted
from jpq.files.atomic import replace_file
from jpq.methods.compatibility import is_allowed
from jpq.methods.structures import by_layer, parse
from jpq.methods.table import Method
from jpq.tasks.data import Batches, Data
from jpq.tracing.network import Network
from jpq.tracing.sites import weight_layout
from jpq.types import DENSE, JpqError, unknown

NAME = "schemes.json"

JUDGES = 512  # held-out samples that judge a mapping

SETTLE = 5  # training batches that BatchNorm's statistics are measured on after a projection

SHARE = 0.1  # of the training data, where mappings are trained before they are judged

Mapped = Mapping[str, str]  # layer -> structure

SAMPLES, LR, MU = 200, 0.1, 1.0
SLOW = 0.9  # of the baseline's moving average


def map_structures(
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
    fits = is_allowed(method)
    if method.structure == RULES:
        return rules(network, density, is_hard_task(network, example), legal=fits, skip=skip, latency=latency)
    if method.structure == SEARCH:
        return cheapest_mapping(network, density, legal=fits, skip=skip)
    given = by_layer(method.structure)
    for name in given:
        if name not in (known := [layer.name for layer in network.layers]):
            raise unknown("layer", name, known)
    return {layer.name: given.get(layer.name, DENSE) for layer in network.layers} if given else None


def search_mapping(
    method: Method,
    network: Network,
    model: nn.Module,
    data: Data,
    density: float,
    skip: Collection[str],
    *,
    trained: bool = False,
    lr: float = 1e-3,
    seed: int = 0,
    samples: int = SAMPLES,
    latency: Latency = timed,
) -> tuple[StructureSearchResult, float]:
    """(what the search found, its limit in ms): as fast as the rules' mapping, and as accurate as it gets.

    Args:
        model: the trained float model; it is not changed.
        data: the held-out split judges; the test split is not read.
        density: share of the weights that stays.
        trained: whether each mapping is trained for an epoch of a tenth of the data before it is judged.
        lr: of that training. seed, samples: of the search.
    """
    fits = is_allowed(method)
    start = rules(network, density, is_hard_task(network, data.example), legal=fits, skip=skip, latency=latency)
    limit = sum(milliseconds(network, start, density, latency).values())
    ms: dict[str, dict[str, float]] = {}
    for layer in network.layers:
        kinds = {DENSE: (DENSE,)} if layer.name in skip else variants(layer, fits)
        each = [structure for kind in kinds.values() for structure in kind]
        ms[layer.name] = {s: latency(layer, s, kept_share(layer, s, density)) for s in each}
    proxy = MappingEvaluator(network, model, data, density, trained=trained, lr=lr)
    return search_structures(ms, proxy, limit, start=start, seed=seed, samples=samples), limit


class MappingEvaluator:
    """Held-out accuracy of the float model once a mapping's units are zeroed, as a guess at what training makes of it.

    BatchNorm's statistics are measured anew on a few training batches: without that nearly every mapping is at chance.
    """

    def __init__(
        self, network: Network, model: nn.Module, data: Data, density: float, *, trained: bool = False, lr: float = 1e-3
    ):
        self.network, self.density, self.trained, self.lr = network, density, trained, lr
        self.task = data.task
        self.model = copy.deepcopy(model).eval()
        self.before = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.train = [batch for _, batch in zip(range(SETTLE), data.train.epoch(0), strict=False)]
        self.lesson = list(fixed_part(data.train, SHARE).epoch(0)) if trained else []
        self.judges = fixed_part(data.held_out, JUDGES / data.held_out.size)
        self.known: dict[tuple[str, str], Tensor] = {}  # (layer, structure) -> projected weight

    def __call__(self, mapping: Mapped) -> float:
        """In [0, 1]; the same for the same mapping, whatever was asked before."""
        self.model.load_state_dict(self.before)
        masked = {name: s for name, s in mapping.items() if s != DENSE}
        for name, structure in masked.items():
            self.weight(name).data.copy_(self.projected(name, structure))
        if self.trained:
            self.study(masked)
        reestimate_batchnorm(self.model, self.train)
        return self.task.evaluate(self.model, self.judges)

    def weight(self, name: str) -> Tensor:
        """Of a layer, as it stands."""
        return self.model.get_parameter(self.network.layer(name).weight)

    def projected(self, name: str, structure: str) -> Tensor:
        """The float model's weight with the weakest units zeroed."""
        if (name, structure) not in self.known:
            layer = self.network.layer(name)
            own = parse(structure, weight_layout(layer))
            self.known[name, structure] = project(self.before[layer.weight], own, self.density)
        return self.known[name, structure]

    def study(self, masked: Mapped) -> None:
        """One short epoch; what is masked stays zero."""
        self.model.train()
        optim = torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.0)
        zeros = {name: self.projected(name, s) == 0 for name, s in masked.items()}
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of dropout
            for x, y in self.lesson:
                optim.zero_grad()
                self.task.loss(self.model(x), y).backward()
                optim.step()
                for name, zero in zeros.items():
                    self.weight(name).data[zero] = 0
        self.model.eval()


def fixed_part(batches: Batches, share: float) -> Batches:
    """A fixed random part of the samples, not augmented and always in one order; all of them from a share of 1 on."""
    count = max(1, min(batches.size, round(share * batches.size)))
    which = torch.randperm(batches.size, generator=torch.Generator().manual_seed(0))[:count].to(batches.images.device)
    return Batches(
        batches.images[which],
        batches.labels[which],
        mean=batches.mean,
        std=batches.std,
        batch_size=batches.batch_size,
        seed=batches.seed,
    )


def mapping_record(network: Network, mapping: Mapped, density: float | Mapping[str, float], by: str) -> dict[str, Any]:
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


def save_mapping(path: Path, about: Mapping[str, Any]) -> None:
    """Keep a record, for the reader and for a run that is resumed."""
    replace_file(path, lambda part: part.write_text(json.dumps(about, indent=1) + "\n"))


def read_mapping(path: Path) -> dict[str, str]:
    """The mapping in a record. Raises JpqError where it is none."""
    try:
        layers = untrusted.as_dict(
            untrusted.as_dict(untrusted.parse_json(untrusted.read_text(path), str(path)))["layers"]
        )
        return {name: untrusted.as_str(untrusted.as_dict(layer)["structure"]) for name, layer in layers.items()}
    except (JpqError, ValueError, KeyError) as error:
        raise JpqError(f"{path} is not a mapping of schemes that jpq wrote; start anew without --resume.") from error


@dataclass(frozen=True)
class StructureSearchResult:
    """What a search ended with."""

    mapping: Mapping[str, str]
    reward: float
    accuracy: float  # as the proxy says, in [0, 1]
    ms: float
    logits: Mapping[str, Tensor]  # layer -> one for each of its choices
    judged: int  # different mappings


def reward(accuracy: float, ms: float, limit_ms: float, mu: float = MU) -> float:
    """R of the table: accuracy, less what it is slower than the limit."""
    return accuracy - mu * max(0.0, ms / limit_ms - 1)


def search_structures(
    ms: Mapping[str, Mapping[str, float]],
    accuracy: Callable[[Mapping[str, str]], float],
    limit_ms: float,
    *,
    start: Mapping[str, str] | None = None,
    samples: int = SAMPLES,
    lr: float = LR,
    mu: float = MU,
    seed: int = 0,
) -> StructureSearchResult:
    """The mapping of the best reward among the samples.

    Args:
        ms: layer -> its choices -> milliseconds.
        accuracy: mapping -> held-out accuracy in [0, 1]; asked once for each mapping.
        limit_ms: above it the whole network is penalised.
        start: a mapping that is judged before the samples.
        samples, lr, mu, seed: see above.

    Raises JpqError where a layer has no choice, or a number makes no sense.
    """
    if not samples >= 1 or not lr >= 0 or not mu >= 0 or not limit_ms > 0:
        asked = f"samples {samples}, lr {lr}, mu {mu}, limit {limit_ms} ms"
        raise JpqError(f"A search needs samples >= 1, lr >= 0, mu >= 0 and a limit above 0 ms, not {asked}.")
    if not ms or not all(ms.values()):
        raise JpqError("A search over schemes needs at least one choice for every layer.")
    draw = torch.Generator().manual_seed(seed)
    names = {layer: tuple(choices) for layer, choices in ms.items()}
    logits = {layer: torch.zeros(len(choices), dtype=torch.float64) for layer, choices in names.items()}
    known: dict[tuple[str, ...], tuple[float, float, float]] = {}  # mapping -> reward, accuracy, ms

    def judge(mapping: Mapping[str, str]) -> float:
        key = tuple(mapping[layer] for layer in names)
        if key not in known:
            total = sum(ms[layer][mapping[layer]] for layer in names)
            right = accuracy(mapping)
            known[key] = reward(right, total, limit_ms, mu), right, total
        return known[key][0]

    if start is not None:
        judge(start)
    mean, square = None, 0.0
    for t in range(1, samples + 1):
        picked = {x: int(torch.multinomial(theta.softmax(0), 1, generator=draw)) for x, theta in logits.items()}
        got = judge({layer: names[layer][i] for layer, i in picked.items()})
        mean = got if mean is None else SLOW * mean + (1 - SLOW) * got
        advantage = got - mean
        square = SLOW * square + (1 - SLOW) * advantage**2
        spread = (square / (1 - SLOW**t)) ** 0.5
        if spread > 0:
            for layer, i in picked.items():
                step = -logits[layer].softmax(0)
                step[i] += 1  # the gradient of log pi
                logits[layer] += lr * advantage / spread * step
    judge({layer: names[layer][int(theta.argmax())] for layer, theta in logits.items()})
    key, (best, right, total) = max(known.items(), key=lambda entry: entry[1][0])
    return StructureSearchResult(dict(zip(names, key, strict=True)), best, right, total, logits, len(known))
